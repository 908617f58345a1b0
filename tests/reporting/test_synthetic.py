"""What the report says of the synthetic images."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from pipeline.artifacts import read_json, write_json
from pipeline.csv_tables import read_csv
from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.reporting.report import write_report
from pipeline.reporting.synthetic import notices, read_quality, selection_sentence, synthetic_sheets
from tests.reporting.artifacts import CLASSES, PARAMS
from tests.reporting.conftest import artifacts_at
from tests.reporting.test_pictures import decode

STAND_IN = "Stand-in: no image here was generated."


def page_of(root: Path, target: Path, sheets: int = 4) -> str:
    params = PARAMS | {"strategies": {"none": {}}}
    write_report(
        target, artifacts_at(root), params=params, seeds=[0],
        title="t", histogram_bins=5, contact_sheet_images=sheets, confidence=0.95,
    )  # fmt: skip
    return (target / "report.html").read_text()


def test_the_page_shows_the_figures_of_synthetic_and_real_images_side_by_side(made: Path, tmp_path: Path) -> None:
    page = page_of(made, tmp_path / "report")
    table = page[page.index('id="synthetic-quality"') :]
    distance = table[table.index("Fréchet distance") :]
    assert distance.index(">1.25<") < distance.index(">0.5<")
    assert ">70.0<" in table
    assert "20 images of each kind" in table
    assert "The label is seen least often in zero: 25.0 %." in table
    assert "<summary>Synthetic images by class</summary>" in page
    assert "synthetic 0: ratio 0.25" in page
    assert STAND_IN not in page


def test_a_judge_that_was_trained_on_the_images_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "judge", tmp_path / "judge")
    assert not read_quality(tmp_path / "judge").circular
    found = read_json(tmp_path / "judge" / "quality.json")
    for trained_on, circular in ((["real"], False), (None, False), (["real", "synthetic"], True)):
        write_json(tmp_path / "judge" / "quality.json", found | {"judged_by": {"digest": "0", "trained_on": trained_on}})
        assert read_quality(tmp_path / "judge").circular is circular


def test_a_stand_in_is_named_before_the_first_result_and_without_a_judgement_there_is_no_table(
    made: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(made, root)
    header = read_json(root / "synthetic" / "store.json")
    write_json(root / "synthetic" / "store.json", header | {"origin": {"kind": "left_out"}})
    found = read_json(root / "judge" / "quality.json")
    write_json(root / "judge" / "quality.json", found | {"synthetic": {"num_images": 0}, "test": {"num_images": 0}})
    page = page_of(root, tmp_path / "report", sheets=0)
    assert page.index(STAND_IN) < page.index('<section id="results">')
    assert 'id="synthetic-quality"' not in page


def test_a_stand_in_is_called_synthetic_nowhere_but_in_paths_and_parameters(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(made, root)
    header = read_json(root / "synthetic" / "store.json")
    write_json(root / "synthetic" / "store.json", header | {"origin": {"kind": "left_out"}})
    page = page_of(root, tmp_path / "report").replace(get_plotlyjs(), "")
    assert '"name":"stand-in (left-out real)"' in page
    shown = page[: page.index('<section id="provenance">')] + page[page.index('<script type="application/json"') :]
    shown = re.sub(r'<div class="short notice".*?</div>', "", shown, flags=re.DOTALL)  # it says what they are
    assert re.findall(r"[^>\n]*synthetic[^<\n]*", shown, re.IGNORECASE) == ['<table id="synthetic-quality">']
    rows = read_csv(tmp_path / "report" / "plots" / "margins.csv", ["source"])
    assert {row["source"] for row in rows} == {"real", "stand-in (left-out real)"}


def test_a_licence_is_told_and_a_plain_generator_needs_no_notice() -> None:
    assert notices({"kind": "edm"}) == []
    (told,) = notices({"kind": "edm", "licence": "CC BY-NC-SA 4.0"})
    assert "CC BY-NC-SA 4.0" in told


def test_a_selection_is_told_with_its_cost(made: Path, tmp_path: Path) -> None:
    assert selection_sentence({"kind": "edm"}) == ""
    selection = {
        "rule": {"kind": "margin"}, "kept": 700, "drawn": 1000, "drawn_for_pilot": 100, "acceptance": 0.7,
        "acceptance_by_class": {"a": 0.9, "b": 0.5}, "network_evaluations": 38500,
    }  # fmt: skip
    root = tmp_path / "root"
    shutil.copytree(made, root)
    header = read_json(root / "synthetic" / "store.json")
    write_json(root / "synthetic" / "store.json", header | {"origin": {"kind": "edm", "selection": selection}})
    page = page_of(root, tmp_path / "report", sheets=0)
    told = page[page.index('id="selection"') :]
    assert "(margin): 1,000 images were drawn for the 700 that are kept, 70.0% (least in b: 50.0%), and 100" in told
    assert "38,500 evaluations" in told


def test_sheets_show_every_class_and_the_pairs_that_are_nearest_to_copies(made: Path) -> None:
    stores = {"real": ImageStore.open(made / "real" / "train"), "synthetic": ImageStore.open(made / "synthetic")}
    *classes, pairs = synthetic_sheets(stores, read_quality(made / "judge"), 6, "synthetic")
    assert [sheet.title for sheet in classes] == [f"Synthetic: {name}" for name in CLASSES]
    assert [[picture.note for picture in sheet.pictures] for sheet in classes] == [
        [f"synthetic {label}", f"synthetic {label + 3}"] for label in range(3)
    ]
    synthetic, real = pairs.pictures
    assert real.note == "real 3, mirrored"
    for picture, source, row in ((synthetic, "synthetic", 0), (real, "real", 3)):
        np.testing.assert_array_equal(np.asarray(decode(picture.uri)), stores[source].batch(np.array([row]))[0, :, :, 0])


def test_a_missing_judgement_names_its_stage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dvc repro judge"):
        read_quality(tmp_path)
