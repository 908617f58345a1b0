import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts import MANIFEST_SCHEMA
from pipeline.batches import (
    AugmentationParams,
    Pool,
    augment,
    draw,
    full_pool,
    kept_fraction,
    load_batch,
    pools_of_manifest,
    split_holdout,
)
from pipeline.images import ImageStore
from pipeline.params import InputError

CPU = torch.device("cpu")


def full_pools(stores: dict[str, ImageStore]) -> dict[str, Pool]:
    return {source: full_pool(store, 0.1) for source, store in stores.items()}


def test_an_epoch_shows_every_real_row_once_and_the_next_in_another_order(stores: dict[str, ImageStore]) -> None:
    pools = full_pools(stores)
    drawn = [draw(pools, step, batch_size=100, synthetic_fraction=0.5, seed=0)["real"] for step in range(16)]
    first, second = np.concatenate(drawn[:8]), np.concatenate(drawn[8:])
    assert sorted(first) == sorted(second) == list(range(400))
    assert not np.array_equal(first, second)


def test_a_batch_is_a_function_of_seed_and_step_and_epochs_may_end_inside_a_batch(stores: dict[str, ImageStore]) -> None:
    pools = full_pools(stores)
    steps = [draw(pools, step, batch_size=96, synthetic_fraction=0.25, seed=3) for step in range(12)]
    again = draw(pools, 7, batch_size=96, synthetic_fraction=0.25, seed=3)
    assert all(np.array_equal(again[source], steps[7][source]) for source in again)
    real = np.concatenate([step["real"] for step in steps])
    assert sorted(real[:400]) == list(range(400))
    assert {len(step["synthetic"]) for step in steps} == {24}


def test_a_source_without_rows_leaves_the_whole_batch_to_the_other(stores: dict[str, ImageStore]) -> None:
    pools = full_pools(stores)
    none = Pool(stores["real"], np.empty(0, np.uint32), np.empty(0, np.float32))
    only_synthetic = draw({**pools, "real": none}, 0, batch_size=10, synthetic_fraction=0.3, seed=0)
    only_real = draw({**pools, "synthetic": none}, 0, batch_size=10, synthetic_fraction=0.3, seed=0)
    assert [len(only_synthetic["real"]), len(only_synthetic["synthetic"])] == [0, 10]
    assert [len(only_real["real"]), len(only_real["synthetic"])] == [10, 0]
    with pytest.raises(InputError, match="no image is left to train on"):
        draw({"real": none, "synthetic": none}, 0, batch_size=10, synthetic_fraction=0.3, seed=0)


def test_a_loaded_batch_has_the_images_labels_and_radii_of_its_rows(stores: dict[str, ImageStore]) -> None:
    pool = Pool(stores["real"], np.array([5, 399], np.uint32), np.array([0.0, 0.2], np.float32))
    positions = {"real": np.array([1, 0]), "synthetic": np.array([3])}
    batch = load_batch({"real": pool, "synthetic": full_pool(stores["synthetic"], 0.1)}, positions, CPU)
    expected = np.concatenate([stores["real"].batch(np.array([399, 5])), stores["synthetic"].batch(np.array([3]))])
    np.testing.assert_array_equal((batch.x * 255).round().permute(0, 2, 3, 1).numpy(), expected)
    np.testing.assert_allclose(batch.eps, [0.2, 0.0, 0.1])
    assert batch.y.tolist() == [stores["real"].labels[399], stores["real"].labels[5], stores["synthetic"].labels[3]]


def manifest(rows: list[int], kept: list[bool]) -> pa.Table:
    sources = pa.array(["synthetic"] * len(rows)).cast(MANIFEST_SCHEMA.field("source").type)
    eps = pa.array([0.05 if k else None for k in kept], pa.float32())
    reason = pa.array(["kept" if k else "random" for k in kept]).cast(MANIFEST_SCHEMA.field("reason").type)
    return pa.table([sources, rows, pa.array([0] * len(rows), pa.int16()), kept, eps, reason], schema=MANIFEST_SCHEMA)


def test_pools_hold_the_kept_rows_at_8_bytes_each(stores: dict[str, ImageStore]) -> None:
    table = manifest([0, 1, 2], [True, False, True])
    pool = pools_of_manifest(table, stores)["synthetic"]
    assert pool.rows.tolist() == [0, 2]
    assert (pool.rows.nbytes + pool.eps.nbytes) / len(pool) == 8
    assert kept_fraction(table) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="wanted rows of synthetic below 200, got 200"):
        pools_of_manifest(manifest([200], [True]), stores)


def test_held_out_rows_never_enter_training_and_are_the_same_for_every_strategy(stores: dict[str, ImageStore]) -> None:
    whole = full_pool(stores["real"], 0.1)
    half = Pool(stores["real"], whole.rows[::2], whole.eps[::2])
    rest, held_out = split_holdout(whole, 50, seed=0)
    half_rest, same = split_holdout(half, 50, seed=0)
    assert np.array_equal(held_out, same)
    assert len(rest) == 350
    assert not set(held_out) & (set(rest.rows) | set(half_rest.rows))
    assert not np.array_equal(held_out, split_holdout(whole, 50, seed=1)[1])
    with pytest.raises(InputError, match="fewer than the 400 real training images, got 400"):
        split_holdout(whole, 400, seed=0)


def test_every_augmented_image_is_a_shifted_and_perhaps_flipped_copy() -> None:
    x = torch.rand(64, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    augmented = augment(x, AugmentationParams(crop_padding=1, flip=True), seed=0, step=5)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    seen = set()
    for i in range(64):
        crops = {(top, left): padded[i, :, top : top + 6, left : left + 6] for top in range(3) for left in range(3)}
        matches = {(*corner, False) for corner, crop in crops.items() if torch.equal(crop, augmented[i])}
        matches |= {(*corner, True) for corner, crop in crops.items() if torch.equal(crop.flip(2), augmented[i])}
        assert len(matches) == 1
        seen |= matches
    assert len(seen) >= 14  # of the 18 possible ones
    again = augment(x, AugmentationParams(crop_padding=1, flip=True), seed=0, step=5)
    assert torch.equal(again, augmented)
    assert torch.equal(augment(x, AugmentationParams(crop_padding=0, flip=False), seed=0, step=5), x)
