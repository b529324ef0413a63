"""Augmentation parameters as a function of (seed, epoch, sample id) alone (our own rules; the crops of
evaluation are in preparation.py).

They are the same for a sample whatever its batch, its rank, the number of ranks or the step a run resumed at.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from coe_dist.data.order import hash_counters
from coe_dist.seeds import derive_seed

SCALE = (0.35, 1.0)  # share of the image's area that a random resized crop takes
RATIO = (3 / 4, 4 / 3)  # its width / height
ATTEMPTS = 10

_DRAWS = 64  # counters set aside per sample
_FLIP, _SHIFT_Y, _SHIFT_X, _CROP = 0, 1, 2, 8  # _CROP + 4 * attempt + (area, ratio, top, left); 3 to 7 and from 48 on
# are those of random_operations.py

Integers = npt.NDArray[np.int64]


class Augmentation(Protocol):
    """What the loader needs to know; config.AugmentationConfig has these fields."""

    @property
    def flip(self) -> bool: ...
    @property
    def shift(self) -> int: ...
    @property
    def random_resized_crop(self) -> bool: ...
    @property
    def operations(self) -> int: ...
    @property
    def magnitude(self) -> float: ...
    @property
    def erase(self) -> float: ...


class Placement(NamedTuple):
    """How each image is laid into its square: moved by (down_B, right_B) pixels with zero fill, then mirrored."""

    down_B: Integers
    right_B: Integers
    flip_B: npt.NDArray[np.bool_]


def uniform(key: int, ids_B: Integers, draw: int) -> npt.NDArray[np.float64]:
    """Number `draw` (0..63) of each sample, uniform in [0, 1)."""
    bits_B = (hash_counters(key, ids_B * _DRAWS + draw) >> np.uint64(11)).astype(np.float64)
    return bits_B * np.float64(2.0**-53)


def augmentation_key(seed: int, epoch: int) -> int:
    return derive_seed(seed, "augmentation", epoch)


def placements(augmentation: Augmentation | None, key: int, ids_B: Integers) -> Placement:
    """Shift uniform on -s..s in both directions, mirrored with probability 1/2; nothing without augmentation."""
    if augmentation is None:
        zeros_B = np.zeros(len(ids_B), np.int64)
        return Placement(zeros_B, zeros_B, np.zeros(len(ids_B), np.bool_))
    span = 2 * augmentation.shift + 1
    down_B = (uniform(key, ids_B, _SHIFT_Y) * span).astype(np.int64) - augmentation.shift
    right_B = (uniform(key, ids_B, _SHIFT_X) * span).astype(np.int64) - augmentation.shift
    flip_B = (uniform(key, ids_B, _FLIP) < 0.5) & augmentation.flip
    return Placement(down_B, right_B, flip_B)


def random_crops(key: int, ids_B: Integers, heights_B: Integers, widths_B: Integers) -> Integers:
    """[B,4] of (top, left, height, width): the first of ten candidates with an area of 0.35..1 of the image's and a
    width/height of 3/4..4/3 (uniform in its logarithm) that fits; else the largest centred crop of allowed ratio."""
    crops_B4 = _fallback_crops(heights_B, widths_B)
    open_B = np.ones(len(ids_B), np.bool_)
    for attempt in range(ATTEMPTS):
        first = _CROP + 4 * attempt
        area_B = heights_B * widths_B * (SCALE[0] + (SCALE[1] - SCALE[0]) * uniform(key, ids_B, first))
        low, high = np.log(RATIO[0]), np.log(RATIO[1])
        ratio_B = np.exp(low + (high - low) * uniform(key, ids_B, first + 1))
        width_B = np.rint(np.sqrt(area_B * ratio_B)).astype(np.int64)
        height_B = np.rint(np.sqrt(area_B / ratio_B)).astype(np.int64)
        fits_B = open_B & (width_B > 0) & (width_B <= widths_B) & (height_B > 0) & (height_B <= heights_B)
        top_B = (uniform(key, ids_B, first + 2) * (heights_B - height_B + 1)).astype(np.int64)
        left_B = (uniform(key, ids_B, first + 3) * (widths_B - width_B + 1)).astype(np.int64)
        crops_B4[fits_B] = np.stack([top_B, left_B, height_B, width_B], axis=1)[fits_B]
        open_B &= ~fits_B
    return crops_B4


def _fallback_crops(heights_B: Integers, widths_B: Integers) -> Integers:
    width_B = np.maximum(np.minimum(widths_B, np.rint(heights_B * RATIO[1]).astype(np.int64)), 1)
    height_B = np.maximum(np.minimum(heights_B, np.rint(widths_B / RATIO[0]).astype(np.int64)), 1)
    return np.stack([(heights_B - height_B) // 2, (widths_B - width_B) // 2, height_B, width_B], axis=1)
