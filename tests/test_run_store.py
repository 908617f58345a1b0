"""The run store of this machine: what it keeps and when, torn files, and edits while a stage runs."""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.execution import Task, guarded_publish, stage_run
from pipeline.execution import store as run_store
from pipeline.execution.settings import FROZEN, settings
from pipeline.execution.stage_run import ANEW
from pipeline.execution.store import RunStore
from pipeline.execution.worker import Owner
from pipeline.params import InputError, Section, StageParams
from tests.conftest import ROOT


class ThresholdSection(Section):
    eps: float


class ExampleParams(StageParams):
    threat: ThresholdSection


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "params.yaml").write_text("threat: {eps: 0.1}\nexecution: {backend: local}\n")
    (tmp_path / "source").write_text("1")
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    found = RunStore(tmp_path / ".runs/toy/key")
    found.work("a").mkdir(parents=True)
    return found


def leave_a_trace(task: Task, source: Path) -> None:
    with Path("trace").open("a") as trace:
        trace.write(source.read_text())
    (task.output / "result").write_text(source.read_text())


def publish_copy(project: Path) -> RunStore:
    """Run a stage of one task; its run."""
    with stage_run("perceptron", ExampleParams.load(), [project / "source"], project / "out") as this:
        (part,) = this.run(leave_a_trace, {"a": {}})
        with this.publish() as work:
            shutil.copy(part / "result", work / "result")
    return this.store


def test_a_result_that_dvc_lost_is_published_again_without_computing_it(project: Path) -> None:
    run = publish_copy(project)
    shutil.rmtree(project / "out")  # as dvc does at its next start if it was killed while it hashed
    publish_copy(project)
    assert (project / "trace").read_text() == "1"
    assert (project / "out/result").read_text() == "1"
    assert not (run.path / "work").exists()


def test_a_forced_run_computes_what_is_published_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_copy(project)
    monkeypatch.setenv(ANEW, "1")
    publish_copy(project)
    assert (project / "trace").read_text() == "11"


def test_the_tasks_of_a_published_run_go_when_another_is_published(project: Path) -> None:
    first = publish_copy(project)
    (project / "source").write_text("2")
    second = publish_copy(project)
    assert (first.is_done("a"), second.is_done("a")) == (False, True)
    assert "published" in first.description(), "the record of the run stays"


def test_the_tasks_of_a_run_that_was_not_published_stay_when_another_is(project: Path) -> None:
    with stage_run("perceptron", ExampleParams.load(), [project / "source"], project / "out") as stopped:
        stopped.run(leave_a_trace, {"a": {}})
    (project / "source").write_text("2")
    publish_copy(project)
    assert stopped.store.is_done("a")


def test_removal_that_is_cut_off_leaves_no_task_that_seems_done(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.finish("a", store.work("a"), {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it begins
        store.remove("tasks")
    assert not store.is_done("a")
    assert len(list(store.path.glob(".*.removed"))) == 1
    store.remove("tasks")
    assert not list(store.path.glob(".*.removed"))


def test_a_task_replaces_what_is_there_unfinished(store: RunStore) -> None:
    store.output("a").mkdir(parents=True)
    (store.output("a") / "half").touch()
    (store.work("a") / "result").touch()
    store.finish("a", store.work("a"), {})
    assert {path.name for path in store.output("a").iterdir()} == {"result", "done.json"}


def test_a_record_that_was_cut_off_is_skipped_and_spoils_no_other(store: RunStore) -> None:
    store.record({"a": "1_0", "b": "1_1"})
    file = store.path / "jobs.jsonl"
    file.write_text(file.read_text()[:-20])
    assert store.jobs() == {"a": "1_0"}
    store.record({"b": "2"})
    assert store.jobs() == {"a": "1_0", "b": "2"}
    with file.open("ab") as end:
        end.write(b'{"job": "3", "ta\xff}\n[]\n')
    assert store.jobs() == {"a": "1_0", "b": "2"}


def test_a_snapshot_of_other_code_than_that_of_the_run_is_refused_and_taken_again(project: Path) -> None:
    with stage_run("perceptron", ExampleParams.load(), [], project / "out") as this:
        this.check_snapshot()
        module = this.store.path / "code/stages/perceptron.py"
        before = module.read_text()
        module.write_text(before + "# edited between the key and the snapshot\n")
        with pytest.raises(InputError, match="code were edited while it ran; nothing is published"):
            this.check_snapshot()
        this.check_snapshot()
        assert module.read_text() == before


def test_an_edit_while_a_stage_waits_for_another_to_end_is_told(project: Path) -> None:
    params, told = ExampleParams.load(), list[str]()
    with stage_run("perceptron", params, [project / "source"], project / "out") as first:

        def wait() -> None:
            try:
                with stage_run("perceptron", params, [project / "source"], project / "out"):
                    told.append("began")
            except InputError as error:
                told.append(str(error))

        second = threading.Thread(target=wait)
        second.start()
        second.join(1)
        assert first.store.is_locked()
        (project / "source").write_text("2")
    second.join(60)
    assert len(told) == 1
    assert "were edited while it ran" in told[0]


@pytest.mark.parametrize("edited", ["params.yaml", "source", "source/below", "code"])
def test_a_stage_without_tasks_publishes_nothing_that_was_edited_meanwhile(
    project: Path, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    inputs = [project / "source"]
    if edited == "source/below":
        inputs[0].unlink()
        inputs[0].mkdir()

    def edit() -> None:
        if edited == "code":
            monkeypatch.setattr(run_store, "code_deps", lambda *_: [])
        else:
            (project / edited).write_text("threat: {eps: 0.2}\n")

    publish_guarded(inputs, "before", lambda: None)
    with pytest.raises(InputError, match="perceptron: its params, inputs or code were edited"):
        publish_guarded(inputs, "after", edit)
    assert (project / "out/result").read_text() == "before"
    assert {path.name for path in project.iterdir()} == {"params.yaml", "source", "out"}


def publish_guarded(inputs: list[Path], text: str, meanwhile: Callable[[], None]) -> None:
    with guarded_publish("perceptron", ExampleParams.load(), inputs, Path("out")) as work:
        (work / "result").write_text(text)
        meanwhile()


@pytest.mark.parametrize("stage", sorted((ROOT / "stages").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_stage_publishes_under_guard(stage: Path) -> None:
    assert not re.search(r"[ ,]publish\b", "".join(re.findall(r"from pipeline.artifacts import .*", stage.read_text())))
    assert re.search(r"guarded_publish\(|this\.publish\(", stage.read_text())


def test_frozen_settings_are_those_of_the_submission(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    monkeypatch.setenv(FROZEN, before.model_dump_json())
    (project / "params.yaml").write_text("execution: {no_such_key: 1}\n")
    monkeypatch.setenv("PUMA_EXECUTION", "{device: cuda}")
    assert settings() == before


def be_superseded(task: Task, source: Path) -> None:  # noqa: ARG001
    Owner(task.scratch)
    raise RuntimeError("of no interest any more")


def fail(task: Task, source: Path) -> None:
    raise RuntimeError(f"{source} is wrong for {task.scratch.name}")


def test_only_the_owner_of_a_task_writes_down_its_error(project: Path) -> None:
    for function, noted in ((fail, True), (be_superseded, False)):
        with stage_run("perceptron", ExampleParams.load(), [project / "source"], project / function.__name__) as this:
            with pytest.raises(RuntimeError):
                this.run(function, {"a": {}})
            assert bool(this.store.error("a")) == noted
