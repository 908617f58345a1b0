"""Images of a store on the device, a batch at a time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images import Images, ImageStore


def to_tensor(images: Images, device: torch.device) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [0, 1], channels last in memory."""
    return to_float(torch.from_numpy(images).to(device))


def to_float(images: Tensor) -> Tensor:
    """As `to_tensor`, of images that are on the device."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def stream(
    store: ImageStore, size: int, start: int, stop: int, device: torch.device
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """Rows, images (B, C, H, W) in [0, 1] and labels (B,) of the rows in [start, stop), on the device. While one batch is
    worked on, a thread reads the next, into pinned memory where the device is a GPU."""
    chunks = store.chunks(size, start, stop)

    def read() -> tuple[NDArray[np.int64], Tensor, Tensor] | None:
        chunk = next(chunks, None)
        if chunk is None:
            return None
        images, labels = torch.from_numpy(chunk[1]), torch.from_numpy(chunk[2].copy())
        return (chunk[0], images.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (chunk[0], images, labels)

    with ThreadPoolExecutor(max_workers=1) as reader:
        following = reader.submit(read)
        while (batch := following.result()) is not None:
            following = reader.submit(read)
            rows, images, labels = batch
            yield rows, to_float(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
