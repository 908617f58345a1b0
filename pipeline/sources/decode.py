"""Encoded images to arrays, on every core. Processes, not threads: PIL holds the GIL for most of a small image."""

import io
import os
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.images import Chunk, Images, Labels
from pipeline.params import InputError
from pipeline.sources.corrupt import Corrupt, CorruptImageError
from pipeline.sources.rows import Rows
from pipeline.sources.source import changed
from pipeline.threads import num_cores

TASK_ROWS = 256
ROWS_PER_PROCESS = 2048  # starting a process costs as much as decoding a few thousand small images
MAX_FILE_BYTES = 2**28
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # PIL goes by content: an EPS would reach Ghostscript
MAX_PROPORTION = 100  # longer side over shorter: resized by its shorter side, a thin strip would fill the memory


class Span(NamedTuple):
    """Part of a file: an image in a tar."""

    file: Path
    offset: int
    size: int


class Loose(NamedTuple):
    """An image in a file of its own, as the file was when it was listed."""

    file: Path
    size: int
    mtime_ns: int


Encoded = tuple[str, bytes | Span | Loose | None]  # where it comes from (for errors), and its bytes or where they are
Decoded = tuple[Images, list[tuple[int, CorruptImageError]]]  # the readable images of a batch, and the positions of the others


def decode(where: str, data: bytes | Span | Loose | None, *, size: int | None, channels: int) -> Images:
    """One encoded image to uint8 (H, W, C), upright by its EXIF orientation, alpha dropped, 1 (grey) or 3 (RGB) channels.

    With a size the shorter side becomes size (bicubic, antialiased) and the centre is cut out: (size, size, C), as by
    torchvision's v2.Resize and v2.CenterCrop; a JPEG far larger than that is decoded at a reduced scale, never below
    twice the size.

    Raises:
        CorruptImageError: no image, not an image, damaged, too large to be one, or of more than 8 bits per channel.
        InputError: its file has changed since it was listed.
    """
    if data is None:
        raise CorruptImageError(where, "wanted an encoded image, got null")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(opened(data), formats=FORMATS) as image:
                if size is not None:
                    image.draft(None, (2 * size, 2 * size))
                if image.format != "JPEG" or image.info.keys() & {"exif", "xmp"}:  # a fifth of the time of a small JPEG without
                    ImageOps.exif_transpose(image, in_place=True)
                if image.mode.startswith(("I", "F")):
                    raise CorruptImageError(where, f"wanted 8 bits per channel, got an image of mode {image.mode}")
                return to_array(image, size, channels)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise CorruptImageError(where, "not a readable image (of no known format)") from None
    except Exception as error:  # what PIL raises on damaged bytes is open-ended: OSError, SyntaxError, struct.error, ...
        text = re.sub(r" object at 0x[0-9a-f]+", "", str(error))
        raise CorruptImageError(where, f"not a readable image ({text})") from error


def opened(data: bytes | Span | Loose) -> io.BytesIO:
    """What PIL can open."""
    num_bytes = len(data) if isinstance(data, bytes) else data.size
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"wanted at most {MAX_FILE_BYTES} encoded bytes")
    if isinstance(data, bytes):
        return io.BytesIO(data)
    try:
        with data.file.open("rb") as file:
            file.seek(data.offset if isinstance(data, Span) else 0)
            content = file.read(data.size)
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        raise changed(data.file) from None
    if isinstance(data, Loose) and (found.st_size, found.st_mtime_ns) != (data.size, data.mtime_ns):
        raise changed(data.file)
    if len(content) < data.size:
        raise EOFError(f"{data.file.name} ends before the image does")
    return io.BytesIO(content)


def to_array(image: Image.Image, size: int | None, channels: int) -> Images:
    """Convert, resize and crop as in `decode`: uint8 (H, W, C)."""
    if image.mode == "P":
        image = image.convert("RGBA")  # PIL warns when a palette with transparency becomes RGB at once
    mode = "RGB" if channels == 3 else "L"
    image = image if image.mode == mode else image.convert(mode)
    if size is not None and image.size != (size, size):
        image = centre(image, size)
    return np.asarray(image).reshape(image.height, image.width, channels)


def centre(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to size, the centre cut out; rounding as in torchvision."""
    short, long = sorted(image.size)
    if long > MAX_PROPORTION * short:
        raise ValueError(f"wanted sides in a proportion of at most {MAX_PROPORTION}, got {image.width} x {image.height}")
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def decode_batch(batch: list[Encoded], shape: tuple[int, int, int], size: int | None) -> Decoded:
    """Decode B images of one shape: uint8 (B - corrupt ones, H, W, C), and the corrupt ones with their positions.

    Raises:
        InputError: an image has another shape.
    """
    images, corrupt, filled = np.empty((len(batch), *shape), np.uint8), [], 0
    for index, (where, data) in enumerate(batch):
        try:
            image = decode(where, data, size=size, channels=shape[2])
        except CorruptImageError as error:
            corrupt.append((index, error))
            continue
        if image.shape != shape:
            raise InputError(
                f"{where}: wanted {shape[0]} x {shape[1]} pixels as the first image, got {image.shape[0]} x {image.shape[1]}; "
                "set `size` to resize and crop all images"
            )
        images[filled] = image
        filled += 1
    return images[:filled], corrupt


def decode_all(
    batches: Iterable[list[Encoded]],
    labels: Labels,
    rows: Rows,
    corrupt: Corrupt,
    *,
    shape: tuple[int, int, int],
    size: int | None,
) -> Iterator[Chunk]:
    """Decode batches, which together hold the given rows (B,) of a split with labels (n,), in order, on all cores. Images
    that cannot be read are left out and added to corrupt.

    Raises:
        InputError: an image has another shape, or there are more corrupt ones than its limit.
    """
    done = 0
    num_workers = min(num_cores(), len(rows) // ROWS_PER_PROCESS)
    for images, bad in in_order(batches, shape, size, num_workers):
        batch_rows = rows[done : done + len(images) + len(bad)]
        done += len(batch_rows)
        for index, error in bad:
            corrupt.add(int(batch_rows[index]), error)
        yield images, labels[np.delete(batch_rows, [index for index, _ in bad])]


def first_shape(images: Iterable[Encoded], channels: int) -> tuple[int, int, int]:
    """(H, W, C) of the first image that can be read.

    Raises:
        InputError: there is none.
    """
    problem: CorruptImageError | None = None
    for where, data in images:
        try:
            height, width, _ = decode(where, data, size=None, channels=channels).shape
        except CorruptImageError as error:
            problem = problem or error
            continue
        return height, width, channels
    raise problem or InputError("wanted at least one image, got none")


def in_order(
    batches: Iterable[list[Encoded]], shape: tuple[int, int, int], size: int | None, num_workers: int
) -> Iterator[Decoded]:
    """Images of each batch in turn; a few batches per worker are in flight, so memory does not grow with the stream."""
    if num_workers < 2:
        yield from (decode_batch(batch, shape, size) for batch in batches)
        return
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))
    try:
        pending: deque[Future[Decoded]] = deque()
        for batch in batches:
            pending.append(pool.submit(decode_batch, batch, shape, size))
            if len(pending) > 4 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
