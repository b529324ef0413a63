"""What MLflow is told about a run beside its metrics and settings: tags, and the data it is made of."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import torch

from coe_dist.config import RunConfig
from coe_dist.data.sidecar import SPLITS
from coe_dist.errors import InputError
from coe_dist.storage.datasets import place_of, sidecar_of
from coe_dist.tracking.datasets import DataUsed

_CONTEXT = {"train": "training"}  # MLflow's word for it


def run_tags(config: RunConfig, *, baseline: bool, revision: str) -> dict[str, str]:
    """kind, host, world_size ("1 to 4" where elastic) and, where it is known, git_revision."""
    workers = config.workers
    return {
        "kind": "baseline" if baseline else "collaboration",
        "host": platform.node(),
        "world_size": f"{workers.fewest} to {workers.most}" if workers.elastic else str(workers.count),
        **({"git_revision": revision} if revision else {}),
    }


def data_used(config: RunConfig) -> list[DataUsed]:
    """The splits of the configuration's data set, as their side-cars describe them; a missing one is left out."""
    found = []
    for split in SPLITS:
        try:
            info = sidecar_of(config.data, split)
        except InputError:
            continue
        rows = info.count if config.data.limit is None else min(info.count, config.data.limit)
        profile = {"num_rows": rows, "classes": len(info.classes), "channels": info.channels, "bytes": info.bytes}
        name = f"{config.data.source} {Path(config.data.folder).name} {split}"
        found.append(
            DataUsed(name, _CONTEXT.get(split, split), info.sha256[:16], place_of(config.data, split), profile)
        )
    return found


def system_metrics(device: torch.device) -> dict[str, float]:
    """Of this process and its machine, under `system/`: memory in bytes, the machine's processor use in percent since
    the call before (0 at the first), and the most GPU memory this process has had."""
    figures = {
        "system/memory_bytes": float(psutil.Process().memory_info().rss),
        "system/memory_free_bytes": float(psutil.virtual_memory().available),
        "system/cpu_percent": psutil.cpu_percent(),
    }
    if device.type == "cuda":
        figures["system/gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return figures
