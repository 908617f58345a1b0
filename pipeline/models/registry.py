"""Architectures by name: those of this package, and functions in modules of the user's own."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from pipeline.params import InputError

Builder = Callable[..., nn.Module]
ARCHITECTURES: dict[str, Builder] = {}
PROJECT = Path(__file__).parents[2]


def register(build: Builder) -> Builder:
    """Make `build(shape, num_classes, **arguments) -> nn.Module`, for images of shape (H, W, C), an architecture.

    In this package its name is that of the function; in a module of one's own, `module.function`, which params.yaml and
    model.json name, and by which every stage finds it."""
    own = not build.__module__.startswith("pipeline.models.")
    ARCHITECTURES[f"{build.__module__}.{build.__name__}" if own else build.__name__] = build
    return build


def find_builder(name: str) -> Builder:
    """The registered function, after the import of its module where the name has one. Only files of the project are
    imported and only what they register is called, so a model.json from elsewhere runs no code but the user's own.

    Raises:
        InputError: there is no such architecture, or its module cannot be imported.
    """
    module = name.rpartition(".")[0]
    if module and name not in ARCHITECTURES:
        import_own(module)
    if name not in ARCHITECTURES:
        raise InputError(
            f"wanted an architecture out of {', '.join(sorted(ARCHITECTURES))}, or module.function of a module of your own "
            f"whose function has @register; got {name!r}"
        )
    return ARCHITECTURES[name]


def import_own(module: str) -> None:
    path = own_file(module, PROJECT)
    if path is None:
        raise InputError(
            f"architecture: wanted the file {module.replace('.', '/')}.py in the project for {module!r}, found none"
        )
    if str(PROJECT) not in sys.path:
        sys.path.append(str(PROJECT))
    try:
        importlib.import_module(module)
    except Exception as error:
        raise InputError(f"architecture: {path.name} cannot be imported ({type(error).__name__}: {error})") from error


def own_file(module: str, root: Path) -> Path | None:
    """The file of a module below root, None if there is none or the name is no module's."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    base = root.joinpath(*parts)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
