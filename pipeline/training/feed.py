"""Batches of a training, one step after the other: the images lie on the GPU where they fit, and else stay in the memory maps
of their stores, of which a thread reads what the next steps need."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.artifacts import SOURCES
from pipeline.params import InputError
from pipeline.training.batch import Batch, Plan, Rows
from pipeline.training.pools import Pool
from pipeline.training.sampler import Places, draw

Placement = Literal["auto", "device", "memmap"]

AHEAD = 2  # steps that are read before they are due
LARGEST_SHARE = 0.4  # of the free memory of a GPU that images may take: the rest is for the model
COPIED_ROWS = 2**16


class Mapped:
    """The rows of the pools, real ones first, read from the memory maps; into pinned memory where the device is a GPU."""

    ahead = AHEAD

    def __init__(self, pools: dict[str, Pool], device: torch.device) -> None:
        self.pools, self.pinned = [pools[source] for source in SOURCES], device.type == "cuda"
        self.first = np.cumsum([0, *map(len, self.pools)])

    def read(self, places: Places) -> Rows:
        """The rows at places (B,)."""
        images = np.empty((len(places), *self.pools[0].store.shape), np.uint8)
        labels, eps = np.empty(len(places), np.int64), np.empty(len(places), np.float32)
        for pool, first in zip(self.pools, self.first, strict=False):
            here = np.flatnonzero((places >= first) & (places < first + len(pool)))
            rows = pool.rows[places[here] - first].astype(np.int64)
            images[here], labels[here] = pool.store.batch(rows), pool.store.compact_labels[rows]
            eps[here] = pool.eps[places[here] - first]
        rows = Rows(*map(torch.from_numpy, (images, labels, eps)))
        return Rows(rows.images.pin_memory(), rows.labels.pin_memory(), rows.eps) if self.pinned else rows


class Resident:
    """As `Mapped`, with all of the images as uint8 on the device."""

    ahead = 0

    def __init__(self, pools: dict[str, Pool], device: torch.device) -> None:
        source, count = Mapped(pools, device), sum(map(len, pools.values()))
        shape = pools["real"].store.shape
        self.rows = Rows(
            torch.empty((count, *shape), dtype=torch.uint8, device=device),
            torch.empty(count, dtype=torch.int64, device=device),
            torch.empty(count, dtype=torch.float32),
        )
        for first in range(0, count, COPIED_ROWS):
            part = slice(first, min(first + COPIED_ROWS, count))
            rows = source.read(np.arange(part.start, part.stop)).to(device)
            self.rows.images[part], self.rows.labels[part], self.rows.eps[part] = rows.images, rows.labels, rows.eps

    def read(self, places: Places) -> Rows:
        here = torch.from_numpy(places)
        index = here.to(self.rows.labels.device, non_blocking=True)
        return Rows(self.rows.images[index], self.rows.labels[index], self.rows.eps[here])


def place_pools(pools: dict[str, Pool], device: torch.device, placement: Placement) -> Mapped | Resident:
    """Put the images where the training reads them: `auto` is on the GPU if they take at most 40 % of its free memory.

    Raises:
        InputError: `device` without a GPU, whose memory alone may hold a whole set.
    """
    on_gpu = device.type == "cuda"
    if placement == "device" and not on_gpu:
        raise InputError("execution.placement: device wants a GPU; on a CPU images stay in their files, choose auto or memmap")
    if placement == "auto" and on_gpu:
        size = sum(len(pool) * prod(pool.store.shape) for pool in pools.values())
        placement = "device" if size <= LARGEST_SHARE * torch.cuda.mem_get_info(device)[0] else "memmap"
    return Resident(pools, device) if placement == "device" else Mapped(pools, device)


def feed(
    source: Mapped | Resident,
    plan: Plan,
    counts: tuple[int, int],
    *,
    synthetic_fraction: float,
    parts: list[NDArray[np.int64]],
    steps: range,
    device: torch.device,
) -> Iterator[Iterator[Batch]]:
    """For each of the steps the micro-batches of this rank, which are the places `parts` of the global batch; counts are the
    real and synthetic rows of source. A micro-batch is made when it is asked for, before the next step."""

    def read(step: int) -> list[list[Rows]]:
        places = draw(
            *counts, step, batch_size=plan.batch_size, synthetic_fraction=synthetic_fraction, seed=plan.seed
        )  # fmt: skip
        return [[source.read(places[wanted]) for wanted in plan.wanted(step, part)] for part in parts]

    def finished(step: int, found: list[list[Rows]]) -> Iterator[Batch]:
        for part, rows in zip(parts, found, strict=True):
            yield plan.finish(step, part, [each.to(device) for each in rows])

    if not source.ahead:
        yield from (finished(step, read(step)) for step in steps)
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming: deque[Future[list[list[Rows]]]] = deque(reader.submit(read, step) for step in steps[: source.ahead])
        for step in steps:
            found = coming.popleft().result()
            if step + source.ahead in steps:
                coming.append(reader.submit(read, step + source.ahead))
            yield finished(step, found)
