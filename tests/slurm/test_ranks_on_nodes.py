"""One training over two nodes, against the same on one rank of this machine."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.images import ImageStore
from tests.conftest import make_store
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Toy

pytestmark = pytest.mark.xdist_group("slurm")

GENERATOR = {
    "kind": "edm",
    "network": {"channels": 4, "multipliers": [1], "blocks": 1, "attention_resolutions": [], "dropout": 0.0},
    "training": {"steps": 12, "batch_size": 16, "warmup_steps": 2, "ema_decay": 0.9, "flip": True, "seed": 0},
}


def losses(path: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader(path.read_text().splitlines())]


def test_two_nodes_have_the_losses_of_one_rank(
    plain: Cluster, make_toy: Callable[[Cluster], Toy], stores: dict[str, ImageStore]
) -> None:
    project = make_toy(plain)
    store = stores["real"]
    make_store(project.path / "real", (store.shard(0).copy(), store.labels.copy()))
    shared = {"backend": "slurm", "device": "cpu", "threads": 1, "cpus_per_task": 1, "poll_s": 0.5, "timeout_min": 30}
    for nodes in (1, 2):
        execution = {**shared, "stages": {"generator": {"nodes": nodes}}}
        (project.path / "params.yaml").write_text(json.dumps({"generator": GENERATOR, "execution": execution}))
        project.run(f"exec python -m stages.generator real generator-{nodes}")
    one, two = (losses(project.path / f"generator-{nodes}/training.csv") for nodes in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)
    assert len(one) == 12
    assert "global_rank=1(2)" in project.all_logs()
