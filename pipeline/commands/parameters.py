"""params.yaml and dvc.yaml: recipes, checks, and what no longer belongs to them."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from pipeline import project, recipes
from pipeline.commands.terminal import console
from pipeline.execution.settings import settings
from pipeline.params import PARAMS_FILE, InputError


def recipe(
    name: Annotated[str | None, typer.Argument(help="A file of recipes/ without its ending; none lists them.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. seeds=[0,1,2].")
    ] = None,
) -> None:
    """Write a recipe to params.yaml and show the difference.

    Example: python -m pipeline recipe cifar10-small --set ingest.source.train=[PATH/train.parquet]
    """
    if name is None:
        for path in recipes.available():
            console.print(f"{path.stem:24} {recipes.summary(path)}")
        return
    text = recipes.read(name, assignments or [])
    project.check_params(recipes.parse(text), f"recipe {name}")
    before = PARAMS_FILE.read_text("utf-8", "replace") if PARAMS_FILE.is_file() else ""
    for line in recipes.difference(before, text):
        style = {"+": "green", "-": "red"}.get(line[:1], "")
        console.print(line, style=style, markup=False)
    recipes.write(PARAMS_FILE, text)
    console.print(f"{PARAMS_FILE} is now the recipe {name}; run `dvc repro`" if before != text else "nothing to change")


def check() -> None:
    """Check every section of params.yaml as its stage will, and build its models without memory; nothing is run."""
    check_quietly()
    console.print(f"{PARAMS_FILE}: all sections are valid")


def check_quietly() -> None:
    params = recipes.parse(recipes.text_of(PARAMS_FILE))
    project.check_params(params, str(PARAMS_FILE))
    project.check_own_modules(params)
    settings()  # those of this machine too


def deps(write: Annotated[bool, typer.Option("--write", help="Correct dvc.yaml in place.")] = False) -> None:
    """Compare the code deps of dvc.yaml with what the stages import (for those who change the code)."""
    changes = project.correct_code_deps(write=write)
    for line in changes:
        console.print(line, markup=False)
    if not changes:
        console.print("dvc.yaml lists exactly what the stages import")
    elif not write:
        raise InputError("dvc.yaml does not list what the stages import; run `python -m pipeline deps --write`")


def tidy() -> None:
    """Remove the artifacts of strategies and seeds that params.yaml no longer has (DVC's cache keeps them), and the
    unfinished ones of killed stages."""
    params = recipes.parse(recipes.text_of(PARAMS_FILE))
    project.check_params(params, str(PARAMS_FILE))
    leftovers = project.leftovers(params, Path("data"))
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        console.print(f"removed {path}")
    if not leftovers:
        console.print("nothing to remove")
