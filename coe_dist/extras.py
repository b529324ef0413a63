"""What an optional command needs beyond the package's own requirements."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from coe_dist.errors import InputError


def require(command: str, modules: Iterable[str], extra: str) -> None:
    """Raises InputError naming the first module that is not installed, and how to install it."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"{command} needs the package {module}; run: pip install -e '.[{extra}]' in the project's folder"
            )
