"""Recipes: whole params.yaml files, chosen by name and changed key by key."""

import difflib
import io
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.params import InputError, read_yaml

RECIPES = Path("recipes")


def available() -> list[Path]:
    return sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem)


def summary(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return re.split(r"(?<! al)\. ", " ".join(line.lstrip("# ").rstrip() for line in comment))[0].rstrip(".")


def text_of(path: Path) -> str:
    read_yaml(path)
    return path.read_text()


def parse(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return parsed


def read(name: str, assignments: list[str]) -> str:
    """The text of a recipe, comments kept, with assignments such as "train.training.epochs=2" applied.

    Raises:
        InputError: no such recipe, no such key, or a value that is not YAML.
    """
    path = RECIPES / f"{name}.yaml"
    if path not in available():
        raise InputError(f"wanted one of the recipes {', '.join(p.stem for p in available())}; got {name!r}")
    if not assignments:
        return text_of(path)
    yaml = YAML()
    yaml.width = 120
    content = yaml.load(path.read_text())
    for assignment in assignments:
        assign(content, assignment)
    out = io.StringIO()
    yaml.dump(content, out)
    return out.getvalue()


def assign(content: Any, assignment: str) -> None:
    key, equals, value = assignment.partition("=")
    *parents, last = key.split(".")
    try:
        parsed = YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise InputError(f"--set {assignment}: the value is not valid YAML") from None
    node = content
    for part in parents:
        if not isinstance(node, dict) or not isinstance(node.get(part), dict):
            raise InputError(f"--set {assignment}: wanted KEY=VALUE with a KEY that the recipe has")
        node = node[part]
    if not equals or not isinstance(node, dict):
        raise InputError(f"--set {assignment}: wanted KEY=VALUE with a KEY that the recipe has")
    node[last] = parsed


def difference(before: str, after: str) -> Iterator[str]:
    """Unified diff, line by line."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "params.yaml", "params.yaml (new)", "", "", 1, "")
    return iter(lines)


def write(path: Path, text: str) -> None:
    """Replace path in one step."""
    work = path.with_name(f".{path.name}.tmp")
    work.write_text(text)
    work.rename(path)
