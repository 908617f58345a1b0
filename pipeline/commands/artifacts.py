"""Artifacts and results: show, verify, compare, tabulate, import."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands.terminal import console
from pipeline.params import InputError


def compare(
    first: Annotated[str, typer.Argument(help="A git revision, a dvc experiment, or workspace.")],
    second: Annotated[str, typer.Argument(help="As first.")] = "workspace",
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of the intervals.")] = 0.95,
) -> None:
    """Compare two experiments strategy by strategy, paired on the same test images.

    Example: python -m pipeline compare HEAD keep-60
    """
    from pipeline.reporting import compare as comparison

    one, other = (comparison.read_experiment(name) for name in (first, second))
    changes = comparison.compare(one, other, confidence)
    for line in comparison.report_lines(one, other, changes, confidence):
        console.print(line, markup=False)


def table(
    report: Annotated[Path, typer.Argument(help="A folder with summary.csv and differences.csv.")] = Path("data/report"),
    which: Annotated[Literal["summary", "differences"], typer.Option("--table", help="Strategies, or contrasts.")] = "summary",
    page: Annotated[Path | None, typer.Option("--into", help="A Markdown file to write it into.")] = None,
    name: Annotated[str | None, typer.Option(help="Its place there: between <!-- NAME --> and <!-- /NAME -->.")] = None,
) -> None:
    """A table of a report as Markdown, printed or written into a page: the headline, or the differences of strategies.

    Example: python -m pipeline table results/cifar10-study --into README.md --name cifar10-study
    """
    from pipeline.reporting.markdown import insert, markdown_table

    text = markdown_table(report, which)
    if page is None:
        print(text, end="")
    elif name is None:
        raise InputError("table: wanted --name with --into")
    else:
        insert(page, name, text)


def import_edm(
    file: Annotated[Path, typer.Argument(help="A class-conditional network, e.g. edm-cifar10-32x32-cond-vp.pkl.")],
    to: Annotated[Path | None, typer.Option(help="A new folder; generators/<name of the file> by default.")] = None,
) -> None:
    """Read a network that NVlabs published with EDM without executing its pickle, and print how to use it.

    Example: python -m pipeline import-edm edm-cifar10-32x32-cond-vp.pkl
    """
    from pipeline.edm import importing

    target = to or Path("generators") / file.stem
    made = importing.import_edm(file, target)
    console.print(f"wrote {target}: {made['shape'][0]} pixels, {len(made['classes'])} classes", markup=False)
    console.print(f"licence: {importing.LICENCE}, also of the images; it is recorded in every store of them", markup=False)
    console.print(f"params.yaml: generator: {{kind: imported, path: {target}, digest: {made['digest']}}}", markup=False)


def verify(path: Annotated[Path, typer.Argument(help="An image store, or a folder of them, e.g. data/real.")]) -> None:
    """Read image stores whole and compare every file with its digest and its counts.

    Example: python -m pipeline verify data/synthetic
    """
    from pipeline.verify import stores_below
    from pipeline.verify import verify as problems_of

    stores = stores_below(path)
    problems = [problem for store in stores for problem in problems_of(store)]
    for problem in problems:
        console.print(problem, markup=False)
    if problems:
        raise InputError(
            f"{path}: {len(problems)} problems in {len(stores)} stores; `dvc checkout` restores what is in the cache, "
            "`dvc repro -f` makes it again"
        )
    console.print(f"{path}: {len(stores)} stores, every byte as it was written")


def show(
    path: Annotated[Path, typer.Argument(help="An image store, a margin table or a manifest.")],
    data: Annotated[Path, typer.Option(help="Where the other artifacts are.")] = Path("data"),
    sheet: Annotated[Path | None, typer.Option(help="The contact sheet; sheet-<name>.png by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each kind and class.")] = 6,
    max_classes: Annotated[int, typer.Option(min=1, help="Classes on the contact sheet.")] = 20,
) -> None:
    """Schema, counts and quantiles of an artifact, and a contact sheet of its images.

    Example: python -m pipeline show data/manifests/puma
    """
    from pipeline import show as shown

    for line in shown.describe(path):
        console.print(line, markup=False)
    parts = path.parts[len(data.parts) :] if path.is_relative_to(data) else path.parts[-1:]
    file = sheet or Path(f"sheet-{'-'.join(parts)}.png")
    picture = shown.sheet(path, data, per_group=count, max_classes=max_classes)
    try:
        picture.save(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--sheet: wanted a picture in a folder that exists, such as x.png, got {file} ({error})") from None
    console.print(f"contact sheet: {file}", markup=False)
