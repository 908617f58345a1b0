"""Tensors out of the pickles of NVlabs' EDM, without executing or importing anything that they name.

Such a file is a plain pickle: each network is `torch_utils.persistence._reconstruct_persistent_obj(meta)` with its state and
source code in `meta`; a tensor is `torch._utils._rebuild_tensor_v2(storage, ...)`; a storage is
`torch.storage._load_from_bytes(data)`, where data is in the format of torch.save before version 1.6. Read by pickle.load, it
runs the code. `replay` does not; here is what the names stand for. Tensors are made when they are asked for.
"""

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.edm.replay import Make, Name, Record, replay
from pipeline.params import InputError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before 1.6
MAX_OPCODES, MAX_STORAGE_OPCODES = 1_000_000, 1_000  # a network as for CIFAR-10 needs about 45,000 and 60
MAX_DEPTH, MAX_NAME = 8, 100  # theirs: 5 modules deep
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}


@dataclass
class NumpyType(Record):
    """The type of a NumPy scalar: its code and its state."""

    state: Any = None
    code: Any = None


@dataclass(frozen=True)
class Storage:
    """Numbers (count,) of a tensor, still as bytes: they start at `start` of data, little-endian."""

    data: bytes = field(repr=False)
    start: int
    count: int
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage that lies inside it and has no more elements than it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, a copy."""
        begin = self.storage.start + self.offset * self.storage.dtype.itemsize
        end = begin + extent(self.shape, self.stride) * self.storage.dtype.itemsize
        numbers = bytearray(memoryview(self.storage.data)[begin:end])
        return torch.frombuffer(numbers, dtype=self.storage.dtype).as_strided(self.shape, self.stride).clone()


@dataclass
class Module(Record):
    """What is known of a pickled network or layer: its attributes as data, and the name of its class."""

    state: Any = field(repr=False)
    class_name: str = ""

    @property
    def children(self) -> dict[str, "Module"]:
        return {name: child for name, child in self.named("_modules") if isinstance(child, Module)}

    def named(self, kind: str) -> list[tuple[str, Any]]:
        """Names and values of the modules, parameters or buffers."""
        found = self.state.get(kind, {}) if isinstance(self.state, dict) else None
        if not isinstance(found, dict) or not all(isinstance(name, str) and len(name) <= MAX_NAME for name in found):
            raise InputError(f"wanted names of at most {MAX_NAME} letters in {kind}, got something else")
        return list(found.items())

    def modules(self) -> Iterator[tuple[str, "Module"]]:
        """Names and modules of the whole tree, as torch's named_modules.

        Raises:
            InputError: a module is met twice, or is very deep inside others.
        """
        met: set[int] = set()

        def walk(prefix: str, module: Module, depth: int) -> Iterator[tuple[str, Module]]:
            if id(module) in met or depth > MAX_DEPTH:
                raise InputError(f"wanted a tree of modules, got one twice or more than {MAX_DEPTH} deep: {prefix}")
            met.add(id(module))
            yield prefix, module
            for name, child in module.children.items():
                yield from walk(f"{prefix}.{name}" if prefix else name, child, depth + 1)

        return walk("", self, 0)

    def tensors(self) -> dict[str, StoredTensor]:
        """All parameters and buffers by name, as torch's state_dict.

        Raises:
            InputError: a tensor has two names, or as `modules`.
        """
        found: dict[str, StoredTensor] = {}
        met: set[int] = set()
        for prefix, module in self.modules():
            for kind in ("_parameters", "_buffers"):
                for name, value in module.named(kind):
                    if isinstance(value, StoredTensor):
                        full = f"{prefix}.{name}" if prefix else name
                        if id(value) in met:
                            raise InputError(f"wanted tensors of their own, got one that has another name besides {full}")
                        met.add(id(value))
                        found[full] = value
        return found


def read_pickle(path: Path) -> Any:
    """The content of a file: plain values, `Module` for networks and layers, `StoredTensor` for tensors.

    Raises:
        InputError: no such file, not a pickle, or it asks for anything but networks, layers and tensors.
    """
    if not path.is_file():
        raise InputError(f"{path}: wanted a pickle of NVlabs' EDM, found no file")
    content = path.read_bytes()
    return replay(io.BytesIO(content), published_names(len(content)), str(path), MAX_OPCODES)


def published_names(num_bytes: int) -> dict[str, Make]:
    """Name -> what a call of it makes. All tensors together must not be larger than the file of that size."""
    left = num_bytes

    def tensor(*arguments: Any) -> StoredTensor:
        nonlocal left
        made = stored_tensor(*arguments)
        left -= made.num_bytes
        if left < 0:
            raise InputError("wanted tensors that are together no larger than the file, got more")
        return made

    def container(name: str) -> Make:
        return lambda *_: Module({}, name)

    containers = {f"torch.nn.modules.container.{name}": container(name) for name in ("ModuleDict", "ModuleList", "Sequential")}
    return containers | {
        "torch_utils.persistence._reconstruct_persistent_obj": persistent_module,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch.storage._load_from_bytes": read_storage,
        "collections.OrderedDict": lambda: {},
        "dnnlib.util.EasyDict": lambda: {},
        "builtins.set": lambda *_: None,  # not needed
        "__builtin__.set": lambda *_: None,
        "numpy.dtype": lambda code, *_: NumpyType(code=code),
        "numpy.core.multiarray.scalar": numpy_scalar,
        "numpy._core.multiarray.scalar": numpy_scalar,
    }


def persistent_module(meta: Any) -> Module:
    """A network from the description in its pickle; the source code in it is not looked at."""
    if isinstance(meta, dict) and meta.get("type") == "class":
        name, state = meta.get("class_name"), meta.get("state")
        if isinstance(name, str) and len(name) <= MAX_NAME and isinstance(state, dict):
            return Module(state, name)
    raise InputError("wanted the state of a class of NVlabs' persistence, got something else")


def numpy_scalar(kind: Any, data: Any = None) -> float | None:
    """A float64, such as skip_scale = sqrt(1/2); other scalars are not needed."""
    little = isinstance(kind, NumpyType) and kind.code == "f8" and isinstance(kind.state, tuple) and kind.state[1:2] == ("<",)
    return float(struct.unpack("<d", data)[0]) if little and isinstance(data, bytes) and len(data) == 8 else None


def stored_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """A view of a storage."""
    if not isinstance(storage, Storage):
        raise InputError(f"wanted the storage of a tensor, got {type(storage).__name__}")
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 8):
        raise InputError("wanted a size and a stride for each dimension of a tensor, got something else")
    numbers = (offset, *shape, *stride)
    if not all(isinstance(number, int) and 0 <= number < 2**40 for number in numbers) or 0 in shape:
        raise InputError("wanted sizes above 0 and offsets and strides from 0 of a tensor, got others")
    if offset + extent(shape, stride) > storage.count or math.prod(shape) > storage.count:
        raise InputError(f"wanted a tensor inside its storage of {storage.count} numbers, got one that is out of bounds")
    return StoredTensor(storage, offset, shape, stride)


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many numbers of a storage a view spans."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def read_storage(data: Any) -> Storage:
    """The numbers (n,) of a storage in the format of torch.save before version 1.6: five pickles, then their count in
    eight bytes and the numbers, little-endian."""
    if not isinstance(data, bytes):
        raise InputError(f"wanted the bytes of a storage, got {type(data).__name__}")
    stored: list[Any] = []

    def refer(what: Any) -> int:
        stored.append(what)
        return len(stored) - 1

    file, types = io.BytesIO(data), {f"torch.{name}": lambda: None for name in DTYPES}
    parts = [replay(file, types, "a tensor", MAX_STORAGE_OPCODES, refer) for _ in range(5)]
    if [parts[0], parts[1], parts[3]] != [MAGIC, PROTOCOL, 0] or len(stored) != 1:
        raise InputError("wanted one storage in the format of torch.save before version 1.6")
    match stored[0], parts[4]:
        case ("storage", Name(name=str(name)), str(key), _, int(count), None), [str(other)] if key == other and count >= 0:
            dtype = DTYPES[name]
        case _:
            raise InputError("wanted a whole storage of numbers, got something else")
    start = file.tell() + 8
    if len(data) != start + count * dtype.itemsize or struct.unpack("<q", data[start - 8 : start]) != (count,):
        raise InputError(f"wanted {count} numbers of {dtype}, got {len(data) - start} bytes")
    return Storage(data, start, count, dtype)
