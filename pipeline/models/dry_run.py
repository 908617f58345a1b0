"""Whether an architecture with its arguments can be built and run, found out without memory or time."""

import torch
from torch import Tensor

from pipeline.models import ModelParams, build_network
from pipeline.params import InputError

SIDES = (672, 480, 32)  # between them they are multiples of every usual patch and stride


def check_model(params: ModelParams, shape: tuple[int, int, int] | None, num_classes: int = 10) -> None:
    """Build the network for images of shape (H, W, C) on the meta device. A network of the user's own is run on two images as
    well; those of this package refuse what they cannot run, and the first run costs a second of imports. Where the shape is
    not yet known, it is enough that images of some size can be built for.

    Raises:
        InputError: with what the builder or the network says.
    """
    shapes = [shape] if shape else [(side, side, 3) for side in SIDES]
    forward = shape is not None and "." in params.architecture
    problems = [problem_with(params, each, num_classes, forward=forward) for each in shapes]
    if all(problems):
        raise InputError(f"{params.architecture}: {problems[-1]}")


def problem_with(params: ModelParams, shape: tuple[int, int, int], num_classes: int, *, forward: bool) -> str | None:
    """What goes wrong, in a line; None where nothing does."""
    try:
        dry_run(params, shape, num_classes, torch.device("meta"), forward=forward)
    except Exception:  # the meta device cannot do all that a builder may: only what fails in earnest too is a fault
        try:
            dry_run(params, shape, num_classes, torch.device("cpu"), forward=forward)
        except InputError as error:
            return str(error).removeprefix(f"{params.architecture}: ")
        except Exception as error:
            size = " x ".join(map(str, shape))
            return f"cannot be built and run for {size} images with {params.arguments} ({type(error).__name__}: {error})"
    return None


def dry_run(params: ModelParams, shape: tuple[int, int, int], num_classes: int, device: torch.device, *, forward: bool) -> None:
    with device, torch.no_grad():
        net = build_network(params, shape, num_classes, seed=0).eval()
        if not forward:
            return
        logits = net(torch.zeros(2, shape[2], shape[0], shape[1]))
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"wanted logits of shape {(2, num_classes)} for two images, got {found}")
