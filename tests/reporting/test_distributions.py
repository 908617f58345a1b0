"""Streamed distributions against the whole arrays."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import artifacts
from pipeline.artifacts import MANIFEST_SCHEMA, MARGINS_SCHEMA, scan_table, source_codes, write_table
from pipeline.params import InputError
from pipeline.reporting.distributions import eps_distribution, kept_rows, margin_histogram
from tests.reporting.artifacts import EPS, Sizes, draw_margins, write_margins

SIZES = Sizes()


@pytest.mark.parametrize("batch_rows", [7, 1 << 20])
def test_histogram_totals_match_the_rows_whatever_the_batches(
    made: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(artifacts, "BATCH_ROWS", batch_rows)
    found = margin_histogram(made / "margins", 12, 3)
    margins = draw_margins(SIZES)
    assert found.norm == "linf"
    assert found.num_missing == sum(int(np.isnan(margin).sum()) for margin in margins.values()) == 10
    for source, margin in margins.items():
        known = np.clip(margin[~np.isnan(margin)].astype(np.float64), found.edges[0], found.edges[-1])
        np.testing.assert_array_equal(found.counts[source], np.histogram(known, found.edges)[0])
        assert found.counts[source].sum() == len(known)
    assert found.by_class.shape == (3, len(found.edges) - 1)
    np.testing.assert_array_equal(found.by_class.sum(axis=0), sum(found.counts.values()))
    labels = [np.arange(len(margin))[~np.isnan(margin)] % 3 for margin in margins.values()]
    np.testing.assert_array_equal(found.by_class.sum(axis=1), np.bincount(np.concatenate(labels)))


def test_zero_is_an_edge_so_that_no_bin_mixes_right_and_wrong(made: Path) -> None:
    edges = margin_histogram(made / "margins", 13, 3).edges
    assert np.abs(edges).min() == 0
    assert 13 <= len(edges) - 1 <= 14
    np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0])


def test_an_outlier_is_counted_in_the_end_bin_and_does_not_stretch_the_histogram(tmp_path: Path) -> None:
    margin = np.linspace(0, 1, 5000, dtype=np.float32)
    margin[0] = 1000
    write_margins(tmp_path / "margins", {"real": margin})
    found = margin_histogram(tmp_path / "margins", 10, 3)
    assert found.edges[-1] == pytest.approx(1, abs=0.01)
    assert found.counts["real"].sum() == 5000


@pytest.mark.parametrize("value", [0.0, 0.25, np.nan])
def test_equal_or_missing_margins_still_make_a_histogram(tmp_path: Path, value: float) -> None:
    write_margins(tmp_path / "margins", {"real": np.full(4, value, np.float32)})
    found = margin_histogram(tmp_path / "margins", 5, 3)
    assert sum(int(count.sum()) for count in found.counts.values()) + found.num_missing == 4


def test_files_may_number_the_sources_differently() -> None:
    column = pa.DictionaryArray.from_arrays(np.array([0, 0, 1], np.int8), ["synthetic", "real"])
    batch = pa.RecordBatch.from_arrays([column], names=["source"])
    assert source_codes(batch).tolist() == [1, 1, 0]


def manifest(path: Path, kept: list[bool], eps: list[float | None]) -> Path:
    num = len(kept)
    columns = {
        "source": pa.array(["synthetic"] * num).dictionary_encode(),
        "row": np.arange(num),
        "label": np.zeros(num),
        "kept": kept,
        "eps": eps,
        "reason": pa.array(["kept" if k else "random" for k in kept]).dictionary_encode(),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in MANIFEST_SCHEMA]
    write_table(path, pa.Table.from_arrays(arrays, schema=MANIFEST_SCHEMA))
    return path


def test_the_distribution_of_eps_is_exact_on_its_grid(tmp_path: Path) -> None:
    eps = [0.0, EPS / 4, EPS / 2, EPS, None]
    grid, share = eps_distribution(manifest(tmp_path / "m.parquet", [True] * 4 + [False], eps), EPS, 4)
    np.testing.assert_allclose(grid, np.linspace(0, EPS, 5))
    np.testing.assert_allclose(share, [0.25, 0.5, 0.75, 0.75, 1])


def test_the_distribution_of_eps_agrees_with_the_whole_column(made: Path) -> None:
    path = made / "manifests" / "puma" / "manifest.parquet"
    grid, share = eps_distribution(path, EPS, 16)
    eps = pq.read_table(path)["eps"].drop_null().to_numpy()
    np.testing.assert_allclose(share, [(eps <= edge * (1 + 1e-5)).mean() for edge in grid])


def test_kept_rows_are_those_of_the_manifest(tmp_path: Path) -> None:
    path = manifest(tmp_path / "m.parquet", [True, False, True], [EPS, None, EPS])
    kept = kept_rows(path, {"real": 2, "synthetic": 4})
    assert kept["synthetic"].tolist() == [True, False, True, False]
    assert not kept["real"].any()


def test_a_row_beyond_its_store_is_an_input_error(tmp_path: Path) -> None:
    path = manifest(tmp_path / "m.parquet", [True] * 3, [EPS] * 3)
    with pytest.raises(InputError, match="row 2 of synthetic, whose store has 2"):
        kept_rows(path, {"real": 0, "synthetic": 2})


def test_missing_parts_and_columns_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        margin_histogram(tmp_path / "margins", 5, 3)
    pq.write_table(pa.table({"row": [1.5]}), tmp_path / "m.parquet")
    with pytest.raises(InputError, match="wanted"):
        list(scan_table(tmp_path / "m.parquet", MARGINS_SCHEMA, ["row"]))
