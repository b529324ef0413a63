"""The pipeline of an FFCV loader: sample ids -> augmented uint8 images [B,C,H,W] (FFCV hands its operations the ids).

Images stored raw at the loader's resolution are laid into their slots straight from the memory-mapped file: shifted
with zero fill, mirrored, channels first. All others are decoded where they are JPEGs, and cropped, resized and laid by
resample.py in one pass. Last come the random operations that the configuration asks for. The parts of a batch run in
parallel; the parameters come from augment.py and random_operations.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numba
import numpy as np

from coe_dist.data.augment import (
    Augmentation,
    Placement,
    augmentation_key,
    placements,
    random_crops,
)
from coe_dist.data.ffcv_binding import Operation, imdecode
from coe_dist.data.random_operations import apply_random_operations
from coe_dist.data.resample import resample
from coe_dist.data.stored import JPEG_MODE, Bytes
from coe_dist.preparation import centre_crops


class FailureSlot:
    """Where the loader's thread leaves its exception: FFCV would let the reader wait for ever."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as error:
                self.error = error
                # FFCV's thread takes this for the end of the epoch and ends quietly; the reader knows it came too early
                raise StopIteration from error

        return guarded


class ImageDecoder(Operation):  # type: ignore[misc]
    """`epoch` and `side` are set by the loader before each epoch; augmentation None: evaluation.

    resolution: the largest side of the images in pixels. `side`: that of the images made; crops do not depend on it.
    """

    def __init__(
        self,
        failures: FailureSlot,
        *,
        channels: int,
        stored_shape: tuple[int, int] | None,
        resolution: int,
        seed: int,
        augmentation: Augmentation | None,
        threads: int,
    ) -> None:
        super().__init__()
        self.epoch, self.side = 0, resolution
        self._failures = failures
        self._channels = channels
        self._resolution = resolution
        self._seed = seed
        self._augmentation = augmentation
        self._random_crop = augmentation is not None and augmentation.random_resized_crop
        self._crop = self._random_crop or stored_shape != (resolution, resolution)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        shape, dtype = (self._channels, self._resolution, self._resolution), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), None

    def generate_code(self) -> Callable[..., Any]:
        return self._failures.guard(self._decode)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, ids_B: Any, memory: None, metadata: Any, storage_state: Any) -> Bytes:
        """metadata: FFCV's records of all samples' image field; storage_state: the mapped file, places and sizes.

        The batch gets memory of its own: FFCV would use its slots again, and the reader would have to copy."""
        ids_B = ids_B.astype(np.int64)
        count = len(ids_B)
        out_BCHW = np.empty((count, self._channels, self.side, self.side), np.uint8)
        bounds = [count * part // self._threads for part in range(self._threads + 1)]

        def work(part: int) -> None:
            first, last = bounds[part], bounds[part + 1]
            if last > first:
                self._fill(ids_B[first:last], out_BCHW[first:last], metadata, storage_state)

        if self._pool is None:
            work(0)
        else:
            list(self._pool.map(work, range(self._threads)))
        return out_BCHW

    def _fill(self, ids_B: Any, out_BCHW: Bytes, metadata: Any, storage_state: Any) -> None:
        key = augmentation_key(self._seed, self.epoch)
        records_B = metadata[ids_B]
        mapped = np.asarray(storage_state[0])
        place = placements(self._augmentation, key, ids_B)
        if self._crop or self.side != self._resolution or (records_B["mode"] == JPEG_MODE).any():
            crops_B4 = self._crops(ids_B, key, records_B)
            self._resample(ids_B, records_B, mapped, storage_state, crops_B4, place, out_BCHW)
        else:
            _lay(mapped, records_B["data_ptr"].astype(np.int64), place.down_B, place.right_B, place.flip_B, out_BCHW)
        apply_random_operations(self._augmentation, key, ids_B, out_BCHW)

    def _crops(self, ids_B: Any, key: int, records_B: Any) -> Any:
        """[B,4] of (top, left, height, width)."""
        heights_B, widths_B = records_B["height"].astype(np.int64), records_B["width"].astype(np.int64)
        if self._random_crop:
            return random_crops(key, ids_B, heights_B, widths_B)
        if self._crop:
            return centre_crops(heights_B, widths_B)
        return np.stack([heights_B * 0, widths_B * 0, heights_B, widths_B], axis=1)

    def _resample(
        self,
        ids_B: Any,
        records_B: Any,
        mapped: Bytes,
        storage_state: Any,
        crops_B4: Any,
        place: Placement,
        out_BCHW: Bytes,
    ) -> None:
        _, places, sizes = storage_state
        starts_B = records_B["data_ptr"].astype(np.int64)
        lengths_B = sizes[np.searchsorted(places, records_B["data_ptr"])].astype(np.int64)
        areas_B = records_B["height"].astype(np.int64) * records_B["width"]
        decoded = np.empty(3 * int(areas_B.max(initial=0)), np.uint8)  # one buffer: fresh memory costs page faults
        for i in range(len(ids_B)):
            height, width = int(records_B["height"][i]), int(records_B["width"][i])
            stored = mapped[int(starts_B[i]) : int(starts_B[i]) + int(lengths_B[i])]
            if records_B["mode"][i] == JPEG_MODE:
                pixels = decoded[: 3 * height * width]
                if imdecode(stored, pixels, height, width, height, width, 0, 0, 1, 1, False, False):
                    raise ValueError(f"image {ids_B[i]}: its stored JPEG is damaged")
            else:
                pixels = stored
            top, left, crop_height, crop_width = (int(value) for value in crops_B4[i])
            down, right, mirrored = int(place.down_B[i]), int(place.right_B[i]), bool(place.flip_B[i])
            image_HW3 = pixels.reshape(height, width, 3)
            resample(image_HW3, top, left, crop_height, crop_width, down, right, mirrored, out_BCHW[i])


class LabelDecoder(Operation):  # type: ignore[misc]
    """Labels of a batch, int64 [B]; FFCV's own loops in Python when its compiler is off."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        return replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype("<i8")), None

    def generate_code(self) -> Callable[..., Any]:
        return lambda ids_B, memory, metadata, storage_state: metadata[ids_B.astype(np.int64)]


class IdDecoder(LabelDecoder):
    """The sample ids FFCV read, int64 [B]."""

    def generate_code(self) -> Callable[..., Any]:
        return lambda ids_B, memory, metadata, storage_state: ids_B.astype(np.int64)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _lay(pixels: Any, starts_B: Any, down_B: Any, right_B: Any, flip_B: Any, out_BCHW: Any) -> None:
    """out[b,c,y,x] = image b, stored as [H,W,3] bytes, at (y - down, x' - right), x' = W-1-x if mirrored; 0 outside."""
    count, channels, height, width = out_BCHW.shape
    for b in range(count):
        for c in range(channels):
            for y in range(height):
                source_y = y - down_B[b]
                row = starts_B[b] + source_y * width * 3 + c
                inside = 0 <= source_y < height
                for x in range(width):
                    source_x = (width - 1 - x if flip_B[b] else x) - right_B[b]
                    if inside and 0 <= source_x < width:
                        out_BCHW[b, c, y, x] = pixels[row + source_x * 3]
                    else:
                        out_BCHW[b, c, y, x] = 0
