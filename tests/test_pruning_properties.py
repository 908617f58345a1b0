"""What holds for every strategy and every margin table."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline import artifacts, selection
from pipeline.artifacts import MANIFEST_SCHEMA, MARGINS_SCHEMA, read_json, read_table, write_table
from pipeline.manifest import prune, write_manifest
from pipeline.params import InputError
from pipeline.pruning import Strategy
from tests.conftest import ROOT
from tests.test_pruning import margin_table

EPS = 8 / 255
SCORES = ["random", "margin", "confidence", "entropy", "logit_margin", "el2n", "grand"]
RULES: list[dict[str, Any]] = [
    {"rule": "constant"},
    {"rule": "margin", "scale": 1.0},
    {"rule": "margin", "scale": 0.3},
    {"rule": "floor", "min_eps_255": 2.0},
    {"rule": "quantile", "q": 0.4},
    {"rule": "rank", "q": 0.6},
]
Columns = dict[str, np.ndarray]


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Small margin tables with many ties, missing margins, and classes and sources that may be empty."""
    n, num_real = draw(st.integers(1, 40)), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_real = min(n, num_real)
    label = rng.integers(0, 3, n).astype(np.int16)
    margin = (rng.integers(-3, 6, n) * EPS / 2).astype(np.float32)
    converged = rng.random(n) < draw(st.sampled_from([1.0, 0.8, 0.0]))
    predicted = np.where(margin < 0, (label + 1) % 3, label).astype(np.int16)
    scores = {name: (rng.integers(0, 4, n) / 4).astype(np.float32) for name in SCORES[2:]}
    return pa.table(
        {
            "source": pa.array(["real"] * num_real + ["synthetic"] * (n - num_real)).cast(MARGINS_SCHEMA.field("source").type),
            "row": np.r_[np.arange(num_real), np.arange(n - num_real)],
            "label": label,
            "predicted": predicted,
            "margin": pa.array(margin, mask=~converged),
            "nearest": pa.array(predicted, mask=~converged),
            "iterations": np.ones(n, np.int16),
            "converged": converged,
            **scores,
        },
        schema=MARGINS_SCHEMA,
    )


strategies = st.builds(
    lambda **fields: Strategy.model_validate(fields if fields["score"] else fields | {"keep": 1.0}),
    score=st.sampled_from([None, *SCORES]),
    prune=st.sampled_from(["highest", "lowest", "both"]),
    keep=st.floats(0.05, 1.0),
    eps=st.sampled_from(RULES),
    per_class=st.booleans(),
    applies_to=st.sampled_from(["all", "synthetic"]),
    misclassified=st.sampled_from(["keep", "drop"]),
    not_converged=st.sampled_from(["keep", "drop"]),
    seed=st.integers(0, 3),
)


def columns_of(table: pa.Table) -> Columns:
    frame = table.to_pandas()
    return {name: frame[name].to_numpy() for name in frame}


def pruned(table: pa.Table, strategy: Strategy) -> Columns:
    try:
        manifest, _ = prune(table, strategy, EPS)
    except InputError:  # nothing is kept: said by its own test
        assume(False)
        raise
    return columns_of(manifest)


def largest_remainders(counts: list[int], keep: float) -> list[int]:
    """round(keep * total), shared by the exact shares."""
    exact = [keep * count for count in counts]
    shares = [int(value) for value in exact]
    for index in sorted(range(len(counts)), key=lambda k: shares[k] - exact[k])[: round(keep * sum(counts)) - sum(shares)]:
        shares[index] += 1
    return shares


@settings(max_examples=300, deadline=None)
@given(table=tables(), strategy=strategies)
def test_the_rows_are_those_of_the_table_in_its_order_and_each_is_kept_or_pruned_for_a_reason(
    table: pa.Table, strategy: Strategy
) -> None:
    try:
        manifest, summary = prune(table, strategy, EPS)
    except InputError:
        assume(False)
        raise
    assert manifest.schema.equals(MANIFEST_SCHEMA)
    for name in ("source", "row", "label"):
        assert manifest[name].to_pylist() == table[name].to_pylist()
    found = columns_of(manifest)
    kept = found["kept"]
    assert np.array_equal(kept, found["reason"] == "kept")
    eps = manifest["eps"].to_pylist()
    assert all((value is None) != chosen for value, chosen in zip(eps, kept, strict=True))
    assert all(0 <= value <= np.float32(EPS) for value in eps if value is not None)
    assert (summary["kept"], summary["total"]) == (kept.sum(), len(table))
    assert sum(part["kept"] for part in summary["by_source"].values()) == kept.sum()
    assert sum(part["total"] for part in summary["by_class"].values()) == len(table)
    again, same_summary = prune(table, strategy, EPS)
    assert manifest.equals(again)
    assert summary == same_summary


@settings(max_examples=300, deadline=None)
@given(table=tables(), strategy=strategies)
def test_the_kept_count_is_the_rounded_share_or_what_the_drop_rules_leave(table: pa.Table, strategy: Strategy) -> None:
    found, given_ = pruned(table, strategy), columns_of(table)
    applies = (found["source"] == "synthetic") | (strategy.applies_to == "all")
    wrong = (given_["label"] != given_["predicted"]) & (strategy.misclassified == "drop")
    missing = ~given_["converged"] & strategy.uses_margin & ~wrong
    dropped = applies & (wrong | (missing & (strategy.not_converged == "drop")))
    certain = applies & missing & (strategy.not_converged == "keep")
    assert found["kept"][~applies].all()
    groups = [given_["label"] == label for label in range(3)] if strategy.per_class else [np.ones(len(table), bool)]
    quotas = largest_remainders([int((applies & group).sum()) for group in groups], strategy.keep)
    for group, quota in zip(groups, quotas, strict=True):
        here = applies & group
        possible = int((here & ~dropped).sum())
        wanted = min(possible, max(quota, int((here & certain).sum()))) if strategy.score is not None else possible
        assert found["kept"][here].sum() == wanted


@settings(max_examples=300, deadline=None)
@given(table=tables(), strategy=strategies)
def test_rows_without_a_margin_and_misclassified_ones_follow_their_rules(table: pa.Table, strategy: Strategy) -> None:
    found, given_ = pruned(table, strategy), columns_of(table)
    applies = (found["source"] == "synthetic") | (strategy.applies_to == "all")
    if strategy.misclassified == "drop":
        wrong = applies & (given_["label"] != given_["predicted"])
        assert set(found["reason"][wrong]) <= {"misclassified"}
    missing = applies & ~given_["converged"] & (found["reason"] != "misclassified")
    if strategy.uses_margin and strategy.not_converged == "drop":
        assert set(found["reason"][missing]) <= {"not_converged"}
    if strategy.uses_margin and strategy.not_converged == "keep":
        assert found["kept"][missing].all()
        assert (found["eps"][missing] == np.float32(EPS)).all()
    if strategy.eps.rule == "margin":
        below = applies & found["kept"] & (given_["margin"] <= 0)
        assert (found["eps"][below] == 0).all()


@settings(max_examples=200, deadline=None)
@given(table=tables(), strategy=strategies)
def test_eps_never_falls_as_the_margin_grows(table: pa.Table, strategy: Strategy) -> None:
    found, given_ = pruned(table, strategy), columns_of(table)
    applies = (found["source"] == "synthetic") | (strategy.applies_to == "all")
    lowered = applies & found["kept"] & given_["converged"]
    margin, eps = given_["margin"][lowered], found["eps"][lowered]
    order = np.lexsort((eps, margin))
    assert (np.diff(eps[order]) >= 0).all()
    for value in np.unique(margin):
        assert len(set(eps[margin == value])) == 1  # equal margins, equal radii


@settings(max_examples=200, deadline=None)
@given(table=tables(), strategy=strategies)
def test_nothing_that_is_pruned_lies_on_the_kept_side_of_the_score(table: pa.Table, strategy: Strategy) -> None:
    assume(strategy.score not in (None, "random"))
    found, given_ = pruned(table, strategy), columns_of(table)
    score = given_[str(strategy.score)]
    for label in range(3) if strategy.per_class else [None]:
        here = np.ones(len(table), bool) if label is None else given_["label"] == label
        here &= (found["source"] == "synthetic") | (strategy.applies_to == "all")
        kept = score[here & found["kept"] & (given_["converged"] | (not strategy.uses_margin))]
        for reason, sign in ((f"low_{strategy.score}", 1), (f"high_{strategy.score}", -1)):
            gone = score[here & (found["reason"] == reason)]
            if len(kept) and len(gone):
                assert (sign * gone).max() <= (sign * kept).min()


@settings(max_examples=60, deadline=None)
@given(table=tables(), seed=st.integers(0, 5), keep=st.tuples(st.floats(0.3, 1.0), st.floats(0.3, 1.0)))
def test_two_strategies_with_one_seed_share_their_random_rows(table: pa.Table, seed: int, keep: tuple[float, float]) -> None:
    fewer, more = (pruned(table, Strategy(score="random", keep=share, seed=seed))["kept"] for share in sorted(keep))
    assert not (fewer & ~more).any()


@settings(max_examples=150, deadline=None)
@given(table=tables(), strategy=strategies, cuts=st.lists(st.integers(0, 40), max_size=3), chunk=st.integers(1, 50))
def test_the_manifest_of_a_table_in_parts_is_that_of_the_whole(
    table: pa.Table, strategy: Strategy, cuts: list[int], chunk: int
) -> None:
    """Parts, and batches within them, of any size; also parts with one source alone."""
    try:
        whole, summary = prune(table, strategy, EPS)
    except InputError:
        assume(False)
        raise
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "BATCH_ROWS", chunk)
        patch.setattr(selection, "CHUNK_ROWS", chunk + 1)
        (margins := Path(folder) / "margins").mkdir()
        edges = sorted({0, len(table), *(cut for cut in cuts if cut < len(table))})
        for index, (start, stop) in enumerate(pairwise(edges)):
            part = table.slice(start, stop - start)
            source = pa.array(part["source"].to_pylist()).cast(MARGINS_SCHEMA.field("source").type)  # numbered anew
            part = part.set_column(0, MARGINS_SCHEMA.field("source"), source)
            write_table(margins / f"part-{index:05d}.parquet", part)
        write_manifest(Path(folder), margins, strategy, EPS)
        found = read_table(Path(folder) / "manifest.parquet", MANIFEST_SCHEMA)
        assert found.to_pylist() == whole.to_pylist()
        assert read_json(Path(folder) / "summary.json") == json.loads(json.dumps(summary))


def test_a_score_with_nan_is_refused() -> None:
    table = margin_table(5)
    index = table.schema.get_field_index("el2n")
    table = table.set_column(index, table.schema.field("el2n"), pa.array([0, 1, np.nan, 0, 1], pa.float32()))
    with pytest.raises(InputError, match="strategy score el2n: the margin table has rows without this score"):
        prune(table, Strategy(score="el2n", keep=0.5), EPS)


def test_the_manifest_stage_imports_no_torch() -> None:
    program = "import sys, stages.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0
