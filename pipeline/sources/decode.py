"""Encoded images to arrays, on every core. Processes, not threads: PIL holds the GIL for most of a small image."""

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.images import Chunk, Images, Labels
from pipeline.params import InputError
from pipeline.sources.rows import Rows

TASK_ROWS = 256
ROWS_PER_PROCESS = 2048  # starting a process costs as much as decoding a few thousand small images

Encoded = tuple[str, bytes | Path | None]  # where it comes from (for errors), and its bytes or its file


def decode(where: str, data: bytes | Path | None, *, size: int | None, channels: int) -> Images:
    """One encoded image to uint8 (H, W, C), upright by its EXIF orientation, alpha dropped, 1 (grey) or 3 (RGB) channels.

    With a size the shorter side becomes size (bicubic, antialiased) and the centre is cut out: (size, size, C); a JPEG far
    larger than that is decoded at a reduced scale, never below twice the size.

    Raises:
        InputError: no image, not an image, damaged, or of more than 8 bits per channel.
    """
    if data is None:
        raise InputError(f"{where}: wanted an encoded image, got null")
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            if size is not None:
                image.draft(None, (2 * size, 2 * size))
            if image.format != "JPEG" or image.info.keys() & {"exif", "xmp"}:  # a fifth of the time of a small JPEG without
                ImageOps.exif_transpose(image, in_place=True)
            pixels = None if image.mode.startswith(("I", "F")) else to_array(image, size, channels)
    except Exception as error:  # what PIL raises on damaged bytes is open-ended: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{where}: not a readable image ({error}); repair or remove it") from error
    if pixels is None:
        raise InputError(f"{where}: wanted 8 bits per channel, got an image of mode {image.mode}; convert it")
    return pixels


def to_array(image: Image.Image, size: int | None, channels: int) -> Images:
    """Convert, resize and crop as in `decode`: uint8 (H, W, C)."""
    if image.mode == "P":
        image = image.convert("RGBA")  # PIL warns when a palette with transparency becomes RGB at once
    mode = "RGB" if channels == 3 else "L"
    image = image if image.mode == mode else image.convert(mode)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, channels)


def decode_batch(batch: list[Encoded], shape: tuple[int, int, int], size: int | None) -> Images:
    """Decode B images of one shape: uint8 (B, H, W, C).

    Raises:
        InputError: an image cannot be decoded or has another shape.
    """
    images = np.empty((len(batch), *shape), np.uint8)
    for index, (where, data) in enumerate(batch):
        image = decode(where, data, size=size, channels=shape[2])
        if image.shape != shape:
            raise InputError(
                f"{where}: wanted {shape[0]} x {shape[1]} pixels as the first image, got {image.shape[0]} x {image.shape[1]}; "
                "set `size` to resize and crop all images"
            )
        images[index] = image
    return images


def decode_all(
    batches: Iterable[list[Encoded]], labels: Labels, rows: Rows, *, shape: tuple[int, int, int], size: int | None
) -> Iterator[Chunk]:
    """Decode batches, which together hold the given rows (B,) of a split with labels (n,), in order, on all cores."""
    done = 0
    for images in in_order(batches, shape, size, num_workers=min(num_cores(), len(rows) // ROWS_PER_PROCESS)):
        yield images, labels[rows[done : done + len(images)]]
        done += len(images)


def in_order(
    batches: Iterable[list[Encoded]], shape: tuple[int, int, int], size: int | None, num_workers: int
) -> Iterator[Images]:
    """Images of each batch in turn; a few batches per worker are in flight, so memory does not grow with the stream."""
    if num_workers < 2:
        yield from (decode_batch(batch, shape, size) for batch in batches)
        return
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))
    try:
        pending: deque[Future[Images]] = deque()
        for batch in batches:
            pending.append(pool.submit(decode_batch, batch, shape, size))
            if len(pending) > 4 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Cores this process may use (on SLURM: those of the job)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
