"""Commands around the pipeline. None of them is needed to run it, and changing them reruns nothing."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline import project, recipes
from pipeline.execution import parallel
from pipeline.params import PARAMS_FILE, InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Commands around the pipeline; `dvc repro` runs it.",
)
console = Console(highlight=False, soft_wrap=True)


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(help="A file of recipes/ without its ending; none lists them.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. seeds=[0,1,2].")
    ] = None,
) -> None:
    """Write a recipe to params.yaml and show the difference.

    Example: python -m pipeline recipe cifar10-small --set ingest.source.train=[/data/cifar10/train.parquet]
    """
    if name is None:
        for path in recipes.available():
            console.print(f"{path.stem:24} {recipes.summary(path)}")
        return
    text = recipes.read(name, assignments or [])
    project.check_params(recipes.parse(text), f"recipe {name}")
    before = PARAMS_FILE.read_text() if PARAMS_FILE.is_file() else ""
    for line in recipes.difference(before, text):
        style = {"+": "green", "-": "red"}.get(line[:1], "")
        console.print(line, style=style, markup=False)
    recipes.write(PARAMS_FILE, text)
    console.print(f"{PARAMS_FILE} is now the recipe {name}; run `dvc repro`" if before != text else "nothing to change")


@app.command()
def check() -> None:
    """Check every section of params.yaml as its stage will, without running anything."""
    project.check_params(recipes.parse(recipes.text_of(PARAMS_FILE)), str(PARAMS_FILE))
    console.print(f"{PARAMS_FILE}: all sections are valid")


@app.command()
def deps(write: Annotated[bool, typer.Option("--write", help="Correct dvc.yaml in place.")] = False) -> None:
    """Compare the code deps of dvc.yaml with what the stages import (for those who change the code)."""
    changes = project.correct_code_deps(write=write)
    for line in changes:
        console.print(line, markup=False)
    if not changes:
        console.print("dvc.yaml lists exactly what the stages import")
    elif not write:
        raise InputError("dvc.yaml does not list what the stages import; run `python -m pipeline deps --write`")


@app.command()
def tidy() -> None:
    """Remove the artifacts of strategies and seeds that params.yaml no longer has (DVC's cache keeps them), and the
    unfinished ones of killed stages."""
    params = recipes.parse(recipes.text_of(PARAMS_FILE))
    project.check_params(params, str(PARAMS_FILE))
    leftovers = project.leftovers(params, Path("data"))
    for path in leftovers:
        shutil.rmtree(path)
        console.print(f"removed {path}")
    if not leftovers:
        console.print("nothing to remove")


@app.command()
def repro(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, e.g. evaluate@puma-0 or train; none means all.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="How many stages run at a time.")] = os.cpu_count() or 1,
    force: Annotated[bool, typer.Option("--force", help="Run stages even where nothing changed.")] = False,
) -> None:
    """Check params.yaml, then run what is out of date, independent stages side by side; else the same as `dvc repro`.

    Example: python -m pipeline repro -j 2
    """
    check()
    parallel.repro(targets or [], jobs, force=force)
