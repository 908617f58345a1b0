"""What goes wrong on a cluster, done to a real one: kills, cancellations, lost nodes, preemption, time limits, edits."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.execution.settings import StageExecution
from pipeline.images import ImageStore
from tests.conftest import make_store
from tests.projects import has_ended
from tests.slurm.cluster import SLURM_CONF, Cluster, free_port
from tests.slurm.conftest import Toy
from tests.test_resume import contents

pytestmark = pytest.mark.xdist_group("slurm")
PARALLEL = "exec python -c 'from pipeline.execution.parallel import repro; repro([], 2)'"
WORK = ".runs/generator/*/work/train/"
GENERATOR = {
    "kind": "edm",
    "network": {"channels": 4, "multipliers": [1], "blocks": 1, "attention_resolutions": [], "dropout": 0.0},
    "training": {"steps": 200, "batch_size": 16, "warmup_steps": 2, "ema_decay": 0.9, "flip": True, "seed": 0},
}
MakeToy = Callable[[Cluster], Toy]


def worker_pid(toy: Toy, task: str) -> int:
    return int(json.loads((toy.run_folder / "work" / task / "owner.json").read_text())["pid"])


def test_an_array_in_chunks_runs_a_bounded_number_of_tasks_at_a_time(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(tasks=10, steps=2, step_s=0.2, max_parallel=3)  # MaxArraySize is 8
    child = toy.start()
    most = 0
    while child.poll() is None:
        most = max(most, sum(state == "RUNNING" for state in plain.jobs().values()))
        time.sleep(0.2)
    toy.finish(child)
    toy.check_result(tasks=10, steps=2)
    assert 2 <= most <= 3
    assert sorted(task for _, task in toy.submissions()) == [f"{index:02d}" for index in range(10)]
    assert len({job.split("_")[0] for job, _ in toy.submissions()}) == 2


def test_killed_dvc_and_stage_re_attach_and_submit_nothing_twice(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.hold()
    child = toy.start("exec dvc repro toy")
    toy.until_steps(3)
    stage = toy.stage_of(child)
    child.kill()
    child.wait()
    toy.until(lambda: has_ended(stage), "the end of the stage whose dvc was killed")
    assert "its jobs go on. Run the same command again to re-attach" in toy.output(child)
    child = toy.start()
    toy.until_said(child, "re-attached to 3 jobs")
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child = toy.start("exec dvc repro toy")
    toy.until_said(child, "re-attached to 3 jobs")
    toy.release()
    toy.finish(child)
    assert len(toy.submissions()) == 3
    toy.check_result()
    toy.check_each_step_once()


def test_only_a_killed_task_is_tried_again(either: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(either)
    toy.hold()
    child = toy.start()
    toy.until_steps(9)
    os.kill(worker_pid(toy, "01"), signal.SIGKILL)
    toy.release()
    output = toy.finish(child)
    assert "died as" in output
    assert sorted(task for _, task in toy.submissions()) == ["00", "01", "01", "02"]
    toy.check_result()
    toy.check_each_step_once()


def test_a_cancelled_task_is_left_alone_until_the_next_command_and_the_others_are_kept(
    either: Cluster, make_toy: MakeToy
) -> None:
    toy = make_toy(either)
    toy.hold()
    child = toy.start()
    toy.until_steps(9)
    (job,) = [job for job, task in toy.submissions() if task == "02"]
    either.run("scancel", job)
    toy.until(lambda: job not in either.jobs(), "the end of the cancelled job")
    toy.release()
    output = toy.finish(child, status=1)
    assert "1 of 3 tasks failed, the others are kept" in output
    assert "was cancelled" in output
    assert not (toy.path / "out").exists()
    toy.run()
    assert sorted(task for _, task in toy.submissions()) == ["00", "01", "02", "02"]
    toy.check_result()
    toy.check_each_step_once()


def test_a_wrong_task_is_named_and_not_tried_again(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(steps=2, fail=1)
    output = toy.run(status=1)
    assert "RuntimeError: this task is wrong" in output
    assert len(toy.submissions()) == 3
    assert "this task is wrong" in toy.run("python -m pipeline logs toy --task 01")
    assert not (toy.path / "out").exists()


def test_a_task_that_dies_without_progress_is_tried_twice_again(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(tasks=2, steps=2, die=1)
    output = toy.run(status=1)
    assert "died again without progress, as FAILED" in output
    assert sorted(task for _, task in toy.submissions()) == ["00", "01", "01", "01"]


def test_a_task_that_reaches_its_time_limit_without_progress_is_not_tried_again(full: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(full)
    toy.set(tasks=1, stall=0, timeout_min=1)
    output = toy.finish(toy.start(), status=1, timeout_s=240)
    assert "reached its time limit without progress; raise timeout_min" in output
    assert len(toy.submissions()) == 1


def test_what_sbatch_refuses_is_told_in_its_words(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(partition="nowhere")
    output = toy.run(status=1)
    assert "error: toy: sbatch refused its jobs: sbatch: error: invalid partition specified: nowhere" in output
    assert "correct `execution`" in output
    assert "Traceback" not in output


def test_auto_means_slurm_where_it_knows_a_cluster(
    plain: Cluster, make_toy: MakeToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy(plain)
    toy.set(steps=2, backend="auto")
    toy.run()
    assert len(toy.submissions()) == 3
    auto = StageExecution(backend="auto")
    for name, value in plain.environment.items():
        monkeypatch.setenv(name, value)
    unreachable = tmp_path / "slurm.conf"
    unreachable.write_text(SLURM_CONF.format(**plain.values | {"ctld_port": free_port()}))
    monkeypatch.setenv("SLURM_CONF", str(unreachable))
    assert auto.on_slurm
    monkeypatch.delenv("SLURM_CONF")
    if not Path("/etc/slurm/slurm.conf").exists():
        assert not auto.on_slurm


def test_an_edit_of_execution_does_not_reach_jobs_in_the_queue(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    params = toy.path / "params.yaml"
    plain.run("scontrol", "update", "NodeName=n1,n2", "State=DRAIN", "Reason=test")
    try:
        child = toy.start()
        toy.until(lambda: len(plain.jobs()) == 3, "the jobs")
        params.write_text(params.read_text().replace('"poll_s"', '"no_such_key"'))
    finally:
        plain.run("scontrol", "update", "NodeName=n1,n2", "State=RESUME")
    toy.finish(child)
    toy.check_result()


def test_a_lost_node_leaves_one_writer_that_goes_on_from_the_checkpoint(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(tasks=1, steps=30)
    toy.hold()
    child = toy.start()
    toy.until_steps(3)
    old = worker_pid(toy, "00")
    plain.kill_node("n1")
    toy.until(lambda: "PENDING" in plain.jobs().values(), "the requeue")
    toy.release()
    plain.start_now()
    toy.until(lambda: len({pid for *_, pid in toy.trace()}) > 1, "the restarted job")
    plain.revive_node("n1")
    toy.finish(child)
    toy.check_result(tasks=1, steps=30)
    pids = [pid for *_, pid in toy.trace()]
    new = next(pid for pid in pids if pid != old)
    assert old not in pids[pids.index(new) + 1 :], "the first process wrote after the second had taken over"
    assert len(toy.submissions()) == 1
    assert next(step for _, step, pid in toy.trace() if pid == new) > 1


def test_a_training_on_a_lost_node_ends_with_the_bytes_of_an_undisturbed_one(
    plain: Cluster, make_toy: MakeToy, stores: dict[str, ImageStore]
) -> None:
    project = make_toy(plain)
    store = stores["real"]
    make_store(project.path / "real", (store.shard(0).copy(), store.labels.copy()))
    shared = {"device": "cpu", "threads": 1, "cpus_per_task": 1, "poll_s": 0.5, "timeout_min": 30, "checkpoint_s": 0.3}
    (project.path / "params.yaml").write_text(json.dumps({"generator": GENERATOR, "execution": shared}))
    undisturbed = project.start(
        "DVC_ROOT=elsewhere PUMA_EXECUTION='{backend: local}' exec python -m stages.generator real whole/generator"
    )
    child = project.start("PUMA_EXECUTION='{backend: slurm}' exec python -m stages.generator real killed/generator")
    project.until(lambda: list(project.path.glob(WORK + "checkpoint.safetensors")), "a checkpoint")
    owner = next(project.path.glob(WORK + "owner.json"))
    old = json.loads(owner.read_text())["pid"]
    os.kill(old, signal.SIGSTOP)  # so that it is still at work when the next job has begun
    plain.kill_node("n1")
    project.until(lambda: "PENDING" in plain.jobs().values(), "the requeue")
    plain.start_now()
    project.until(lambda: json.loads(owner.read_text())["pid"] != old, "the restarted job")
    os.kill(old, signal.SIGCONT)
    plain.revive_node("n1")
    project.finish(child)
    project.finish(undisturbed)
    whole, killed = (contents(project.path / name / "generator") for name in ("whole", "killed"))
    assert whole == killed
    project.until(lambda: has_ended(old), "the end of the first process")
    assert project.all_logs().count("Starting with JobEnvironment") == 2


def test_ctrl_c_leaves_the_jobs_and_says_how_to_go_on(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.hold()
    child = toy.start()
    toy.until_steps(9)
    child.send_signal(signal.SIGINT)
    output = toy.finish(child, status=130)
    assert "its jobs go on. Run the same command again to re-attach" in output
    assert len(plain.jobs()) == 3
    child = toy.start()
    toy.until_said(child, "re-attached to 3 jobs")
    toy.release()
    toy.finish(child)
    assert len(toy.submissions()) == 3
    toy.check_result()


def test_ctrl_c_on_dvc_leaves_the_jobs(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.hold()
    child = toy.start("exec dvc repro toy")
    toy.until_steps(9)
    os.killpg(child.pid, signal.SIGINT)  # a terminal sends it to all in the foreground
    output = toy.finish(child, status=255)
    assert "its jobs go on. Run the same command again to re-attach" in output
    assert "Traceback" not in output
    child = toy.start("exec dvc repro toy")
    toy.until_said(child, "re-attached to 3 jobs")
    toy.release()
    toy.finish(child)
    toy.check_result()
    toy.check_each_step_once()
    assert len(toy.submissions()) == 3


def test_a_second_controller_waits_for_the_first(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    first = toy.start()
    toy.until_steps(1)
    second = toy.start()
    toy.finish(first)
    output = toy.finish(second)
    assert "another process runs it; waiting" in output
    toy.check_result()
    assert len(toy.submissions()) == 3
    toy.check_each_step_once()


def test_a_second_repro_waits_for_the_first_and_computes_nothing_again(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.hold()
    first = toy.start("exec dvc repro toy")
    toy.until_steps(3)
    second = toy.start(PARALLEL)
    toy.until_said(second, "is busy, it is being blocked by")
    assert "is busy, it is being blocked by" in toy.run("exec dvc --wait-for-lock repro toy", status=255)
    toy.release()
    toy.finish(first)
    assert toy.finish(second).count("is busy") == 1
    toy.check_result()
    assert len(toy.submissions()) == 3
    toy.check_each_step_once()


def test_two_clones_leave_each_other_alone(plain: Cluster, make_toy: MakeToy) -> None:
    ours, theirs = make_toy(plain), make_toy(plain)
    ours.hold()
    child = ours.start()
    ours.until_steps(9)
    theirs.run()
    theirs.check_result()
    assert theirs.run_folder.name == ours.run_folder.name, "the runs have different keys, so this shows nothing"
    ours.release()
    ours.finish(child)
    ours.check_result()
    ours.check_each_step_once()
    assert len(ours.submissions()) == 3


def test_jobs_whose_submission_was_not_recorded_are_cancelled_and_submitted_again(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.hold()
    child = toy.start()
    toy.until_steps(9)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    unrecorded = set(plain.jobs())
    (toy.run_folder / "jobs.jsonl").unlink()
    child = toy.start()
    toy.until_said(child, "cancelling 3 jobs whose submission was not recorded")
    toy.release()
    toy.finish(child)
    assert not unrecorded & {job for job, _ in toy.submissions()}
    toy.check_result()
    toy.check_each_step_once()


def test_preempted_jobs_go_on_from_their_checkpoints(either: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(either)
    toy.set(tasks=2, partition="low")
    toy.hold()
    child = toy.start()
    toy.until_steps(6)
    before = {pid for *_, pid in toy.trace()}
    either.run("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    toy.until(lambda: all(has_ended(pid) for pid in before), "the preemption")
    toy.release()
    toy.finish(child, timeout_s=180)
    toy.check_result(tasks=2)
    toy.check_each_step_once(tasks=2)
    assert len(toy.submissions()) == 2  # SLURM put them back itself
    assert ("SIGUSR2" in toy.all_logs()) == (either.values["preempt_parameters"] != ""), "the signal that submitit knows"


def test_jobs_that_reach_the_time_limit_go_on_from_their_checkpoints(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(tasks=1, steps=240, timeout_min=1)  # submitit's signal comes 90 s before the end: at once,
    # that is when SLURM looks at the limits, every half minute
    toy.run()
    toy.check_result(tasks=1, steps=240)
    toy.check_each_step_once(tasks=1, steps=240)
    assert len({pid for *_, pid in toy.trace()}) > 1


def test_an_edit_while_jobs_wait_changes_neither_their_code_nor_what_is_published(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    params, code = (toy.path / name for name in ("params.yaml", "stages/toy.py"))
    before = params.read_text(), code.read_text()
    plain.run("scontrol", "update", "NodeName=n1,n2", "State=DRAIN", "Reason=test")
    try:
        child = toy.start()
        toy.until(lambda: len(plain.jobs()) == 3, "the jobs")
        params.write_text(before[0].replace('"steps": 8', '"steps": 9'))
        code.write_text(before[1].replace("{state['sum']}", "wrong"))
    finally:
        plain.run("scontrol", "update", "NodeName=n1,n2", "State=RESUME")
    output = toy.finish(child, status=1)
    assert "were edited while it ran; nothing is published" in output
    assert not (toy.path / "out").exists()
    params.write_text(before[0])
    code.write_text(before[1])
    steps = len(toy.trace())
    toy.run()
    toy.check_result()
    assert len(toy.trace()) == steps, "the tasks were computed again"


def test_without_waiting_the_stage_submits_and_asks_to_be_called_again(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(steps=2, wait=False)
    output = toy.run(status=75)
    assert "run the same command again to go on when the jobs have ended" in output
    assert not (toy.path / "out").exists()
    shown = json.loads(toy.run("python -m pipeline status --json"))
    assert {task["stage"] for task in shown} == {"toy"}
    assert all(task["state"].split()[0] in ("pending", "running", "completing", "done") for task in shown)
    toy.until(lambda: not plain.jobs(), "the end of the jobs")
    shutil.rmtree(toy.run_folder / "tasks/01")  # as if it had died
    assert "run the same command again" in toy.run(status=75)
    toy.until(lambda: not plain.jobs(), "the end of the second try")
    toy.run()
    toy.check_result(steps=2)
    assert sorted(task for _, task in toy.submissions()) == ["00", "01", "01", "02"]


def test_without_waiting_a_wrong_task_is_told_once_before_it_is_tried_again(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.set(steps=2, fail=1, wait=False)
    toy.run(status=75)
    toy.until(lambda: not plain.jobs(), "the end of the jobs")
    assert "RuntimeError: this task is wrong" in toy.run(status=1)
    assert len(toy.submissions()) == 3
    assert "submitting again" in toy.run(status=75)
    assert len(toy.submissions()) == 4


def test_cancel_ends_the_jobs_of_a_stage_and_gc_frees_its_room(plain: Cluster, make_toy: MakeToy) -> None:
    toy = make_toy(plain)
    toy.hold()
    child = toy.start()
    toy.until_steps(9)
    child.send_signal(signal.SIGTERM)
    toy.finish(child, status=130)
    assert "cancelled 3 jobs" in toy.run("python -m pipeline cancel toy")
    toy.until(lambda: not plain.jobs(), "an empty queue")
    freed = json.loads(toy.run("python -m pipeline gc --keep 0 --json"))
    assert [run["stage"] for run in freed] == ["toy"]
    assert freed[0]["bytes"] > 0
    assert not list(toy.path.glob(".runs/toy/*"))


def test_the_doctor_knows_the_cluster(full: Cluster, make_toy: MakeToy) -> None:
    findings = json.loads(make_toy(full).run("python -m pipeline doctor --json"))
    (slurm,) = [finding for finding in findings if finding["what"] == "SLURM"]
    assert slurm["ok"]
    assert "with accounting" in slurm["found"]
