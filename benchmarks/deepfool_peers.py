"""DeepFool of the peers behind one signature. They come with `pip install -e ".[bench]"`, but for torchattacks, which pins
an old requests: `pip install --no-deps torchattacks==3.5.1`."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.balls import BALLS
from pipeline.threat import NormName

Attack = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]  # model, x, y -> x_adv, distance (B,)
ITERATIONS, OVERSHOOT = 50, 0.02


def adv_lib(norm: NormName) -> Attack:
    from adv_lib.attacks import df

    order = {"linf": float("inf"), "l2": 2.0}[norm]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = df(model, x, y, steps=ITERATIONS, overshoot=OVERSHOOT, norm=order)
        return x_adv, BALLS[norm].norm(x_adv - x)

    return attack


def foolbox(norm: NormName) -> Attack:
    import foolbox as package

    kind = {"linf": package.attacks.LinfDeepFoolAttack, "l2": package.attacks.L2DeepFoolAttack}[norm]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        wrapped = package.PyTorchModel(model, bounds=(0, 1), device=x.device)
        _, clipped, _ = kind(steps=ITERATIONS, overshoot=OVERSHOOT, candidates=None)(wrapped, x, y, epsilons=None)
        return clipped, BALLS[norm].norm(clipped - x)

    return attack


def torchattacks(_: NormName) -> Attack:
    import torchattacks as package

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = package.DeepFool(model, steps=ITERATIONS, overshoot=OVERSHOOT)(x, y)
        return x_adv, BALLS["l2"].norm(x_adv - x)

    return attack


def art(_: NormName) -> Attack:
    from art.attacks.evasion import DeepFool
    from art.estimators.classification import PyTorchClassifier

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        wrapped = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0, 1), device_type=x.device.type
        )
        kind = DeepFool(wrapped, ITERATIONS, OVERSHOOT, nb_grads=classes, batch_size=len(x), verbose=False)
        x_adv = torch.from_numpy(np.asarray(kind.generate(x.cpu().numpy(), y.cpu().numpy()))).to(x.device)
        return x_adv, BALLS["l2"].norm(x_adv - x)

    return attack


def fab(norm: NormName) -> Attack:
    from pyautoattack.fab_pt import FABAttack_PT

    kind = {"linf": "Linf", "l2": "L2"}[norm]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        search = FABAttack_PT(model, norm=kind, n_restarts=1, n_iter=100, eps=1e3, device=x.device)
        x_adv = search.perturb(x, y).detach()
        return x_adv, BALLS[norm].norm(x_adv - x)

    return attack


FAST: dict[str, Callable[[NormName], Attack]] = {"adv-lib": adv_lib, "foolbox": foolbox}
SLOW: dict[str, Callable[[NormName], Attack]] = {"torchattacks": torchattacks, "ART": art}  # L2 only, image by image


def installed(name: str) -> bool:
    return find_spec({"torchattacks": "torchattacks", "ART": "art"}[name]) is not None
