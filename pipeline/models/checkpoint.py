"""A trained classifier on disk: model.safetensors (weights of the bare network) and model.json (everything else)."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.artifacts import digest_file, read_json, write_json
from pipeline.images import ImageStore
from pipeline.models import Classifier, ModelParams, build_network
from pipeline.params import InputError


def save_model(directory: Path, model: Classifier, description: dict[str, Any]) -> None:
    """Write the weights and their description (architecture, shape, classes, threat, digests of the inputs)."""
    directory.mkdir(parents=True, exist_ok=True)
    # Clones, because safetensors refuses tensors that share memory: tied weights are written under each of their names.
    plain = torch.contiguous_format
    state = {name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in model.net.state_dict().items()}
    save_file(state, directory / "model.safetensors")
    normalisation = {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    write_json(directory / "model.json", {**description, "normalisation": normalisation})


def describe(directory: Path) -> dict[str, Any]:
    """The description of a saved classifier with the digest of its weights added as `digest`."""
    description, weights = read_json(directory / "model.json"), directory / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights}: wanted the weights of a model, found none; run `dvc repro`")
    return {**description, "digest": digest_file(weights)}


def load_model(directory: Path, device: torch.device) -> tuple[Classifier, dict[str, Any]]:
    """The classifier in eval mode, and its description (see `describe`).

    Raises:
        InputError: files are missing, or the weights do not fit the architecture they claim.
    """
    description = describe(directory)
    weights = directory / "model.safetensors"
    try:
        params = ModelParams(architecture=description["architecture"], arguments=description["arguments"])
        net = build_network(params, tuple(description["shape"]), len(description["classes"]), seed=0)
        net.load_state_dict(load_file(weights))
        normalisation = description["normalisation"]
        model = Classifier(net, normalisation["mean"], normalisation["std"]).to(device)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, OSError) as error:
        raise InputError(f"{directory}: wanted weights that fit model.json, but: {error}") from None
    return model.to(memory_format=torch.channels_last).eval(), description


def import_model(source: Path, target: Path, store: ImageStore) -> None:
    """Copy a saved classifier after checking that it fits the images of store.

    Raises:
        InputError: there is none, it cannot be loaded, or is for other images or classes.
    """
    if missing := [name for name in ("model.json", "model.safetensors") if not (source / name).is_file()]:
        raise InputError(f"{source}: wanted a folder with a model, found no {' and no '.join(missing)}; correct the path")
    model, description = load_model(source, torch.device("cpu"))
    wanted = (list(store.shape), len(store.classes))
    found = (list(description["shape"]), len(description["classes"]))
    if wanted != found:
        raise InputError(f"{source}: wanted a model for images and number of classes {wanted}, got one for {found}")
    save_model(target, model, {key: value for key, value in description.items() if key not in ("digest", "normalisation")})
