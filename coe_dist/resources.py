"""What this process may use: cores by affinity and cgroup quota, memory by cgroup limit, GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC_CGROUP = Path("/proc/self/cgroup")


def usable_cores(root: Path = _CGROUP_ROOT, own: Path = _PROC_CGROUP) -> int:
    """Whole cores this process may use: its affinity mask, limited by every cgroup CPU quota above it; at least 1.

    A quota of 1.5 cores counts as 1 (our own rule: two busy workers on it would throttle each other).
    """
    cores = len(os.sched_getaffinity(0))
    for quota in _cpu_quotas(root, own):
        cores = min(cores, int(quota))
    return max(1, cores)


def usable_memory(root: Path = _CGROUP_ROOT, own: Path = _PROC_CGROUP) -> int:
    """Bytes of memory this process may use: the machine's, further limited by every cgroup limit above it."""
    memory = int(psutil.virtual_memory().total)
    for folder, legacy in _cgroup_folders(root, own, "memory"):
        text = _read(folder / ("memory.limit_in_bytes" if legacy else "memory.max"))
        if text.isdigit():
            memory = min(memory, int(text))
    return memory


def usable_gpus() -> int:
    """CUDA devices torch sees (imports torch)."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cpu_quotas(root: Path, own: Path) -> Iterator[float]:
    """Every CPU quota that applies, in cores: cgroup v2's `cpu.max`, v1's `cpu.cfs_quota_us` (-1: none)."""
    for folder, legacy in _cgroup_folders(root, own, "cpu"):
        if legacy:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        else:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield int(quota) / int(period)


def _cgroup_folders(root: Path, own: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is cgroup v1) from this process's group up to the root of the mount."""
    for line in _read(own).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        legacy = controllers != ""
        if legacy and controller not in controllers.split(","):
            continue
        base = root / controller if legacy else root
        folder = base / name.lstrip("/")
        # Inside a container the path may be the host's and absent here; the mount's root then holds the limits.
        for candidate in [folder, *folder.parents]:
            if candidate.is_dir():
                yield candidate, legacy
            if candidate == base:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
