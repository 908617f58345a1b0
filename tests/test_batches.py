import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches import stream, to_tensor
from pipeline.images import ImageStore
from pipeline.params import InputError

CPU = torch.device("cpu")


def test_a_stream_gives_the_images_and_labels_of_its_range_in_order(stores: dict[str, ImageStore]) -> None:
    store = stores["real"]
    batches = list(stream(store, 64, 10, 200, CPU))
    assert [len(rows) for rows, _, _ in batches] == [64, 64, 62]
    rows = np.arange(10, 200)
    assert np.array_equal(np.concatenate([rows for rows, _, _ in batches]), rows)
    assert torch.equal(torch.cat([x for _, x, _ in batches]), to_tensor(store.batch(rows), CPU))
    assert np.array_equal(torch.cat([y for _, _, y in batches]), store.labels[rows])


def test_what_stops_the_reader_of_a_stream_reaches_the_caller(stores: dict[str, ImageStore], tmp_path: Path) -> None:
    shutil.copytree(stores["real"].path, tmp_path / "store")
    store = ImageStore.open(tmp_path / "store")
    (tmp_path / "store" / "images-00000.npy").unlink()
    with pytest.raises(InputError, match="images-00000.npy: not readable"):
        next(stream(store, 64, 0, 200, CPU))
