"""An artifact is the old one or the new one, whole, whatever happens while it is replaced."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import publish, read_json
from pipeline.params import InputError
from tests.conftest import ROOT


def write(target: Path, content: str) -> None:
    with publish(target) as work:
        for name in ("a", "b"):
            (work / name).write_text(content)


def contents(target: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in target.iterdir()}


OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "b": "new"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write(tmp_path / "real", "old")
    return tmp_path / "real"


def test_the_new_artifact_takes_the_place_of_the_old_and_nothing_else_stays(target: Path) -> None:
    write(target, "new")
    assert contents(target) == NEW
    assert [path.name for path in target.parent.iterdir()] == ["real"]


def test_a_failure_while_the_artifact_is_made_leaves_the_old_one(target: Path) -> None:
    with pytest.raises(FileNotFoundError), publish(target) as work:
        (work / "missing" / "a").write_text("new")
    assert contents(target) == OLD
    assert [path.name for path in target.parent.iterdir()] == ["real"]


def test_an_old_artifact_that_cannot_be_removed_is_out_of_the_way_and_whole_or_gone(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def fail_on_a_whole_folder(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and not ignore_errors:
            (path / "a").unlink()
            raise OSError("busy")
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", fail_on_a_whole_folder)
    write(target, "new")
    assert contents(target) == NEW


def test_a_new_artifact_that_cannot_take_its_place_leaves_the_old_one(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_for_the_new(self: Path, to: Path) -> Any:
        if (self / "a").read_text() == "new":
            raise OSError("no such luck")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no such luck"):
        write(target, "new")
    assert contents(target) == OLD
    assert [path.name for path in target.parent.iterdir()] == ["real"]


@pytest.mark.parametrize("call", range(8))
def test_a_kill_between_any_two_changes_of_the_disk_leaves_no_half_of_an_artifact(target: Path, call: int) -> None:
    """The process kills itself before its n-th rename or removal of a file or folder."""
    program = f"""
import os, signal, sys
from pathlib import Path
count = 0
def watch(event, arguments):
    global count
    if event in ("os.rename", "os.remove", "os.rmdir"):
        count += 1
        if count > {call}:
            os.kill(os.getpid(), signal.SIGKILL)
from pipeline.artifacts import publish
with publish(Path(sys.argv[1])) as work:
    for name in ("a", "b"):
        (work / name).write_text("new")
    sys.addaudithook(watch)
"""
    run = subprocess.run([sys.executable, "-c", program, str(target)], cwd=ROOT, check=False)
    assert run.returncode in (0, -signal.SIGKILL)
    if target.exists():
        assert contents(target) in (OLD, NEW)
    for left in target.parent.glob(".real.*"):
        assert left.name.endswith(".tmp")  # what `gc` finds
    write(target, "again")
    assert contents(target) == {"a": "again", "b": "again"}


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store.json").write_bytes(content)
    with pytest.raises(InputError, match=r"store\.json: not valid JSON") as error:
        read_json(tmp_path / "store.json")
    assert os.linesep not in str(error.value)
