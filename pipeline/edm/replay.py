"""A pickle without an unpickler: its opcodes, as `pickletools` splits them, replayed on plain values and records.

Nothing that a pickle names is looked up, and what it makes keeps references to what is in the file, so that memory is a small
multiple of the file's size whatever the file says of itself.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.params import InputError

MAX_SHOWN = 200
CONSTANTS = {
    "BINBYTES", "BINBYTES8", "BINFLOAT", "BININT", "BININT1", "BININT2", "BINUNICODE", "BINUNICODE8", "LONG1",
    "SHORT_BINBYTES", "SHORT_BINUNICODE",
}  # fmt: skip


class RefusedError(InputError):
    """A pickle asks for what no network needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; nothing is looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Record:
    """What takes a state from a pickle, and does nothing with it."""

    state: Any


Make = Callable[..., Any]
Persistent = Callable[[Any], Any]


def replay(
    file: io.BytesIO, known: Mapping[str, Make], where: str, max_opcodes: int, persistent: Persistent | None = None
) -> Any:
    """One pickle from file, in which calls of the names `known` make something harmless and all other names are refused."""
    machine = Machine(known, where, persistent)
    try:
        for opcode, value, _ in islice(pickletools.genops(file), max_opcodes):
            if opcode.name == "STOP":
                (result,) = machine.stack
                return result
            machine.step(opcode.name, value)
    except InputError:
        raise
    except Exception as error:  # a damaged or hostile file may end in any of them
        raise InputError(f"{where}: not a readable pickle of an EDM network ({type(error).__name__}: {error})") from None
    raise RefusedError(f"{where}: refused, because it has more than {max_opcodes} opcodes, which no network of EDM needs")


class Machine:
    """The stack and the memo of one pickle. Values are plain or records, and only lists and dicts of this pickle change."""

    def __init__(self, known: Mapping[str, Make], where: str, persistent: Persistent | None) -> None:
        self.known, self.where, self.persistent = known, where, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "NONE": lambda _: self.stack.append(None),
            "NEWTRUE": lambda _: self.stack.append(True),
            "NEWFALSE": lambda _: self.stack.append(False),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_SET": lambda _: self.stack.append([]),  # no set is needed, and a hash of nested tuples takes for ever
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "TUPLE1": lambda _: self.stack.append(tuple(self.pop(1))),
            "TUPLE2": lambda _: self.stack.append(tuple(self.pop(2))),
            "TUPLE3": lambda _: self.stack.append(tuple(self.pop(3))),
            "TUPLE": lambda _: self.stack.append(tuple(self.to_mark())),
            "APPEND": lambda _: self.extend(self.pop(1)),
            "APPENDS": lambda _: self.extend(self.to_mark()),
            "ADDITEMS": lambda _: self.extend(self.to_mark()),
            "SETITEM": lambda _: self.update(self.pop(2)),
            "SETITEMS": lambda _: self.update(self.to_mark()),
            "MEMOIZE": lambda _: self.memo.update({len(self.memo): self.stack[-1]}),
            "BINPUT": lambda index: self.memo.update({index: self.stack[-1]}),
            "LONG_BINPUT": lambda index: self.memo.update({index: self.stack[-1]}),
            "BINGET": lambda index: self.stack.append(self.memo[index]),
            "LONG_BINGET": lambda index: self.stack.append(self.memo[index]),
            "GLOBAL": lambda names: self.name(*names.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self.name(*self.pop(2)),
            "REDUCE": lambda _: self.call(),
            "NEWOBJ": lambda _: self.call(),
            "BUILD": lambda _: self.build(),
            "BINPERSID": lambda _: self.refer(),
        }

    def step(self, opcode: str, value: Any) -> None:
        if opcode in CONSTANTS:
            self.stack.append(value)
        elif opcode in self.steps:
            self.steps[opcode](value)
        else:
            raise RefusedError(f"{self.where}: refused, because it has the opcode {opcode}, which no network of EDM needs")

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        return self.cut(len(self.stack) - count)

    def to_mark(self) -> list[Any]:
        return self.cut(self.marks.pop())

    def cut(self, first: int) -> list[Any]:
        found = self.stack[first:]
        del self.stack[first:]
        return found

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("wanted a list to add to")
        self.stack[-1].extend(values)

    def update(self, values: list[Any]) -> None:
        target, keys = self.stack[-1], values[::2]
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in keys):
            raise TypeError("wanted a dict with names or numbers as keys")
        target.update(zip(keys, values[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("wanted the name of a class or a function")
        found = Name(module, name)
        if str(found) not in self.known:
            raise RefusedError(
                f"{self.where}: refused, because it names {str(found)[:MAX_SHOWN]}, which no network of EDM needs; nothing was "
                "executed. Do not load this file by other means"
            )
        self.stack.append(found)

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise TypeError("wanted a name and its arguments")
        self.stack.append(self.known[str(function)](*arguments))

    def build(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # attributes of an ordered or dotted dict are not needed
            raise RefusedError(f"{self.where}: refused, because it changes a {type(target).__name__}")

    def refer(self) -> None:
        if self.persistent is None:
            raise RefusedError(f"{self.where}: refused, because it refers to data outside the file")
        self.stack.append(self.persistent(*self.pop(1)))
