"""The commands `export` and `export-robustbench`; what they need is imported only when they run."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[str, typer.Argument(help="A run, e.g. puma-0, or a folder with model.json, e.g. data/margin_model/best.")],
    kind: Annotated[Literal["robustbench", "torchscript", "onnx"], typer.Option("--format", help="What it is written for.")],
    to: Annotated[Path | None, typer.Option(help="A new folder; exports/<model>-<format> by default.")] = None,
    checkpoint: Annotated[
        Literal["best", "last"] | None, typer.Option(help="Of a run; by default the one that was evaluated.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Of the weights: mit, or where another can be read.")] = "",
    model_id: Annotated[str, typer.Option("--id", help="For RobustBench: NameYearFirstWord.")] = "",
    title: str = "",
    authors: str = "",
    link: str = "",
    venue: str = "",
    dataset: Annotated[str, typer.Option(help="For RobustBench: cifar10, cifar100 or imagenet.")] = "",
    additional_data: Annotated[bool, typer.Option(help="For RobustBench: images beyond the training set were used.")] = False,
    model_zoo: Annotated[bool, typer.Option(help="For RobustBench: it may add the weights to its model zoo.")] = False,
) -> None:
    """Write a trained model for use elsewhere, with a model card: data, licence, threat, metrics, digests.

    Example: python -m pipeline export puma-0 --format onnx
    """
    from pipeline.exporting.export import export as write
    from pipeline.exporting.robustbench import Paper

    paper = None
    if model_id:
        paper = Paper(model_id, title, authors, link, venue, dataset, additional_data, licence, model_zoo)
    target = to or Path("exports") / f"{model.replace('/', '-')}-{kind}"
    for point in write(Path("data"), model, kind, target, checkpoint=checkpoint, licence=licence, paper=paper):
        print(f"to be done: {point}")
    print(f"wrote {target}")


def export_robustbench(
    run: Annotated[str, typer.Argument(help="A strategy and a seed, e.g. puma-0.")],
    model_id: Annotated[str, typer.Argument(help="NameYearFirstWord, e.g. Maroto2024Puma_WRN-28-10.")],
    to: Annotated[Path, typer.Option(help="A new folder.")] = Path("robustbench"),
    title: str = "",
    authors: str = "",
    link: str = "",
    venue: str = "",
    dataset: Annotated[str, typer.Option(help="cifar10, cifar100 or imagenet, where the source does not tell.")] = "",
    additional_data: Annotated[bool, typer.Option(help="Whether images beyond the training set were used.")] = False,
    licence: Annotated[str, typer.Option(help="Of the weights: mit, or where another can be read.")] = "",
    model_zoo: Annotated[bool, typer.Option(help="Whether RobustBench may add the weights to its model zoo.")] = False,
) -> None:
    """The same as `export RUN --format robustbench --id ID`: model_info, weights in its key layout, the text of the issue,
    and what is missing.

    Example: python -m pipeline export-robustbench puma-0 Maroto2024Puma --title "PUMA"
    """
    export(
        run, "robustbench", to, model_id=model_id, title=title, authors=authors, link=link, venue=venue, dataset=dataset,
        additional_data=additional_data, licence=licence, model_zoo=model_zoo,
    )  # fmt: skip
