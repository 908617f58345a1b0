"""params.yaml is read as DVC reads it, and anything not as declared is refused with where, what was wanted and what came."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, PositiveInt
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.params import InputError, Section, StageParams, read_yaml


class Attack(Section):
    norm: str
    step_size: Annotated[float, Field(gt=0)]
    num_steps: PositiveInt


class Params(StageParams):
    attack: Attack
    strategy: str = Field(alias="strategies.{name}.score")


VALID = """
attack: {norm: linf, step_size: 3e-4, num_steps: 10}
strategies: {puma: {score: margin}, random: {score: uniform}}
other: {not: read}
"""


def load(tmp_path: Path, text: str, **items: str) -> Params:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return Params.load(path, **items)


def test_a_number_such_as_3e_4_is_a_float(tmp_path: Path) -> None:
    assert load(tmp_path, VALID, name="puma").attack.step_size == 0.0003


def test_an_integer_is_good_where_a_float_is_wanted(tmp_path: Path) -> None:
    assert load(tmp_path, VALID.replace("3e-4", "1"), name="puma").attack.step_size == 1.0


@pytest.mark.parametrize(("name", "score"), [("puma", "margin"), ("random", "uniform")])
def test_a_placeholder_in_a_key_is_filled_with_the_item_of_the_run(tmp_path: Path, name: str, score: str) -> None:
    assert load(tmp_path, VALID, name=name).strategy == score


def test_keys_are_those_of_params_yaml_with_placeholders_unfilled() -> None:
    assert Params.keys() == {"attack": "attack", "strategy": "strategies.{name}.score"}


def test_a_section_cannot_be_changed(tmp_path: Path) -> None:
    params = load(tmp_path, VALID, name="puma")
    with pytest.raises(ValueError, match="frozen"):
        params.attack.num_steps = 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("norm:", "nrom:", "attack.nrom: no such parameter; remove it or correct its name"),
        ("norm: linf, ", "", "attack.norm: missing; add it"),
        ("num_steps: 10", 'num_steps: "10"', "attack.num_steps: Input should be a valid integer, got '10'"),
        ("num_steps: 10", "num_steps: 10.0", "attack.num_steps: Input should be a valid integer, got 10.0"),
        ("num_steps: 10", "num_steps: true", "attack.num_steps: Input should be a valid integer, got True"),
        ("num_steps: 10", "num_steps: 0", "attack.num_steps: Input should be greater than 0, got 0"),
        ("num_steps: 10", "num_steps: null", "attack.num_steps: Input should be a valid integer, got None"),
        ("num_steps: 10", "num_steps: 2024-01-31", "attack.num_steps: Input should be a valid integer, got '2024-01-31'"),
        ("3e-4", ".nan", "attack.step_size: "),
        ("3e-4", ".inf", "attack.step_size: "),
        ("3e-4", "-1e-3", "attack.step_size: Input should be greater than 0, got -0.001"),
        ("norm: linf", "norm: 2", "attack.norm: Input should be a valid string, got 2"),
        ("norm: linf", "norm: linf, 'a{b}': 1", "attack.a{b}: no such parameter"),
        ("attack:", "attacks:", "wanted the key 'attack', but the top level has: attacks, strategies, other"),
        ("{norm: linf, step_size: 3e-4, num_steps: 10}", "7", "attack: Input should be an object, got 7"),
        ("puma:", "pmua:", "wanted the key 'strategies.puma.score', but strategies has: pmua, random"),
        ("{score: margin}", "margin", "wanted the key 'strategies.puma.score', but strategies.puma has: a str"),
        ("{score: margin}", "{score: 1}", "strategies.puma.score: Input should be a valid string, got 1"),
    ],
)
def test_what_is_not_as_declared_is_refused_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in VALID
    with pytest.raises(InputError) as error:
        load(tmp_path, VALID.replace(old, new, 1), name="puma")
    assert message in str(error.value)
    assert str(tmp_path / "params.yaml") in str(error.value)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attack\.norm: .*; attack\.num_steps: "):
        load(tmp_path, VALID.replace("linf", "1").replace("10", "0"), name="puma")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "not valid YAML"),
        (b"a: 1\na: 2", "not valid YAML"),
        (b"a: \xff\xfe", "not valid YAML"),
        (b"- 1", "wanted a mapping of sections, got list"),
        (b"", "wanted a mapping of sections, got NoneType"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_yaml(path)
    assert message in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wanted a YAML file, found none"):
        read_yaml(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", [command.name for command in app.registered_commands])
def test_every_command_explains_itself_as_it_is_written(name: str) -> None:
    """Help is markup to the library, in which brackets are styles."""
    (command,) = [command for command in app.registered_commands if command.name == name]
    told = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert told.exit_code == 0
    assert command.callback is not None
    assert command.callback.__doc__ is not None
    assert "".join(command.callback.__doc__.split()) in "".join(told.output.split())
