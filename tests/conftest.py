"""Long tests run only when asked for (`make test-full`, `make docs-check`); no generated example has a time limit; all
processes have one thread, since with tiny networks more of them only wait for each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

MARKS = {
    "full": "also run the tests marked `full` (up to an hour)",
    "docs": "also run the commands of README.md and docs/ (about ten minutes)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark, meaning in MARKS.items():
        parser.addoption(f"--{mark}", action="store_true", help=meaning)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [mark for mark in MARKS if not config.getoption(f"--{mark}")]
    long = [item for item in items if any(item.get_closest_marker(mark) for mark in left_out)]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    items[:] = spread(items)


def spread(items: list[pytest.Item]) -> list[pytest.Item]:
    """The files of each folder evenly over the whole: those of one folder wait for the same things (Ray's start, four
    ranks), and would make each other late."""
    folders: dict[Path, dict[Path, list[pytest.Item]]] = {}
    for item in items:
        folders.setdefault(item.path.parent, {}).setdefault(item.path, []).append(item)
    placed = [
        ((number + 0.5) / len(files), tests)
        for files in folders.values()
        for number, tests in enumerate(files.values())
    ]
    return [item for _, tests in sorted(placed, key=lambda pair: pair[0]) for item in tests]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Runs `coe-dist ARGUMENTS` in this process; gives its exit code, standard output and standard error."""
    from coe_dist import cli

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["coe-dist", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()

    return run
