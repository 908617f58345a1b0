"""The project as a whole: what dvc.yaml says about the stages, held against the code and params.yaml."""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML

from pipeline.dependencies import DVC_FILE, code_deps, own_modules_of
from pipeline.execution import ExecutionParams
from pipeline.params import InputError, StageParams, read_yaml

PER_RUN = ("models", "evaluations")
SHAPES = {"digits": (8, 8, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "svhn": (32, 32, 3)}


def stage_names() -> list[str]:
    return list(read_yaml(DVC_FILE)["stages"])


def params_class(stage: str) -> type[StageParams]:
    """The one `StageParams` class that stages/<stage>.py defines."""
    module = importlib.import_module(f"stages.{stage}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, StageParams) and value.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"stages/{stage}.py defines {len(classes)} StageParams classes"
    return classes[0]


def check_params(params: dict[str, Any], origin: str) -> None:
    """Validate params as every stage will, every strategy included, and try whether the models can be built.

    Raises:
        InputError: a section is wrong or missing, the top level has a key that no stage reads, or a model has arguments that
            its architecture refuses.
    """
    strategies = params.get("strategies")
    if not isinstance(strategies, dict) or not strategies:
        raise InputError(f"{origin}: strategies: wanted a mapping of names to strategies, got {strategies!r}")
    if bad := [name for name in strategies if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise InputError(
            f"{origin}: strategies: wanted names of letters, digits, _ and - (they name folders; numbers in quotes), got {bad}"
        )
    wanted: list[tuple[type[StageParams], str]] = [(ExecutionParams, "")] if "execution" in params else []
    known = {"execution"}
    for stage in stage_names():
        section = params_class(stage)
        keys = section.keys().values()
        known |= {key.split(".")[0] for key in keys}
        wanted += [(section, name) for name in (strategies if any("{strategy}" in key for key in keys) else [""])]
    problems: list[str] = []
    sections: list[BaseModel] = []
    for section, name in wanted:
        try:
            sections.append(section.from_dict(params, origin, strategy=name))
        except InputError as error:
            problems += [text for text in str(error).removeprefix(f"{origin}: ").split("; ") if text not in problems]
    if unknown := sorted(set(params) - known):
        problems.append(f"no stage reads {', '.join(unknown)}, known sections are {', '.join(sorted(known))}")
    problems += problems_of_models(sections, image_shape(params))
    problems = problems or [*conflicts(params), *problems_of_overrides(sections)]
    if problems:
        raise InputError(f"{origin}: {'; '.join(problems)}")


def conflicts(params: dict[str, Any]) -> list[str]:
    """What sections that are valid by themselves cannot do together."""
    from pipeline.pruning import FloorEps, Strategy, check_norms

    problems = []
    margins, norm, radius = params["margins"], params["threat"]["norm"], params["threat"]["eps_255"]
    for name, given in params["strategies"].items():
        strategy = Strategy.model_validate(given)
        if strategy.score == "grand" and not margins.get("grand", False):
            problems.append(f"strategies.{name}.score: grand wants margins.grand: true")
        try:
            check_norms(strategy, margins.get("norm") or norm, norm)
        except InputError as error:
            problems.append(f"strategies.{name}: {error}")
        if isinstance(strategy.eps, FloorEps) and strategy.eps.min_eps_255 > radius:
            problems.append(f"strategies.{name}.eps.min_eps_255: wanted at most threat.eps_255, {radius}")
        if strategy.applies_to == "synthetic" and params["synthesize"]["source"]["kind"] == "none":
            problems.append(f"strategies.{name}.applies_to: synthetic wants some, but synthesize.source.kind is none")
    synthesize = params["synthesize"]
    if synthesize["source"]["kind"] == "edm" and params["generator"]["kind"] == "none":
        problems.append("synthesize.source.kind: edm wants a generator, but generator.kind is none")
    if synthesize.get("select", {"kind": "none"})["kind"] != "none" and params["guide"]["kind"] == "none":
        problems.append("synthesize.select: wants a guide, but guide.kind is none")
    return problems


def problems_of_overrides(sections: Iterable[BaseModel]) -> list[str]:
    """What is wrong with execution.stages."""
    problems = []
    for section in (section.execution for section in sections if isinstance(section, ExecutionParams)):
        for stage in section.stages:
            if stage not in stage_names():
                problems.append(f"execution.stages.{stage}: no such stage; there are {', '.join(stage_names())}")
                continue
            try:
                section.of_stage(stage)
            except InputError as error:
                problems.append(str(error))
    return problems


def problems_of_models(sections: Iterable[BaseModel], shape: tuple[int, int, int] | None) -> list[str]:
    """What is wrong with the models that validated sections name, each model tried once."""
    from pipeline.models import ModelParams
    from pipeline.models.dry_run import check_model

    found: dict[str, tuple[str, ModelParams]] = {}

    def search(node: BaseModel, where: str) -> None:
        for name, field in type(node).model_fields.items():
            value, key = getattr(node, name), f"{where}{field.alias or name}"
            if isinstance(value, ModelParams):
                found.setdefault(value.model_dump_json(), (key, value))
            elif isinstance(value, BaseModel):
                search(value, f"{key}.")

    for section in sections:
        search(section, "")
    problems = []
    for where, model in found.values():
        try:
            check_model(model, shape)
        except InputError as error:
            problems.append(f"{where}: {error}")
    return problems


def image_shape(params: dict[str, Any]) -> tuple[int, int, int] | None:
    """Shape (H, W, C) of the images that ingest will write, where its source tells without being read."""
    ingest = params.get("ingest")
    source = ingest.get("source") if isinstance(ingest, dict) else None
    if not isinstance(source, dict):
        return None
    size, channels = source.get("size"), source.get("channels", 3)
    if isinstance(size, int) and isinstance(channels, int):
        return size, size, channels
    return SHAPES.get(str(source.get("kind")))


def check_own_modules(params: dict[str, Any]) -> None:
    """Raise an InputError where dvc.yaml does not have the user's own modules of architectures: editing these would rerun
    nothing."""
    modules = {name: name.replace(".", "/") for name in own_modules_of(params)}
    for stage, entry in read_yaml(DVC_FILE)["stages"].items() if modules else ():
        missing = {*code_deps(stage)} - {*entry.get("do", entry).get("deps", [])}
        for module, base in modules.items():
            if {f"{base}.py", f"{base}/__init__.py"} & missing:
                raise InputError(
                    f"dvc.yaml does not list your module {module} in the stage {stage}; run `python -m pipeline deps --write`"
                )


def correct_code_deps(*, write: bool) -> list[str]:
    """Lines such as "train: + pipeline/ema.py" where dvc.yaml differs from the imports; write corrects it in place."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(DVC_FILE.read_text())
    changes = []
    for stage, entry in content["stages"].items():
        body = entry.get("do", entry)
        wanted = code_deps(stage)
        listed = [dep for dep in body["deps"] if is_code(dep)]
        changes += [f"{stage}: + {dep}" for dep in wanted if dep not in listed]
        changes += [f"{stage}: - {dep}" for dep in listed if dep not in wanted]
        body["deps"] = [dep for dep in body["deps"] if not is_code(dep)] + wanted
    if write and changes:
        with DVC_FILE.open("w") as file:
            yaml.dump(content, file)
    return changes


def is_code(dep: str) -> bool:
    return dep.endswith((".py", ".j2"))


def leftovers(params: dict[str, Any], data: Path) -> list[Path]:
    """Artifacts below data of strategies or seeds that params does not have, and what killed stages left unfinished."""
    strategies = list(params["strategies"])
    runs = {f"{strategy}-{seed}" for strategy in strategies for seed in params["seeds"]}
    stale = [path for path in data.glob("manifests/*") if path.name not in strategies]
    for folder in PER_RUN:
        stale += [path for path in data.glob(f"{folder}/*") if path.name not in runs]
    finished = [path for path in stale if path.is_dir() and not path.name.startswith(".")]
    unfinished = [path for path in data.rglob(".*.tmp") if not is_being_written(path)]
    return sorted([*finished, *(path for path in unfinished if not any(p in unfinished for p in path.parents))])


def is_being_written(path: Path) -> bool:
    """Whether the process whose number ends the name of unfinished work, or of a folder above it, is alive."""
    numbers = [found[1] for name in path.parts if (found := re.search(r"\.(\d+)(\.old)?\.tmp$", name))]
    return any(Path("/proc", number).exists() for number in numbers)
