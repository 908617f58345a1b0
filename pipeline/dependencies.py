"""The modules of the project that a stage imports, directly or not: what its deps in dvc.yaml must list."""

import ast
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.params import PARAMS_FILE, read_yaml

DVC_FILE = Path("dvc.yaml")
REGISTRY = "pipeline/models/registry.py"
# Where a job runs is not a result, so the execution package is in no stage's deps.
NOT_A_RESULT = "pipeline/execution/"


def code_deps(stage: str, root: Path = Path()) -> list[str]:
    """Sorted paths, from root, of the files in the import closure of stages/<stage>.py; templates beside a module that
    is a package count as part of it. A stage that builds models also has the user's own modules that its sections of
    params.yaml name, and those of the stages whose outputs it reads."""
    seen = closure([f"stages/{stage}.py"], root)
    if REGISTRY in seen and (root / PARAMS_FILE).is_file():  # a job on a cluster has its params elsewhere
        params = read_yaml(root / PARAMS_FILE)
        modules = own_modules_of({name: params.get(name) for name in sections_of(stage, root) or params}, root)
        seen |= closure([path for module in modules for path in files_of(module, root)], root)
    templates = {t for path in seen for t in templates_of(root / path, root)}
    return sorted(path for path in seen | templates if not is_documentation(root / path))


def sections_of(stage: str, root: Path) -> set[str]:
    """The sections of params.yaml that the stage and those that make what it reads have in dvc.yaml; none where it is not
    there."""
    if not (root / DVC_FILE).is_file():
        return set()
    stages = {name: entry.get("do", entry) for name, entry in read_yaml(root / DVC_FILE)["stages"].items()}
    if stage not in stages:
        return set()
    outs = {name: paths(entry.get("outs", [])) for name, entry in stages.items()}
    makers = [name for name, made in outs.items() if any(overlap(a, b) for a in stages[stage].get("deps", []) for b in made)]
    keys = [key for name in (stage, *makers) for key in stages[name].get("params", []) if isinstance(key, str)]
    return {key.split(".")[0] for key in keys}


def paths(entries: list[Any]) -> list[str]:
    """Of outs of dvc.yaml, each a path or a path with options."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def overlap(one: str, other: str) -> bool:
    """Whether one of the paths is the other or lies below it."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def closure(entries: list[str], root: Path) -> set[str]:
    seen: set[str] = set()
    todo = list(entries)
    while todo:
        path = todo.pop()
        if path in seen or path.startswith(NOT_A_RESULT):
            continue
        seen.add(path)
        todo += imports_of(root / path, root)
    return seen


def own_modules_of(params: dict[str, Any], root: Path = Path()) -> list[str]:
    """The modules of architectures such as mynets.cnn in params, and of models that they import."""
    return sorted({name.rpartition(".")[0] for name in architectures(params, root) if "." in name})


def architectures(params: Any, root: Path) -> Iterator[str]:
    """Every value of a key `architecture`, at any depth, and that of the model.json of every model that is imported."""
    if not isinstance(params, dict):
        return
    if isinstance(params.get("architecture"), str):
        yield params["architecture"]
    if params.get("kind") == "import" and isinstance(params.get("path"), str):
        with suppress(OSError, ValueError):  # the stage that imports it says what is wrong
            yield from architectures(json.loads((root / params["path"] / "model.json").read_text()), root)
    for value in params.values():
        yield from architectures(value, root)


def imports_of(path: Path, root: Path) -> list[str]:
    """Files of the project that a module's import statements name, at any depth of its code."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            found += files_of(name, root)
    return found


def files_of(name: str, root: Path) -> list[str]:
    """The module and the packages above it, which Python runs before it."""
    parts = name.split(".")
    found = []
    for depth in range(1, len(parts) + 1):
        base = Path(*parts[:depth])
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if (root / path).is_file():
                found.append(path.as_posix())
    return found


def templates_of(path: Path, root: Path) -> list[str]:
    return [t.relative_to(root).as_posix() for t in path.parent.glob("*.j2")] if path.name == "__init__.py" else []


def is_documentation(path: Path) -> bool:
    """Whether a module is nothing but its docstring."""
    if path.suffix != ".py":
        return False
    body = ast.parse(path.read_text()).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
