"""A small Fashion-MNIST written with FFCV for real, and a configuration that trains on it in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from coe_dist.data.batches import Batch
from coe_dist.data.beton import write_dataset

IMAGES = 101  # of each split; prime, so that no batch or world size divides it


def write_small(folder: Path) -> Path:
    write_dataset("fashion-mnist", folder, limit=IMAGES)
    return folder


def batches_of(beton: Path, resolution: int, size: int = 64) -> Iterator[Batch]:
    """A split as evaluation reads it: every image once, in order, without augmentation."""
    from coe_dist.data.loader import SplitLoader  # imports FFCV, which not every user of this file needs

    loader = SplitLoader(
        beton,
        global_batch=size,
        rank=0,
        world_size=1,
        resolution=resolution,
        seed=0,
        train=False,
        augmentation=None,
    )
    try:
        yield from loader.epoch(0)
    finally:
        loader.close()


def small_config(data: Path, runs: Path, /, **sections: Any) -> dict[str, Any]:
    """Three experts, two epochs of four steps, the torch engine; `sections` are merged in."""
    network = {"network": "small_cnn", "options": {"width": 0.1}}
    content: dict[str, Any] = {
        "name": "run",
        "runs_dir": str(runs),
        "data": {"folder": str(data)},
        "delegator": network,
        "experts": {"count": 3, "per_sample": 2, **network},
        "training": {"epochs": 2, "global_batch": 32, "engine": "torch", "timeout_seconds": 60},
        "workers": {"count": 2, "device": "cpu"},
        "tracking": {"enabled": False, "every_steps": 2},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, Mapping) else section
    return content


def write_config(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content)))
    return path
