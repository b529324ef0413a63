"""Commands in a network of their own, so that tests neither reach nor are reached by anything else.

A private network has only the loopback interface; connected ones stand for machines.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_NOT_HERE = ("Operation not permitted", "Unknown device type", "not supported")  # by the kernel, or its keeper
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def private_network_allowed() -> bool:
    done = subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return done.returncode == 0


def private_network_command(argv: Sequence[str]) -> list[str]:
    """`argv` under a network with only `lo`, or as it is where that is not permitted. Keeps its process id."""
    if not private_network_allowed():
        return list(argv)
    return ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *argv]


def slow_network_command(argv: Sequence[str], *, bytes_per_second: int, burst: int) -> list[str]:
    """`argv` under a network with only `lo`, which carries so many bytes a second after the first `burst` bytes. Skips
    the test, saying why, where the kernel has no such network."""
    shape = f"tc qdisc add dev lo root tbf rate {8 * bytes_per_second}bit burst {burst} latency 10s"
    network = ["unshare", "-rn", "sh", "-c", f'ip link set lo mtu 1500 up && {shape} && exec "$@"', "sh"]
    tried = subprocess.run([*network, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        assert "not found" not in tried.stderr, tried.stderr  # a missing command is no reason to skip
        pytest.skip(f"a slow network cannot be made here: {tried.stderr.strip()}")
    return [*network, *argv]


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment of a process that tests start: finds the package, without this user's Ray settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def in_private_network(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command in a private network; options as of subprocess.run."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "env": clean_environment()}
    return subprocess.run(private_network_command(argv), **{**settings, **options})


def scenario(script: Path, *arguments: object, folder: Path, **environment: str) -> dict[str, Any]:
    """Runs a script with `folder` as its place, in a private network; what its last line on stderr tells, as JSON. The
    script finds the modules of tests/ and those beside it."""
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(script.parent)])
    settings = clean_environment(XDG_STATE_HOME=str(folder / "state"), PYTHONPATH=search, **environment)
    command = python(script, *map(str, arguments))
    done = in_private_network(command, cwd=folder, env=settings, timeout=840)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])
    return told


@dataclass(frozen=True)
class Machines:
    """Network namespaces that reach each other over a bridge, as machines on one switch do."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    switch: str

    def command(self, number: int, argv: Sequence[str]) -> list[str]:
        """`argv` on one of them; keeps its process id."""
        return ["ip", "netns", "exec", self.names[number], *argv]

    def unplug(self, number: int) -> None:
        _ip("-n", self.switch, "link", "set", f"port{number}", "down")


@contextmanager
def machines(count: int) -> Iterator[Machines]:
    """Creates them and removes them afterwards; each has the interface `va`: gloo is told one name for all ranks. Skips
    the test, saying why, where namespaces may not be created."""
    tag = f"coe{os.getpid()}"
    names = tuple(f"{tag}{chr(ord('a') + number)}" for number in range(count))
    made = Machines(names, tuple(f"10.77.0.{number + 1}" for number in range(count)), f"{tag}switch")
    try:
        try:
            _connect(made)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            if os.geteuid() == 0 and not any(words in reason for words in _NOT_HERE):
                raise
            pytest.skip(f"network namespaces cannot be created here: {reason.strip()}")
        yield made
    finally:
        for name in (*names, made.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _connect(made: Machines) -> None:
    _ip("netns", "add", made.switch)
    _ip("-n", made.switch, "link", "add", "bridge", "type", "bridge")
    _ip("-n", made.switch, "link", "set", "bridge", "up")
    for number, (name, address) in enumerate(zip(made.names, made.addresses, strict=True)):
        port = f"port{number}"
        _ip("netns", "add", name)
        _ip("link", "add", "va", "netns", name, "type", "veth", "peer", "name", port, "netns", made.switch)
        _ip("-n", made.switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "va")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "va", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def python(script: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(script), *arguments]
