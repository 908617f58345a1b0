from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.batches import to_tensor
from pipeline.evaluation import AttackName, EvaluateSection, accuracies, check_classes, evaluate
from pipeline.images import ImageStore, write_store
from pipeline.params import InputError, explain
from pipeline.threat import ThreatParams
from tests.conftest import digits, make_store, untrained

CPU = torch.device("cpu")
THREAT = ThreatParams(norm="linf", eps_255=2)


def run(model: nn.Module, store: ImageStore, attacks: list[AttackName], threat: ThreatParams = THREAT) -> dict[str, np.ndarray]:
    table = evaluate(
        model, store, threat=threat, attacks=attacks, batch_size=16, seed=0, device=CPU, progress=lambda done, total: None
    )
    return {name: table[name].to_numpy() for name in table.column_names}


class Prototypes(nn.Module):
    """Logits: minus the distance to the mean image of each class, a model whose clean accuracy is high untrained."""

    def __init__(self, store: ImageStore) -> None:
        super().__init__()
        x = to_tensor(store.batch(np.arange(len(store))), CPU).flatten(1)
        y = torch.from_numpy(np.array(store.labels))
        self.means = torch.stack([x[y == k].mean(dim=0) for k in range(10)])

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.means.T - self.means.square().sum(dim=1) / 2


def test_attack_after_attack_gives_what_one_run_of_the_package_gives(test_store: ImageStore, stores: dict[str, Any]) -> None:
    model = Prototypes(stores["real"]).eval()
    found = run(model, test_store, ["apgd-ce", "apgd-t"], ThreatParams(norm="linf", eps_255=16))
    x = to_tensor(test_store.batch(np.arange(len(test_store))), CPU)
    y = torch.from_numpy(np.array(test_store.labels))
    package = AutoAttack(model, norm="Linf", eps=16 / 255, seed=0, version="standard", device="cpu")
    package.attacks_to_run = ["apgd-ce", "apgd-t"]
    x_adv, _ = package.run_standard_evaluation(x, y, batch_size=16)
    with torch.no_grad():
        expected = (model(x_adv).argmax(dim=1) == y).numpy()
    assert np.array_equal(found["apgd-t"], expected)
    assert 0.05 < expected.mean() < found["clean"].mean() - 0.1


def test_survival_never_returns_and_counts_are_of_examples(test_store: ImageStore, stores: dict[str, Any]) -> None:
    table = evaluate(
        Prototypes(stores["real"]).eval(), test_store, threat=THREAT, attacks=["apgd-ce", "fab-t", "square"], batch_size=7,
        seed=0, device=CPU, progress=lambda done, total: None,
    )  # fmt: skip
    clean, first, second, third = (table[name].to_numpy() for name in ("clean", "apgd-ce", "fab-t", "square"))
    assert (first <= clean).all()
    assert (second <= first).all()
    assert (third <= second).all()
    assert accuracies(table, ["square"]) == {"clean": clean.sum() / 60, "square": third.sum() / 60}
    assert table["row"].to_pylist() == list(range(60))


def test_attacks_that_need_more_classes_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="apgd-t wants at least 4 classes, the data have 3"):
        check_classes(["apgd-ce", "apgd-t"], 3)
    with pytest.raises(InputError, match="apgd-dlr wants at least 3 classes"):
        check_classes(["apgd-dlr"], 2)
    check_classes(["apgd-ce", "fab-t", "square"], 2)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_fewer_than_ten_classes_are_attacked_without_a_crash(num_classes: int, tmp_path: Path) -> None:
    images, labels = digits("train", 300)
    few = labels < num_classes
    shape = (8, 8, 1)
    classes = tuple("0123"[:num_classes])
    store = write_store(tmp_path / "few", [(images[few], labels[few])], classes=classes, shape=shape, shard_rows=300, origin={})
    attacks: list[AttackName] = ["apgd-ce", "fab-t"] if num_classes < 4 else ["apgd-ce", "apgd-t", "fab-t"]
    found = run(untrained(num_classes=num_classes), store, attacks)
    assert (found[attacks[-1]] <= found["clean"]).all()


def test_nan_and_empty_test_sets_are_clear_errors(test_store: ImageStore, tmp_path: Path) -> None:
    broken = untrained()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="wanted finite logits"):
        run(broken, test_store, ["apgd-ce"])
    empty = make_store(tmp_path / "empty", (np.empty((0, 8, 8, 1), np.uint8), np.empty(0, np.int64)))
    with pytest.raises(InputError, match="wanted test images to evaluate on, got none"):
        run(untrained(), empty, ["apgd-ce"])


def test_standard_is_the_four_attacks_and_custom_needs_names() -> None:
    fields = {"checkpoint": "best", "batch_size": 8}
    standard = EvaluateSection.model_validate({"version": "standard", "attacks": [], **fields})
    assert standard.chosen == ["apgd-ce", "apgd-t", "fab-t", "square"]
    with pytest.raises(ValidationError) as error:
        EvaluateSection.model_validate({"version": "custom", "attacks": [], **fields})
    assert "a list of different attacks" in explain(error.value)
