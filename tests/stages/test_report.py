"""The report stage from params.yaml to its directory."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.params import InputError, read_yaml
from pipeline.reporting.inputs import Artifacts
from stages.report import ReportParams, main
from tests.conftest import ROOT
from tests.reporting.artifacts import write_artifacts

PARAMS = """
report:
  title: Digits
  histogram_bins: 10
  contact_sheet_images: 2
  confidence: 0.95
strategies:
  none: {}
  puma: {score: margin, keep: 0.8}
seeds: [0]
train: {training: {loss: trades, attack: {num_steps: 10}, holdout: 4, selection_attack: {num_steps: 20}}}
margin_model: {kind: import, path: elsewhere}
margins: {deepfool: {first_candidates: null, candidates: 3}, grand: false}
threat: {norm: linf}
ingest: {}
generator: {kind: none}
guide: {kind: none}
judge: {}
synthesize: {}
evaluate: {}
perceptron: {}
"""
INPUTS = tuple(field.name for field in fields(Artifacts))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    return tmp_path


def run_main() -> None:
    main(**{f"{name}_path": Path("data") / name for name in (*INPUTS, "report")})


def test_the_stage_writes_the_report_and_prints_its_headline(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_artifacts(project / "data", ["none", "puma"], [0])
    run_main()
    lines = capsys.readouterr().out.splitlines()
    for table in (lines[1:4], lines[6:9]):
        assert [line.split()[0] for line in table] == ["strategy", "none", "puma"]
    assert lines[-1] == "data/report/report.html"
    assert Path(lines[-1]).stat().st_size > 1_000_000


def test_named_contrasts_take_the_place_of_the_derived_ones_and_wrong_names_are_refused(project: Path) -> None:
    write_artifacts(project / "data", ["none", "puma"], [0])
    for pair, wrong in (("[none, puma]", False), ("[none, pma]", True)):
        text = PARAMS.replace("report:\n", f"report:\n  contrasts: [{pair}]\n")
        (project / "params.yaml").write_text(text)
        if wrong:
            with pytest.raises(InputError, match="contrasts: wanted pairs of two strategies out of none, puma, got"):
                run_main()
        else:
            run_main()
            lines = (project / "data/report/differences.csv").read_text().splitlines()
            assert [line.split(",")[:2] for line in lines[1:]] == [["none", "puma"]]


def test_a_missing_manifest_is_an_input_error_that_names_the_stage(project: Path) -> None:
    write_artifacts(project / "data", ["none"], [0])
    with pytest.raises(InputError, match="dvc repro manifest@puma"):
        run_main()


def test_the_stage_knows_all_parameters_but_where_it_runs() -> None:
    assert set(ReportParams.keys()) == set(read_yaml(ROOT / "params.yaml")) - {"execution"}


@pytest.mark.parametrize(
    "line", ["confidence: 95", "histogram_bins: 1", "contact_sheet_images: -1", "colour: red", "passes_per_second: 0.0"]
)
def test_wrong_parameters_are_refused(project: Path, line: str) -> None:
    name = line.split(":")[0]
    kept = [old for old in PARAMS.splitlines() if not old.strip().startswith(f"{name}:")]
    kept.insert(kept.index("report:") + 1, f"  {line}")
    (project / "params.yaml").write_text("\n".join(kept))
    with pytest.raises(InputError, match=name):
        ReportParams.load()


def test_the_stage_does_not_import_torch() -> None:
    code = "import sys, stages.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
