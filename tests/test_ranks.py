"""Several ranks against one, in real processes over Gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.attacks import PGDParams
from pipeline.balls import BALLS
from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.ranks import my_part
from pipeline.training.heldout import Selector
from tests.conftest import ROOT, untrained

PARTS = """
import sys, torch
import numpy as np
from pathlib import Path
from torch import nn
from safetensors.torch import save_file
from pipeline.attacks import PGDParams
from pipeline.balls import BALLS
from pipeline.images import ImageStore
from pipeline.execution.distributed import process_group
from pipeline.batchnorm import share_batchnorm
from pipeline.ranks import average_gradients, rank
from pipeline.training.heldout import Selector
from tests.conftest import untrained
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 3)).double()
x = torch.randn(7, 2, 6, 6, dtype=torch.float64)
with process_group():
    share_batchnorm(net)
    mine = x[:5] if rank() == 0 else x[5:]      # unequal parts
    mine.requires_grad_()
    (net(mine).square().sum() * 2).backward()   # the mean over two ranks of twice the local sums is the global sum
    average_gradients(net.parameters())
    net(x[:7] if rank() == 0 else x[:0])        # a rank without images takes part
    selector = Selector(ImageStore.open(Path(sys.argv[2])), np.arange(151), PGDParams(num_steps=2, step_size_255=24),
                        BALLS["linf"], 0.3, 20, torch.device("cpu"))
    score = torch.tensor(selector.score(untrained()), dtype=torch.float64)
    save_file({"score": score, **net.state_dict(),
               **{f"grad.{n}": p.grad for n, p in net.named_parameters()}, "x": mine.grad / 2},
              f"{sys.argv[1]}-{rank()}")
"""

TRAINING = """
import json, sys, torch
from pathlib import Path
from pipeline.execution.distributed import process_group
from pipeline.images import ImageStore
from pipeline.models import build_network
from pipeline.ranks import rank
from pipeline.training import TrainingParams, train
from pipeline.training.pools import full_pool
from pipeline.threat import ThreatParams
from tests.conftest import TINY
torch.set_num_threads(1)
with process_group():
    threat = ThreatParams(norm="linf", eps_255=24)
    stores = {name: ImageStore.open(Path(sys.argv[2]) / name) for name in ("real", "synthetic")}
    pools = {name: full_pool(store, threat.eps) for name, store in stores.items()}
    pools["real"].eps[:200] = 0
    result = train(build_network(TINY, (8, 8, 1), 10, 0), pools, TrainingParams.model_validate_json(sys.argv[3]),
                   threat=threat, seed=0, device=torch.device("cpu"), progress=lambda *a: None)
    if rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps([result.history, result.cost]))
"""


def run_ranks(code: str, count: int, *arguments: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code, *arguments], env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(count)
    ]
    assert [child.wait(timeout=300) for child in children] == [0] * count


def test_batchnorm_and_selection_over_unequal_parts_are_those_of_the_whole(
    tmp_path: Path, stores: dict[str, ImageStore]
) -> None:
    run_ranks(PARTS, 2, str(tmp_path / "rank"), str(stores["real"].path))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 3)).double()
    x = torch.randn(7, 2, 6, 6, dtype=torch.float64).requires_grad_()
    net(x).square().sum().backward()
    net(x)
    expected = {**net.state_dict(), **{f"grad.{name}": p.grad for name, p in net.named_parameters()}}
    found = [load_file(tmp_path / f"rank-{rank}") for rank in (0, 1)]
    attack = PGDParams(num_steps=2, step_size_255=24)
    selector = Selector(stores["real"], np.arange(151), attack, BALLS["linf"], 0.3, 151, torch.device("cpu"))
    clean, robust = selector.score(untrained())
    assert 0 < robust < clean
    expected["score"] = torch.tensor([clean, robust], dtype=torch.float64)
    for name, value in expected.items():
        for part in found:
            torch.testing.assert_close(part[name], value)
    torch.testing.assert_close(torch.cat([part["x"] for part in found]), x.grad)


@pytest.mark.parametrize(("loss", "mode"), [("trades", "batch"), ("pgd_at", "batch"), ("trades", "clean")])
def test_two_ranks_have_the_losses_of_one(tmp_path: Path, stores: dict[str, ImageStore], loss: str, mode: str) -> None:
    params = {
        "attack_batchnorm": mode,
        "loss": loss, "attack": {"num_steps": 2, "step_size_255": 8}, "epochs": 1, "batch_size": 40, "synthetic_fraction": 0.3,
        "lr": 0.1, "augmentation": {"crop_padding": 1, "flip": True, "cutmix": mode == "clean"},
        "holdout": 40, "select_every": 1,
        "selection_attack": {"num_steps": 2, "step_size_255": 8},
    }  # fmt: skip
    folder = str(stores["real"].path.parent)
    for count in (1, 2):
        run_ranks(TRAINING, count, str(tmp_path / f"{count}.json"), folder, json.dumps(params))
    (one, cost), (two, same_cost) = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert cost == same_cost
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-4)
    assert one[0]["mean_eps"] == pytest.approx(two[0]["mean_eps"], rel=1e-6)
    assert one[0]["clean_accuracy"] == pytest.approx(two[0]["clean_accuracy"], abs=0.051)


def test_a_batch_that_the_ranks_cannot_share_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.ranks.world_size", lambda: 3)
    with pytest.raises(InputError, match="wanted a multiple of the 3 ranks, got 128"):
        my_part(128)
    assert np.array_equal(my_part(6), [0, 3])
