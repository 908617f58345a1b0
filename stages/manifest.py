"""Turn the margins into one strategy's manifest: which rows are kept, and with which eps."""

from pathlib import Path

from pydantic import Field

from pipeline.execution import guarded_publish
from pipeline.manifest import check_norm, write_manifest
from pipeline.params import StageParams
from pipeline.pruning import Strategy
from pipeline.stage import run
from pipeline.threat import ThreatParams


class ManifestParams(StageParams):
    threat: ThreatParams
    strategy: Strategy = Field(alias="strategies.{strategy}")


def main(margins_path: Path, manifest_path: Path) -> None:
    params = ManifestParams.load(strategy=manifest_path.name)
    with guarded_publish("manifest", params, [margins_path], manifest_path, strategy=manifest_path.name) as work:
        check_norm(margins_path, params.strategy, params.threat.norm)
        write_manifest(work, margins_path, params.strategy, params.threat.eps)


if __name__ == "__main__":
    run(main)
