"""From pools to batches: which rows, in which order, as which images."""

from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts import MANIFEST_SCHEMA, write_table
from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.training.augmentation import AugmentationParams, augment
from pipeline.training.batch import Batch, Plan, Rows
from pipeline.training.cutmix import mixed_labels, partners, paste, shares, windows
from pipeline.training.feed import Mapped, Resident, feed, place_pools
from pipeline.training.pools import Pool, full_pool, read_pools, split_holdout
from pipeline.training.sampler import draw, permuted

CPU = torch.device("cpu")


def full_pools(stores: dict[str, ImageStore]) -> dict[str, Pool]:
    return {source: full_pool(store, 0.1) for source, store in stores.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_random_order_has_every_place_once_and_another_seed_has_another(count: int) -> None:
    first, again, other = (permuted(np.arange(count), count, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert sorted(first) == list(range(count))
    assert np.array_equal(first, again)
    assert np.array_equal(permuted(np.arange(count)[::-3], count, np.random.default_rng(0)), first[::-3])
    if count > 10:
        assert not np.array_equal(first, other)


def test_random_orders_are_uniform_in_what_stands_where_and_what_stands_beside_it() -> None:
    orders = np.stack([permuted(np.arange(20), 20, np.random.default_rng(seed)) for seed in range(4000)])
    for values, possible in ((orders[:, 0], 20), (orders[:, 13], 20), ((orders[:, 5] - orders[:, 4]) % 20 - 1, 19)):
        counts, expected = np.bincount(values, minlength=possible), 4000 / possible
        assert len(counts) == possible
        assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-squared, 19 degrees of freedom: 1 in 7,000


def test_an_epoch_shows_every_real_row_once_and_the_next_in_another_order() -> None:
    drawn = [draw(400, 200, step, batch_size=100, synthetic_fraction=0.5, seed=0) for step in range(16)]
    first, second = np.concatenate([d[:50] for d in drawn[:8]]), np.concatenate([d[:50] for d in drawn[8:]])
    assert sorted(first) == sorted(second) == list(range(400))
    assert not np.array_equal(first, second)
    synthetic = np.concatenate([d[50:] for d in drawn])
    assert 400 <= synthetic.min() < synthetic.max() < 600
    assert len(np.unique(synthetic)) < len(synthetic)  # with replacement


def test_a_batch_is_a_function_of_seed_and_step_and_epochs_may_end_inside_a_batch() -> None:
    steps = [draw(400, 200, step, batch_size=96, synthetic_fraction=0.25, seed=3) for step in range(12)]
    assert np.array_equal(draw(400, 200, 7, batch_size=96, synthetic_fraction=0.25, seed=3), steps[7])
    real = np.concatenate([step[:72] for step in steps])
    assert sorted(real[:400]) == list(range(400))
    assert all((step[72:] >= 400).all() for step in steps)


def test_a_source_without_rows_leaves_the_whole_batch_to_the_other() -> None:
    assert draw(0, 200, 0, batch_size=10, synthetic_fraction=0.3, seed=0).max() < 200
    assert len(draw(0, 200, 0, batch_size=10, synthetic_fraction=0.3, seed=0)) == 10
    assert len(np.unique(draw(400, 0, 0, batch_size=10, synthetic_fraction=0.3, seed=0))) == 10
    with pytest.raises(InputError, match="no image is left to train on"):
        draw(0, 0, 0, batch_size=10, synthetic_fraction=0.3, seed=0)


@pytest.mark.parametrize("kind", [Mapped, Resident])
def test_rows_are_read_with_their_images_labels_and_radii_in_the_order_asked_for(
    stores: dict[str, ImageStore], kind: type[Mapped | Resident]
) -> None:
    pool = Pool(stores["real"], np.array([5, 399], np.uint32), np.array([0.0, 0.2], np.float32))
    source = kind({"real": pool, "synthetic": full_pool(stores["synthetic"], 0.1)}, CPU)
    rows = source.read(np.array([5, 1, 0]))
    expected = np.concatenate([stores["synthetic"].batch(np.array([3])), stores["real"].batch(np.array([399, 5]))])
    np.testing.assert_array_equal(rows.images, expected)
    np.testing.assert_allclose(rows.eps, [0.1, 0.2, 0.0])
    assert rows.labels.tolist() == [stores["synthetic"].labels[3], stores["real"].labels[399], stores["real"].labels[5]]


def test_images_never_move_to_the_memory_of_a_cpu(stores: dict[str, ImageStore]) -> None:
    assert isinstance(place_pools(full_pools(stores), CPU, "auto"), Mapped)
    with pytest.raises(InputError, match="execution.placement: device wants a GPU"):
        place_pools(full_pools(stores), CPU, "device")


def batches(stores: dict[str, ImageStore], first: int, parts: list[np.ndarray], cutmix: bool = False) -> list[list[Batch]]:
    """Three steps from the first on."""
    plan = Plan(AugmentationParams(crop_padding=1, flip=True, cutmix=cutmix), batch_size=24, num_classes=10, seed=3)
    pools = full_pools(stores)
    pools["real"].eps[::3] = 0
    given = feed(
        Mapped(pools, CPU), plan, (400, 200), synthetic_fraction=0.5, parts=parts, steps=range(first, 30), device=CPU
    )  # fmt: skip
    return [list(step) for step in islice(given, 3)]


@pytest.mark.parametrize("cutmix", [False, True])
def test_a_batch_is_the_same_for_a_resumed_run_and_however_it_is_shared(stores: dict[str, ImageStore], cutmix: bool) -> None:
    whole = [step[0] for step in batches(stores, 0, [np.arange(24)], cutmix)]
    resumed = batches(stores, 2, [np.arange(24)], cutmix)[0][0]
    shared = batches(stores, 0, [np.arange(first, 24, 3) for first in range(3)], cutmix)
    for name in ("x", "y", "eps"):
        assert torch.equal(getattr(resumed, name), getattr(whole[2], name))
        for step, parts in zip(whole, shared, strict=True):
            together = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(together, getattr(step, name))
    assert whole[0].y.ndim == (2 if cutmix else 1)


def test_what_stops_the_reader_reaches_the_training(stores: dict[str, ImageStore], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> Rows:
        raise InputError("images-00000.npy: not readable")

    monkeypatch.setattr(Mapped, "read", unreadable)
    with pytest.raises(InputError, match="not readable"):
        batches(stores, 0, [np.arange(24)])


def test_cutmix_pastes_a_window_and_mixes_labels_and_radii_by_area() -> None:
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randint(low, low + 99, (200, 8, 6, 1), dtype=torch.uint8, generator=generator) for low in (0, 100))
    edges = windows(200, 8, 6, seed=1, step=2)
    mixed, share = paste(images, others, torch.from_numpy(edges)), shares(torch.from_numpy(edges), 8, 6)
    for image, (top, bottom, left, right) in enumerate(edges):
        expected = images[image].clone()
        expected[top:bottom, left:right] = others[image, top:bottom, left:right]
        assert torch.equal(mixed[image], expected)
        assert share[image].item() == pytest.approx((bottom - top) * (right - left) / 48)
    assert 0.15 < share.mean().item() < 0.5
    assert share.max() > 0.7
    labels = mixed_labels(torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([0.25, 0.5]), 3)
    torch.testing.assert_close(labels, torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]))
    assert sorted(partners(50, seed=0, step=0)) == list(range(50))


def test_cutmix_leaves_the_mean_radius_where_it_was_and_attacks_no_mixture_of_unattacked_images() -> None:
    plan = Plan(AugmentationParams(crop_padding=0, flip=False, cutmix=True), batch_size=64, num_classes=10, seed=0)
    eps = torch.arange(64) % 2 * 0.1
    found = []
    for step in range(200):
        own, other = plan.wanted(step, np.arange(64))
        rows = [Rows(torch.zeros(64, 4, 4, 1, dtype=torch.uint8), torch.zeros(64).long(), eps[at]) for at in (own, other)]
        mixed = plan.finish(step, np.arange(64), rows).eps
        assert bool((mixed[(eps == 0) & (eps[other] == 0)] == 0).all())
        found.append(mixed.mean().item())
    assert np.mean(found) == pytest.approx(0.05, abs=0.001)


def manifest(rows: list[int], kept: list[bool]) -> pa.Table:
    sources = pa.array(["synthetic"] * len(rows)).cast(MANIFEST_SCHEMA.field("source").type)
    eps = pa.array([0.05 if k else None for k in kept], pa.float32())
    reason = pa.array(["kept" if k else "random" for k in kept]).cast(MANIFEST_SCHEMA.field("reason").type)
    return pa.table([sources, rows, pa.array([0] * len(rows), pa.int16()), kept, eps, reason], schema=MANIFEST_SCHEMA)


def test_pools_hold_the_kept_rows_at_8_bytes_each(stores: dict[str, ImageStore], tmp_path: Path) -> None:
    write_table(tmp_path / "manifest.parquet", manifest([0, 1, 2], [True, False, True]))
    pools = read_pools(tmp_path / "manifest.parquet", stores)
    assert pools["synthetic"].rows.tolist() == [0, 2]
    np.testing.assert_allclose(pools["synthetic"].eps, [0.05, 0.05])
    assert len(pools["real"]) == 0
    assert (pools["synthetic"].rows.nbytes + pools["synthetic"].eps.nbytes) / 2 == 8
    write_table(tmp_path / "manifest.parquet", manifest([200], [True]))
    with pytest.raises(InputError, match="wanted rows of synthetic below 200, got 200"):
        read_pools(tmp_path / "manifest.parquet", stores)


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
    x = torch.randint(1, 256, (64, 6, 6, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augmented = augment(x, AugmentationParams(crop_padding=1, flip=True), seed=0, step=5)
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    seen = set()
    for i in range(64):
        crops = {(top, left): padded[i, top : top + 6, left : left + 6] for top in range(3) for left in range(3)}
        matches = {(*corner, False) for corner, crop in crops.items() if torch.equal(crop, augmented[i])}
        matches |= {(*corner, True) for corner, crop in crops.items() if torch.equal(crop.flip(1), augmented[i])}
        assert len(matches) == 1
        seen |= matches
    assert len(seen) >= 14  # of the 18 possible ones
    again = augment(x, AugmentationParams(crop_padding=1, flip=True), seed=0, step=5)
    assert torch.equal(again, augmented)
    assert torch.equal(augment(x, AugmentationParams(crop_padding=0, flip=False), seed=0, step=5), x)
