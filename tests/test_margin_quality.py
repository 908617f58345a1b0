"""quality.json: counts, agreement and repetition, against NumPy and hand-worked cases."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from pipeline.artifacts import MARGINS_SCHEMA, read_json, read_table
from pipeline.balls import BALLS
from pipeline.images import ImageStore
from pipeline.margin_quality import agreement, difference, margins_at, measure_again, sample_places
from pipeline.margins import MarginsSection, quality
from tests.conftest import untrained
from tests.test_margins import CPU, settings, write

SAMPLE = {"sample_rows": 40, "seed": 3}


@pytest.fixture(scope="module")
def written(stores: dict[str, ImageStore], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "margins"
    write(path, stores, settings(grand=False, quality=SAMPLE))
    return path


def test_counts_by_source_and_class_are_those_of_the_table(written: Path) -> None:
    frame = read_table(written, MARGINS_SCHEMA).to_pandas()
    found = quality(written)
    assert found["rows"] == len(frame)
    assert found["mean_iterations"] == pytest.approx(frame["iterations"].mean())
    assert found["not_converged"] == pytest.approx((~frame["converged"]).mean())
    for source, classes in found["by_class"].items():
        for label, counts in classes.items():
            rows = frame[(frame["source"] == source) & (frame["label"] == int(label))]
            assert counts == {
                "rows": len(rows),
                "not_converged": int(rows["margin"].isna().sum()),
                "misclassified": int((rows["label"] != rows["predicted"]).sum()),
            }
        total = found["by_source"][source]
        assert total == {name: sum(counts[name] for counts in classes.values()) for name in total}


def test_the_sample_is_seeded_and_spans_both_sources(stores: dict[str, ImageStore]) -> None:
    places = sample_places(stores, 40, 3)
    assert len(set(places.tolist())) == 40
    assert places.tolist() == sorted(places.tolist()) == sample_places(stores, 40, 3).tolist()
    assert places.tolist() != sample_places(stores, 40, 4).tolist()
    assert (places < 400).any()
    assert (places >= 400).any()
    assert sample_places(stores, 10_000, 3).tolist() == list(range(600))


def test_the_margins_of_the_sample_are_read_from_their_parts(written: Path) -> None:
    column = read_table(written, MARGINS_SCHEMA)["margin"].to_numpy()
    places = np.array([0, 149, 150, 399, 400, 599])
    np.testing.assert_array_equal(margins_at(written, places), column[places].astype(np.float64))


def test_measuring_again_gives_the_margins_of_the_table(written: Path, stores: dict[str, ImageStore]) -> None:
    places = np.array([401, 7, 3, 599])
    again = measure_again(untrained(), stores, places, BALLS["linf"], settings(grand=False), None, CPU)
    np.testing.assert_allclose(again, margins_at(written, np.sort(places))[[2, 1, 0, 3]], rtol=1e-3, atol=1e-6)
    found = read_json(written / "quality.json")
    assert found["repeated"]["rows"] == 40
    assert found["repeated"]["converged_once"] == 0
    assert found["repeated"]["max_difference"] < 1e-4
    assert found["tight"]["rows"] > 10  # an untrained model has no way into some classes
    assert found["tight"]["median_tight"] <= found["tight"]["median"] * 1.001
    assert found["tight"]["spearman"] > 0.9


def test_agreement_and_difference_equal_numpy_and_leave_missing_margins_out() -> None:
    margins = np.array([0.1, np.nan, 0.3, -0.2, 0.44])
    tight = np.array([0.1, 0.2, 0.2, -0.1, np.nan])
    found = agreement(margins, tight)
    assert found["rows"] == 3
    assert found["spearman"] == pytest.approx(spearmanr([0.1, 0.3, -0.2], [0.1, 0.2, -0.1]).statistic)
    assert found["ratio_quantiles"]["0.5"] == pytest.approx(1.5)
    assert (found["median"], found["median_tight"]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert agreement(margins[:1], tight[:1])["spearman"] is None
    assert difference(margins, np.array([0.1, np.nan, 0.3, -0.25, np.nan])) == {
        "rows": 5, "equal": 3, "converged_once": 1, "max_difference": pytest.approx(0.05),
    }  # fmt: skip
    assert difference(np.array([np.nan]), np.array([0.1]))["max_difference"] is None


def test_the_estimator_of_the_settings_is_the_one_used(stores: dict[str, ImageStore]) -> None:
    places = np.arange(32)
    sections: list[MarginsSection] = [settings(grand=False), settings(grand=False, estimator="tight")]
    plain, closer = (measure_again(untrained(), stores, places, BALLS["l2"], section, None, CPU) for section in sections)
    assert np.nanmedian(np.abs(closer)) < np.nanmedian(np.abs(plain))
    mixed = measure_again(untrained(), stores, places, BALLS["l2"], settings(grand=False, bf16=True), None, CPU)
    assert not np.array_equal(mixed, plain, equal_nan=True)
    known = np.isfinite(plain) & np.isfinite(mixed)
    assert spearmanr(plain[known], mixed[known]).statistic > 0.99
    torch.testing.assert_close(torch.tensor(mixed[known]).median(), torch.tensor(plain[known]).median(), rtol=0.05, atol=1e-4)
