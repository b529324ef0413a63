"""The FFCV loader: reads a .beton in a thread, decodes by decode.py. One FFCV loader serves all epochs."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from coe_dist.data.batches import Batch, SplitReader
from coe_dist.data.decode import FailureSlot, IdDecoder, ImageDecoder, LabelDecoder
from coe_dist.data.ffcv_binding import FIELDS, Loader, PipelineSpec, TraversalOrder
from coe_dist.data.sidecar import check_labels
from coe_dist.errors import InputError, TrainingError

POLL_SECONDS = 0.5


class _GivenOrder(TraversalOrder):  # type: ignore[misc]
    """An order set from outside; FFCV takes an instance and calls it with the loader."""

    def __init__(self, ids: npt.NDArray[np.int64]) -> None:
        self.ids = ids

    def __call__(self, loader: Any) -> _GivenOrder:
        return self

    def sample_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return self.ids


class SplitLoader(SplitReader):
    """See SplitReader; `threads` are decoding threads of this process."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._failures = FailureSlot()
        self._decoder = ImageDecoder(
            self._failures,
            channels=self.info.channels,
            stored_shape=self.info.shape,
            resolution=self.resolution,
            seed=self.seed,
            augmentation=self.augmentation,
            threads=self.threads,
        )
        self._order = _GivenOrder(np.arange(self.count, dtype=np.int64))
        self._loader = self._build(batch_size=self.largest_batch)
        self._reading: Any = None  # FFCV's iterator, a thread

    def close(self) -> None:
        self._stop()
        self._decoder.close()

    def _read(self, epoch: int, batches: list[npt.NDArray[np.int64]]) -> Iterator[Batch]:
        self._stop()
        self._failures.error = None
        self._order.ids = np.concatenate([*batches, np.zeros(0, np.int64)])
        side = self.side_of(epoch)
        self._decoder.epoch, self._decoder.side = epoch, side
        reading = self._reading = iter(self._loader)
        try:
            for ids_B in batches:
                if self._reading is not reading:
                    raise RuntimeError(f"{self.beton}: epoch {epoch} was ended by the start of another one")
                batch = self._next(reading) if len(ids_B) else self.empty(side)
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
            return Batch(*(torch.from_numpy(part) for part in item[1]))

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
            seed=self.seed,
            pipelines={
                "image": PipelineSpec("image", decoder=self._decoder),
                "label": PipelineSpec("label", decoder=LabelDecoder()),
                "id": PipelineSpec("label", decoder=IdDecoder()),
            },
        )
        if tuple(loader.reader.field_names) != FIELDS:
            raise InputError(f"{self.beton}: its fields are {loader.reader.field_names}, not {list(FIELDS)}")
        check_labels(self.beton, self.info, loader.reader.metadata["f1"])
        return loader
