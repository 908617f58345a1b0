"""Checkpoints: the whole state of a run between two steps in one file, tensors in safetensors and the rest as JSON.

PyTorch is only imported where there are tensors: stages that have none start without it.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tree = Any  # nested dicts with string keys and lists of tensors, numbers, strings, booleans and None

MARK = "tensor:"


class Checkpoint:
    """A file that a run saves its state to every `every_s` seconds, and goes on from. No file: the run starts anew."""

    def __init__(self, path: Path, every_s: float) -> None:
        self.path, self.every_s = path, every_s
        self.last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.every_s

    def save(self, state: Tree) -> None:
        """Replace the file in one step: at any moment it holds a complete state."""
        tensors: dict[str, Tensor] = {}
        outline = {"outline": json.dumps(take_tensors(state, tensors, ""))}
        work = self.path.with_name(f".{self.path.name}.{uuid4().hex}.tmp")  # another writer may not know yet that it is one too
        if tensors:
            from safetensors.torch import save_file as save_tensors

            save_tensors(tensors, work, outline)
        else:
            save_file({}, work, outline)
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.replace(self.path)
        self.last = time.monotonic()

    def load(self) -> Tree | None:
        """The saved state, tensors on the CPU; None if there is none, or it is damaged, which is said."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                outline, names = json.loads(file.metadata()["outline"]), list(file.keys())
            if not names:
                return outline
            from safetensors.torch import load_file

            return put_tensors(outline, load_file(self.path))
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
            print(f"{self.path}: damaged ({error}); starting anew", file=sys.stderr, flush=True)
            return None


def take_tensors(tree: Tree, tensors: "dict[str, Tensor]", name: str) -> Tree:
    """tree with every tensor replaced by its name in tensors."""
    if isinstance(tree, dict):
        return {str(key): take_tensors(value, tensors, f"{name}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [take_tensors(value, tensors, f"{name}/{index}") for index, value in enumerate(tree)]
    if tree is None or isinstance(tree, str | int | float):
        return tree
    tensors[name] = tree.detach().cpu().contiguous().clone()
    return MARK + name


def put_tensors(tree: Tree, tensors: "dict[str, Tensor]") -> Tree:
    if isinstance(tree, str) and tree.startswith(MARK):
        return tensors[tree.removeprefix(MARK)]
    if isinstance(tree, dict):
        return {key: put_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [put_tensors(value, tensors) for value in tree]
    return tree


def restore_optimizer(optimizer: "torch.optim.Optimizer", saved: dict[str, Any]) -> None:
    """Load the state of an optimiser. JSON made the numbers of its parameters text; and its buffers must lie in memory like
    the parameters, or fused kernels pair the wrong numbers."""
    optimizer.load_state_dict(saved | {"state": {int(index): value for index, value in saved["state"].items()}})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if getattr(value, "shape", None) == parameter.shape:
                state[name] = parameter.detach().clone().copy_(value)
