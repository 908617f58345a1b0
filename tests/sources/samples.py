"""Images, encoded images and opened sources for the tests of the readers."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from pipeline.images import Chunk, Images, Labels
from pipeline.sources import Source, SourceParams, open_source


def open_params(**params: Any) -> Source:
    adapter: TypeAdapter[SourceParams] = TypeAdapter(SourceParams)
    return open_source(adapter.validate_python(params))


def joined(chunks: Iterable[Chunk]) -> tuple[Images, Labels]:
    images, labels = zip(*chunks, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def encode(pixels: NDArray[Any], mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def pixels(count: int, height: int = 6, width: int = 5, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
