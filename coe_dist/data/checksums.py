"""The checksum of each image's stored bytes, taken where they are made: in FFCV's writing processes."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt

from coe_dist.data.sources import SourceSplit


class ChecksummedField:
    """Puts the CRC-32 of what FFCV's image field stores into memory that the worker processes share."""

    def __init__(self, image: Any, count: int) -> None:
        self.checksums_N = get_context("fork").RawArray(ctypes.c_uint32, count)
        self.index = 0  # of the image that comes next, in a worker process
        self._encode = image.encode
        image.encode = self._checking  # FFCV looks fields up by their class, so that a subclass would not do

    def _checking(self, destination: Any, image: Any, allocate: Callable[[int], Any]) -> None:
        stored = []

        def noting(size: int) -> Any:
            place, memory = allocate(size)
            stored.append(memory)
            return place, memory

        self._encode(destination, image, noting)
        self.checksums_N[self.index] = zlib.crc32(stored[-1])


class CheckedSplit:
    """A split that tells which image is read."""

    def __init__(self, split: SourceSplit, checked: ChecksummedField) -> None:
        self._split, self._checked = split, checked

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        self._checked.index = index
        return self._split[index]
