"""One training over two nodes, against the same on one rank of this machine."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artifacts import write_table
from pipeline.images import ImageStore
from pipeline.manifest import write_manifest
from pipeline.pruning import Strategy
from tests.conftest import TINY, make_store
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Toy
from tests.test_pruning import margin_table

pytestmark = pytest.mark.xdist_group("slurm")

GENERATOR = {
    "kind": "edm",
    "network": {"channels": 4, "multipliers": [1], "blocks": 1, "attention_resolutions": [], "dropout": 0.0},
    "training": {"steps": 12, "batch_size": 16, "warmup_steps": 2, "ema_decay": 0.9, "flip": True, "seed": 0},
}


TRAINING = {
    "loss": "trades", "attack": {"num_steps": 2, "step_size_255": 8}, "epochs": 2, "batch_size": 64, "synthetic_fraction": 0.3,
    "lr": 0.02, "augmentation": {"crop_padding": 1, "flip": True}, "holdout": 40, "select_every": 2,
    "selection_attack": {"num_steps": 2, "step_size_255": 8},
}  # fmt: skip
PARAMS = {
    "threat": {"norm": "linf", "eps_255": 24},
    "generator": GENERATOR,
    "train": {"model": TINY.model_dump(), "training": TRAINING},
}
COMMANDS = {
    "generator": ("real", "training.csv"),
    "train": ("real synthetic manifest", "steps.csv"),
}


def losses(path: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader(path.read_text().splitlines())]


@pytest.mark.parametrize("stage", ["generator", "train"])
def test_two_nodes_have_the_losses_of_one_rank(
    plain: Cluster, make_toy: Callable[[Cluster], Toy], stores: dict[str, ImageStore], stage: str
) -> None:
    project = make_toy(plain)
    for name, store in stores.items():
        make_store(project.path / name, (store.shard(0).copy(), store.labels.copy()))
    for folder in ("margins", "manifest"):
        (project.path / folder).mkdir()
    write_table(project.path / "margins/part-00000.parquet", margin_table(n=300))
    rule = Strategy.model_validate({"eps": {"rule": "margin"}})
    write_manifest(project.path / "manifest", project.path / "margins", rule, 0.1)
    inputs, curve = COMMANDS[stage]
    seed = " 0" if stage == "train" else ""
    shared = {"device": "cpu", "threads": 1, "cpus_per_task": 1, "poll_s": 0.5, "timeout_min": 30}
    for nodes in (1, 2):
        execution = shared | ({"backend": "local"} if nodes == 1 else {"backend": "slurm", "stages": {stage: {"nodes": nodes}}})
        (project.path / "params.yaml").write_text(json.dumps({**PARAMS, "execution": execution}))
        project.run(f"exec python -m stages.{stage} {inputs} {stage}-{nodes}{seed}")
    one, two = (losses(project.path / f"{stage}-{nodes}" / curve) for nodes in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)
    assert len(one) == {"generator": 12, "train": 14}[stage]
    logs = project.run(f"python -m pipeline logs {stage}")
    assert re.findall(r"global_rank=(\d)\(2\)", logs) == ["0", "1"]
