"""torchvision's own way to such batches: ImageFolder over the original files, a DataLoader of worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from coe_dist.data.augment import RATIO, SCALE


def torchvision_loader(folder: Path, resolution: int, batch: int, workers: int, *, form: str) -> DataLoader[Any]:
    """Shuffled (uint8 [B,3,resolution,resolution], int64 [B]); the workers stay from epoch to epoch.

    form: `pil` crops and resizes the Pillow image, `tensor` makes a tensor of it first.
    """
    crop = v2.RandomResizedCrop(resolution, scale=SCALE, ratio=RATIO, antialias=True)
    steps: list[Any] = [crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]
    if form == "tensor":
        steps = [v2.PILToTensor(), crop, v2.RandomHorizontalFlip()]
    data = ImageFolder(str(folder), transform=v2.Compose(steps))
    return DataLoader(
        data,
        batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork",
    )
