"""The part of this package that answering needs, copied so that it travels with a model and meets no other copy.

The copy has a name of its own, made of its content's digest. Loading a model then neither finds this package by
accident, where another version is installed, nor hides it from the process that loads the model.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "coe_dist"
_ROOT = Path(__file__).resolve().parents[1]


class PackagedCode(NamedTuple):
    name: str  # of the copied package
    files: dict[str, str]  # path inside it -> source text, imports renamed
    libraries: frozenset[str]  # what it imports besides Python's own: top-level module names


def package_code(module: str) -> PackagedCode:
    """`module` (such as "coe_dist.inference") and everything of this package that it imports, also inside functions."""
    found: dict[str, str] = {}
    libraries: set[str] = set()
    waiting = _with_parents(module)
    while waiting:
        path = _source_of(waiting.pop())
        inside = path.relative_to(_ROOT).as_posix()
        if inside in found:
            continue
        found[inside] = path.read_text()
        for name in _imports(found[inside]):
            top = name.partition(".")[0]
            if top == PACKAGE:
                waiting += _with_parents(name)
            elif top not in sys.stdlib_module_names:
                libraries.add(top)
    digest = hashlib.sha256("".join(f"{path}\0{found[path]}\0" for path in sorted(found)).encode())
    name = f"{PACKAGE}_{digest.hexdigest()[:12]}"
    return PackagedCode(name, {path: rename_imports(found[path], name) for path in sorted(found)}, frozenset(libraries))


def rename_imports(source: str, name: str) -> str:
    """The same source importing package `name` in place of this one."""
    return re.sub(rf"^(\s*(?:from|import)\s+){PACKAGE}\b", rf"\g<1>{name}", source, flags=re.MULTILINE)


def write_code(code: PackagedCode, folder: Path) -> Path:
    """Writes the package into `folder` and returns its own folder there."""
    package = folder / code.name
    for path, text in code.files.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    return package


def requirements(libraries: frozenset[str]) -> list[str]:
    """pip requirements for top-level modules, within the versions that this package allows.

    What this package does not require by itself comes with what it does (pandas with MLflow) and is left out.
    """
    allowed = {}
    for line in importlib.metadata.requires("coe-dist") or ():
        if "extra ==" not in line:
            allowed[re.split(r"[^\w.-]", line)[0].lower()] = line.partition(";")[0].strip()
    distributions = importlib.metadata.packages_distributions()
    names = {name.lower() for module in libraries for name in distributions.get(module, [module])}
    return sorted(allowed[name] for name in names if name in allowed)


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _source_of(module: str) -> Path:
    place = _ROOT.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _imports(source: str) -> Iterator[str]:
    """Names of the modules that a source imports; of `from a import b` also a.b where it is a module of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.partition(".")[0] == PACKAGE:
                members = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (member for member in members if _source_of(member).is_file())
