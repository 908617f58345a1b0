"""The modules of the project that a stage imports, directly or not: what its deps in dvc.yaml must list."""

import ast
from pathlib import Path

# Where a job runs is not a result, so the execution package is in no stage's deps.
NOT_A_RESULT = "pipeline/execution/"


def code_deps(stage: str, root: Path = Path()) -> list[str]:
    """Sorted paths, from root, of the files in the import closure of stages/<stage>.py; templates beside a module that
    is a package count as part of it."""
    entry = f"stages/{stage}.py"
    seen: set[str] = set()
    todo = [entry]
    while todo:
        path = todo.pop()
        if path in seen or path.startswith(NOT_A_RESULT):
            continue
        seen.add(path)
        todo += imports_of(root / path, root)
    templates = {t for path in seen for t in templates_of(root / path, root)}
    return sorted(path for path in seen | templates if not is_documentation(root / path))


def imports_of(path: Path, root: Path) -> list[str]:
    """Files of the project that a module's import statements name, at any depth of its code."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("pipeline", "stages"):
                found += files_of(name, root)
    return found


def files_of(name: str, root: Path) -> list[str]:
    """The module and the packages above it, which Python runs before it."""
    parts = name.split(".")
    found = []
    for depth in range(1, len(parts) + 1):
        base = Path(*parts[:depth])
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if (root / path).is_file():
                found.append(path.as_posix())
    return found


def templates_of(path: Path, root: Path) -> list[str]:
    return [t.relative_to(root).as_posix() for t in path.parent.glob("*.j2")] if path.name == "__init__.py" else []


def is_documentation(path: Path) -> bool:
    """Whether a module is nothing but its docstring."""
    if path.suffix != ".py":
        return False
    body = ast.parse(path.read_text()).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
