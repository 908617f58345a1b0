"""Runs: start, plan, watch, cancel and clear them, and examine the machine they are for."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.parameters import check, check_quietly
from pipeline.commands.terminal import console, duration, print_table, size
from pipeline.execution import parallel
from pipeline.reporting.headline import TABLE_FOLLOWS, print_headline
from pipeline.threads import num_cores

REPORT = Path("data/report")


def repro(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, e.g. evaluate@puma-0 or train; none means all.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="How many stages run at a time.")] = num_cores(),
    force: Annotated[bool, typer.Option("--force", help="Run stages even where nothing changed.")] = False,
) -> None:
    """Check params.yaml, then run what is out of date, independent stages side by side; else the same as `dvc repro`.
    Ends with the table of results when the whole pipeline is up to date.

    Example: python -m pipeline repro -j 2
    """
    check()
    os.environ[TABLE_FOLLOWS] = "1"  # also where the stage report is restored from the cache and prints nothing
    parallel.repro(targets or [], jobs, force=force)
    if not targets or "report" in targets:
        print_headline(REPORT)


def plan(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages; none means all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a script.")] = False,
) -> None:
    """Show which stages would run and why, without running any, and what a stopped run has already done.

    Example: python -m pipeline plan train
    """
    from pipeline.execution.plan import plan as make

    check_quietly()
    _, stages = make(targets or [])
    done = [f"{stage.tasks_done}/{stage.tasks}" if stage.tasks else "" for stage in stages]
    rows = [(stage.stage, stage.reason, tasks) for stage, tasks in zip(stages, done, strict=True)]
    print_table(
        ("stage", "reason", "tasks done"), rows, [asdict(stage) for stage in stages], "everything is up to date", as_json
    )


def status(
    stage: Annotated[str | None, typer.Argument(help="A stage, such as train or train@puma-0; none means all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a script.")] = False,
) -> None:
    """Show the tasks of the runs that are under way or were stopped: state, job, progress, time, log.

    Example: python -m pipeline status margins
    """
    from pipeline.execution import operate

    tasks = operate.status(stage)
    rows = [
        (t.stage, t.task, t.state, t.job or "", f"{t.done}/{t.total}" if t.total else "", duration(t.seconds), t.log or "")
        for t in tasks
    ]
    header = ("stage", "task", "state", "job", "images", "time", "log")
    print_table(header, rows, operate.as_dicts(tasks), "no run is under way", as_json)


def logs(
    stage: Annotated[str, typer.Argument(help="A stage, such as margins or train@puma-0.")],
    task: Annotated[str | None, typer.Option(help="One task of it, as `status` names them.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many lines of each log.")] = 30,
) -> None:
    """Print the end of what the jobs of a stage printed.

    Example: python -m pipeline logs margins --task real-00003 -n 100
    """
    from pipeline.execution import operate

    console.print(operate.logs(stage, task, lines), markup=False)


def cancel(stage: Annotated[str, typer.Argument(help="A stage, such as margins or train@puma-0.")]) -> None:
    """End the jobs of a stage and let it submit no more. What is finished and every checkpoint are kept.

    Example: python -m pipeline cancel train
    """
    from pipeline.execution import operate

    jobs = operate.cancel(stage)
    console.print(f"cancelled {len(jobs)} jobs: {', '.join(jobs)}" if jobs else f"{stage} has no jobs in the queue")


def gc(
    keep: Annotated[int, typer.Option(min=0, help="How many runs of every stage to keep.")] = 2,
    dry: Annotated[bool, typer.Option("--dry", help="Only say what would be removed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For a script.")] = False,
) -> None:
    """Remove old runs from .runs: checkpoints, unpublished results and logs. Artifacts in data/ and DVC's cache stay.

    Example: python -m pipeline gc --keep 1
    """
    from pipeline.execution import operate

    freed = operate.collect_garbage(keep, dry=dry)
    rows = [(run.stage, run.key, size(run.bytes)) for run in freed]
    if len(rows) > 1:
        rows.append(("total", f"{len(freed)} runs", size(sum(run.bytes for run in freed))))
    print_table(("stage", "run", "would free" if dry else "freed"), rows, operate.as_dicts(freed), "nothing to remove", as_json)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For a script.")] = False) -> None:
    """Check the machine: Python, torch, GPU, SLURM, DVC remote, disk; each with what to do. Fails if something is wrong.

    Example: python -m pipeline doctor
    """
    from pipeline.execution.doctor import examine

    findings = list(examine())
    rows = [
        ({True: "ok", False: "wrong", None: "-"}[f.ok], f.what, f.found, f.advice if f.ok is not True else "") for f in findings
    ]
    print_table(("", "what", "found", "to do"), rows, [asdict(finding) for finding in findings], "", as_json)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)
