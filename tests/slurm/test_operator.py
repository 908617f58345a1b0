"""What an operator does beside a stage that waits: cancel it for good, watch it, read its logs."""

import json
import re
from collections.abc import Callable

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import Toy

pytestmark = pytest.mark.xdist_group("slurm")
MakeToy = Callable[[Cluster], Toy]

EVERY_SECOND = """
import importlib, runpy
importlib.import_module("pipeline.execution.progress").WATCH_EVERY_S = 1.0
runpy.run_module("stages.toy", run_name="__main__", alter_sys=True)
"""


def test_a_cancelled_stage_submits_no_more_and_goes_on_when_it_is_asked_to(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(tasks=10, steps=4, step_s=0.05, max_parallel=3)
    toy.hold()
    child = toy.start()
    toy.until_steps(9)
    assert len(toy.submissions()) == 8  # an array has at most 8 tasks here, so two are still to come
    assert "error: trian: wanted a stage with a run" in toy.run("python -m pipeline cancel trian", status=1)
    assert "cancelled 8 jobs" in toy.run("python -m pipeline cancel toy")
    assert "error: toy: cancelled; what is done is kept, run the same command again" in toy.finish(child, status=1)
    assert not plain.jobs()
    assert len(toy.submissions()) == 8
    toy.release()
    output = toy.run()
    assert "re-attached" not in output
    assert len(toy.submissions()) == 18
    toy.check_result(tasks=10, steps=4)
    toy.check_each_step_once(tasks=10, steps=4)


def test_the_status_and_the_log_of_a_waiting_stage_tell_how_far_it_is(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(tasks=2, steps=8, step_s=0.5)
    toy.hold()
    child = toy.start(f"exec python -c '{EVERY_SECOND}' source.txt out")
    toy.until_steps(6)
    wait_for(lambda: len(re.findall(r"(?m)^toy: .* images", toy.output(child))) >= 3, "three lines")
    shown = json.loads(toy.run("python -m pipeline status toy --json"))
    assert [(task["stage"], task["task"], task["state"], task["total"]) for task in shown] == [
        ("toy", "00", "running", 8),
        ("toy", "01", "running", 8),
    ]
    assert all(1 <= task["done"] <= 3 for task in shown)  # it is written down every other second
    assert {(task["job"], task["task"]) for task in shown} == set(toy.submissions())
    assert all(0 <= task["seconds"] < 120 for task in shown)
    assert all((toy.path / task["log"]).is_file() for task in shown)
    toy.release()
    output = toy.finish(child)
    assert re.search(r"(?m)^toy: \d+/16 images, \d+ s left, [\d.]+ images/s \d tasks done, \d running, 0 pending$", output)
    assert "toy: 16/16 images" in output
    assert re.findall(r"==> toy (\d+), job", toy.run("python -m pipeline logs toy --task 01")) == ["01"]
