"""A Python environment that holds the given requirements, what they require, and nothing else: not this package.

It is made of links to the installed distributions, so that making it takes a second and no network.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement


def bare_environment(folder: Path, requirements: Iterable[str]) -> Path:
    """Makes the environment in `folder` and returns its folder of programs (python and those of the distributions).

    Raises AssertionError when an installed version is not within a requirement.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    [packages] = folder.glob("lib/python*/site-packages")
    programs = folder / "bin"
    for distribution in _required(requirements).values():
        for name in {file.parts[0] for file in distribution.files or () if ".." not in file.parts}:
            source = Path(str(distribution.locate_file(name)))
            if source.suffix != ".pth" and name != "__pycache__" and not (packages / name).exists():
                (packages / name).symlink_to(source)
        for entry in distribution.entry_points.select(group="console_scripts"):
            module, _, function = entry.value.partition(":")
            program = programs / entry.name
            program.write_text(
                f"#!{programs / 'python'}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
            )
            program.chmod(0o755)
    return programs


def _required(requirements: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        distribution = importlib.metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), requirement
        found[distribution.name] = distribution
        for text in distribution.requires or ():
            needed = Requirement(text)
            extras = [{"extra": extra} for extra in ("", *requirement.extras)]
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras):
                waiting.append(needed)
    return found
