"""synthesize: the store of synthetic images, drawn from the generator, read from .npz files, a stand-in, or empty."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator

from pipeline.artifacts import read_json, write_json
from pipeline.edm import EdmGenerator, load_generator
from pipeline.edm.sampling import Draw, EdmSourceParams, image_sampler, sample_images
from pipeline.edm.selecting import (
    MarginSelection,
    NoSelection,
    Score,
    Selector,
    SelectParams,
    TopConfidence,
    account,
    given_thresholds,
    pilot_thresholds,
    scorer,
)
from pipeline.execution import Task, device, guarded_publish, stage_run
from pipeline.image_writing import join_stores, write_store
from pipeline.images import ImageStore
from pipeline.models.checkpoint import describe, load_model
from pipeline.params import InputError, Section, StageParams
from pipeline.sources.left_out import Given, LeftOutParams, left_out
from pipeline.sources.npz import Archives, NpzSyntheticParams, source_rows, stream
from pipeline.sources.source import expand
from pipeline.stage import run

CPU = torch.device("cpu")


class NoSyntheticParams(Section):
    """No synthetic images."""

    kind: Literal["none"]


class SynthesizeSection(Section):
    """`select` has the guide of the stage `guide` choose among the images while they are drawn."""

    source: Annotated[EdmSourceParams | NpzSyntheticParams | LeftOutParams | NoSyntheticParams, Field(discriminator="kind")]
    select: SelectParams = NoSelection(kind="none")
    shard_rows: PositiveInt

    @model_validator(mode="after")
    def only_what_is_drawn_is_selected(self) -> Self:
        if self.select.kind != "none" and not isinstance(self.source, EdmSourceParams):
            raise ValueError(
                f"select: wanted none, unless source.kind is edm (a strategy can prune other images), got {self.select.kind}"
            )
        return self


class SynthesizeParams(StageParams):
    synthesize: SynthesizeSection


def drawing(section: SynthesizeSection, train: ImageStore, generator_path: Path, guide_path: Path) -> tuple[Draw, Score]:
    """What draws images and what scores them, for a selection."""
    assert isinstance(section.source, EdmSourceParams)
    assert not isinstance(section.select, NoSelection)
    generator = load_generator(generator_path, device(), classes=train.classes, shape=train.shape)
    guide, _ = load_model(guide_path / "best", device())
    draw = image_sampler(generator.net, section.source.seed, generator.sigma_data, section.source.sampler)
    return draw, scorer(section.select, guide, device())


def pilot(task: Task, train_path: Path, generator_path: Path, guide_path: Path) -> None:
    """The thresholds of the selection, one per class."""
    section, train = SynthesizeParams.model_validate_json(task.params).synthesize, ImageStore.open(train_path)
    assert isinstance(section.source, EdmSourceParams)
    assert isinstance(section.select, TopConfidence | MarginSelection)
    draw, score = drawing(section, train, generator_path, guide_path)
    found = pilot_thresholds(section.select, draw, score, len(train.classes), section.source.batch_size)
    write_json(task.output / "thresholds.json", found)


def select(
    task: Task, train_path: Path, generator_path: Path, guide_path: Path, start: int, stop: int, thresholds: list[float]
) -> None:
    """The images of one shard, a store of its own, drawn until they are accepted, and how often each row was drawn."""
    section, train = SynthesizeParams.model_validate_json(task.params).synthesize, ImageStore.open(train_path)
    assert isinstance(section.source, EdmSourceParams)
    assert not isinstance(section.select, NoSelection)
    selector = Selector(*drawing(section, train, generator_path, guide_path), thresholds, section.select.max_attempts)
    chunks = selector.images(start, stop, section.source.batch_size, task.report)
    origin = origin_of(section.source, load_generator(generator_path, CPU, classes=train.classes, shape=train.shape))
    write_store(task.output / "store", chunks, classes=train.classes, shape=train.shape, shard_rows=stop - start, origin=origin)
    np.save(task.output / "attempts.npy", np.concatenate(selector.attempts), allow_pickle=False)


def draw(task: Task, train_path: Path, generator_path: Path, guide_path: Path, start: int, stop: int) -> None:  # noqa: ARG001
    """The images of one shard, a store of its own."""
    source = SynthesizeParams.model_validate_json(task.params).synthesize.source
    assert isinstance(source, EdmSourceParams)
    train = ImageStore.open(train_path)
    generator = load_generator(generator_path, device(), classes=train.classes, shape=train.shape)
    chunks = sample_images(
        generator.net, start, stop, batch_size=source.batch_size, seed=source.seed, sigma_data=generator.sigma_data,
        sampler=source.sampler, progress=task.report,
    )  # fmt: skip
    origin = origin_of(source, generator)
    write_store(task.output / "store", chunks, classes=train.classes, shape=train.shape, shard_rows=stop - start, origin=origin)


def origin_of(source: EdmSourceParams, generator: EdmGenerator) -> dict[str, Any]:
    """For the store: what determines the images, whether mirrored ones may be among them, and their licence."""
    settings = {"batch_size": source.batch_size, "seed": source.seed, **source.sampler.model_dump()}
    known = {name: value for name, value in (("licence", generator.licence), ("flip", generator.flip)) if value is not None}
    return {"kind": "edm", "generator": generator.digest, **settings, **known}


def guide_digest(guide_path: Path) -> str:
    """Of the weights of the guide.

    Raises:
        InputError: there is none.
    """
    if not (guide_path / "best").is_dir():
        raise InputError(
            "synthesize.select: wanted a guide to select with, got guide.kind: none; set guide.kind to train or import"
        )
    digest: str = describe(guide_path / "best")["digest"]
    return digest


def read(source: NpzSyntheticParams | LeftOutParams | NoSyntheticParams, train: ImageStore) -> Given:
    """What exists already."""
    if isinstance(source, NoSyntheticParams):
        return Given({"kind": "none"}, iter(()))
    if isinstance(source, LeftOutParams):
        return left_out(source, train)
    archives = Archives.open(expand(source.files), source.image_key, source.label_key)
    count, chunks = stream(**source.model_dump(exclude={"kind", "filtered"}))
    origin = {"kind": "npz", "files": archives.origin(), "seed": source.seed, "filtered": source.filtered}
    return Given(origin, chunks, lambda: source_rows(origin, count))


def write_given(target: Path, given: Given, train: ImageStore, shard_rows: int) -> None:
    """A store of images that exist already, with their rows in the source, and the list of those that cannot be read."""
    write_store(
        target, given.chunks, classes=train.classes, shape=train.shape, shard_rows=shard_rows, origin=given.origin,
        source_rows=given.source_rows,
    )  # fmt: skip
    if given.corrupt is not None:
        write_json(target / "corrupt.json", given.corrupt.listed())


def shards(num_images: int, rows: int) -> dict[str, dict[str, Any]]:
    """Name -> rows of each shard."""
    starts = range(0, num_images, rows)
    return {f"{start // rows:05d}": {"start": start, "stop": min(start + rows, num_images)} for start in starts}


def main(train_path: Path, generator_path: Path, guide_path: Path, synthetic_path: Path) -> None:
    params = SynthesizeParams.load()
    section, train = params.synthesize, ImageStore.open(train_path)
    source, rows, rule = section.source, section.shard_rows, section.select
    if not isinstance(source, EdmSourceParams):
        with guarded_publish("synthesize", params, [train_path], synthetic_path) as work:
            write_given(work, read(source, train), train, rows)
        return
    origin = origin_of(source, load_generator(generator_path, CPU, classes=train.classes, shape=train.shape))
    origin["select"] = rule.kind
    inputs, tasks = [train_path, generator_path, guide_path], shards(source.num_images, rows)
    with stage_run("synthesize", params, inputs, synthetic_path) as this:
        if isinstance(rule, NoSelection):
            parts = this.run(draw, tasks)
        else:
            guide, thresholds = guide_digest(guide_path), given_thresholds(rule, len(train.classes))
            if thresholds is None:
                thresholds = read_json(this.run(pilot, {"pilot": {}})[0] / "thresholds.json")
            parts = this.run(select, {name: shard | {"thresholds": thresholds} for name, shard in tasks.items()})
            attempts = np.concatenate([np.load(part / "attempts.npy", allow_pickle=False) for part in parts])
            evaluations = source.sampler.evaluations
            origin["selection"] = account(rule, guide, thresholds, attempts, train.classes, evaluations)
        with this.publish() as work:
            join_stores(work, [part / "store" for part in parts], origin)


if __name__ == "__main__":
    run(main)
