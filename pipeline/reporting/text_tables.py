"""The rows of the tables that people read as text, out of summary.csv and differences.csv."""

from pathlib import Path

from pipeline.csv_tables import read_csv
from pipeline.reporting.summary import amount

IMAGES = "images, M"
ENDS = ("seeds_low", "seeds_high", "examples_low", "examples_high")
ACCURACIES = [name for metric in ("clean", "robust") for name in (metric, *(f"{metric}_{end}" for end in ENDS))]
SUMMARY = ("strategy", "seeds", "kept", "images_seen", "training_passes", "margin_passes", "hours", *ACCURACIES)
ENDS_OF_DIFFERENCE = ("", "_low", "_high", "_p", "_verdict")
DIFFERENCES = (
    *("strategy", "baseline", "differs_in", "kept", "baseline_kept"),
    *(f"{metric}{end}" for metric in ("clean", "robust") for end in ENDS_OF_DIFFERENCE),
)


def summary_rows(summary: Path) -> list[list[str]]:
    """Names, then one row per strategy: accuracies with the interval over the seeds if there are several, else over the test
    images; images seen and passes (those of the margins included) in millions; hours where they are known."""
    rows = read_csv(summary, SUMMARY)
    timed = any(row["hours"] for row in rows)
    found = [["strategy", "seeds", "kept", "clean, %", "robust, %", IMAGES, "passes, M"] + ["hours"] * timed]
    for row in rows:
        counts = [int(row["images_seen"]), int(row["training_passes"]) + int(row["margin_passes"])]
        cells = [row["strategy"], row["seeds"], f"{float(row['kept']):.0%}", accuracy(row, "clean"), accuracy(row, "robust")]
        cells += [amount(count / 1e6) for count in counts]
        found.append([*cells, amount(float(row["hours"]))] if timed else cells)
    return found


def accuracy(row: dict[str, str], metric: str) -> str:
    over = "seeds" if row[f"{metric}_seeds_low"] else "examples"
    low, high = (float(row[f"{metric}_{over}_{end}"]) for end in ("low", "high"))
    return f"{100 * float(row[metric]):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def difference_rows(differences: Path) -> list[list[str]]:
    """Names, then one row per contrast: the differences in points with their intervals, McNemar's p and the verdict."""
    measured = [f"{metric}, {what}" for metric in ("clean", "robust") for what in ("points", "p", "verdict")]
    found = [["contrast", "differs in", "kept", *measured]]
    for row in read_csv(differences, DIFFERENCES):
        kept = f"{float(row['kept']):.0%} / {float(row['baseline_kept']):.0%}"
        cells = [f"{row['strategy']} less {row['baseline']}", row["differs_in"].replace(" ", ", "), kept]
        for metric in ("clean", "robust"):
            mean, low, high = (f"{100 * float(row[metric + end]):+.1f}" for end in ENDS_OF_DIFFERENCE[:3])
            cells += [f"{mean} [{low}, {high}]", row[f"{metric}_p"], row[f"{metric}_verdict"]]
        found.append(cells)
    return found
