"""A model's file that lies in a package: its name there, and its import under that name."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

from ir.errors import PlanError


def packages_of(path: Path) -> tuple[Path, ...]:
    """The folders of the packages that a file lies in, the innermost first; none of a lone file."""
    found, folder = [], path.resolve().parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        found.append(folder)
        folder = folder.parent
    return tuple(found)


def roots_of(path: Path) -> tuple[Path, ...]:
    """The folder that the outermost package is imported from; none of a lone file."""
    return tuple(package.parent for package in packages_of(path)[-1:])


def imports_relatively(path: Path) -> bool:
    """Whether the file has `from .x import y`; a file that does not parse has none."""
    try:
        tree = ast.parse(path.read_text(errors="replace"))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def import_of_package(path: Path) -> ModuleType:
    """Import a file as its package's module, anew. Its root's parent is on `sys.path`.

    Raises PlanError where another package of that name is imported already.
    """
    packages = [folder.name for folder in reversed(packages_of(path))]
    name = ".".join([*packages, *([path.stem] if path.stem != "__init__" else [])])
    root = packages_of(path)[-1]
    there = sys.modules.get(root.name)
    lies = getattr(there, "__file__", None)
    if there is not None and (lies is None or Path(lies).resolve().parent != root):
        raise PlanError(f"{path} is {name} of {root}, and another {root.name} is imported",
                        why=str(lies or root.name), hints=(f"rename {root}",))  # fmt: skip
    for old in [key for key in sys.modules if f"{key}.".startswith(f"{root.name}.")]:
        del sys.modules[old]  # files may have changed since
    importlib.invalidate_caches()
    return importlib.import_module(name)


def meant(model_spec: str) -> tuple[str, ...]:
    """The file of a dotted module's name, where it is here: `pkg.sub:build`."""
    module, colon, factory = model_spec.partition(":")
    stem = Path(*module.split("."))
    there = (p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file())
    return tuple(f"plan trace {path}{colon}{factory}" for path in there)
