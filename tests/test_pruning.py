from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.artifacts import MANIFEST_SCHEMA, MARGINS_SCHEMA, write_table
from pipeline.manifest import check_norm, prune
from pipeline.params import InputError
from pipeline.pruning import Strategy, quotas

EPS = 8 / 255


def margin_table(n: int = 300, seed: int = 0, num_classes: int = 4, ties: bool = True) -> pa.Table:
    """Random margins with many ties, some negative, some missing; the first third of the rows is real."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, n)
    margin = rng.normal(0.5 * EPS, EPS, n)
    margin = np.round(margin, 3) if ties else margin
    converged = rng.random(n) > 0.05
    predicted = np.where(margin < 0, (label + 1) % num_classes, label)
    num_real = n // 3
    columns = {
        "source": pa.array(["real"] * num_real + ["synthetic"] * (n - num_real)).cast(MARGINS_SCHEMA.field("source").type),
        "row": np.r_[np.arange(num_real), np.arange(n - num_real)],
        "label": label.astype(np.int16),
        "predicted": predicted.astype(np.int16),
        "margin": pa.array(margin.astype(np.float32), mask=~converged),
        "nearest": pa.array(predicted.astype(np.int16), mask=~converged),
        "iterations": np.ones(n, np.int16),
        "converged": converged,
        **{name: rng.random(n).astype(np.float32) for name in ("confidence", "entropy", "logit_margin", "el2n", "grand")},
    }
    return pa.table(columns, schema=MARGINS_SCHEMA)


def strategy(**fields: Any) -> Strategy:
    return Strategy.model_validate(fields)


def columns_of(manifest: pa.Table) -> dict[str, np.ndarray]:
    frame = manifest.to_pandas()
    return {name: frame[name].to_numpy() for name in frame}


ALL = [
    strategy(),
    strategy(score="random", keep=0.7),
    strategy(score="margin", keep=0.7),
    strategy(score="margin", prune="lowest", keep=0.7),
    strategy(score="margin", prune="both", keep=0.7, per_class=True),
    strategy(score="margin", keep=0.7, eps={"rule": "margin"}),
    strategy(eps={"rule": "margin"}),
    strategy(score="random", keep=0.3, budget="scaled"),
    *(strategy(score=name, keep=0.5) for name in ("logit_margin", "confidence")),
    *(strategy(score=name, prune="lowest", keep=0.5, applies_to="synthetic") for name in ("entropy", "el2n", "grand")),
]


@pytest.mark.parametrize("chosen", ALL, ids=lambda s: f"{s.score}-{s.prune}-{s.eps.rule}-{s.budget}")
def test_every_strategy_gives_a_partition_in_the_order_of_the_table_with_eps_in_range(chosen: Strategy) -> None:
    margins = margin_table()
    manifest, summary = prune(margins, chosen, EPS)
    assert manifest.schema.equals(MANIFEST_SCHEMA)
    assert manifest["row"].equals(margins["row"])
    found = columns_of(manifest)
    assert np.array_equal(found["kept"], found["reason"] == "kept")
    assert np.array_equal(np.isnan(found["eps"].astype(float)), ~found["kept"])
    eps = found["eps"][found["kept"]]
    assert eps.min() >= 0
    assert eps.max() <= np.float32(EPS)
    assert summary["steps_share"] == (summary["fraction_kept"] if chosen.budget == "scaled" else 1)
    assert summary["kept"] == found["kept"].sum() == summary["reasons"]["kept"]
    assert sum(summary["reasons"].values()) == summary["total"] == len(margins)
    assert manifest.equals(prune(margins, chosen, EPS)[0])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(3, 80), keep=st.floats(0.2, 1.0), seed=st.integers(0, 99), per_class=st.booleans())
def test_the_kept_count_is_exactly_the_rounded_share(n: int, keep: float, seed: int, per_class: bool) -> None:
    manifest, _ = prune(margin_table(n, seed), strategy(score="confidence", keep=keep, per_class=per_class), EPS)
    assert manifest["kept"].to_numpy().sum() == round(keep * n)


def test_quotas_follow_the_largest_remainder() -> None:
    # 0.5 * (3, 5, 4) = 1.5, 2.5, 2: six in all, five floors, the first of the equal remainders gets the sixth.
    assert quotas(np.array([3, 5, 4]), 0.5).tolist() == [2, 2, 2]
    assert quotas(np.array([10, 20, 70]), 0.33).tolist() == [3, 7, 23]


@pytest.mark.parametrize(("end", "sign"), [("highest", 1), ("lowest", -1)])
def test_what_is_pruned_equals_a_full_sort(end: str, sign: int) -> None:
    margins = margin_table(ties=False)
    found = columns_of(prune(margins, strategy(score="margin", prune=end, keep=0.6), EPS)[0])
    margin = margins["margin"].to_numpy()
    known = np.flatnonzero(~np.isnan(margin))
    order = known[np.argsort(sign * margin[known])]
    assert set(np.flatnonzero(found["kept"])) == set(order[: round(0.6 * 300)])
    pruned = np.setdiff1d(known, np.flatnonzero(found["kept"]))
    assert set(found["reason"][pruned]) == {"high_margin" if sign == 1 else "low_margin"}
    assert set(found["reason"][np.isnan(margin)]) == {"not_converged"}


def test_a_hand_worked_puma_manifest() -> None:
    margins = margin_table(6).slice(0, 6)
    values = [0.5 * EPS, 3 * EPS, -EPS, 0.25 * EPS, 2 * EPS, None]
    margins = margins.set_column(4, "margin", pa.array(values, pa.float32()))
    margins = margins.set_column(7, MARGINS_SCHEMA.field("converged"), pa.array([v is not None for v in values]))
    found = columns_of(prune(margins, strategy(score="margin", keep=0.67, eps={"rule": "margin"}), EPS)[0])
    assert found["reason"].tolist() == ["kept", "high_margin", "kept", "kept", "kept", "not_converged"]
    expected = [0.5 * EPS, np.nan, 0, 0.25 * EPS, EPS, np.nan]
    np.testing.assert_allclose(found["eps"].astype(float), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"rule": "constant"}, [1, 1, 1, 1]),
        ({"rule": "margin", "scale": 0.5}, [0, 0.25, 0.5, 1]),
        ({"rule": "floor", "min_eps_255": 4}, [0.5, 0.5, 1, 1]),
        ({"rule": "quantile", "q": 0.5}, [0, 0.5, 1, 1]),
        ({"rule": "rank", "q": 1.0}, [0, 1 / 3, 2 / 3, 1]),
        ({"rule": "rank", "q": 0.5}, [0, 2 / 3, 1, 1]),
    ],
)
def test_each_eps_rule_equals_its_formula(rule: dict[str, Any], expected: list[float]) -> None:
    margins = margin_table(4)
    margins = margins.set_column(4, "margin", pa.array(np.array([-1, 0.5, 1, 9]) * EPS, pa.float32()))
    margins = margins.set_column(7, MARGINS_SCHEMA.field("converged"), pa.array([True] * 4))
    found = columns_of(prune(margins, strategy(eps=rule), EPS)[0])
    np.testing.assert_allclose(found["eps"].astype(float) / EPS, expected, atol=1e-6)


def test_puma_eps_grows_with_the_margin() -> None:
    margins = margin_table()
    found = columns_of(prune(margins, strategy(score="margin", keep=0.7, eps={"rule": "margin"}), EPS)[0])
    order = np.argsort(margins["margin"].to_numpy()[found["kept"]])
    assert np.all(np.diff(found["eps"][found["kept"]].astype(float)[order]) >= 0)


def test_rows_without_a_margin_are_never_kept_by_accident() -> None:
    margins = margin_table()
    unknown = ~margins["converged"].to_numpy()
    for prune_end in ("highest", "lowest", "both"):
        dropped = columns_of(prune(margins, strategy(score="margin", prune=prune_end, keep=0.9), EPS)[0])
        assert not dropped["kept"][unknown].any()
        held = strategy(score="margin", prune=prune_end, keep=0.5, not_converged="keep", eps={"rule": "margin"})
        kept = columns_of(prune(margins, held, EPS)[0])
        assert kept["kept"][unknown].all()
        np.testing.assert_allclose(kept["eps"][unknown].astype(float), EPS, rtol=1e-6)
        assert kept["kept"].sum() == 150


def test_misclassified_rows_are_dropped_on_demand_and_otherwise_have_eps_0_under_puma() -> None:
    margins = margin_table()
    wrong = (margins["label"].to_numpy() != margins["predicted"].to_numpy()) & margins["converged"].to_numpy()
    dropped = columns_of(prune(margins, strategy(misclassified="drop"), EPS)[0])
    assert set(dropped["reason"][wrong]) == {"misclassified"}
    kept = columns_of(prune(margins, strategy(eps={"rule": "margin"}), EPS)[0])
    assert np.all(kept["eps"][wrong] == 0)


def test_synthetic_only_leaves_real_rows_alone() -> None:
    margins = margin_table()
    fields: dict[str, Any] = {"score": "margin", "keep": 0.5, "applies_to": "synthetic", "eps": {"rule": "margin"}}
    found = columns_of(prune(margins, strategy(**fields), EPS)[0])
    real = found["source"] == "real"
    assert found["kept"][real].all()
    np.testing.assert_allclose(found["eps"][real].astype(float), EPS, rtol=1e-6)
    assert found["kept"][~real].sum() == 100


def test_two_strategies_with_one_seed_share_their_random_rows_and_another_seed_draws_others() -> None:
    margins = margin_table()

    def kept(**fields: Any) -> set[int]:
        manifest = prune(margins, strategy(score="random", **fields), EPS)[0]
        return set(np.flatnonzero(manifest["kept"].to_numpy()))

    assert kept(keep=0.3) < kept(keep=0.6)
    assert kept(keep=0.3) != kept(keep=0.3, seed=1)


def test_a_missing_score_and_an_empty_result_are_clear_errors() -> None:
    margins = margin_table()
    index = margins.schema.get_field_index("grand")
    without = margins.set_column(index, MARGINS_SCHEMA.field("grand"), pa.nulls(300, pa.float32()))
    with pytest.raises(InputError, match="set margins.grand: true"):
        prune(without, strategy(score="grand", keep=0.5), EPS)
    with pytest.raises(InputError, match="keeps none of 300 rows; raise keep"):
        prune(margins, strategy(score="random", keep=0.001), EPS)


@pytest.mark.parametrize(
    ("rule", "refused"),
    [
        ({"rule": "constant"}, False),
        ({"rule": "rank", "q": 0.5}, False),
        ({"rule": "margin"}, True),
        ({"rule": "floor", "min_eps_255": 1}, True),
        ({"rule": "quantile", "q": 0.5}, True),
    ],
)
def test_margins_in_one_norm_set_no_radius_in_another(tmp_path: Path, rule: dict[str, Any], refused: bool) -> None:
    write_table(tmp_path / "part-00000.parquet", margin_table(), {"norm": "l2"})
    check_norm(tmp_path, strategy(eps=rule), "l2")
    with pytest.raises(InputError, match="wanted margins in linf.*got l2") if refused else nullcontext():
        check_norm(tmp_path, strategy(eps=rule), "linf")


def test_a_share_without_a_score_is_refused() -> None:
    with pytest.raises(ValidationError, match="keep: wanted 1 without a score.*got 0.5"):
        Strategy(keep=0.5)
