import math
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.artifacts import write_json
from pipeline.csv_tables import read_csv
from pipeline.execution import Task, operate, parallel, progress, stage_run
from pipeline.execution.live import live_table, tensorboard
from pipeline.execution.plan import plan
from pipeline.execution.progress import summarise
from pipeline.execution.settings import StageExecution, device, settings
from pipeline.execution.store import RunStore
from pipeline.params import InputError, StageParams
from tests.projects import has_ended

DVC_YAML = """
stages:
  first: {cmd: mkdir -p out && echo 1 > out/first, outs: [out/first]}
  second: {cmd: cp out/first out/second, deps: [out/first], outs: [out/second]}
  side: {cmd: mkdir -p out && echo s > out/side, outs: [out/side]}
  wrong: {cmd: "false", deps: [out/first], outs: [out/wrong]}
  after: {cmd: cp out/wrong out/after, deps: [out/wrong], outs: [out/after]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    return tmp_path


def test_the_graph_holds_what_the_targets_need(project: Path) -> None:
    assert plan(["second"])[0] == {"first": set(), "second": {"first"}}
    assert set(plan([])[0]) == {"first", "second", "side", "wrong", "after"}
    with pytest.raises(InputError, match="wanted stages of dvc.yaml, got 'third'"):
        plan(["third"])
    assert project.is_dir()


def test_a_failure_starts_nothing_new_keeps_what_is_finished_and_is_named(project: Path) -> None:
    with pytest.raises(InputError, match="^wrong failed .*finished stages are kept"):
        parallel.repro([], jobs=1)
    assert (project / "out/first").read_text() == "1\n"
    assert not (project / "out/after").exists()
    parallel.repro(["second", "side"], jobs=2)
    assert (project / "out/second").read_text() == "1\n"
    lock = (project / "dvc.lock").read_text()
    parallel.repro(["second", "side"], jobs=2)
    assert (project / "dvc.lock").read_text() == lock


def test_the_local_file_overrides_single_keys(tmp_path: Path) -> None:
    params, local = tmp_path / "params.yaml", tmp_path / "execution.local.yaml"
    params.write_text("execution: {device: cpu, threads: 3}\n")
    assert (settings(params, local).device, settings(params, local).threads) == ("cpu", 3)
    local.write_text("threads: 5\n")
    assert (settings(params, local).device, settings(params, local).threads) == ("cpu", 5)
    local.write_text("thread: 5\n")
    with pytest.raises(InputError, match="execution.thread: no such parameter"):
        settings(params, local)


def test_a_gpu_that_is_not_there_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("params.yaml").write_text("execution: {device: cuda, threads: 1}\n")
    with pytest.raises(InputError, match="wanted cuda, but PyTorch sees no GPU; choose auto or cpu"):
        device()
    Path("params.yaml").write_text("execution: {device: auto, threads: 1}\n")
    assert device().type == "cpu"


def test_a_log_gets_plain_lines_and_always_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work") as report:
        for done in range(1, 1001):
            report(done, 1000, {"loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"work: 1000/1000 images, 0 s left, \d+ images/s loss 0.5", lines[0])


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    code = (
        "import time\n"
        "from pipeline.execution import progress\n"
        "with progress('work') as report:\n"
        "    for done in (100, 400, 500): report(done, 1000, {'loss': 0.5}); time.sleep(0.2)\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", code], env=environment, stderr=theirs, check=True)
    os.close(theirs)
    shown = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", os.read(ours, 100_000).decode())
    os.close(ours)
    assert "━" in shown
    assert re.search(r"50%.* \d:\d\d:\d\d", shown)
    assert re.search(r"work \d+ images/s loss 0.5", shown)


def count_up(task: Task, index: int) -> None:
    task.report(index, index)


def add_up(task: Task, parts: list[str]) -> None:
    task.report(len(parts), len(parts))


def test_a_stage_may_have_its_tasks_in_steps(project: Path) -> None:
    with stage_run("perceptron", StageParams(), [], project / "out/steps") as this:
        parts = this.run(count_up, {"a": {"index": 3}, "b": {"index": 4}})
        this.run(add_up, {"sum": {"parts": [str(part) for part in parts]}})
    shown = operate.status("perceptron")
    assert [(task.task, task.state, task.total) for task in shown] == [("a", "done", 3), ("b", "done", 4), ("sum", "done", 2)]


def test_an_interrupt_stops_the_running_stage(project: Path) -> None:
    (project / "dvc.yaml").write_text('stages: {slow: {cmd: "echo $$ > pid; sleep 60", outs: [never]}}\n')
    code = "from pipeline.execution import parallel; parallel.repro([], 1)"
    root = Path(__file__).parents[1]
    # A shell that starts the tests in the background has them ignore SIGINT, and children inherit that.
    child = subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (project / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    stage = int((project / "pid").read_text())
    child.send_signal(2)
    assert child.wait(timeout=30) != 0
    while not has_ended(stage) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert has_ended(stage)


def test_progress_of_tasks_elsewhere_counts_tasks_and_images(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "margins" / "key")
    for name, count in (("a", 100), ("b", 40)):
        store.work(name).mkdir(parents=True)
        write_json(store.work(name) / "progress.json", {"done": count, "total": 100, "figures": {}, "time": 0.0})
    output = store.work("a") / "output"
    output.mkdir()
    store.finish("a", output, {"total": 100})
    done, total, text = summarise(store, ["a", "b", "c", "d"], {"b": "RUNNING", "c": "PENDING (Resources)", "d": "PENDING ()"})
    assert (done, total) == (140, 400)  # two tasks of 100 are known, so four have 400
    assert text == "1 tasks done, 1 running, 2 pending"


def test_stages_override_the_execution_and_a_wrong_key_is_named(tmp_path: Path) -> None:
    params, local = tmp_path / "params.yaml", tmp_path / "execution.local.yaml"
    params.write_text("execution: {backend: local, timeout_min: 60, stages: {train: {timeout_min: 900, extra: {nice: 10}}}}\n")
    chosen = settings(params, local)
    assert (chosen.of_stage("train").timeout_min, chosen.of_stage("margins").timeout_min) == (900, 60)
    assert chosen.of_stage("train").extra == {"nice": 10}
    local.write_text("stages: {train: {timeout: 5}}\n")
    with pytest.raises(InputError, match="execution.stages.train: stage.timeout: no such parameter"):
        settings(params, local)


def test_the_environment_overrides_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("execution: {backend: slurm, threads: 3}\n")
    monkeypatch.setenv("PUMA_EXECUTION", "{backend: local}")
    assert (settings(params).backend, settings(params).threads) == ("local", 3)
    monkeypatch.setenv("PUMA_EXECUTION", "[")
    with pytest.raises(InputError, match="PUMA_EXECUTION: not valid YAML"):
        settings(params)


def test_auto_means_this_machine_where_slurm_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not StageExecution(backend="auto").on_slurm
    assert StageExecution(backend="slurm").on_slurm


def test_a_live_table_has_a_row_per_report_and_goes_on_where_a_killed_task_will(tmp_path: Path) -> None:
    path = tmp_path / "live" / "train.csv"
    with live_table(path) as report:
        report(0, 30)  # nothing to tell
        report(10, 30, {"loss": 2.0, "robust_accuracy": math.nan})
        report(20, 30, {"loss": 1.0, "robust_accuracy": 0.5})
    with live_table(path) as report:  # from a checkpoint after 10 images
        report(20, 30, {"loss": 1.0, "robust_accuracy": 0.5})
        report(30, 30, {"loss": 0.25})
    rows = read_csv(path, ["images", "images_per_s", "loss", "robust_accuracy"])
    assert [row["images"] for row in rows] == ["10", "20", "30"]
    assert [row["loss"] for row in rows] == ["2", "1", "0.25"]
    assert [row["robust_accuracy"] for row in rows] == ["", "0.5", ""]
    assert float(rows[2]["images_per_s"]) > 0


def test_tensorboard_gets_the_figures_and_says_so_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard(tmp_path / "board") as report:
        report(10, 20, {"loss": 2.0})
        report(20, 20, {"loss": 1.5})
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 2.0), (20, 1.5)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="execution.tensorboard: TensorBoard is not installed"), tensorboard(tmp_path):
        pass
