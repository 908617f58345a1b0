"""50 million margin rows to a PUMA manifest: ours beside pandas, polars and duckdb, each in a process of its own.

All do the same work: read the margin table (Parquet), drop the rows without a margin, keep the share 0.7 of lowest margins
of all rows or of each class with ties broken by a hash of the row, set eps_i = min(eps, max(m_i, 0)), and write the manifest
with its reasons, in the order of the table. The peers do it by ranks, and by the threshold below which all is kept, as we do.
The kept rows are compared by count and order, the sums of their eps too. Peak memory is that of the process.

    python benchmarks/manifest.py --peers PATH_TO_PEERS
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from processes import finish, measure

from pipeline.artifacts import MARGINS_SCHEMA, write_table

EPS, KEEP, GOAL, LIMIT_GB = 8 / 255, 0.7, 2.0, 2.0
MOST_GB = 9.0  # no peer may take the whole machine
PART_ROWS, NUM_REAL, NUM_CLASSES = 1_000_000, 50_000, 10


def generate(folder: Path, num_rows: int) -> None:
    """A margin table with 50,000 real rows, 2 % of rows without a margin and many equal margins."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, start in enumerate(range(0, num_rows, PART_ROWS)):
        n = min(PART_ROWS, num_rows - start)
        position = np.arange(start, start + n)
        label = rng.integers(0, NUM_CLASSES, n).astype(np.int16)
        margin = rng.normal(0.7 * EPS, EPS, n).astype(np.float32)
        margin = np.where(rng.random(n) < 0.1, np.round(margin, 3), margin)
        converged = rng.random(n) > 0.02
        predicted = np.where(margin < 0, (label + 1) % NUM_CLASSES, label).astype(np.int16)
        floats = {name: rng.random(n, np.float32) for name in ("confidence", "entropy", "logit_margin", "el2n")}
        table = pa.table(
            {
                "source": pa.DictionaryArray.from_arrays((position >= NUM_REAL).astype(np.int8), ["real", "synthetic"]),
                "row": np.where(position < NUM_REAL, position, position - NUM_REAL),
                "label": label,
                "predicted": predicted,
                "margin": pa.array(margin, mask=~converged),
                "nearest": pa.array(predicted, mask=~converged),
                "iterations": np.full(n, 2, np.int16),
                "converged": converged,
                **floats,
                "grand": pa.nulls(n, pa.float32()),
            },
            schema=MARGINS_SCHEMA,
        )
        write_table(folder / f"part-{part:05d}.parquet", table, {"norm": "linf"})


def ours(margins: Path, out: Path, per_class: bool) -> None:
    from pipeline.manifest import write_manifest
    from pipeline.pruning import Strategy

    strategy = Strategy.model_validate({"score": "margin", "keep": KEEP, "eps": {"rule": "margin"}, "per_class": per_class})
    out.mkdir()
    write_manifest(out, margins, strategy, EPS)


def with_pandas(margins: Path, out: Path, per_class: bool) -> None:
    import pandas as pd

    columns = ["source", "row", "label", "margin", "converged"]
    frame = pd.read_parquet(margins, columns=columns)
    tie = pd.util.hash_array(frame["row"].to_numpy()) if len(frame) else np.empty(0, np.uint64)
    order = np.lexsort((tie, frame["margin"].to_numpy()))  # not converged (NaN) last
    frame["rank"] = 0
    quota: pd.Series[int] | int
    if per_class:
        ranks = frame.iloc[order].groupby("label").cumcount()
        frame.loc[ranks.index, "rank"] = ranks
        quota = frame["label"].map((frame.groupby("label").size() * KEEP).round().astype(int))
    else:
        frame["rank"] = np.argsort(order)
        quota = round(KEEP * len(frame))
    kept = frame["converged"] & (frame["rank"] < quota)
    frame["kept"] = kept
    frame["eps"] = frame["margin"].clip(lower=0, upper=EPS).astype(np.float32).where(kept)
    reason = np.where(kept, "kept", np.where(frame["converged"], "high_margin", "not_converged"))
    frame["reason"] = pd.Categorical(reason)
    out.mkdir()
    frame.drop(columns=["margin", "converged", "rank"]).to_parquet(out / "manifest.parquet", compression="zstd")


def with_polars(margins: Path, out: Path, per_class: bool) -> None:
    import polars as pl

    frame = pl.scan_parquet(margins / "*.parquet").select("source", "row", "label", "margin", "converged")
    scored = frame.with_columns(tie=pl.col("row").hash(0))
    key = pl.struct(pl.when(pl.col("converged")).then(pl.col("margin")).otherwise(float("inf")), "tie")
    rank = key.rank("ordinal")
    size = pl.len()
    if per_class:
        rank, size = rank.over("label"), size.over("label")
    kept = pl.col("converged") & (rank <= (size * KEEP).round())
    eps = pl.col("margin").clip(0, EPS).cast(pl.Float32)
    reason = pl.when(pl.col("kept")).then(pl.lit("kept")).when(pl.col("converged")).then(pl.lit("high_margin"))
    manifest = (
        scored.with_columns(kept=kept)
        .with_columns(eps=pl.when("kept").then(eps), reason=reason.otherwise(pl.lit("not_converged")).cast(pl.Categorical))
        .select("source", "row", "label", "kept", "eps", "reason")
    )
    out.mkdir()
    manifest.sink_parquet(out / "manifest.parquet", compression="zstd")


def with_polars_threshold(margins: Path, out: Path, per_class: bool) -> None:
    """Two streaming passes instead of ranks: the threshold, then the rows below it. Rows at the threshold are ordered by
    their hash, so that the count is exact."""
    import polars as pl

    frame = pl.scan_parquet(margins / "*.parquet").select("source", "row", "label", "margin", "converged")
    by = pl.col("label") if per_class else pl.lit(0, pl.Int16).alias("label")
    sizes = frame.group_by(by).agg(n=(pl.len() * KEEP).round().cast(pl.Int64)).collect(engine="streaming")
    cuts, tied = {}, {}
    for label, count in sizes.iter_rows():
        part = frame.filter("converged", *([pl.col("label") == label] if per_class else []))
        values = part.select("margin").collect(engine="streaming")["margin"].to_numpy()
        cuts[label], tied[label] = cut_of(values, count)
    out.mkdir()
    cut = (pl.col("label") if per_class else pl.lit(0, pl.Int16)).replace_strict(cuts, return_dtype=pl.Float32)
    ties = (
        frame.filter(pl.col("converged") & (pl.col("margin") == cut))
        .with_columns(tie=pl.col("row").hash(0))
        .collect(engine="streaming")
        .sort("tie")
    )
    chosen = [
        group.head(tied[label[0] if per_class else 0]).select("source", "row")
        for label, group in (ties.group_by("label") if per_class else [((0,), ties)])
    ]
    extra = pl.concat(chosen).with_columns(extra=pl.lit(True)).lazy()
    manifest = (
        frame.join(extra, on=["source", "row"], how="left", maintain_order="left")
        .with_columns(kept=pl.col("converged") & ((pl.col("margin") < cut) | pl.col("extra").fill_null(False)).fill_null(False))
        .with_columns(
            eps=pl.when("kept").then(pl.col("margin").clip(0, EPS)),
            reason=pl.when("kept")
            .then(pl.lit("kept"))
            .when("converged")
            .then(pl.lit("high_margin"))
            .otherwise(pl.lit("not_converged"))
            .cast(pl.Categorical),
        )
        .select("source", "row", "label", "kept", "eps", "reason")
    )
    manifest.sink_parquet(out / "manifest.parquet", compression="zstd")


def cut_of(values: np.ndarray, count: int) -> tuple[float, int]:
    """The count-th lowest of values, and how many of those that equal it are among the count lowest."""
    at = min(count, len(values)) - 1
    cut = np.partition(values, at)[at]
    return float(cut), int(at + 1 - np.count_nonzero(values < cut))


def with_pandas_threshold(margins: Path, out: Path, per_class: bool) -> None:
    """The threshold instead of ranks; rows at it are ordered by their hash."""
    import pandas as pd

    frame = pd.read_parquet(margins, columns=["source", "row", "label", "margin"])
    kept = np.zeros(len(frame), bool)
    labels = frame["label"].to_numpy() if per_class else np.zeros(len(frame), np.int16)
    margin = frame["margin"].to_numpy()
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        values = margin[rows]
        count, known = round(KEEP * len(rows)), ~np.isnan(values)
        cut, tied = cut_of(values[known], count)
        kept[rows[values < cut]] = True
        equal = rows[values == cut]
        kept[equal[np.argsort(pd.util.hash_array(frame["row"].to_numpy()[equal]))[:tied]]] = True
    frame["kept"] = kept
    frame["eps"] = frame["margin"].clip(lower=0, upper=EPS).where(kept)
    codes = np.where(kept, 0, np.where(np.isnan(margin), 2, 1)).astype(np.int8)
    frame["reason"] = pd.Categorical.from_codes(codes, pd.Index(["kept", "high_margin", "not_converged"]))
    out.mkdir()
    frame.drop(columns=["margin"]).to_parquet(out / "manifest.parquet", compression="zstd")


def with_duckdb_threshold(margins: Path, out: Path, per_class: bool) -> None:
    """The threshold instead of ranks, and one more for the hashes of the rows at it: constants, so that no join reorders."""
    out.mkdir()
    database = connect(out)
    table = f"read_parquet('{margins}/*.parquet')"
    group = "label" if per_class else "0::SMALLINT"
    sizes = database.execute(
        f"SELECT {group}, round({KEEP} * count(*))::BIGINT, count(margin) FROM {table} GROUP BY 1"
    ).fetchall()
    # quantile_disc gives the ceil(q * count)-th lowest.
    columns = [f"quantile_disc(margin, {min(1, (n - 0.5) / known)}) FILTER ({group} = {label})" for label, n, known in sizes]
    (cuts,) = database.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
    at = {size[0]: f"{cut!r}::FLOAT" for size, cut in zip(sizes, cuts, strict=True)}
    columns = [f"count(*) FILTER ({group} = {label} AND margin < {cut})" for label, cut in at.items()]
    (below,) = database.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
    tied = {label: n - lower for (label, n, _), lower in zip(sizes, below, strict=True)}
    equal = " OR ".join(f"({group} = {label} AND margin = {cut})" for label, cut in at.items())
    hashes = database.execute(f"SELECT {group}, hash(row) FROM {table} WHERE {equal} ORDER BY ALL").fetchall()
    last = {label: [found for key, found in hashes if key == label][count - 1] for label, count in tied.items()}
    cut = f"CASE {group} " + " ".join(f"WHEN {label} THEN {value}" for label, value in at.items()) + " END"
    highest = f"CASE {group} " + " ".join(f"WHEN {label} THEN {value}::UBIGINT" for label, value in last.items()) + " END"
    database.execute(f"""
        COPY (
            SELECT source, row, label, kept, CASE WHEN kept THEN least({EPS}::FLOAT, greatest(margin, 0)) END AS eps,
                   CASE WHEN kept THEN 'kept' WHEN converged THEN 'high_margin' ELSE 'not_converged' END AS reason
            FROM (
                SELECT *, converged AND (margin < {cut} OR (margin = {cut} AND hash(row) <= {highest})) AS kept FROM {table}
            )
        ) TO '{out}/manifest.parquet' (FORMAT parquet, COMPRESSION zstd)
    """)


def connect(out: Path) -> Any:
    """A duckdb that spills to the disk below out."""
    import duckdb

    database = duckdb.connect()
    database.execute(f"SET memory_limit='1500MB'; SET threads=2; SET temp_directory='{out}/spill'")
    return database


def with_duckdb(margins: Path, out: Path, per_class: bool) -> None:
    over = "PARTITION BY label" if per_class else ""
    out.mkdir()
    connect(out).execute(f"""
        COPY (
            SELECT source, row, label, kept, CASE WHEN kept THEN least({EPS}::FLOAT, greatest(margin, 0)) END AS eps,
                   CASE WHEN kept THEN 'kept' WHEN converged THEN 'high_margin' ELSE 'not_converged' END AS reason
            FROM (
                SELECT *, converged AND row_number() OVER ({over} ORDER BY margin NULLS LAST, hash(row))
                          <= round({KEEP} * count(*) OVER ({over})) AS kept
                FROM read_parquet('{margins}/*.parquet')
            ) ORDER BY source, row
        ) TO '{out}/manifest.parquet' (FORMAT parquet, COMPRESSION zstd)
    """)


TOOLS: dict[str, Callable[[Path, Path, bool], None]] = {
    "ours": ours,
    "pandas": with_pandas,
    "polars": with_polars,
    "duckdb": with_duckdb,
    "pandas by threshold": with_pandas_threshold,
    "polars by threshold": with_polars_threshold,
    "duckdb by threshold": with_duckdb_threshold,
}


def check(manifest: Path) -> dict[str, Any]:
    """How many rows it keeps, the sum of their eps, and whether its rows are in the order of the table."""
    kept, total, ordered, last = 0, 0.0, True, -1
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches(columns=["source", "row", "kept", "eps"]):
            source = batch["source"].cast(pa.string()) if pa.types.is_dictionary(batch["source"].type) else batch["source"]
            place = batch["row"].to_numpy() + NUM_REAL * pc.equal(source, "synthetic").to_numpy(zero_copy_only=False)
            ordered &= bool(place[0] == last + 1 and (np.diff(place) == 1).all())
            last = int(place[-1])
            kept += batch["kept"].true_count
            total += float(np.nansum(batch["eps"].to_numpy(zero_copy_only=False), dtype=np.float64))
    return {"kept": kept, "eps_sum": total, "ordered": ordered}


def main(
    folder: Annotated[Path, typer.Option(help="Where the margin table is, or is made.")] = Path("/tmp/margins-benchmark"),
    num_rows: int = 50_000_000,
    num_rounds: int = 1,
    tools: str = ",".join(TOOLS),
    peers: Annotated[Path | None, typer.Option(help="Folder in which polars and duckdb are installed.")] = None,
    timeout_s: float = 300,
    per_class: bool = False,
    run: Annotated[str | None, typer.Option(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    if run is not None and out is not None:
        finish(partial(TOOLS[run], folder, out, per_class))
        return
    if not folder.exists():
        generate(folder, num_rows)
    chosen = [name.strip() for name in tools.split(",")]
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
    print(f"{num_rows} rows, {size:.2f} GB of Parquet")
    print(f"{'groups':10} {'tool':20} {'seconds':>8} {'peak GB':>8} {'ratio':>6} {'kept':>10} {'same':5} {'order':5}")
    rows, headline = [], {"name": "manifest, seconds of the fastest peer within 2 GB over ours", "ratio": None, "goal": GOAL}
    ratios = []
    for grouped in (False, True):
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for _ in range(num_rounds):
            for name in chosen:
                target = folder.with_name(f"{folder.name}-out")
                arguments = ["--run", name, "--folder", str(folder), "--out", str(target)]
                arguments += ["--per-class"] if grouped else []
                result = measure(__file__, arguments, peers=peers, timeout_s=timeout_s, most_gb=MOST_GB)
                found[name].append(result | (check(target / "manifest.parquet") if "seconds" in result else {}))
                subprocess.run(["rm", "-rf", str(target)], check=True)
        own = median(r["seconds"] for r in found["ours"])
        within = []
        for name, results in found.items():
            good = [r for r in results if "seconds" in r]
            label = "per class" if grouped else "global"
            if not good:
                print(f"{label:10} {name:20} {results[0]['error']}", flush=True)
                rows.append({"groups": label, "tool": name, "error": results[0]["error"]})
                continue
            seconds, peak = median(r["seconds"] for r in good), max(r["peak_gb"] for r in good)
            row = {"groups": label, "tool": name, "seconds": seconds, "peak_gb": peak, "ratio": seconds / own}
            reference = found["ours"][0]
            # Peers round the share of each class by itself, we to the share of all.
            near = [abs(r["kept"] - reference["kept"]) <= NUM_CLASSES for r in good]
            same = all(near) and all(
                math.isclose(r["eps_sum"], reference["eps_sum"], rel_tol=1e-6, abs_tol=NUM_CLASSES * EPS) for r in good
            )
            row |= {"kept": good[0]["kept"], "same": same, "ordered": all(r["ordered"] for r in good)}
            rows.append(row)
            if name != "ours" and peak <= LIMIT_GB and same and row["ordered"]:
                within.append(row["ratio"])
            figures = f"{seconds:8.1f} {peak:8.2f} {row['ratio']:6.2f} {row['kept']:10} {same!s:5} {row['ordered']!s:5}"
            print(f"{label:10} {name:20} {figures}", flush=True)
        ratios.append(min(within, default=None))
    known = [ratio for ratio in ratios if ratio is not None]
    headline["ratio"] = min(known) if known else None
    print(f"{headline['name']}, worst of both: {headline['ratio'] or 'no peer stays within 2 GB'} (goal {GOAL})")
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        json_file.write_text(json.dumps({"headline": headline, "rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
