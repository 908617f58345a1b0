"""The networks that NVlabs published with EDM as weights of our U-Net.

Source of the names, shapes and arguments: SongUNet, UNetBlock and EDMPrecond in training/networks.py of github.com/NVlabs/edm,
commit 0a2ff34 (facts alone, no code); the network itself is that of arXiv:2206.00364, appendix F. Our names are the same below
`model`, so that the table is short.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from pipeline.artifacts import digest_file, place, publish, read_json, write_json
from pipeline.edm import WEIGHTS, save_generator
from pipeline.edm.network import MAX_PERIOD, SKIP_SCALE, NetworkParams, UNet, build_unet
from pipeline.edm.pickles import Module, StoredTensor, read_pickle
from pipeline.images import ImageStore
from pipeline.params import InputError

LICENCE = "CC BY-NC-SA 4.0"
MAX_BLOCKS = 32  # per level; theirs have 4
SOURCE = "NVlabs EDM, Karras et al. 2022, arXiv:2206.00364"
# name in the pickle -> name in our network; None: not needed, because of the reason
KEY_MAP: tuple[tuple[str, str | None], ...] = (
    (r"model\.(map_label|map_layer0|map_layer1)\.(weight|bias)", r"\1.\2"),
    (r"model\.enc\.(\d+x\d+_conv)\.(weight|bias)", r"enc.\1.\2"),  # the first convolution
    (
        r"model\.(enc|dec)\.(\d+x\d+_(?:down|up|in\d|block\d+))\.(norm\d|conv\d|affine|skip|qkv|proj)\.(weight|bias)",
        r"\1.\2.\3.\4",
    ),
    (r"model\.dec\.(\d+x\d+_aux_(?:norm|conv))\.(weight|bias)", r"dec.\1.\2"),  # the last norm and convolution
    (r"model\.map_augment\.weight", None),  # labels of augmentations: there are none when images are drawn
    (r"model\..*\.resample_filter", None),  # [1, 1] in both directions: `check_layers` makes sure of it
)


def import_edm(source: Path, target: Path) -> dict[str, Any]:
    """Read a pickle without executing it and write a new folder that `generator.kind: imported` takes; its description.

    Raises:
        InputError: the pickle is refused, is of another kind of network, or a tensor is missing, unknown or of another
            shape, or there is no room for it; nothing is written then.
    """
    if target.exists():
        raise InputError(f"{target}: wanted a new folder, this exists; remove it or give another with --to")
    try:
        net, params, sigma_data = convert(read_pickle(source), str(source))
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{source}: not a network of EDM as published ({type(error).__name__}: {error})") from None
    origin = {"imported": source.name, "sha256": digest_file(source), "source": SOURCE, "licence": LICENCE}
    try:
        with publish(target) as work:
            save_generator(
                work, net, network=params, classes=tuple(f"class {label}" for label in range(net.num_classes)), shape=net.shape,
                sigma_data=sigma_data, origin=origin, curve=[],
            )  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: could not be written ({error}); make room or give another folder with --to") from None
    return {"digest": digest_file(target / WEIGHTS), **read_json(target / "generator.json")}


def convert(found: Any, source: str) -> tuple[UNet, NetworkParams, float]:
    """Our U-Net with the weights of what a pickle holds, its arguments, and sigma_data."""
    precondition = found.get("ema") if isinstance(found, dict) else found
    if not isinstance(precondition, Module) or precondition.class_name != "EDMPrecond":
        raise InputError(f"{source}: wanted a network preconditioned as in EDM (EDMPrecond), got {name_of(precondition)}")
    network = precondition.children.get("model")
    if network is None or network.class_name != "SongUNet":
        raise InputError(f"{source}: wanted a SongUNet, as the networks for 32 and 64 pixels are, got {name_of(network)}")
    state = precondition.state
    side, channels, labels = (whole(state, name) for name in ("img_resolution", "img_channels", "label_dim"))
    if not labels:
        raise InputError(f"{source}: wanted a class-conditional network, got one without labels; choose a file named -cond-")
    tensors = rename(precondition.tensors(), source)
    params = network_params(network, tensors, side)
    with torch.device("meta"):  # what the file says of its sizes takes no memory until its tensors have them
        net = build_unet(params, (side, side, channels), labels, seed=0)
    check_layers(network, net, source)
    fill(net, tensors, source)
    return net, params, number(state, "sigma_data", above=0)


def whole(state: Mapping[str, Any], name: str) -> int:
    """An integer from 0 among the attributes of a module."""
    value = state[name]
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"wanted a whole number as {name}, got something else")
    return value


def number(state: Mapping[str, Any], name: str, above: float) -> float:
    """A finite number among the attributes of a module."""
    value = state[name]
    if not isinstance(value, int | float) or not above < value < math.inf:
        raise ValueError(f"wanted a number above {above:g} as {name}, got something else")
    return float(value)


def name_of(module: Any) -> str:
    return module.class_name if isinstance(module, Module) else type(module).__name__


def rename(tensors: Mapping[str, StoredTensor], source: str) -> dict[str, StoredTensor]:
    """Tensors under the names of our network.

    Raises:
        InputError: one has no place in it.
    """
    renamed = {}
    for name, tensor in tensors.items():
        rules = [(re.fullmatch(pattern, name), ours) for pattern, ours in KEY_MAP]
        matches = [(match, ours) for match, ours in rules if match]
        if not matches:
            raise InputError(
                f"{source}: {name} has no place in our U-Net, which is DDPM++ (files named -vp); "
                "NCSN++ (files named -ve) has Fourier features and a residual encoder"
            )
        match, ours = matches[0]
        if ours is not None:
            renamed[match.expand(ours)] = tensor
    return renamed


def network_params(network: Module, tensors: Mapping[str, StoredTensor], side: int) -> NetworkParams:
    """The arguments of our network, from the shapes of the tensors."""
    widths: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"enc\.(\d+)x\d+_block\d+\.conv0\.weight", name):
            widths.setdefault(int(match[1]), []).append(tensor.shape[0])
    if f"enc.{side}x{side}_conv.weight" not in tensors or side not in widths:
        raise InputError(f"wanted a network for images of {side} pixels, got levels of {sorted(widths)[:9]}")
    if len(widths[side]) > MAX_BLOCKS:
        raise InputError(f"wanted at most {MAX_BLOCKS} blocks per level, got {len(widths[side])}")
    channels = tensors[f"enc.{side}x{side}_conv.weight"].shape[0]
    attention = {int(m[1]) for name in tensors if (m := re.fullmatch(r"enc\.(\d+)x\d+_block\d+\.qkv\.weight", name))}
    first = f"enc.{side}x{side}_block0"
    blocks = [module for name, module in network.modules() if module.class_name == "UNetBlock"]
    return NetworkParams(
        channels=channels,
        multipliers=tuple(widths[level][0] // channels for level in sorted(widths, reverse=True)),
        blocks=len(widths[side]),
        attention_resolutions=tuple(sorted(attention, reverse=True)),
        dropout=number(blocks[0].state, "dropout", above=-1),
        label_dropout=number(network.state, "label_dropout", above=-1),
        adaptive_scale=tensors[f"{first}.affine.weight"].shape[0] == 2 * tensors[f"{first}.conv0.weight"].shape[0],
    )


def check_layers(network: Module, net: UNet, source: str) -> None:
    """What the tensors do not show: the embedding of noise levels, one head of attention, the scale of the sums, box filters,
    and the groups of the norms."""
    norms = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.GroupNorm)}
    for name, layer in network.modules():
        state, box = layer.state, dict(layer.named("_buffers")).get("resample_filter")
        if layer.class_name == "PositionalEmbedding" and (state["endpoint"], state["max_positions"]) != (True, MAX_PERIOD):
            raise InputError(f"{source}: {name} has other frequencies than endpoint: true and max_positions: {MAX_PERIOD}")
        if layer.class_name == "UNetBlock" and whole(state, "num_heads") > 1:
            raise InputError(f"{source}: {name} has {state['num_heads']} heads of attention, our U-Net one")
        if layer.class_name == "UNetBlock" and not math.isclose(number(state, "skip_scale", above=0), SKIP_SCALE, rel_tol=1e-6):
            raise InputError(f"{source}: {name} has the skip_scale {state['skip_scale']:g}, our U-Net {SKIP_SCALE:g}")
        if isinstance(box, StoredTensor) and not (box.shape == (1, 1, 2, 2) and bool((box.read() == 0.25).all())):
            raise InputError(f"{source}: {name} resamples with another filter than [1, 1]")
        if layer.class_name == "GroupNorm" and name in norms:
            found = (whole(state, "num_groups"), number(state, "eps", above=0))
            if found != (norms[name].num_groups, norms[name].eps):
                raise InputError(f"{source}: {name} has groups and eps {found}, ours {norms[name].num_groups, norms[name].eps}")


def fill(net: UNet, tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Make tensors the weights of net, which is on the meta device.

    Raises:
        InputError: a name is missing or left over, a shape differs, or a number is not finite.
    """
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is left over" for name in tensors if name not in wanted]
    problems += [
        f"{name} has the shape {tensors[name].shape} instead of {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if not problems:
        state = {name: tensor.read().float() for name, tensor in tensors.items()}
        problems = [f"{name} is not finite" for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if problems:
        raise InputError(f"{source}: {len(problems)} tensors do not fit our U-Net: {'; '.join(problems[:5])}")
    net.load_state_dict(state, assign=True)


def place_imported(source: Path, target: Path, store: ImageStore, digest: str) -> None:
    """Make an imported network the generator of the images of store, under their class names.

    Raises:
        InputError: it is not there, is not the one of that digest, or is for other images or another number of classes.
    """
    description, weights = read_json(source / "generator.json"), source / WEIGHTS
    found = digest_file(weights) if weights.is_file() else None
    if found != digest:
        raise InputError(
            f"{weights}: wanted the SHA-256 generator.digest, {digest}, got {found}; import it again or correct it"
        )
    wanted = (list(store.shape), len(store.classes))
    fits = (description.get("shape"), len(description.get("classes", [])))
    if wanted != fits:
        raise InputError(f"{source}: wanted a generator of images and number of classes {wanted}, got one of {fits}")
    place(weights, target / WEIGHTS)
    write_json(target / "generator.json", description | {"classes": list(store.classes)})
