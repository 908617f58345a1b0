"""Threat model: the norm and radius of the perturbations that are allowed (their geometry is in balls.py)."""

from typing import Literal, Self

from pydantic import PositiveFloat, model_validator

from pipeline.params import Section

NormName = Literal["linf", "l2"]


class ThreatParams(Section):
    """Radius `eps_255` in units of 1/255 of the pixel range (8 for the usual 8/255), in `norm`."""

    norm: NormName
    eps_255: PositiveFloat

    @model_validator(mode="after")
    def _is_in_255ths(self) -> Self:
        if self.norm == "linf" and self.eps_255 > 255:
            raise ValueError(f"eps_255: wanted at most 255, the whole pixel range, in linf, got {self.eps_255:g}")
        return self

    @property
    def eps(self) -> float:
        """Radius in the pixel range [0, 1]."""
        return self.eps_255 / 255

    @property
    def exact(self) -> str:
        """The radius as a fraction, for artifacts: "8/255"."""
        return f"{self.eps_255:g}/255"
