import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.execution import parallel, progress
from pipeline.execution.settings import device, settings
from pipeline.params import InputError

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
    assert parallel.stage_graph(["second"]) == {"first": set(), "second": {"first"}}
    assert set(parallel.stage_graph([])) == {"first", "second", "side", "wrong", "after"}
    with pytest.raises(InputError, match="wanted stages of dvc.yaml, got 'third'"):
        parallel.stage_graph(["third"])
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
    assert lines == ["work: 1000/1000, 0 s left loss 0.5"]


def test_an_interrupt_stops_the_running_stage(project: Path) -> None:
    (project / "dvc.yaml").write_text('stages: {slow: {cmd: "echo $$ > pid; sleep 60", outs: [never]}}\n')
    code = "from pipeline.execution import parallel; parallel.repro([], 1)"
    root = Path(__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (project / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    stage = int((project / "pid").read_text())
    child.send_signal(2)
    assert child.wait(timeout=30) != 0
    while Path(f"/proc/{stage}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{stage}").exists()
