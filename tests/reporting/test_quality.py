"""The sentences about the margins say what quality.json says."""

import json
from pathlib import Path

import pytest

from pipeline.params import InputError
from pipeline.reporting.quality import quality_sentences
from tests.reporting.artifacts import Sizes, draw_margins, write_margin_quality

NAMES = {"real": "real", "synthetic": "synthetic"}


def written(path: Path) -> Path:
    path.mkdir()
    write_margin_quality(path, draw_margins(Sizes()))
    return path


def test_every_source_the_agreement_and_the_repetition_have_a_sentence(tmp_path: Path) -> None:
    sizes = Sizes()
    real, synthetic, tight, repeated = quality_sentences(written(tmp_path / "margins"), NAMES)
    assert real.startswith(f"real: {sizes.real} samples, 10.00% without a margin, 10.00% misclassified")
    assert synthetic.startswith(f"synthetic: {sizes.synthetic} samples, ")
    assert "median 0.045 to 0.04, ratio 1.125 (90 % within 1.000 to 1.250), rank correlation 0.9875" in tight
    assert "15 of 16 margins are the same to the last bit, the largest difference is 1e-07" in repeated


def test_the_class_with_most_rows_without_a_margin_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "margins")
    found = json.loads((path / "quality.json").read_text())
    found["by_class"]["real"] = {
        "0": {"rows": 10, "not_converged": 1, "misclassified": 0},
        "1": {"rows": 4, "not_converged": 1, "misclassified": 0},
    }
    (path / "quality.json").write_text(json.dumps(found))
    assert "most often without: class 1, 25.00%" in quality_sentences(path, NAMES)[0]


def test_without_a_sample_only_the_sources_are_told_and_without_a_file_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path / "margins")
    found = json.loads((path / "quality.json").read_text())
    (path / "quality.json").write_text(json.dumps({key: found[key] for key in ("by_source", "by_class")}))
    assert len(quality_sentences(path, NAMES)) == 2
    with pytest.raises(InputError, match="dvc repro"):
        quality_sentences(tmp_path, NAMES)
