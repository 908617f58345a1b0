"""Parameters: params.yaml in, one frozen, strictly checked section per group of knobs out."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

PARAMS_FILE = Path("params.yaml")


class InputError(ValueError):
    """Something the user gave is wrong; the message says what was wanted, what came and what to do."""

    exit_status = 1


class Section(BaseModel):
    """A group of parameters: immutable, unknown keys and coercions (such as "8" for 8) are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StageParams(Section):
    """All that one stage reads. Each field is a key of params.yaml; an alias such as `strategies.{strategy}` is a path
    with a placeholder for the item the stage is run for. The fields equal the `params:` of the stage in dvc.yaml."""

    @classmethod
    def keys(cls) -> dict[str, str]:
        """Field name -> key in params.yaml, placeholders unfilled."""
        return {name: field.alias or name for name, field in cls.model_fields.items()}

    @classmethod
    def load(cls, path: Path = PARAMS_FILE, **items: str) -> Self:
        """Read only this stage's keys from params.yaml.

        Raises:
            InputError: the file or a key is missing, or a value has the wrong type or range.
        """
        return cls.from_dict(read_yaml(path), str(path), **items)

    @classmethod
    def from_dict(cls, params: dict[str, Any], origin: str = "params", **items: str) -> Self:
        """As `load`, from params already read."""
        chosen = {key: lookup(params, key.format(**items), origin) for key in cls.keys().values()}
        try:
            return cls.model_validate_json(json.dumps(chosen, default=str), strict=True)
        except ValidationError as error:
            raise InputError(f"{origin}: {explain(error, items)}") from None


def distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    """Validator: no value twice."""
    if len(set(values)) != len(values):
        raise ValueError("wanted different values")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML 1.2 file as DVC does (ruamel: 3e-4 is a number) into a dict."""
    if not path.is_file():
        raise InputError(f"{path}: wanted a YAML file, found none; run from the root of the project")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """As `read_yaml`, from text."""
    try:
        params = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise InputError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(params, dict):
        raise InputError(f"{origin}: wanted a mapping of sections, got {type(params).__name__}")
    return params


def lookup(params: dict[str, Any], key: str, origin: str) -> Any:
    """The value at a dotted key."""
    value: Any = params
    for depth, part in enumerate(key.split(".")):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(map(str, value)) if isinstance(value, dict) else f"a {type(value).__name__}"
            where = ".".join(key.split(".")[:depth]) or "the top level"
            raise InputError(f"{origin}: wanted the key {key!r}, but {where} has: {known}")
        value = value[part]
    return value


def explain(error: ValidationError, items: dict[str, str] | None = None) -> str:
    """One line for all that is wrong: where, what was wanted, what came."""
    lines = []
    for problem in error.errors(include_url=False):
        parts = [str(part) for part in problem["loc"]]
        if parts and items:
            parts[0] = parts[0].format(**items)
        where = ".".join(parts)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: no such parameter; remove it or correct its name")
        elif problem["type"] == "missing":
            lines.append(f"{where}: missing; add it")
        elif problem["type"] == "value_error" and isinstance(problem["input"], dict):  # of a whole section
            lines.append(f"{where}: {problem['ctx']['error']}")
        else:
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}")
    return "; ".join(lines)
