"""Pruning: a strategy turns the margin table into a manifest, which says what is kept and with which eps."""

from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat

from pipeline.artifacts import MANIFEST_SCHEMA, SOURCES
from pipeline.params import InputError, Section

Score = Literal["random", "margin", "confidence", "entropy", "logit_margin", "el2n", "grand"]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


class ConstantEps(Section):
    """Every kept sample is attacked with the eps of the threat."""

    rule: Literal["constant"] = "constant"


class MarginEps(Section):
    """eps_i = min(eps, scale * max(m_i, 0)), the rule of PUMA as we read it."""

    rule: Literal["margin"]
    scale: PositiveFloat = 1.0


class FloorEps(Section):
    """eps_i = max(min_eps_255 / 255, min(eps, scale * max(m_i, 0)))."""

    rule: Literal["floor"]
    min_eps_255: PositiveFloat
    scale: PositiveFloat = 1.0


class QuantileEps(Section):
    """As `margin`, for the share q of lowest margins only; the others have the eps of the threat."""

    rule: Literal["quantile"]
    q: float = Field(gt=0, le=1)
    scale: PositiveFloat = 1.0


class RankEps(Section):
    """eps_i grows linearly with the rank of the margin, from 0 at the lowest to eps at the share q."""

    rule: Literal["rank"]
    q: float = Field(gt=0, le=1)


EpsRule = Annotated[ConstantEps | MarginEps | FloorEps | QuantileEps | RankEps, Field(discriminator="rule")]


class Strategy(Section):
    """Keep the share `keep` of the rows that the strategy applies to; `prune` says at which end of the score (`score:
    null` keeps all). `not_converged` rows have no margin: `keep` keeps them with the eps of the threat."""

    score: Score | None = None
    prune: Literal["highest", "lowest", "both"] = "highest"
    keep: float = Field(default=1.0, gt=0, le=1)
    eps: EpsRule = ConstantEps()
    per_class: bool = False
    applies_to: Literal["all", "synthetic"] = "all"
    misclassified: Literal["keep", "drop"] = "keep"
    not_converged: Literal["keep", "drop"] = "drop"
    seed: NonNegativeInt = 0

    @property
    def uses_margin(self) -> bool:
        return self.score == "margin" or self.eps.rule != "constant"


def prune(margins: pa.Table, strategy: Strategy, eps: float) -> tuple[pa.Table, dict[str, Any]]:
    """Manifest (`MANIFEST_SCHEMA`, rows in the order of margins) and its summary. eps is the threat's, in pixel range.

    The kept count is round(keep * n) of the n rows the strategy applies to (per class: largest remainders), or fewer
    when the rules for misclassified and not converged rows leave fewer; `not_converged: keep` keeps those rows even where
    they are more.

    Raises:
        InputError: the score is not in the table, or nothing is kept.
    """
    columns = {name: margins[name].to_numpy() for name in ("label", "predicted", "converged")}
    source = margins["source"].combine_chunks().cast(pa.string()).to_numpy(zero_copy_only=False)
    margin = margins["margin"].to_numpy().astype(np.float64)  # null becomes NaN
    n = len(margins)
    applies = np.ones(n, bool) if strategy.applies_to == "all" else source == "synthetic"
    reason = np.full(n, "kept", dtype=object)

    if strategy.misclassified == "drop":
        reason[applies & (columns["label"] != columns["predicted"])] = "misclassified"
    unknown = applies & ~columns["converged"] & strategy.uses_margin & (reason == "kept")
    if strategy.not_converged == "drop":
        reason[unknown] = "not_converged"
    thresholds: dict[str, Any] = {}
    if strategy.score is not None:
        certain = unknown & (strategy.not_converged == "keep")
        groups = columns["label"] if strategy.per_class else np.zeros(n, np.int16)
        values = score_values(margins, strategy)
        thresholds = drop_extremes(reason, values, applies, certain, groups, strategy)

    kept = reason == "kept"
    if not kept.any():
        raise InputError(f"strategy keeps none of {n} rows; raise keep (now {strategy.keep}) or relax its drop rules")
    eps_i = np.where(kept, eps, np.nan)
    lowered = kept & applies & ~np.isnan(margin)
    eps_i[lowered] = eps_of_margin(margin[lowered], strategy.eps, eps)
    manifest = pa.table(
        {
            "source": margins["source"],
            "row": margins["row"],
            "label": margins["label"],
            "kept": kept,
            "eps": pa.array(eps_i.astype(np.float32), mask=~kept),
            "reason": pa.array(reason, pa.string()).dictionary_encode().cast(MANIFEST_SCHEMA.field("reason").type),
        },
        schema=MANIFEST_SCHEMA,
    )
    return manifest, summarise(manifest, thresholds, eps)


def score_values(margins: pa.Table, strategy: Strategy) -> Floats:
    """The score of every row (n,); NaN where the table has none."""
    if strategy.score == "random":
        return np.random.default_rng([strategy.seed, 1]).random(len(margins))
    assert strategy.score is not None
    column = margins[strategy.score]
    if strategy.score == "grand" and column.null_count:
        raise InputError("strategy score grand: the margin table has no GraNd scores; set margins.grand: true")
    return column.to_numpy().astype(np.float64)


def drop_extremes(
    reason: NDArray[np.object_], values: Floats, applies: Mask, certain: Mask, groups: NDArray[np.int16], strategy: Strategy
) -> dict[str, Any]:
    """Write the reason of the pruned rows into reason; `certain` rows are kept whatever their score. Ties are broken by
    a seeded order. Returns, per group, the score at each cut."""
    tie_break = np.random.default_rng([strategy.seed, 0]).permutation(len(values))
    thresholds: dict[str, Any] = {}
    labels, counts = np.unique(groups[applies], return_counts=True)
    for group, quota in zip(labels, quotas(counts, strategy.keep), strict=True):
        members = applies & (groups == group)
        candidates = np.flatnonzero(members & (reason == "kept") & ~certain)
        surplus = len(candidates) - max(0, quota - int((members & certain).sum()))
        if surplus <= 0:
            continue
        order = candidates[np.lexsort((tie_break[candidates], values[candidates]))]
        low = {"highest": 0, "lowest": surplus, "both": surplus // 2}[strategy.prune]
        high = surplus - low
        cuts: dict[str, float] = {}
        if low:
            reason[order[:low]] = reason_of("low", strategy)
            cuts["low"] = float(values[order[low - 1]])
        if high:
            reason[order[len(order) - high :]] = reason_of("high", strategy)
            cuts["high"] = float(values[order[len(order) - high]])
        thresholds[str(group) if strategy.per_class else "all"] = cuts
    return thresholds


def reason_of(end: str, strategy: Strategy) -> str:
    return "random" if strategy.score == "random" else f"{end}_{strategy.score}"


def quotas(counts: NDArray[np.int64], keep: float) -> list[int]:
    """How many of each group to keep: round(keep * total) in all, shared by largest remainder."""
    exact = keep * counts
    floors = np.floor(exact).astype(int)
    missing = round(keep * int(counts.sum())) - int(floors.sum())
    for index in np.argsort(floors - exact, kind="stable")[: max(0, missing)]:
        floors[index] += 1
    return [int(value) for value in floors]


def eps_of_margin(margin: Floats, rule: EpsRule, eps: float) -> Floats:
    """Radius of each kept sample (n,) in [0, eps] from its signed margin (n,)."""
    if isinstance(rule, ConstantEps):
        return np.full(len(margin), eps)
    if isinstance(rule, RankEps):
        rank = np.argsort(np.argsort(margin, kind="stable"), kind="stable") / max(1, len(margin) - 1)
        return eps * np.minimum(1.0, rank / rule.q)
    lowered = np.clip(rule.scale * margin, 0, eps)
    if isinstance(rule, FloorEps):
        return np.clip(lowered, min(eps, rule.min_eps_255 / 255), eps)
    if isinstance(rule, QuantileEps):
        return np.where(margin <= np.quantile(margin, rule.q), lowered, eps) if len(margin) else lowered
    return lowered


def summarise(manifest: pa.Table, thresholds: dict[str, Any], eps: float) -> dict[str, Any]:
    """Counts by reason, source and class, the thresholds of the score, quantiles of eps (pixel range)."""
    frame = manifest.to_pandas()
    kept = frame[frame["kept"]]
    quantiles = np.quantile(kept["eps"].to_numpy(np.float64), [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    return {
        "total": len(frame),
        "kept": len(kept),
        "fraction_kept": len(kept) / len(frame),
        "reasons": {str(name): int(count) for name, count in frame["reason"].value_counts().items() if count},
        "by_source": {
            name: {"total": int((frame["source"] == name).sum()), "kept": int((kept["source"] == name).sum())}
            for name in SOURCES
        },
        "by_class": {
            str(label): {"total": len(group), "kept": int(group["kept"].sum())} for label, group in frame.groupby("label")
        },
        "thresholds": thresholds,
        "eps": eps,
        "eps_lowered": int((kept["eps"] < np.float32(eps)).sum()),
        "eps_quantiles": dict(zip(["0", "0.05", "0.25", "0.5", "0.75", "0.95", "1"], quantiles.tolist(), strict=True)),
    }
