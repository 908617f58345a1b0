"""The parameters of a training."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.attacks import PGDParams
from pipeline.params import Section
from pipeline.training.augmentation import AugmentationParams
from pipeline.training.batchnorm import Mode


class TrainingParams(Section):
    """The recipe. `loss: standard` trains without attack; `epochs` count batches as the recipe does,
    ceil(real images / batch_size) each, those held out included, whatever the amount of synthetic data.
    Half of nothing is nothing: `synthetic_fraction` only counts when both sources have rows.
    `batch_size` images make one step, whatever the ranks; each rank takes at most `micro_batch_size` of its share at a time
    (null: all), also of the held-out images, and adds up the gradients. BatchNorm then sees only so many images (of every
    rank) at a time, and its running statistics move once for each: the one way in which the result depends on it, beyond
    rounding.
    `attack_batchnorm` is what BatchNorm normalises by in the attack (`AttackNorms`). `precision: bf16` runs the networks in
    bfloat16 where PyTorch's autocast does; weights, losses and selection stay in float32.
    One-cycle moves the learning rate and, as in the published code, the momentum (0.95 to 0.85 and back).
    `holdout` real images never enter training and select the best checkpoint every `select_every` epochs."""

    precision: Literal["float32", "bf16"] = "float32"
    loss: Literal["standard", "pgd_at", "trades", "mart"]
    beta: NonNegativeFloat = 5.0
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    attack: PGDParams
    attack_batchnorm: Mode = "batch"
    epochs: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    synthetic_fraction: float = Field(ge=0, le=1)
    lr: PositiveFloat
    warmup_fraction: float = Field(default=0.025, gt=0, lt=1)
    weight_decay: NonNegativeFloat = 5e-4
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    augmentation: AugmentationParams
    holdout: PositiveInt
    holdout_seed: NonNegativeInt = 0
    select_every: PositiveInt
    selection_attack: PGDParams

    @model_validator(mode="after")
    def _mart_has_one_label(self) -> Self:
        if self.augmentation.cutmix and self.loss == "mart":
            raise ValueError("cutmix: wanted false with the loss mart, whose terms are of one label per image, got true")
        if self.label_smoothing and self.loss == "mart":
            raise ValueError(f"label_smoothing: wanted 0 with the loss mart, which has none, got {self.label_smoothing}")
        return self
