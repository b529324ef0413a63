"""FFCV loaders that give every sample exactly once, for any number of ranks, from any step on.

The unit is the global batch: batch t of an epoch is order[t*G:(t+1)*G], and each rank reads a contiguous share of it,
so that the ranks' batches in rank order are the global batch. One FFCV loader serves all epochs.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from coe_dist.data.augment import Augmentation
from coe_dist.data.decode import FailureSlot, IdDecoder, ImageDecoder, LabelDecoder
from coe_dist.data.ffcv_binding import FIELDS, Loader, PipelineSpec, TraversalOrder
from coe_dist.data.order import epoch_order, rank_batches, share
from coe_dist.data.sidecar import SplitInfo, read_sidecar
from coe_dist.errors import InputError, TrainingError

POLL_SECONDS = 0.5


class Batch(NamedTuple):
    """B rows of this rank, in memory of their own; ids are positions in the .beton."""

    images_BCHW: torch.Tensor  # uint8, contiguous, not normalised
    labels_B: torch.Tensor  # int64
    ids_B: torch.Tensor  # int64


class _GivenOrder(TraversalOrder):  # type: ignore[misc]
    """An order set from outside; FFCV takes an instance and calls it with the loader."""

    def __init__(self, ids: npt.NDArray[np.int64]) -> None:
        self.ids = ids

    def __call__(self, loader: Any) -> _GivenOrder:
        return self

    def sample_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return self.ids


class SplitLoader:
    """One rank's reader of one split.

    train: shuffled by (seed, epoch) and augmented; else file order, no augmentation. `resolution`: side in pixels of
    the images given; images stored at another size are cropped to the centre (224/256 of the shorter side) and resized,
    or cropped at random under `augmentation.random_resized_crop`. `threads` decode (at most the cores this process may
    use). `limit` uses the first so many images of the file. Raises InputError for a damaged file or labels outside the
    classes. Not for use from several threads; one epoch at a time.
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
        threads: int = 1,
        limit: int | None = None,
    ) -> None:
        if global_batch < 1 or resolution < 1 or (limit is not None and limit < 1):
            raise ValueError(f"{global_batch=}, {resolution=}, {limit=}: each must be at least 1")
        self.beton = Path(beton)
        self.info: SplitInfo = read_sidecar(self.beton)
        self.count = self.info.count if limit is None else min(limit, self.info.count)
        self.steps_per_epoch = -(-self.count // global_batch)
        self._global_batch, self._rank, self._world_size = global_batch, rank, world_size
        self._seed, self._train = seed, train
        self._empty = Batch(
            torch.zeros((0, self.info.channels, resolution, resolution), dtype=torch.uint8),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int64),
        )
        self._failures = FailureSlot()
        self._decoder = ImageDecoder(
            self._failures,
            channels=self.info.channels,
            stored_shape=self.info.shape,
            resolution=resolution,
            seed=seed,
            augmentation=augmentation if train else None,
            threads=max(1, min(threads, len(os.sched_getaffinity(0)))),
        )
        self._order = _GivenOrder(np.arange(self.count, dtype=np.int64))
        start, stop = share(global_batch, rank, world_size)
        self._loader = self._build(batch_size=max(1, stop - start))
        self._reading: Any = None  # FFCV's iterator, a thread

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch from a global step on: steps_per_epoch - start_step of them on every rank,
        some possibly with zero rows. Starting an epoch ends the one before. Raises TrainingError when reading fails."""
        if not 0 <= start_step <= self.steps_per_epoch or epoch < 0:
            raise ValueError(
                f"{epoch=}, {start_step=}; need epoch >= 0 and start_step from 0 to {self.steps_per_epoch}"
            )
        order_N = epoch_order(self.count, self._seed, epoch, shuffle=self._train)
        batches = rank_batches(order_N, self._global_batch, self._rank, self._world_size, start_step)
        return self._read(epoch, batches)

    def close(self) -> None:
        """Ends the reading thread and the decoding threads."""
        self._stop()
        self._decoder.close()

    def _read(self, epoch: int, batches: list[npt.NDArray[np.int64]]) -> Iterator[Batch]:
        self._stop()
        self._failures.error = None
        self._order.ids = np.concatenate([*batches, np.zeros(0, np.int64)])
        self._decoder.epoch = epoch
        reading = self._reading = iter(self._loader)
        try:
            for ids_B in batches:
                if self._reading is not reading:
                    raise RuntimeError(f"{self.beton}: epoch {epoch} was ended by the start of another one")
                batch = self._next(reading) if len(ids_B) else self._empty
                assert np.array_equal(batch.ids_B.numpy(), ids_B), "FFCV gave other samples than asked for"
                yield batch
        finally:
            if self._reading is reading:
                self._stop()

    def _next(self, reading: Any) -> Batch:
        """FFCV's own __next__ waits for ever when its thread has died (ffcv#387)."""
        while True:
            alive = reading.is_alive()  # asked before the queue: what a thread left on its way out is still taken
            try:
                item = reading.output_queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                item = None
                if alive and self._failures.error is None:
                    continue
            if item is None:
                cause = self._failures.error
                reason = f"{type(cause).__name__}: {cause}" if cause else "its thread ended early"
                raise TrainingError(f"{self.beton}: the data loader failed: {reason}") from cause
            images, labels, ids = item[1]  # numpy views into slots that FFCV uses again
            return Batch(*(torch.from_numpy(np.array(part)) for part in (images, labels, ids)))

    def _stop(self) -> None:
        reading, self._reading = self._reading, None
        if reading is None:
            return
        reading.close()
        reading.iter_ixes = iter(())  # FFCV's own end waits until its queue has been full for half a second
        while reading.is_alive():
            with contextlib.suppress(queue.Empty):
                reading.output_queue.get_nowait()
            reading.join(timeout=0.01)

    def _build(self, batch_size: int) -> Any:
        loader = Loader(
            str(self.beton),
            batch_size=batch_size,
            num_workers=1,
            os_cache=True,
            order=self._order,
            drop_last=False,
            seed=self._seed,
            pipelines={
                "image": PipelineSpec("image", decoder=self._decoder),
                "label": PipelineSpec("label", decoder=LabelDecoder()),
                "id": PipelineSpec("label", decoder=IdDecoder()),
            },
        )
        if tuple(loader.reader.field_names) != FIELDS:
            raise InputError(f"{self.beton}: its fields are {loader.reader.field_names}, not {list(FIELDS)}")
        labels_N = loader.reader.metadata["f1"]
        classes = len(self.info.classes)
        if labels_N.min() < 0 or labels_N.max() >= classes:
            bad = int(labels_N.min() if labels_N.min() < 0 else labels_N.max())
            raise InputError(f"{self.beton}: label {bad} is outside the {classes} classes of its side-car")
        return loader
