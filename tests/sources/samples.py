"""Images, encoded images and opened sources for the tests of the readers."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
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


def write_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar with files of this content, or with entries of any other kind."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            entry.size = len(data) or entry.size
            archive.addfile(entry, io.BytesIO(data) if data else None)
    return path
