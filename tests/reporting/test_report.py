"""The whole report on small artifacts."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from pipeline.csv_tables import read_csv
from pipeline.params import InputError, read_yaml
from pipeline.reporting.distributions import margin_histogram
from pipeline.reporting.figures import margin_figure
from pipeline.reporting.report import write_report
from tests.conftest import ROOT
from tests.reporting.artifacts import PARAMS
from tests.reporting.conftest import SEEDS, STRATEGIES, artifacts_at

CHOSEN = {"none": {}, "random": {"score": "random", "keep": 0.9}, "puma": {"score": "margin", "keep": 0.8}}


def report(root: Path, target: Path, title: str = "A report", sheets: int = 4) -> None:
    write_report(
        target, artifacts_at(root), params=PARAMS | {"strategies": CHOSEN}, seeds=SEEDS,
        title=title, histogram_bins=10, contact_sheet_images=sheets, confidence=0.95,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("out") / "report"
    report(made, target, title="Margins </script><b>&</b>")
    return target


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return (written / "report.html").read_text()


def test_the_report_has_all_its_files(written: Path) -> None:
    files = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    plots = ["plots/accuracy.csv", "plots/margins.csv", "plots/steps.csv", "plots/training.csv"]
    tables = ["differences.csv", "differences.tex", "metrics.json", *plots, "report.html", "results.csv"]
    assert files == [*tables, "summary.csv", "summary.tex"]


def test_metrics_are_means_over_the_seeds(written: Path) -> None:
    found = json.loads((written / "metrics.json").read_text())
    assert found["puma"] == {"kept": 0.8, "clean": 0.875, "robust": 0.675}
    assert list(found) == sorted(STRATEGIES)


def test_the_page_compares_the_best_and_the_last_checkpoint_of_every_run(html: str) -> None:
    table = html[html.index('id="checkpoints"') : html.index("</table>", html.index('id="checkpoints"'))]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in table.split("<tr>")[2:]]
    assert len(rows) == 2 * len(STRATEGIES) * len(SEEDS)
    assert rows[0][:3] == [STRATEGIES[0], "0", "best"]
    assert rows[1] == [STRATEGIES[0], "0", "last", "62.50", "37.50"]


def test_plots_hold_every_run_and_the_whole_histogram(written: Path, made: Path) -> None:
    accuracy = read_csv(written / "plots" / "accuracy.csv", ["strategy", "seed", "clean", "robust"])
    assert [(row["strategy"], row["seed"]) for row in accuracy] == [(name, str(seed)) for name in STRATEGIES for seed in SEEDS]
    training = read_csv(written / "plots" / "training.csv", ["run", "step", "loss", "clean_accuracy", "robust_accuracy"])
    assert len(training) == 5 * 6
    assert training[1] == {
        "run": "none-0",
        "step": "2",
        "loss": "0.500000",
        "clean_accuracy": "0.540000",
        "robust_accuracy": "0.250000",
    }
    steps = read_csv(written / "plots" / "steps.csv", ["run", "step", "loss", "lr", "mean_eps"])
    assert len(steps) == 2 * 6
    assert steps[1] == {"run": "none-0", "step": "2", "loss": "0.250000", "lr": "0.200000", "mean_eps": "0.030000"}
    margins = read_csv(written / "plots" / "margins.csv", ["source", "margin", "count"])
    histogram = margin_histogram(made / "margins", 10, 3)
    assert sum(int(row["count"]) for row in margins) == 100 - histogram.num_missing


def test_every_dvc_plot_has_a_template_whose_fields_its_file_has(written: Path) -> None:
    plots = {name: settings for plot in read_yaml(ROOT / "dvc.yaml")["plots"] for name, settings in plot.items()}
    assert {Path(name).name for name in plots} == {path.name for path in (written / "plots").iterdir()}
    for name, settings in plots.items():
        template = json.loads((ROOT / ".dvc" / "plots" / f"{settings['template']}.json").read_text())
        fields = {channel["field"] for channel in template["encoding"].values()}
        columns = (written / "plots" / Path(name).name).read_text().splitlines()[0].split(",")
        assert fields - {"<DVC_METRIC_X>", "<DVC_METRIC_Y>", "rev"} | {settings["x"], settings["y"]} <= set(columns)


def test_the_page_loads_nothing(html: str) -> None:
    own = html.replace(get_plotlyjs(), "")
    assert len(own) == len(html) - len(get_plotlyjs())  # inside, and once
    assert not re.search(r"<script[^>]*\ssrc|<link|@import|https?://|//cdn", own)
    assert all(uri.startswith("data:image/png;base64,") for uri in re.findall(r'<img src="([^"]*)"', own))
    assert "default-src 'none'" in own


def test_text_from_outside_cannot_become_markup(html: str) -> None:
    assert "<h1>Margins &lt;/script&gt;&lt;b&gt;&amp;&lt;/b&gt;</h1>" in html
    assert html.count("</script>") == 3


def test_every_figure_has_a_place_and_is_valid_plotly(html: str) -> None:
    content = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html)
    assert content
    figures = json.loads(content.group(1))
    assert set(figures) == set(re.findall(r'<div class="plot" id="([^"]*)"', html))
    assert {
        "accuracy",
        "kept-robust",
        "kept-clean",
        "margins",
        "margins-by-class",
        "eps",
        "reasons",
        "training-loss",
        "perceptron-shares",
        "perceptron-robust-50",
    } <= set(figures)
    for figure in figures.values():
        go.Figure(figure["data"], figure["layout"])


def test_the_page_shows_the_numbers_of_the_table(html: str) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.replace(get_plotlyjs(), "")))
    assert "87.5 seeds [55.7, 100.0] images [66.9, 96.0]" in text  # puma, clean: 0.90 and 0.85; SciPy's t and Wilson
    assert "licence 2" in text
    assert "Least data of those not told apart in robust accuracy" in text
    # 5000 x 2 + 4000 x 10 + 5 x 4 x 21 passes of the margin model's training and 475 of DeepFool and GraNd
    assert "margins 0.0509" in text
    assert "Warning: gradients are zero at some images: attacks that follow them are unreliable (none-1, random-0" in text
    assert "Not checked, because Square" in text
    assert "AutoAttack in part: apgd-ce, apgd-t." in text
    assert "python -m pipeline repro" in text
    assert "Planned contrasts of robust accuracy: 0 of 2 told apart." in text
    assert "puma none differs in score, keep 80.0 100.0 not told apart −10.0" in text
    assert "The 2 intervals of clean accuracy hold together with 95% (each with 97.5%)" in text


def test_the_provenance_has_the_pinned_versions(html: str) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    shown = html[html.index("<summary>versions of the report</summary>") :]
    found = json.loads(unescape(re.search(r"<pre>(.*?)</pre>", shown, re.DOTALL)[1]))  # type: ignore[index]
    assert {"numpy", "pyarrow", "torchvision", "dvc"} <= set(found) <= set(pinned)


def test_equal_inputs_give_equal_bytes_and_no_path_or_host(made: Path, tmp_path: Path) -> None:
    report(made, tmp_path / "a")
    shutil.copytree(made, tmp_path / "moved")
    report(tmp_path / "moved", tmp_path / "b")
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert str(tmp_path) not in (tmp_path / "a" / "report.html").read_text()


def test_a_generator_is_shown_where_there_is_one(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(made, root)
    (root / "generator").mkdir()
    (root / "generator" / "training.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    report(root, tmp_path / "report", sheets=0)
    page = (tmp_path / "report" / "report.html").read_text()
    assert 'id="generator"' in page
    assert "<img" not in page.replace(get_plotlyjs(), "")


def test_a_failed_report_leaves_the_old_one(made: Path, tmp_path: Path) -> None:
    report(made, tmp_path / "report", sheets=0)
    before = (tmp_path / "report" / "report.html").read_bytes()
    root = tmp_path / "root"
    shutil.copytree(made, root)
    (root / "perceptron" / "curves.csv").unlink()
    with pytest.raises(InputError, match=r"curves\.csv"):
        report(root, tmp_path / "report")
    assert (tmp_path / "report" / "report.html").read_bytes() == before


def test_no_strategy_or_no_seed_is_an_input_error(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one strategy and one seed"):
        write_report(
            tmp_path / "report", artifacts_at(made), params=PARAMS | {"strategies": {}}, seeds=[0],
            title="t", histogram_bins=5, contact_sheet_images=0, confidence=0.95,
        )  # fmt: skip


def test_the_radius_is_drawn_among_the_margins_only_where_they_are_of_its_norm(made: Path) -> None:
    histogram = margin_histogram(made / "margins", 10, 3)
    names = {"real": "real", "synthetic": "synthetic"}
    for eps, drawn in ((0.1, True), (None, False)):
        figure = margin_figure(histogram, [], {}, eps, names)
        assert ("eps" in [trace["name"] for trace in figure.data]) is drawn
