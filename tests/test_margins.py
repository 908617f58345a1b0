from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import margins
from pipeline.artifacts import MARGINS_SCHEMA, read_json, read_table
from pipeline.balls import BALLS
from pipeline.deepfool import DeepFoolParams, DeepFoolResult, deepfool
from pipeline.images import ImageStore
from pipeline.margin_quality import sample_places, write_quality
from pipeline.margins import MarginsSection, estimate, foretold_norms, grand, place_parts, scores, shards, write_shard
from pipeline.params import InputError
from pipeline.threat import ThreatParams
from tests.conftest import untrained

CPU = torch.device("cpu")


def settings(**fields: object) -> MarginsSection:
    defaults = {
        "grand": True,
        "batch_size": 64,
        "shard_rows": 150,
        "max_not_converged": 1.0,
        "quality": {"sample_rows": 0, "seed": 0},
    }
    return MarginsSection.model_validate({"deepfool": DeepFoolParams(), **defaults, **fields})


def write(path: Path, stores: dict[str, ImageStore], section: MarginsSection, model: torch.nn.Module | None = None) -> None:
    path.mkdir()
    model = model or untrained()
    parts = []
    scale = foretold_norms(model, stores["real"], BALLS["linf"], section, CPU)
    for name, shard in shards(stores, section.shard_rows).items():
        parts.append(path.with_name(f"{path.name}-{name}.parquet"))
        write_shard(
            parts[-1], model, stores[shard["source"]], **shard, ball=BALLS["linf"], settings=section, scale=scale,
            model_digest="abc", device=CPU, progress=lambda done, total: None,
        )  # fmt: skip
    place_parts(path, parts)
    write_quality(path, model, stores, ball=BALLS["linf"], settings=section, device=CPU)


def test_the_table_has_every_row_in_order_and_the_margins_of_deepfool(tmp_path: Path, stores: dict[str, ImageStore]) -> None:
    write(tmp_path / "margins", stores, settings())
    table = read_table(tmp_path / "margins", MARGINS_SCHEMA)
    assert len(sorted((tmp_path / "margins").glob("*.parquet"))) == 5  # 400 and 200 rows in parts of at most 150
    assert table["source"].to_pylist() == ["real"] * 400 + ["synthetic"] * 200
    assert table["row"].to_pylist() == [*range(400), *range(200)]
    assert np.array_equal(table["label"].to_numpy()[:400], stores["real"].labels)
    images = torch.from_numpy(stores["real"].batch(np.arange(64))).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(np.array(stores["real"].labels[:64]))
    scale = foretold_norms(untrained(), stores["real"], BALLS["linf"], settings(), CPU)
    result = deepfool(untrained(), images, labels, ball=BALLS["linf"], scale=scale)
    torch.testing.assert_close(torch.tensor(table["margin"].to_numpy()[:64]), result.margin, equal_nan=True)
    quality = read_json(tmp_path / "margins" / "quality.json")
    assert quality["rows"] == 600
    rows = sum(counts["rows"] for classes in quality["by_class"].values() for counts in classes.values())
    assert rows == 600
    wrong = table["label"].to_numpy() != table["predicted"].to_numpy()
    assert quality["by_source"]["synthetic"]["misclassified"] == wrong[400:].sum()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, stores: dict[str, ImageStore]) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, stores, settings(grand=False))
    for part in (tmp_path / "a").iterdir():
        assert part.read_bytes() == (tmp_path / "b" / part.name).read_bytes()
    assert read_table(tmp_path / "a", MARGINS_SCHEMA)["grand"].null_count == 600


@pytest.mark.parametrize("bf16", [False, True])
def test_batches_and_shards_of_any_size_give_the_same_bytes(tmp_path: Path, stores: dict[str, ImageStore], bf16: bool) -> None:
    """A last batch of one image among them: 200 rows in batches of 199, and the lone row that is active last."""
    tables = []
    for batch_size, shard_rows in ((64, 150), (7, 1000), (199, 33)):
        path = tmp_path / f"{batch_size}"
        write(path, stores, settings(grand=False, bf16=bf16, batch_size=batch_size, shard_rows=shard_rows))
        tables.append(read_table(path, MARGINS_SCHEMA).combine_chunks())
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


@pytest.mark.parametrize(
    ("estimator", "bf16", "allowed"), [("deepfool", True, True), ("deepfool", False, False), ("tight", True, False)]
)
def test_tensor_float_32_is_for_deepfool_with_bf16_alone(
    monkeypatch: pytest.MonkeyPatch, estimator: str, bf16: bool, allowed: bool
) -> None:
    seen = []

    def estimated(*_: object, **__: object) -> DeepFoolResult:
        seen.append(torch.backends.cudnn.allow_tf32)
        return DeepFoolResult(*[torch.zeros(1)] * 6)

    for name in ("deepfool", "tight"):
        monkeypatch.setattr(margins, name, estimated)
    before = torch.backends.cudnn.allow_tf32
    section = settings(estimator=estimator, bf16=bf16)
    estimate(untrained(), torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), BALLS["linf"], section, None)
    assert seen == [allowed]
    assert torch.backends.cudnn.allow_tf32 == before


def test_the_quality_sample_has_as_many_rows_of_each_source(stores: dict[str, ImageStore]) -> None:
    places = sample_places(stores, 40, seed=0)
    assert (places < 400).sum() == (places >= 400).sum() == 20
    assert len(np.unique(places)) == 40
    assert np.array_equal(places, np.sort(places))
    assert places.max() < 600
    assert len(sample_places(stores, 10_000, seed=0)) == 600


def test_scores_equal_their_formulas_in_numpy() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 5
    f = logits.numpy()
    p = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
    one_hot, rows = np.eye(5)[y], np.arange(8)
    found = scores(logits, y)
    np.testing.assert_allclose(found["confidence"], p[rows, y])
    np.testing.assert_allclose(found["entropy"], -(p * np.log(p)).sum(axis=1))
    np.testing.assert_allclose(found["logit_margin"], f[rows, y] - np.where(one_hot == 1, -np.inf, f).max(axis=1))
    np.testing.assert_allclose(found["el2n"], np.linalg.norm(p - one_hot, axis=1))


def test_grand_is_the_norm_of_each_samples_own_gradient() -> None:
    model = untrained()
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(5)
    expected = []
    for image, label in zip(x, y, strict=True):
        loss = torch.nn.functional.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected.append(torch.cat([g.flatten() for g in gradients]).norm())
    torch.testing.assert_close(grand(model, x, y), torch.stack(expected))


def test_too_many_rows_without_a_margin_fail_and_say_so(tmp_path: Path, stores: dict[str, ImageStore]) -> None:
    section = settings(deepfool=DeepFoolParams(max_iterations=1, candidates=1, first_candidates=1), max_not_converged=0.0)
    said = r"at most 0.00% of the rows without a margin, got .* \(most in (real|synthetic) class \d: \d+ of \d+.*max_iterations"
    with pytest.raises(InputError, match=said):
        write(tmp_path / "margins", stores, section)


def test_a_model_that_gives_nan_is_named_with_the_rows(tmp_path: Path, stores: dict[str, ImageStore]) -> None:
    broken = untrained()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="margins, real rows 0 to 63: wanted finite logits"):
        write(tmp_path / "margins", stores, settings(), broken)


def test_the_norm_of_the_margins_is_that_of_the_threat_unless_it_is_said() -> None:
    threat = ThreatParams(norm="linf", eps_255=8)
    assert settings().ball(threat) is BALLS["linf"]
    assert settings(norm="l2").ball(threat) is BALLS["l2"]
