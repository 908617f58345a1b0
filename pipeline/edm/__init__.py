"""An EDM generator on disk: generator.json (everything but the weights), generator.safetensors, training.csv."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.artifacts import digest_file, read_json, write_json
from pipeline.edm.network import NetworkParams, UNet, build_unet
from pipeline.params import InputError, explain

WEIGHTS = "generator.safetensors"


@dataclass(frozen=True)
class EdmGenerator:
    """A loaded generator; `digest` is that of its weights, `licence` that which binds what is made with it, `flip` says
    whether it was trained on mirrored images too, where that is known."""

    net: UNet
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    sigma_data: float
    digest: str
    licence: str | None
    flip: bool | None


def save_generator(
    directory: Path,
    net: UNet,
    *,
    network: NetworkParams,
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
    sigma_data: float,
    origin: dict[str, Any],
    curve: list[tuple[int, float]],
) -> None:
    """Write the weights of net, their description, and the loss curve (step, loss) where there is one; shape is (H, W, C)."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, directory / WEIGHTS)
    description = {
        "kind": "edm",
        "network": network.model_dump(),
        "classes": list(classes),
        "shape": list(shape),
        "sigma_data": sigma_data,
        "origin": origin,
    }
    write_json(directory / "generator.json", description)
    if curve:
        with (directory / "training.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("step", "loss"), *curve])


def save_no_generator(directory: Path) -> None:
    """Write that there is none, where images are read from files."""
    write_json(directory / "generator.json", {"kind": "none"})


def load_generator(
    directory: Path, device: torch.device, *, classes: tuple[str, ...], shape: tuple[int, int, int]
) -> EdmGenerator:
    """The generator of a directory, on device, for images of shape (H, W, C) of the given classes.

    Raises:
        InputError: files are missing, the generator is of kind none or for other images, or the weights do not fit.
    """
    description = read_json(directory / "generator.json")
    if description.get("kind") != "edm":
        raise InputError(
            f"{directory}: wanted a generator of kind edm to draw images from, got kind {description.get('kind')}; "
            "in params.yaml set generator.kind: edm, or synthesize.source.kind to npz or none"
        )
    weights = directory / WEIGHTS
    try:
        found = tuple(description["classes"]), tuple(description["shape"])
        network = NetworkParams.model_validate(description["network"])
        if found != (classes, shape):
            raise InputError(f"{directory}: wanted a generator of {shape} images of {classes}, got one of {found[::-1]}")
        net = build_unet(network, shape, len(classes), seed=0)
        net.load_state_dict(load_file(weights))
        sigma_data, origin = float(description["sigma_data"]), dict(description["origin"])
    except ValidationError as error:
        raise InputError(f"{directory}/generator.json: network: {explain(error)}; rerun the generator stage") from None
    except (KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        raise InputError(
            f"{directory}: wanted weights that fit generator.json, but: {error}; rerun the generator stage"
        ) from None
    net = net.to(device).to(memory_format=torch.channels_last).requires_grad_(False)
    return EdmGenerator(net, classes, shape, sigma_data, digest_file(weights), origin.get("licence"), origin.get("flip"))
