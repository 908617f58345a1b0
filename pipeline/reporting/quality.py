"""How good the margins are, from the quality.json of the margin stage, in sentences."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import read_json


def quality_sentences(margins: Path, names: Mapping[str, str]) -> list[str]:
    """One sentence each: rows without a margin, the class with most of them, agreement with the tight estimate, and what
    a repetition changes; names: what the sources are called.

    Raises:
        InputError: the file is missing.
    """
    found = read_json(margins / "quality.json")
    sentences = [
        f"{names[source]}: {counts['rows']:,} samples, {share(counts, 'not_converged')} without a margin, "
        f"{share(counts, 'misclassified')} misclassified by the margin model" + worst_class(found["by_class"][source])
        for source, counts in found["by_source"].items()
    ]
    tight, repeated = found.get("tight"), found.get("repeated")
    if tight and tight["ratio_quantiles"]:
        quantiles = tight["ratio_quantiles"]
        rank = "" if tight["spearman"] is None else f", rank correlation {tight['spearman']:.4f}"
        sentences.append(
            f"Against the tight estimate on {tight['rows']:,} samples: median {tight['median']:.4g} to "
            f"{tight['median_tight']:.4g}, ratio {quantiles['0.5']:.3f} (90 % within {quantiles['0.05']:.3f} to "
            f"{quantiles['0.95']:.3f}){rank}."
        )
    if repeated and repeated["max_difference"] is not None:
        sentences.append(
            f"Measured again in other batches: {repeated['equal']:,} of {repeated['rows']:,} margins are the same to the "
            f"last bit, the largest difference is {repeated['max_difference']:.2g}."
        )
    return sentences


def share(counts: dict[str, int], name: str) -> str:
    return f"{counts[name] / counts['rows']:.2%}"


def worst_class(by_class: dict[str, Any]) -> str:
    """The end of a sentence: the class with the largest share without a margin, where there is one."""
    label, counts = max(by_class.items(), key=lambda item: item[1]["not_converged"] / item[1]["rows"])
    return f"; most often without: class {label}, {share(counts, 'not_converged')}." if counts["not_converged"] else "."
