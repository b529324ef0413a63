"""Commands in a network of their own, so that tests neither reach nor are reached by anything else.

A private network has only the loopback interface; two connected ones (a veth pair) stand for two machines.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment of a process that tests start: finds the package, without this user's Ray settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def in_private_network(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command in a private network; options as of subprocess.run."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "env": clean_environment()}
    return subprocess.run(private_network_command(argv), **{**settings, **options})


@dataclass(frozen=True)
class TwoNetworks:
    """Two network namespaces that reach each other, as two machines do."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def command(self, number: int, argv: Sequence[str]) -> list[str]:
        """`argv` in network 0 or 1; keeps its process id."""
        return ["ip", "netns", "exec", self.names[number], *argv]


@contextmanager
def two_networks() -> Iterator[TwoNetworks]:
    """Creates the pair and removes it afterwards. Needs root and iproute2: raises CalledProcessError otherwise."""
    names = (f"coe{os.getpid()}a", f"coe{os.getpid()}b")
    addresses = ("10.77.0.1", "10.77.0.2")
    try:
        for name in names:
            _ip("netns", "add", name)
        # the same interface name at both ends: gloo is told one name for all ranks
        _ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "va", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "va")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "va", "up")
        yield TwoNetworks(names, addresses)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def python(script: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(script), *arguments]
