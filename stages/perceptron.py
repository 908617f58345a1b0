"""Exact shares and learning curves of margin pruning for a perceptron."""

from pathlib import Path

import numpy as np

from pipeline.execution import guarded_publish
from pipeline.params import StageParams
from pipeline.perceptron import PerceptronSection, learning_curves, measure_shares
from pipeline.perceptron_conclusions import write_perceptron
from pipeline.stage import run


class PerceptronParams(StageParams):
    perceptron: PerceptronSection


def main(perceptron_path: Path) -> None:
    params = PerceptronParams.load()
    section = params.perceptron
    with guarded_publish("perceptron", params, [], perceptron_path) as work:
        rng = np.random.default_rng([section.seed])
        shares = measure_shares(rng, **section.model_dump(include={"dimension", "eps", "fractions", "num_examples"}))
        points = learning_curves(**section.model_dump(exclude={"num_examples"}))
        write_perceptron(work, section.model_dump(mode="json"), shares, points)


if __name__ == "__main__":
    run(main)
