"""What would run, and why: a dry run that propagates, which DVC's own does not."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from pipeline.execution.stage_run import run_key
from pipeline.execution.store import RunStore, runs
from pipeline.params import InputError
from pipeline.project import params_class

Graph = dict[str, set[str]]  # stage -> the stages it needs

FEW = 3


@dataclass(frozen=True)
class Planned:
    """A stage that would run, the reason, and how many of its tasks it would find done already: none where a stage before it
    runs, because its inputs are not known yet."""

    stage: str
    reason: str
    tasks_done: int
    tasks: int


def stage_graph(repo: Repo, targets: list[str]) -> Graph:
    """The stages of dvc.yaml that targets need, themselves included, in the order of dvc.yaml; no targets means all.

    Raises:
        InputError: a target is no stage.
    """
    graph = repo.index.graph
    needs = {stage.addressing: {need.addressing for need in graph.successors(stage)} for stage in graph.nodes}
    wanted, todo = set(), list(targets or needs)
    while todo:
        name = todo.pop()
        family = [stage for stage in needs if stage == name or stage.startswith(f"{name}@")]
        if not family:
            raise InputError(f"wanted stages of dvc.yaml, got {name!r}; `dvc stage list` shows them")
        todo += [need for stage in family for need in needs[stage] if need not in wanted]
        wanted |= set(family)
    return {stage: needs[stage] for stage in needs if stage in wanted}


def plan(targets: list[str]) -> tuple[Graph, list[Planned]]:
    """All stages that targets need, and those that `dvc repro` would run, in an order in which they can run. A stage below
    one that runs is listed too: if that gives the same bytes as before, it will not run.

    Raises:
        InputError: a target is no stage.
    """
    with closing(Repo()) as repo:  # which reads dvc.lock, slowly: once for both
        graph = stage_graph(repo, targets)
        reasons = {stage.addressing: reason_of(stage) for stage in repo.index.stages if stage.addressing in graph}
    planned: dict[str, Planned] = {}
    for name in ordered(graph):
        upstream = [need for need in graph[name] if need in planned]
        reason = reasons.get(name) or (f"after {', '.join(sorted(upstream))}" if upstream else None)
        if reason:
            planned[name] = Planned(name, reason, *((0, 0) if upstream else stored(name)))
    return graph, list(planned.values())


def ordered(graph: Graph) -> list[str]:
    """Stages after all that they need."""
    order: list[str] = []
    while len(order) < len(graph):
        order += [name for name in graph if name not in order and graph[name] <= {*order}]
    return order


def reason_of(stage: Any) -> str | None:
    """Why DVC finds a stage changed, in a few words; None if it does not."""
    if not any(out.hash_info for out in stage.outs):
        return "has not run yet"
    with stage.repo.lock:
        entries = stage.status().get(stage.addressing, [])
    changed: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry, str):
            changed.setdefault(entry, [])
            continue
        for changes in entry.values():
            for path, change in changes.items():
                keys = list(change) if isinstance(change, dict) else [path]
                kind = "params" if isinstance(change, dict) else "data" if path.startswith("data/") else "code"
                changed.setdefault(f"{kind} {change if isinstance(change, str) else 'changed'}", []).extend(map(str, keys))
    return "; ".join(in_words(kind, names) for kind, names in changed.items()) or None


def in_words(kind: str, names: list[str]) -> str:
    """`params changed: train.training.lr`, and no more than a few names."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return f"{kind}: {', '.join(names[:FEW])}{more}" if names else kind


def stored(stage: str) -> tuple[int, int]:
    """Finished tasks and all tasks of the run that the stage would take up: params, inputs and code are what they were."""
    found = [run for run in runs(stage) if run.stage == stage]
    places = {(note["target"], *note["paths"]) for note in map(RunStore.description, found)}  # mostly one: inputs are read
    name = stage.partition("@")[0]
    keys = {run_key(name, Path(target), params_class(name).load(), [*map(Path, paths)]) for target, *paths in places}
    for run in found:
        if run.key in keys:
            tasks = run.tasks()
            return sum(run.is_done(task) for task in tasks), len(tasks)
    return 0, 0
