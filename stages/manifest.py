"""Turn the margins into one strategy's manifest: which rows are kept, and with which eps."""

from pathlib import Path

from pydantic import Field

from pipeline.artifacts import MARGINS_SCHEMA, publish, read_table, write_json, write_table
from pipeline.params import StageParams
from pipeline.pruning import Strategy, prune
from pipeline.stage import run
from pipeline.threat import ThreatParams


class ManifestParams(StageParams):
    threat: ThreatParams
    strategy: Strategy = Field(alias="strategies.{strategy}")


def main(margins_path: Path, manifest_path: Path) -> None:
    params = ManifestParams.load(strategy=manifest_path.name)
    manifest, summary = prune(read_table(margins_path, MARGINS_SCHEMA), params.strategy, params.threat.eps)
    with publish(manifest_path) as work:
        write_table(work / "manifest.parquet", manifest)
        write_json(work / "summary.json", summary)


if __name__ == "__main__":
    run(main)
