"""Training, the generator and an evaluation killed, as real processes: they end with the bytes of a run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.artifacts import write_table
from pipeline.batches import to_tensor
from pipeline.checkpoints import Checkpoint
from pipeline.execution.store import RunStore
from pipeline.images import Images, ImageStore, Labels
from pipeline.manifest import write_manifest
from pipeline.models import Classifier
from pipeline.models.checkpoint import save_model
from pipeline.pruning import Strategy
from tests.conftest import ROOT, TINY, digits, make_store, untrained
from tests.test_pruning import margin_table

TRAINING = {
    "loss": "trades", "attack": {"num_steps": 2, "step_size_255": 8}, "epochs": 6, "batch_size": 32, "synthetic_fraction": 0.3,
    "lr": 0.1, "augmentation": {"crop_padding": 1, "flip": True}, "holdout": 40, "select_every": 1,
    "selection_attack": {"num_steps": 2, "step_size_255": 8},
}  # fmt: skip
PARAMS = {
    "threat": {"norm": "linf", "eps_255": 24},
    "generator": {
        "kind": "edm",
        "network": {"channels": 4, "multipliers": [1], "blocks": 1, "attention_resolutions": [], "dropout": 0.0},
        "training": {"steps": 80, "batch_size": 16, "warmup_steps": 2, "ema_decay": 0.9, "flip": True, "seed": 0},
    },
    "train": {"model": TINY.model_dump(), "training": TRAINING},
    "evaluate": {
        "version": "custom",
        "attacks": ["apgd-ce", "apgd-dlr"],
        "reference_attacks": ["fgsm"],
        "checkpoint": "best",
        "batch_size": 16,
        "shard_rows": 16,
    },
    "execution": {"backend": "local", "device": "cpu", "threads": 1, "checkpoint_s": 0.3},
}
COMMANDS = {
    "generator": ["stages.generator", "real", "generator"],
    "train": ["stages.train", "real", "synthetic", "manifest", "model", "0"],
    "evaluate": ["stages.evaluate", "test", "model", "evaluation", "none", "0"],
}


def start(project: Path, stage: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DVC_ROOT": str(project)}
    command = [sys.executable, "-m", *COMMANDS[stage]]
    with (project / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=project, env=environment, stderr=log)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def kill_at_random(project: Path, stage: str, rng: random.Random) -> bool:
    """Start the stage and SIGKILL it some time after its next checkpoint; False if it ended before."""
    before = {path: path.stat().st_mtime_ns for path in project.glob(".runs/*/*/work/*/checkpoint.safetensors")}
    child = start(project, stage)
    while child.poll() is None:
        found = {path: path.stat().st_mtime_ns for path in project.glob(".runs/*/*/work/*/checkpoint.safetensors")}
        if found and found != before:
            time.sleep(rng.random() * 0.4)
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    return child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("stage", ["generator", "train"])
def test_a_run_killed_at_random_points_ends_with_the_same_bytes(
    tmp_path: Path, stores: dict[str, ImageStore], stage: str
) -> None:
    rng = random.Random(stage)
    for name in ("killed", "whole"):
        project = tmp_path / name
        project.mkdir()
        (project / "params.yaml").write_text(json.dumps(PARAMS))
        for source, store in stores.items():
            make_store(project / source, (store.batch(torch.arange(len(store)).numpy()), store.labels.copy()))
        for folder in ("margins", "manifest"):
            (project / folder).mkdir()
        write_table(project / "margins/part-00000.parquet", margin_table(n=300))
        write_manifest(project / "manifest", project / "margins", Strategy.model_validate({"eps": {"rule": "margin"}}), 0.1)
    assert start(tmp_path / "whole", stage).wait() == 0
    killed = sum(kill_at_random(tmp_path / "killed", stage, rng) for _ in range(2))  # some steps after a checkpoint
    assert killed >= 1, "the run was too short to be killed"
    assert start(tmp_path / "killed", stage).wait() == 0
    out = COMMANDS[stage][-2 if stage == "train" else -1]
    whole, again = (contents(tmp_path / name / out) for name in ("whole", "killed"))
    assert whole == again
    assert whole
    assert not list((tmp_path / "killed").glob(".runs/*/*/work/*")), "checkpoints are freed when the result is published"


def test_an_evaluation_that_is_killed_after_its_first_attack_does_not_repeat_it_and_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    images, labels = digits("test", 48)
    description = {
        "architecture": TINY.architecture, "arguments": TINY.arguments, "shape": [8, 8, 1],
        "classes": list("0123456789"),
    }  # fmt: skip
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.yaml").write_text(json.dumps(PARAMS | {"threat": {"norm": "linf", "eps_255": 3}}))
        for checkpoint, seed in (("best", 1), ("last", 0)):
            save_model(tmp_path / name / "model" / checkpoint, untrained(seed), description)
        make_store(tmp_path / name / "test", (images, as_predicted(untrained(1), images, labels)))
    assert start(tmp_path / "whole", "evaluate").wait() == 0
    killed = tmp_path / "killed"
    child = start(killed, "evaluate")
    while child.poll() is None and not list(killed.glob(".runs/*/*/work/apgd-dlr-*")):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run was too short to be killed"
    assert not (killed / "evaluation").exists()
    assert len(list(killed.glob(".runs/*/*/tasks/apgd-ce-*/done.json"))) > 1
    assert start(killed, "evaluate").wait() == 0
    whole, again = (contents(tmp_path / name / "evaluation") for name in ("whole", "killed"))
    assert whole == again
    assert whole
    repeated = (killed / "log").read_text()
    assert "apgd-dlr-00001: " in repeated
    assert "apgd-ce-" not in repeated
    assert "clean-" not in repeated
    assert "apgd-ce-00001: " in (tmp_path / "whole/log").read_text()
    accuracy = json.loads(whole["metrics.json"])["attacks"]
    assert 0.5 < accuracy["apgd-dlr"] <= accuracy["apgd-ce"] < 35 / 48


def test_dvc_repro_that_is_killed_goes_on_from_the_checkpoint(tmp_path: Path, stores: dict[str, ImageStore]) -> None:
    store, checkpoints = stores["real"], ".runs/*/*/work/*/checkpoint.safetensors"
    for name in ("killed", "whole"):
        project = tmp_path / name
        project.mkdir()
        (project / "params.yaml").write_text(json.dumps(PARAMS))
        make_store(project / "real", (store.batch(np.arange(len(store))), store.labels.copy()))
    assert start(tmp_path / "whole", "generator").wait() == 0
    killed = tmp_path / "killed"
    command = f"exec {sys.executable} -m stages.generator real generator"
    stage = {"cmd": command, "params": ["generator"], "deps": ["real"], "outs": ["generator"]}
    (killed / "dvc.yaml").write_text(json.dumps({"stages": {"generator": stage}}))
    subprocess.run(["git", "init", "-q"], cwd=killed, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=killed, check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SHELL": "/bin/sh"}
    repro = [sys.executable, "-m", "dvc", "repro", "-q"]
    with subprocess.Popen(repro, cwd=killed, env=environment) as child:
        while child.poll() is None and not list(killed.glob(checkpoints)):
            time.sleep(0.01)
        child.kill()
    (path,) = killed.glob(checkpoints)
    with RunStore(path.parents[2]).locked():  # until the stage has ended too
        reached = Checkpoint(path, 0).load()
    assert reached is not None
    assert 0 < reached["step"] < 80
    subprocess.run(repro, cwd=killed, env=environment, check=True)
    assert contents(killed / "generator") == contents(tmp_path / "whole/generator")


def as_predicted(model: Classifier, images: Images, labels: Labels) -> Labels:
    """The labels that model gives the images, but for the first ten."""
    with torch.no_grad():
        predicted = model(to_tensor(images, torch.device("cpu"))).argmax(dim=1).numpy()
    return np.where(np.arange(len(labels)) < 10, (predicted + 1) % 10, predicted)


def test_a_checkpoint_gives_back_what_was_saved_and_a_damaged_one_is_named_and_counts_as_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint(tmp_path / "state", every_s=1000)
    assert checkpoint.load() is None
    assert not capsys.readouterr().err
    assert not checkpoint.due()
    state: dict[str, Any] = {"a": torch.arange(3), "b": [1, None, "text", {"c": torch.zeros(2, 2)}], "d": 0.5, "e": True}
    checkpoint.save(state)
    found = checkpoint.load()
    assert found is not None
    assert torch.equal(found["a"], state["a"])
    assert torch.equal(found["b"][3]["c"], torch.zeros(2, 2))
    assert (found["b"][:3], found["d"], found["e"]) == ([1, None, "text"], 0.5, True)
    checkpoint.save({"step": 3})
    assert checkpoint.load() == {"step": 3}
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:20])
    assert checkpoint.load() is None
    assert "state: damaged (" in capsys.readouterr().err
