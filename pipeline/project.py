"""The project as a whole: what dvc.yaml says about the stages, held against the code and params.yaml."""

import importlib
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.dependencies import code_deps
from pipeline.execution import ExecutionParams
from pipeline.params import InputError, StageParams, read_yaml

DVC_FILE = Path("dvc.yaml")
PER_RUN = ("models", "evaluations")


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
    """Validate params as every stage will, every strategy included.

    Raises:
        InputError: a section is wrong or missing, or the top level has a key that no stage reads.
    """
    strategies = params.get("strategies")
    if not isinstance(strategies, dict) or not strategies:
        raise InputError(f"{origin}: strategies: wanted a mapping of names to strategies, got {strategies!r}")
    if bad := [name for name in strategies if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name))]:
        raise InputError(f"{origin}: strategies: wanted names of letters, digits, _ and - (they name folders), got {bad}")
    wanted: list[tuple[type[StageParams], str]] = [(ExecutionParams, "")] if "execution" in params else []
    known = {"execution"}
    for stage in stage_names():
        section = params_class(stage)
        keys = section.keys().values()
        known |= {key.split(".")[0] for key in keys}
        wanted += [(section, name) for name in (strategies if any("{strategy}" in key for key in keys) else [""])]
    problems: list[str] = []
    for section, name in wanted:
        try:
            section.from_dict(params, origin, strategy=name)
        except InputError as error:
            problems += [text for text in str(error).removeprefix(f"{origin}: ").split("; ") if text not in problems]
    if unknown := sorted(set(params) - known):
        problems.append(f"no stage reads {', '.join(unknown)}, known sections are {', '.join(sorted(known))}")
    if problems:
        raise InputError(f"{origin}: {'; '.join(problems)}")


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
    return dep.startswith(("pipeline/", "stages/"))


def leftovers(params: dict[str, Any], data: Path) -> list[Path]:
    """Artifacts below data of strategies or seeds that params does not have, and what killed stages left unfinished."""
    strategies = list(params["strategies"])
    runs = {f"{strategy}-{seed}" for strategy in strategies for seed in params["seeds"]}
    stale = [path for path in data.glob("manifests/*") if path.name not in strategies]
    for folder in PER_RUN:
        stale += [path for path in data.glob(f"{folder}/*") if path.name not in runs]
    finished = [path for path in stale if path.is_dir() and not path.name.startswith(".")]
    return sorted([*finished, *data.rglob(".*.tmp")])
