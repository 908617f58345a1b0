"""synthesize: the store of synthetic images, drawn from the generator, read from .npz files, or empty."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from pipeline.edm import load_generator
from pipeline.edm.sampling import EdmSourceParams, sample_images
from pipeline.execution import device, progress
from pipeline.images import Chunk, ImageStore, write_store
from pipeline.params import Section, StageParams
from pipeline.sources.npz import Archives, NpzSyntheticParams, stream
from pipeline.sources.source import expand
from pipeline.stage import run


class NoSyntheticParams(Section):
    """No synthetic images."""

    kind: Literal["none"]


class SynthesizeSection(Section):
    source: Annotated[EdmSourceParams | NpzSyntheticParams | NoSyntheticParams, Field(discriminator="kind")]
    shard_rows: PositiveInt


class SynthesizeParams(StageParams):
    synthesize: SynthesizeSection


def drawn(
    source: EdmSourceParams, generator_path: Path, train: ImageStore, report: Callable[[int, int], None]
) -> tuple[dict[str, Any], Iterator[Chunk]]:
    """Origin and images of the generator, which must be for the classes and the shape of the real images."""
    generator = load_generator(generator_path, device(), classes=train.classes, shape=train.shape)
    settings = {"batch_size": source.batch_size, "seed": source.seed, **source.sampler.model_dump()}
    chunks = sample_images(generator.net, 0, source.num_images, sigma_data=generator.sigma_data, **settings, progress=report)
    return {"kind": "edm", "generator": generator.digest, **settings}, chunks


def read(source: NpzSyntheticParams) -> tuple[dict[str, Any], Iterator[Chunk]]:
    """Origin and images of the files."""
    archives = Archives.open(expand(source.files), source.image_key, source.label_key)
    _, chunks = stream(**source.model_dump(exclude={"kind", "filtered"}))
    return {"kind": "npz", "files": archives.origin(), "seed": source.seed, "filtered": source.filtered}, chunks


def main(train_path: Path, generator_path: Path, synthetic_path: Path) -> None:
    section = SynthesizeParams.load().synthesize
    train = ImageStore.open(train_path)
    origin: dict[str, Any] = {"kind": "none"}
    chunks: Iterator[Chunk] = iter(())
    with progress("synthesize") as report:
        if isinstance(section.source, EdmSourceParams):
            origin, chunks = drawn(section.source, generator_path, train, report)
        elif isinstance(section.source, NpzSyntheticParams):
            origin, chunks = read(section.source)
        write_store(
            synthetic_path, chunks, classes=train.classes, shape=train.shape, shard_rows=section.shard_rows, origin=origin
        )


if __name__ == "__main__":
    run(main)
