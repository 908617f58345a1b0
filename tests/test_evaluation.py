"""The evaluate stage against the package pyautoattack itself, run once over all images, and against exact worst cases."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from pyautoattack import AutoAttack, autoattack
from pyautoattack.state import EvaluationState
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline import evaluation
from pipeline.artifacts import read_json
from pipeline.evaluation import AttackName, EvaluateSection, shards
from pipeline.image_writing import write_store
from pipeline.models import Classifier, ModelParams, build_network, register
from pipeline.models.checkpoint import save_model
from pipeline.params import InputError, explain
from pipeline.threat import NormName, ThreatParams
from stages.evaluate import main
from tests.conftest import make_store

STANDARD: list[AttackName] = ["apgd-ce", "apgd-t", "fab-t", "square"]
EPS_255: dict[NormName, float] = {"linf": 4.0, "l2": 40.0}
Outcomes = dict[str, NDArray[np.bool_]]


class Stepped(nn.Module):
    """Bright images are rounded, so that they have no gradient and only Square finds what is near; and the logits depend
    on the company in the batch, as rounding errors do, but more."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        height, width, channels = shape
        features = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Flatten())
        self.net = nn.Sequential(*features, nn.Linear(8 * (height - 2) * (width - 2), num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(torch.where(bright(x), torch.floor(x * 12) / 12, x))
        return logits + 0.03 * x[0, 0, 0, 0].detach() * torch.linspace(-1, 1, logits.shape[1])


@register
def stepped(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return Stepped(shape, num_classes)


def bright(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2, 3), keepdim=True) > 0.5


class Linear(nn.Linear):
    """Logits W (x - 1/2)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) - 0.5)


@register
def linear(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return Linear(shape[0] * shape[1] * shape[2], num_classes, bias=False)


class Project:
    """The inputs of the stage in the present folder: two models, and colour images with the labels that the best one gives
    them, but for every ninth."""

    def __init__(self, architecture: str, num_classes: int = 10, num_rows: int = 90) -> None:
        self.num_classes = num_classes
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(76, 180, (num_rows, 8, 8, 3), generator=generator, dtype=torch.uint8)
        classes = [str(index) for index in range(num_classes)]
        params = ModelParams(architecture=f"tests.test_evaluation.{architecture}")
        self.models = {
            name: Classifier(build_network(params, (8, 8, 3), num_classes, seed), [0.0] * 3, [1.0] * 3).eval()
            for name, seed in (("best", 0), ("last", 1))
        }
        for name, model in self.models.items():
            about = {"architecture": params.architecture, "arguments": {}, "shape": [8, 8, 3], "classes": classes}
            save_model(Path("model") / name, model, about)
        self.x = (images.permute(0, 3, 1, 2).float() / 255).contiguous()
        with torch.no_grad():
            self.y = self.models["best"](self.x).argmax(dim=1)
        self.y[::9] = (self.y[::9] + 1) % num_classes
        chunk = (images.numpy(), self.y.numpy())
        write_store(Path("test"), [chunk], classes=tuple(classes), shape=(8, 8, 3), shard_rows=25, origin={})

    def evaluate(self, norm: NormName, eps_255: float | None = None, **changes: Any) -> tuple[Outcomes, dict[str, Any]]:
        """Run the stage: the columns of its table, and metrics.json."""
        section = {"version": "standard", "attacks": [], "checkpoint": "best", "batch_size": 16, "seed": 3} | changes
        threat = {"norm": norm, "eps_255": eps_255 or EPS_255[norm]}
        execution = {"backend": "local", "device": "cpu", "threads": 1}
        Path("params.yaml").write_text(json.dumps({"threat": threat, "evaluate": section, "execution": execution}))
        main(Path("test"), Path("model"), Path("out/none-0"), "none", 0)
        table = pq.read_table("out/none-0/samples.parquet")
        return {name: table[name].to_numpy() for name in table.column_names}, read_json(Path("out/none-0/metrics.json"))

    def by_package(self, norm: NormName, attacks: list[AttackName], batch_size: int, num_targets: int) -> Outcomes:
        """Which images survive each attack and those before it, by one run of the package over all of them."""
        name = {"linf": "Linf", "l2": "L2"}[norm]
        package = AutoAttack(self.models["best"], norm=name, eps=EPS_255[norm] / 255, seed=3, version="standard", device="cpu")
        package.attacks_to_run = attacks
        package.fab.n_target_classes = package.apgd_targeted.n_target_classes = num_targets
        for attack in (package.apgd, package.apgd_targeted, package.fab, package.square):
            weaken(attack)
        survived: Outcomes = {}

        class Recorder(EvaluationState):  # type: ignore[misc]
            def add_run_attack(self, attack: str) -> None:
                survived[attack] = self.robust_flags.numpy().copy()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(autoattack, "EvaluationState", Recorder)
            package.run_standard_evaluation(self.x, self.y, batch_size=batch_size)
        return survived


def weaken(attack: Any) -> Any:
    """Few steps, which is faster and leaves work to the attacks that follow."""
    if hasattr(attack, "n_queries"):
        attack.n_queries = 60
    else:
        attack.n_iter = 2 if hasattr(attack, "alpha_max") else 1
    return attack


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> None:
    strong: Callable[..., Any] = evaluation.auto_attack
    monkeypatch.setattr(evaluation, "auto_attack", lambda *given: weaken(strong(*given)))


def section(**fields: Any) -> EvaluateSection:
    return EvaluateSection.model_validate({"attacks": [], "checkpoint": "best", "batch_size": 8} | fields)


@pytest.mark.usefixtures("weak")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_tasks_of_any_size_together_give_what_one_run_of_the_package_over_all_images_gives(norm: NormName) -> None:
    project = Project("stepped", num_classes=4)
    expected = {batch_size: project.by_package(norm, STANDARD, batch_size, num_targets=3) for batch_size in (16, 7)}
    assert any((expected[16][attack] != expected[7][attack]).any() for attack in STANDARD), "the packing must matter"
    for batch_size, sizes in ((16, (1, 1000)), (7, (20,))):
        written = set()
        for shard_rows in sizes:
            found, metrics = project.evaluate(norm, batch_size=batch_size, shard_rows=shard_rows, reference_attacks=["fgsm"])
            for attack in STANDARD:
                assert np.array_equal(found[attack], expected[batch_size][attack]), (batch_size, shard_rows, attack)
                assert metrics["attacks"][attack] == expected[batch_size][attack].sum() / 90
            counts = [found[name].sum() for name in ("clean", *STANDARD)]
            assert all(after < before for before, after in pairwise(counts)), "each attack must break some"
            assert counts[-1] > 10
            assert (metrics["clean"], metrics["robust"]) == (counts[0] / 90, counts[-1] / 90)
            assert found["row"].tolist() == list(range(90))
            written.add(tuple(Path(f"out/none-0/{name}").read_bytes() for name in ("samples.parquet", "metrics.json")))
        assert len(written) == 1


@pytest.mark.usefixtures("weak")
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("num_classes", "attacks"),
    [
        (2, ["apgd-ce", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (12, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    ],
)
def test_any_number_of_classes_gets_the_attacks_that_exist_for_it_and_its_targets(
    norm: NormName, num_classes: int, attacks: list[AttackName]
) -> None:
    project, num_targets = Project("stepped", num_classes), {2: 1, 3: 2, 4: 3, 12: 9}[num_classes]
    expected = project.by_package(norm, attacks, 16, num_targets)
    found, metrics = project.evaluate(norm)
    assert list(metrics["attacks"]) == sorted(attacks)
    for attack in attacks:
        assert np.array_equal(found[attack], expected[attack])
    assert 5 < found["square"].sum() < found["apgd-ce"].sum() < found["clean"].sum()
    threat, cpu = ThreatParams(norm=norm, eps_255=EPS_255[norm]), torch.device("cpu")
    fab = evaluation.auto_attack(nn.Identity(), "fab-t", threat, num_classes, 0, cpu)
    assert (fab.targeted, fab.n_target_classes) == (True, num_targets)


@pytest.mark.usefixtures("weak")
def test_a_custom_set_runs_in_its_own_order_as_in_the_package() -> None:
    project = Project("stepped", num_classes=4)
    attacks: list[AttackName] = ["fab", "square", "apgd-dlr"]
    expected = project.by_package("l2", attacks, 16, num_targets=3)
    found, _ = project.evaluate("l2", version="custom", attacks=attacks, shard_rows=32)
    assert [name for name in found if name in attacks] == attacks
    for attack in attacks:
        assert np.array_equal(found[attack], expected[attack])
    assert found["apgd-dlr"].sum() < found["square"].sum() < found["fab"].sum() < found["clean"].sum()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_with_all_steps_a_linear_model_is_broken_exactly_where_it_can_be(norm: NormName, dual: int, num_classes: int) -> None:
    project = Project("linear", num_classes)
    attacks = [name for name in section(version="standard").attacks_for(num_classes) if name != "square"]
    eps_255 = {"linf": 1.5, "l2": 20.0}[norm]
    found, _ = project.evaluate(norm, eps_255, version="custom", attacks=attacks, batch_size=90)
    net, z = project.models["best"].net, project.models["best"](project.x).detach()
    w = net.get_parameter("weight").detach()
    gaps, reach = z.gather(1, project.y[:, None]) - z, eps_255 / 255 * (w[project.y][:, None] - w).norm(p=dual, dim=2)
    others = torch.arange(num_classes) != project.y[:, None]
    expected = ((gaps > reach) | ~others).all(dim=1).numpy()
    clear = (((gaps / reach - 1).abs() > 0.01) | ~others).all(dim=1).numpy()
    assert np.array_equal(found["fab-t"][clear], expected[clear])
    assert clear.mean() > 0.9
    assert 10 < expected.sum() < found["clean"].sum() - 20


@pytest.mark.usefixtures("weak")
def test_where_nothing_survives_the_attacks_that_follow_have_no_tasks() -> None:
    found, metrics = Project("linear", num_rows=20).evaluate("linf", eps_255=200)
    assert found["clean"].any()
    assert not any(found[attack].any() for attack in STANDARD)
    assert metrics["robust"] == 0


def test_attacks_that_need_more_classes_are_refused_by_name_before_any_work() -> None:
    project = Project("linear", num_classes=3, num_rows=10)
    with pytest.raises(InputError, match="apgd-t wants at least 4 classes, the data have 3"):
        project.evaluate("linf", version="custom", attacks=["apgd-ce", "apgd-t"])
    assert not Path(".runs").exists()
    with pytest.raises(InputError, match="apgd-dlr wants at least 3 classes"):
        section(version="custom", attacks=["apgd-dlr"]).attacks_for(2)


def test_nan_and_empty_test_sets_are_clear_errors() -> None:
    project = Project("linear", num_rows=10)
    empty = make_store(Path("empty"), (np.empty((0, 8, 8, 3), np.uint8), np.empty(0, np.int64)))
    with pytest.raises(InputError, match="wanted test images to evaluate on, got none"):
        shards(empty, 10)
    with torch.no_grad():
        next(project.models["best"].parameters())[0, 0] = torch.nan
    description = read_json(Path("model/best/model.json"))
    save_model(Path("model/best"), project.models["best"], description)
    with pytest.raises(InputError, match="wanted finite logits"):
        project.evaluate("linf")
    assert not Path("out").exists()


def test_a_model_that_gives_nan_under_attack_is_an_error_and_not_a_broken_row(monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project("linear", num_rows=10)
    broken = type("Broken", (), {"perturb": lambda self, x, y: torch.full_like(x, torch.nan)})()
    monkeypatch.setattr(evaluation, "auto_attack", lambda *given: broken)
    with pytest.raises(InputError, match="wanted finite logits"):
        project.evaluate("linf")


def test_reference_attacks_flags_and_the_other_checkpoint_stand_beside_autoattack() -> None:
    project = Project("stepped")
    chosen = ["fgsm", "pgd-20-cw"]
    found, metrics = project.evaluate("linf", version="custom", attacks=["apgd-ce"], reference_attacks=chosen, shard_rows=32)
    flags = ["random_output", "probability_output", "zero_gradient"]
    other = ["other_clean", "other_fgsm", "other_pgd-20-cw"]
    assert list(found) == ["row", "label", "predicted", "clean", *flags, *chosen, "apgd-ce", *other]
    assert metrics["robust"] == metrics["attacks"]["apgd-ce"] == found["apgd-ce"].mean()  # AutoAttack's alone
    assert metrics["reference"] == {name: found[name].mean() for name in chosen}
    assert 0 < min(metrics["robust"], *metrics["reference"].values())
    assert max(metrics["robust"], *metrics["reference"].values()) < metrics["clean"]
    with torch.no_grad():
        predicted = torch.cat([project.models["last"](x) for x in project.x.split(16)]).argmax(dim=1)
    correct = (predicted == project.y).double().mean().item()
    assert metrics["other"]["checkpoint"] == "last"
    assert metrics["other"]["model"] != metrics["model"]
    assert metrics["other"]["accuracy"]["clean"] == pytest.approx(correct)
    assert metrics["other"]["accuracy"]["pgd-20-cw"] <= correct < metrics["clean"]
    assert metrics["flags"] == {
        "random_outputs": 0, "probability_outputs": False, "zero_gradients": int(bright(project.x).sum()),
        "square_stronger": None,
    }  # fmt: skip


def test_standard_is_the_four_attacks_custom_needs_names_and_tasks_are_whole_batches() -> None:
    assert section(version="standard").attacks_for(10) == STANDARD
    assert section(version="custom", attacks=["square"]).attacks_for(2) == ["square"]
    with pytest.raises(ValidationError) as error:
        section(version="custom")
    assert "a list of different attacks" in explain(error.value)
    sizes = [section(version="standard", shard_rows=rows).task_rows for rows in (1, 8, 23, 1000)]
    assert sizes == [8, 8, 16, 1000]
