"""Tensors out of the pickles of NVlabs' EDM, without executing or importing anything that they name.

Such a file is a plain pickle: each network is `torch_utils.persistence._reconstruct_persistent_obj(meta)` with its state and
source code in `meta`; a tensor is `torch._utils._rebuild_tensor_v2(storage, ...)`; a storage is
`torch.storage._load_from_bytes(data)`, where data is in the format of torch.save before version 1.6. Read by pickle.load, it
runs the code. Here every name is looked up in a table of inert stand-ins, made anew for each file, and any other is refused.
"""

import io
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.params import InputError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before 1.6
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}


class RefusedError(InputError):
    """A pickle asks for what no network needs."""


@dataclass
class Module:
    """What is known of a pickled network or layer: the name of its class, and its attributes as data."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def children(self) -> dict[str, "Module"]:
        return {name: child for name, child in self.state.get("_modules", {}).items() if isinstance(child, Module)}

    def modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """Names and modules of the whole tree, as torch's named_modules."""
        yield prefix, self
        for name, child in self.children.items():
            yield from child.modules(f"{prefix}.{name}" if prefix else name)

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, as torch's state_dict."""
        found = {}
        for prefix, module in self.modules():
            for kind in ("_parameters", "_buffers"):
                for name, value in module.state.get(kind, {}).items():
                    if isinstance(value, Tensor):
                        found[f"{prefix}.{name}" if prefix else name] = value
        return found


def read_pickle(path: Path) -> Any:
    """The content of a file: plain values, `Module` for networks and layers, tensors.

    Raises:
        InputError: no such file, not a pickle, or it names anything but networks, layers and tensors.
    """
    if not path.is_file():
        raise InputError(f"{path}: wanted a pickle of NVlabs' EDM, found no file")
    with path.open("rb") as file:
        return load(file, stand_ins(), str(path))


def load(file: Any, known: dict[tuple[str, str], Any], where: str, storages: list[Any] | None = None) -> Any:
    """One pickle from file, in which the names `known` stand for harmless values and all others are refused."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in known:
                raise RefusedError(
                    f"{where}: refused, because it names {module}.{name}, which no network of EDM needs; nothing was executed. "
                    "Do not load this file by other means"
                )
            return known[module, name]

        def persistent_load(self, pid: Any) -> Any:
            if storages is None:
                raise RefusedError(f"{where}: refused, because it refers to data outside the file")
            storages.append(pid)
            return len(storages) - 1

    try:
        return Reader(file).load()
    except InputError:
        raise
    except Exception as error:  # a damaged or hostile file may end in any of them
        raise InputError(f"{where}: not a readable pickle of an EDM network ({type(error).__name__}: {error})") from None


def stand_ins() -> dict[tuple[str, str], Any]:
    """(module, name) -> what it stands for. Fresh classes each time: a pickle may write to them, and to nothing else."""

    class Mapping(dict[Any, Any]):
        """An ordered or a dotted dict."""

    containers = {("torch.nn.modules.container", name): layer(name) for name in ("ModuleDict", "ModuleList", "Sequential")}
    return containers | {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): function(persistent),
        ("torch._utils", "_rebuild_parameter"): function(lambda data, *_: data),
        ("torch._utils", "_rebuild_tensor_v2"): function(rebuild_tensor),
        ("torch.storage", "_load_from_bytes"): function(read_storage),
        ("collections", "OrderedDict"): Mapping,
        ("dnnlib.util", "EasyDict"): Mapping,
        ("builtins", "set"): function(lambda *values: set(*values)),
        ("__builtin__", "set"): function(lambda *values: set(*values)),
        # NumPy scalars among the attributes, such as skip_scale = sqrt(1/2): not needed, so not decoded
        ("numpy", "dtype"): layer("dtype"),
        ("numpy.core.multiarray", "scalar"): function(lambda *_: None),
        ("numpy._core.multiarray", "scalar"): function(lambda *_: None),
    }


def layer(name: str) -> type[Module]:
    """A class whose instances keep the state they are given."""

    class Layer(Module):
        def __new__(cls, *_: Any) -> "Layer":
            made = super().__new__(cls)
            Module.__init__(made, name)
            return made

        def __init__(self, *_: Any) -> None: ...

        def __setstate__(self, state: Any) -> None:
            self.state = state if isinstance(state, dict) else {}

    return Layer


def function(body: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper of its own, so that no pickle can reach the function itself."""
    return lambda *args: body(*args)


def persistent(meta: Any) -> Module:
    """A network from the description in its pickle; the source code in it is not looked at."""
    if not (isinstance(meta, dict) and meta.get("type") == "class" and isinstance(meta.get("state"), dict)):
        raise InputError("wanted the state of a class of NVlabs' persistence, got something else")
    return Module(str(meta.get("class_name")), meta["state"])


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A copy of a view of a storage; torch checks that it lies inside."""
    if not isinstance(storage, Tensor):
        raise InputError(f"wanted the storage of a tensor, got {type(storage).__name__}")
    return torch.as_strided(storage, tuple(size), tuple(stride), int(offset)).clone()


def read_storage(data: Any) -> Tensor:
    """The numbers (n,) of a storage in the format of torch.save before version 1.6: five pickles, then their count in
    eight bytes and the numbers, little-endian."""
    if not isinstance(data, bytes):
        raise InputError(f"wanted the bytes of a storage, got {type(data).__name__}")
    file, types = io.BytesIO(data), {("torch", name): name for name in DTYPES}
    stored: list[Any] = []
    magic, protocol, _, root, keys = (load(file, types, "a tensor", stored) for _ in range(5))
    if (magic, protocol, root, len(stored)) != (MAGIC, PROTOCOL, 0, 1):
        raise InputError("wanted one storage in the format of torch.save before version 1.6")
    kind, name, key, _, count, view = stored[0]
    if kind != "storage" or name not in DTYPES or list(keys) != [key] or view is not None:
        raise InputError(f"wanted a whole storage of numbers, got {kind!r} of {name!r}")
    dtype = DTYPES[name]
    numbers = file.read()
    if len(numbers) != 8 + count * dtype.itemsize or struct.unpack("<q", numbers[:8]) != (count,):
        raise InputError(f"wanted {count} numbers of {dtype}, got {len(numbers) - 8} bytes")
    return torch.frombuffer(bytearray(numbers[8:]), dtype=dtype)
