"""Exact shares and learning curves of margin pruning for a perceptron."""

from pathlib import Path

import numpy as np

from pipeline.params import StageParams
from pipeline.perceptron import PerceptronSection, learning_curves, measure_shares
from pipeline.perceptron_conclusions import write_perceptron
from pipeline.stage import run


class PerceptronParams(StageParams):
    perceptron: PerceptronSection


def main(perceptron_path: Path) -> None:
    params = PerceptronParams.load().perceptron
    rng = np.random.default_rng([params.seed])
    shares = measure_shares(rng, **params.model_dump(include={"dimension", "eps", "fractions", "num_examples"}))
    points = learning_curves(**params.model_dump(exclude={"num_examples"}))
    write_perceptron(perceptron_path, params.model_dump(mode="json"), shares, points)


if __name__ == "__main__":
    run(main)
