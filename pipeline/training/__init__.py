"""Adversarial training with a radius per sample: the recipe of Wang et al. (arXiv:2302.04638)."""

from pipeline.training.loop import train
from pipeline.training.recipe import TrainingParams
from pipeline.training.state import TrainingResult

__all__ = ["TrainingParams", "TrainingResult", "train"]
