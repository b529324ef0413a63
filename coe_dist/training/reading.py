"""The micro-batches that a rank reads of each split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from coe_dist.config import RunConfig
from coe_dist.data.batches import SplitReader
from coe_dist.data.loaders import open_loader
from coe_dist.parallel.groups import Groups
from coe_dist.storage.datasets import beton_of
from coe_dist.training.step import MicroBatch


class Data:
    """This rank's loaders of the three splits, built when first used and kept (an FFCV pipeline is costly to build)."""

    def __init__(self, config: RunConfig, groups: Groups, device: torch.device) -> None:
        self.config, self.groups, self.device = config, groups, device
        self._loaders: dict[str, SplitReader] = {}

    def loader(self, split: str) -> SplitReader:
        if split not in self._loaders:
            data = self.config.data
            self._loaders[split] = open_loader(
                data.loader,
                beton_of(data, split),
                global_batch=self.config.micro_batch,
                rank=self.groups.rank,
                world_size=self.groups.world.size,
                resolution=data.resolution,
                seed=self.config.seed,
                train=split == "train",
                augmentation=data.augmentation if split == "train" else None,
                progressive=data.progressive,
                threads=data.loader_threads,
                limit=data.limit,
            )
        return self._loaders[split]

    def batches(self, split: str, epoch: int = 0, start_step: int = 0) -> Iterator[MicroBatch]:
        for batch in self.loader(split).epoch(epoch, start_step=start_step):
            images = batch.images_BCHW
            if self.device.type == "cuda":
                images = images.pin_memory().to(self.device, non_blocking=True)
            yield MicroBatch(images, batch.labels_B.to(self.device), batch.ids_B.to(self.device))

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()


def grouped(batches: Iterable[MicroBatch], size: int) -> Iterator[list[MicroBatch]]:
    """Lists of `size` micro-batches; the last may be shorter."""
    group: list[MicroBatch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
