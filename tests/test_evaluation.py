from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyautoattack import AutoAttack
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.artifacts import read_json
from pipeline.batches import to_tensor
from pipeline.evaluation import AttackName, EvaluateSection, accuracies, check_classes, evaluate, evaluate_other, write_metrics
from pipeline.images import ImageStore, write_store
from pipeline.params import InputError, explain
from pipeline.threat import NormName, ThreatParams
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


@pytest.mark.parametrize(("norm", "eps_255"), [("linf", 16.0), ("l2", 120.0)])
def test_attack_after_attack_gives_what_one_run_of_the_package_gives(
    test_store: ImageStore, stores: dict[str, Any], norm: NormName, eps_255: float
) -> None:
    model = Prototypes(stores["real"]).eval()
    found = run(model, test_store, ["apgd-ce", "apgd-t"], ThreatParams(norm=norm, eps_255=eps_255))
    x = to_tensor(test_store.batch(np.arange(len(test_store))), CPU)
    y = torch.from_numpy(np.array(test_store.labels))
    name = {"linf": "Linf", "l2": "L2"}[norm]
    package = AutoAttack(model, norm=name, eps=eps_255 / 255, seed=0, version="standard", device="cpu")
    package.attacks_to_run = ["apgd-ce", "apgd-t"]
    x_adv, _ = package.run_standard_evaluation(x, y, batch_size=16)
    with torch.no_grad():
        expected = (model(x_adv).argmax(dim=1) == y).numpy()
    assert np.array_equal(found["apgd-t"], expected)
    assert 0.05 < expected.mean() < found["clean"].mean() - 0.1


def test_survival_never_returns_and_counts_are_of_examples(test_store: ImageStore, stores: dict[str, Any]) -> None:
    table = evaluate(
        Prototypes(stores["real"]).eval(), test_store, threat=THREAT, attacks=["apgd-ce", "fab-t", "square"], batch_size=32,
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
    images, labels = digits("train", 60)
    few = labels < num_classes
    shape = (8, 8, 1)
    classes = tuple("0123"[:num_classes])
    store = write_store(tmp_path / "few", [(images[few], labels[few])], classes=classes, shape=shape, shard_rows=300, origin={})
    attacks = section(version="standard").attacks_for(num_classes)
    assert attacks == ["apgd-ce", *{2: [], 3: ["apgd-dlr"], 4: ["apgd-t"]}[num_classes], "fab-t", "square"]
    check_classes(attacks, num_classes)
    found = run(untrained(num_classes=num_classes), store, attacks[:-1])
    assert (found["fab-t"] <= found["clean"]).all()


def test_nan_and_empty_test_sets_are_clear_errors(test_store: ImageStore, tmp_path: Path) -> None:
    broken = untrained()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="wanted finite logits"):
        run(broken, test_store, ["apgd-ce"])
    empty = make_store(tmp_path / "empty", (np.empty((0, 8, 8, 1), np.uint8), np.empty(0, np.int64)))
    with pytest.raises(InputError, match="wanted test images to evaluate on, got none"):
        run(untrained(), empty, ["apgd-ce"])


def section(**fields: Any) -> EvaluateSection:
    return EvaluateSection.model_validate({"attacks": [], "checkpoint": "best", "batch_size": 8} | fields)


def test_reference_attacks_and_flags_stand_beside_autoattack(
    test_store: ImageStore, stores: dict[str, Any], tmp_path: Path
) -> None:
    chosen = section(version="custom", attacks=["apgd-ce"], reference_attacks=["fgsm", "pgd-20-cw"])
    table = evaluate(
        Prototypes(stores["real"]).eval(), test_store, threat=ThreatParams(norm="linf", eps_255=16), attacks=["apgd-ce"],
        batch_size=16, seed=0, device=CPU, progress=lambda done, total: None, reference_attacks=chosen.reference_attacks,
    )  # fmt: skip
    worse = evaluate_other(
        untrained(), test_store, start=0, stop=len(test_store), threat=ThreatParams(norm="linf", eps_255=16), batch_size=16,
        reference_attacks=chosen.reference_attacks, seed=0, device=CPU,
    )  # fmt: skip
    for name, outcome in worse.items():
        table = table.append_column(name, pa.array(outcome))
    write_metrics(tmp_path / "metrics.json", table, chosen, THREAT, "none", 0, {"digest": "a"}, "b")
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["robust"] == metrics["attacks"]["apgd-ce"] == table["apgd-ce"].to_numpy().mean()  # AutoAttack's alone
    assert metrics["reference"] == {name: table[name].to_numpy().mean() for name in ("fgsm", "pgd-20-cw")}
    assert metrics["attacks"]["apgd-ce"] <= metrics["reference"]["fgsm"] < metrics["clean"]
    x = to_tensor(test_store.batch(np.arange(len(test_store))), CPU)
    correct = (untrained()(x).argmax(dim=1).numpy() == test_store.labels).mean()
    assert (metrics["other"]["checkpoint"], metrics["other"]["model"]) == ("last", "b")
    assert metrics["other"]["accuracy"]["clean"] == pytest.approx(correct)
    assert metrics["other"]["accuracy"]["pgd-20-cw"] <= correct < metrics["clean"]
    assert metrics["flags"] == {
        "random_outputs": 0, "probability_outputs": False, "zero_gradients": 0, "square_stronger": None,
    }  # fmt: skip


def test_standard_is_the_four_attacks_and_custom_needs_names() -> None:
    assert section(version="standard").attacks_for(10) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert section(version="custom", attacks=["square"]).attacks_for(2) == ["square"]
    with pytest.raises(ValidationError) as error:
        section(version="custom")
    assert "a list of different attacks" in explain(error.value)
