"""One set of artifacts for all tests that only read them."""

from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.reporting.inputs import Artifacts
from tests.reporting.artifacts import write_artifacts

STRATEGIES = ("none", "random", "puma")
SEEDS = (0, 1)


def artifacts_at(root: Path) -> Artifacts:
    return Artifacts(*(root / field.name for field in fields(Artifacts)))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of artifacts; read only."""
    root = tmp_path_factory.mktemp("artifacts")
    write_artifacts(root, STRATEGIES, SEEDS)
    return root
