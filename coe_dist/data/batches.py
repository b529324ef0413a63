"""What every loader is: one rank's batches of one split, each sample exactly once, for any number of ranks.

The unit is the global batch: batch t of an epoch is order[t*G:(t+1)*G], and each rank reads a contiguous share of it,
so that the ranks' batches in rank order are the global batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from coe_dist.data.augment import Augmentation
from coe_dist.data.order import epoch_order, rank_batches, share
from coe_dist.data.progressive import Progressive, resolution_of
from coe_dist.data.sidecar import SplitInfo, read_sidecar
from coe_dist.resources import usable_cores


class Batch(NamedTuple):
    """B rows of this rank, in memory of their own; ids are positions in the .beton."""

    images_BCHW: torch.Tensor  # uint8, contiguous, not normalised
    labels_B: torch.Tensor  # int64
    ids_B: torch.Tensor  # int64


class SplitReader(ABC):
    """One rank's reader of one split.

    train: shuffled by (seed, epoch) and augmented; else file order, no augmentation. `resolution`: side in pixels of
    the images given; images stored at another size are cropped to the centre (224/256 of the shorter side) and resized,
    or cropped at random under `augmentation.random_resized_crop`. `threads` decode (at most the cores this process may
    use). `limit` uses the first so many images of the file. `progressive` makes the images of early epochs smaller
    (train only). Raises InputError for a damaged file or labels outside the classes. Not for use from several threads;
    one epoch at a time.
    """

    def __init__(
        self,
        beton: Path,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        resolution: int,
        seed: int,
        train: bool,
        augmentation: Augmentation | None,
        progressive: Progressive | None = None,
        threads: int = 1,
        limit: int | None = None,
    ) -> None:
        if global_batch < 1 or resolution < 1 or (limit is not None and limit < 1):
            raise ValueError(f"{global_batch=}, {resolution=}, {limit=}: each must be at least 1")
        self.beton = Path(beton)
        self.info: SplitInfo = read_sidecar(self.beton)
        self.count = self.info.count if limit is None else min(limit, self.info.count)
        self.steps_per_epoch = -(-self.count // global_batch)
        self.resolution, self.seed, self.train = resolution, seed, train
        self.augmentation = augmentation if train else None
        self.progressive = progressive if train else None
        self.threads = max(1, min(threads, usable_cores()))
        self._global_batch, self._rank, self._world_size = global_batch, rank, world_size
        start, stop = share(global_batch, rank, world_size)
        self.largest_batch = max(1, stop - start)

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch from a global step on: steps_per_epoch - start_step of them on every rank,
        some possibly with zero rows. Starting an epoch ends the one before. Raises TrainingError when reading fails."""
        if not 0 <= start_step <= self.steps_per_epoch or epoch < 0:
            raise ValueError(
                f"{epoch=}, {start_step=}; need epoch >= 0 and start_step from 0 to {self.steps_per_epoch}"
            )
        order_N = epoch_order(self.count, self.seed, epoch, shuffle=self.train)
        return self._read(epoch, rank_batches(order_N, self._global_batch, self._rank, self._world_size, start_step))

    def side_of(self, epoch: int) -> int:
        """Side in pixels of the images of one epoch."""
        return resolution_of(epoch, self.resolution, self.progressive)

    def empty(self, side: int) -> Batch:
        """What a rank without rows gets."""
        images = torch.zeros((0, self.info.channels, side, side), dtype=torch.uint8)
        return Batch(images, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))

    @abstractmethod
    def close(self) -> None:
        """Ends the reading and decoding threads."""

    @abstractmethod
    def _read(self, epoch: int, batches: list[npt.NDArray[np.int64]]) -> Iterator[Batch]: ...
