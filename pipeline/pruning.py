"""Pruning: a strategy says which rows of the margin table are kept and with which eps.

The table is read in batches, and only the columns that a strategy needs are held, 15 to 20 bytes per row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from pipeline.hashing import uniform
from pipeline.params import InputError, Section
from pipeline.selection import chunks, count_groups, extremes
from pipeline.threads import on_all_cores, one_behind

Score = Literal["random", "margin", "confidence", "entropy", "logit_margin", "el2n", "grand"]
Mask = NDArray[np.bool_]
Values = NDArray[np.float32]
Read = Callable[[Sequence[str]], Iterator[pa.RecordBatch]]  # names of columns -> batches of the margin table

KEPT, MISCLASSIFIED, NOT_CONVERGED, LOW, HIGH = range(5)  # codes of the reasons, in the order of `reasons`


class ConstantEps(Section):
    """Every kept sample is attacked with the eps of the threat."""

    compares_norms: ClassVar[bool] = False  # whether radii follow from distances, so that both must be of one norm
    rule: Literal["constant"] = "constant"


class MarginEps(Section):
    """eps_i = min(eps, scale * max(m_i, 0)), the rule of PUMA as we read it."""

    compares_norms: ClassVar[bool] = True
    rule: Literal["margin"]
    scale: PositiveFloat = 1.0


class FloorEps(Section):
    """eps_i = max(min_eps_255 / 255, min(eps, scale * max(m_i, 0)))."""

    compares_norms: ClassVar[bool] = True
    rule: Literal["floor"]
    min_eps_255: PositiveFloat
    scale: PositiveFloat = 1.0


class QuantileEps(Section):
    """As `margin`, for the share q of lowest margins only; the others have the eps of the threat."""

    compares_norms: ClassVar[bool] = True
    rule: Literal["quantile"]
    q: float = Field(gt=0, le=1)
    scale: PositiveFloat = 1.0


class RankEps(Section):
    """eps_i grows linearly with the rank of the margin (the number of lower ones), from 0 at the lowest to eps at the share
    q."""

    compares_norms: ClassVar[bool] = False
    rule: Literal["rank"]
    q: float = Field(gt=0, le=1)


EpsRule = Annotated[ConstantEps | MarginEps | FloorEps | QuantileEps | RankEps, Field(discriminator="rule")]


class Strategy(Section):
    """Keep the share `keep` of the rows that the strategy applies to; `prune` says at which end of the score (`score:
    null` keeps all). `not_converged` rows have no margin: `keep` keeps them with the eps of the threat. Training on what is
    kept takes as many steps as on everything (`budget: fixed`), or only the share of them that is kept (`scaled`)."""

    score: Score | None = None
    prune: Literal["highest", "lowest", "both"] = "highest"
    keep: float = Field(default=1.0, gt=0, le=1)
    eps: EpsRule = ConstantEps()
    per_class: bool = False
    applies_to: Literal["all", "synthetic"] = "all"
    misclassified: Literal["keep", "drop"] = "keep"
    not_converged: Literal["keep", "drop"] = "drop"
    budget: Literal["fixed", "scaled"] = "fixed"
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _only_a_score_prunes(self) -> Self:
        if self.score is None and self.keep < 1:
            raise ValueError(f"keep: wanted 1 without a score, which says what to drop, got {self.keep}; set score")
        return self

    @property
    def uses_margin(self) -> bool:
        return self.score == "margin" or self.eps.rule != "constant"


def check_norms(strategy: Strategy, margins: str, threat: str) -> None:
    """Refuse an eps rule that compares margins of one norm with the radius of a threat in another.

    Raises:
        InputError: the rule does.
    """
    if margins != threat and strategy.eps.compares_norms:
        raise InputError(
            f"eps rule {strategy.eps.rule}: wanted margins in {threat}, the norm of the threat, to compare with its radius, "
            f"got {margins}; use the rule rank or constant, or set margins.norm to null"
        )


@dataclass(frozen=True)
class Columns:
    """The columns of the margin table (n,) that a strategy needs; `score` and `margin` are NaN where there is none."""

    label: NDArray[np.int16]
    applies: Mask
    wrong: Mask
    converged: Mask
    score: Values
    margin: Values


@dataclass(frozen=True)
class Choice:
    """Of every row (n,): the code of the reason, and whether its eps follows from its margin; and the score at each cut."""

    reason: NDArray[np.int8]
    lowered: Mask
    thresholds: dict[str, dict[str, float]]


def reasons(strategy: Strategy) -> list[str]:
    """Names of the reasons by their code."""
    ends = ["random"] if strategy.score == "random" else [f"low_{strategy.score}", f"high_{strategy.score}"]
    return ["kept", "misclassified", "not_converged", *ends]


def load_columns(read: Read, num_rows: int, strategy: Strategy) -> Columns:
    """Read what the strategy needs.

    Raises:
        InputError: the table has no such score.
    """
    scored = strategy.score not in (None, "random", "margin")
    names = {"label", "converged"} | ({str(strategy.score)} if scored else set())
    names |= {"source"} if strategy.applies_to == "synthetic" else set()
    names |= {"predicted"} if strategy.misclassified == "drop" else set()
    names |= {"margin"} if strategy.uses_margin else set()
    label, empty = np.empty(num_rows, np.int16), np.empty(0, np.float32)
    applies, wrong, converged = np.ones(num_rows, bool), np.zeros(num_rows, bool), np.empty(num_rows, bool)
    margin = np.empty(num_rows, np.float32) if strategy.uses_margin else empty
    score = margin if strategy.score in (None, "margin") else np.empty(num_rows, np.float32)

    def load(numbered: tuple[slice, pa.RecordBatch]) -> None:
        part, batch = numbered
        label[part] = batch["label"].to_numpy()
        converged[part] = batch["converged"].to_numpy(zero_copy_only=False)
        if "source" in names:
            synthetic = [name == "synthetic" for name in batch["source"].dictionary.to_pylist()]
            applies[part] = np.array(synthetic)[batch["source"].indices.to_numpy()]
        if "predicted" in names:
            wrong[part] = label[part] != batch["predicted"].to_numpy()
        if strategy.uses_margin:
            margin[part] = batch["margin"].to_numpy(zero_copy_only=False)
            converged[part] &= ~np.isnan(margin[part])
        if strategy.score == "random":
            score[part] = uniform(np.arange(part.start, part.stop), strategy.seed, 1)
        elif scored:
            score[part] = score_of(batch, strategy)

    one_behind(load, numbered(read(sorted(names))))
    return Columns(label, applies, wrong, converged, score, margin)


def numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[slice, pa.RecordBatch]]:
    """Each batch with the rows it has in the whole."""
    start = 0
    for batch in batches:
        yield slice(start, start + len(batch)), batch
        start += len(batch)


def score_of(batch: pa.RecordBatch, strategy: Strategy) -> Values:
    score: Values = batch[str(strategy.score)].to_numpy(zero_copy_only=False)
    if np.isnan(score).any():
        remedy = "set margins.grand: true" if strategy.score == "grand" else "run `dvc repro -f margins`"
        raise InputError(f"strategy score {strategy.score}: the margin table has rows without this score; {remedy}")
    return score


def choose(columns: Columns, strategy: Strategy) -> Choice:
    """The fate of every row.

    The kept count is round(keep * n) of the n rows the strategy applies to (per class: largest remainders), or fewer
    when the rules for misclassified and not converged rows leave fewer; `not_converged: keep` keeps those rows even where
    they are more.

    Raises:
        InputError: nothing is kept.
    """
    num_rows = len(columns.label)
    reason, unknown, candidates = np.full(num_rows, KEPT, np.int8), np.zeros(num_rows, bool), np.empty(num_rows, bool)

    def sort_out(part: slice) -> None:
        applies, fate = columns.applies[part], reason[part]
        if strategy.misclassified == "drop":
            fate[applies & columns.wrong[part]] = MISCLASSIFIED
        if strategy.uses_margin:
            unknown[part] = applies & ~columns.converged[part] & (fate == KEPT)
            if strategy.not_converged == "drop":
                fate[unknown[part]] = NOT_CONVERGED
        candidates[part] = applies & (fate == KEPT) & ~unknown[part]

    on_all_cores(sort_out, chunks(num_rows))
    thresholds: dict[str, dict[str, float]] = {}
    if strategy.score is not None:
        certain = unknown if strategy.not_converged == "keep" else np.zeros_like(unknown)
        thresholds = drop_extremes(reason, columns, candidates, certain, strategy)
    if not (reason == KEPT).any():
        raise InputError(f"strategy keeps none of {num_rows} rows; raise keep (now {strategy.keep}) or relax its drop rules")
    return Choice(reason, columns.applies & ~unknown, thresholds)


def drop_extremes(
    reason: NDArray[np.int8], columns: Columns, candidates: Mask, certain: Mask, strategy: Strategy
) -> dict[str, dict[str, float]]:
    """Write the reason of the pruned candidates into reason; `certain` rows are kept whatever their score, and count.
    Returns, per group, the score at each cut."""
    num_groups = int(columns.label.max(initial=0)) + 1 if strategy.per_class else 1
    groups = columns.label if strategy.per_class else None
    applying, held, free = (count_groups(mask, groups, num_groups) for mask in (columns.applies, certain, candidates))
    surplus = np.maximum(0, free - np.maximum(0, quotas(applying, strategy.keep) - held))
    low = {"highest": np.zeros_like(surplus), "lowest": surplus, "both": surplus // 2}[strategy.prune]
    is_low, is_high, cuts = extremes(columns.score, groups, candidates, low, surplus - low, strategy.seed)

    def drop(part: slice) -> None:
        reason[part][is_low[part]] = LOW
        reason[part][is_high[part]] = LOW if strategy.score == "random" else HIGH

    on_all_cores(drop, chunks(len(reason)))
    thresholds: dict[str, dict[str, float]] = {}
    for group in np.flatnonzero(surplus):
        ends = {"low": cuts.low[group], "high": cuts.high[group]}
        thresholds[str(group) if strategy.per_class else "all"] = {k: float(v) for k, v in ends.items() if np.isfinite(v)}
    return thresholds


def quotas(counts: NDArray[np.int64], keep: float) -> NDArray[np.int64]:
    """How many of each group to keep: round(keep * total) in all, shared by largest remainder."""
    exact = keep * counts
    floors = np.floor(exact).astype(np.int64)
    missing = round(keep * int(counts.sum())) - int(floors.sum())
    floors[np.argsort(floors - exact, kind="stable")[: max(0, missing)]] += 1
    return floors


def eps_function(rule: EpsRule, margin: Callable[[], Values], eps: float) -> Callable[[Values], Values]:
    """The radius in [0, eps] of each sample (n,) from its signed margin (n,). `margin` gives those of all samples whose
    radius follows from it, and is asked only by the rules that compare them."""
    limit = np.float32(eps)
    if isinstance(rule, ConstantEps):
        return lambda m: np.full(len(m), limit)
    if isinstance(rule, RankEps):
        ordered = np.sort(margin())
        scale = max(1, len(ordered) - 1) * rule.q
        return lambda m: (eps * np.minimum(1.0, np.searchsorted(ordered, m) / scale)).astype(np.float32)
    factor = np.float32(rule.scale)
    if isinstance(rule, FloorEps):
        lowest = np.float32(min(eps, rule.min_eps_255 / 255))
        return lambda m: np.clip(factor * m, lowest, limit)
    if isinstance(rule, QuantileEps):
        known = margin()
        highest = np.quantile(known, rule.q) if len(known) else 0.0
        return lambda m: np.where(m <= highest, np.clip(factor * m, 0, limit), limit)
    return lambda m: np.clip(factor * m, 0, limit)
