"""What every benchmark reports: the machine, the versions, timings with their spread, and ratios against named peers.

A benchmark returns {"name", "machine", "versions", "cases": [{"case", "ours", "peers": {name: {..., "ratio"}}}]}, plain
numbers and strings that json can write. ratio = the peer's seconds / our seconds: above 1 we are faster.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from coe_dist.resources import usable_cores, usable_memory

Record = dict[str, Any]


def machine() -> Record:
    """Processor, usable cores, memory (GiB), operating system and Python of this machine."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(usable_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each distribution; "not installed" where it is missing."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def timed(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(median seconds, spread) of `repeats` calls; spread = (slowest - fastest) / median, 0 for one call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return median, (max(seconds) - min(seconds)) / median if median else 0.0


def case(fields: Mapping[str, Any], ours: Mapping[str, Any], peers: Mapping[str, Mapping[str, Any]]) -> Record:
    """One measured case. `ours` and each peer hold "seconds"; the peers' "ratio" is added here. Told on stderr, because
    a benchmark may take half an hour."""
    told = " ".join(f"{key}={value}" for key, value in fields.items())
    print(f"bench: measured {told}: {ours['seconds']:.4g} s", file=sys.stderr, flush=True)
    with_ratio = {name: {**peer, "ratio": peer["seconds"] / ours["seconds"]} for name, peer in peers.items()}
    return {"case": dict(fields), "ours": dict(ours), "peers": with_ratio}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
