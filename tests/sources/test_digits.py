"""The digits are those of scikit-learn, in a stratified split."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from tests.sources.samples import joined, open_params


def test_digits_are_those_of_scikit_learn_scaled_to_bytes() -> None:
    source = open_params(kind="digits", test_fraction=0.25, seed=1)
    images, labels = joined([*source.splits["train"](), *source.splits["test"]()])
    wanted = {
        (label, *(int(v * 255 / 16 + 0.5) for v in row)) for row, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    halves = {(label, *row) for row, label in zip(images.reshape(-1, 64).tolist(), labels.tolist(), strict=True)}
    assert (len(images), source.shape, source.classes) == (1797, (8, 8, 1), tuple("0123456789"))
    assert np.abs(np.array(sorted(halves)) - np.array(sorted(wanted))).max() <= 1  # 127.5 may go either way


def test_the_test_digits_are_a_stratified_fraction_that_the_seed_draws() -> None:
    source, other = (open_params(kind="digits", test_fraction=0.2, seed=seed) for seed in (0, 1))
    assert np.abs(np.bincount(source.splits["test"].labels) - np.bincount(load_digits().target) * 0.2).max() < 1
    assert not np.array_equal(joined(source.splits["test"]())[0], joined(other.splits["test"]())[0])


def test_the_digits_need_no_torch() -> None:
    program = (
        "import sys; from pipeline.sources import open_source, digits;"
        "open_source(digits.DigitsParams(kind='digits')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[1]).returncode == 0
