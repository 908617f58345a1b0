"""The 1,797 digits that come with scikit-learn: 8 x 8, grey, ten classes; nothing to download."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from pipeline.params import Section
from pipeline.sources.rows import hold_out
from pipeline.sources.source import Source, array_split


class DigitsParams(Section):
    """`test_fraction` of every class is held out, drawn from `seed`."""

    kind: Literal["digits"]
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: NonNegativeInt = 0

    def open(self) -> Source:
        return open_digits(test_fraction=self.test_fraction, seed=self.seed)


def open_digits(*, test_fraction: float, seed: int) -> Source:
    """The digits with their grey levels 0..16 scaled to 0..255, in a stratified split."""
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    images = np.rint(levels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = hold_out(labels, test_fraction, seed)
    return Source(
        classes=tuple(map(str, range(10))),
        shape=(8, 8, 1),
        origin={
            "kind": "digits",
            "licence": "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
            "test_fraction": test_fraction,
            "seed": seed,
        },
        splits={"train": array_split(images[train], labels[train]), "test": array_split(images[test], labels[test])},
    )
