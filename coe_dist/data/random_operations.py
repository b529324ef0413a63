"""Which random operations an image gets, as a function of (seed, epoch, sample id) alone.

In the manner of RandAugment (Cubuk et al., 2020) and random erasing (Zhong et al., 2020), with our own set of cheap
operations on uint8 (pixel_operations.py) and our own ranges: each of `operations` kinds is drawn independently, its
strength uniformly between 0 and magnitude / 10, its direction by a coin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coe_dist.data.augment import Augmentation, Integers, uniform
from coe_dist.data.pixel_operations import KINDS, alter

AREA = (0.02, 0.2)  # of the erased rectangle, as a share of the image
RATIO = (1 / 3, 3.0)  # its width / height

_ERASE = 3  # draws 3 to 7 of a sample: whether, area, ratio, top, left
_OPERATION = 48  # + 3 * number of the operation: kind, strength, direction


class RandomOperations(NamedTuple):
    """O operations for each of B images."""

    kinds_BO: Integers  # numbers of pixel_operations.KINDS, applied in this order
    strengths_BO: npt.NDArray[np.float64]  # from -1 to 1; the sign is the direction
    boxes_B4: Integers  # (top, left, height, width) of the erased rectangle; height 0: none


def random_operations(augmentation: Augmentation, key: int, ids_B: Integers, side: int) -> RandomOperations:
    """side: of the square images, in pixels."""
    kinds_BO = np.zeros((len(ids_B), augmentation.operations), np.int64)
    strengths_BO = np.zeros(kinds_BO.shape)
    for number in range(augmentation.operations):
        kind_B, strength_B, direction_B = (uniform(key, ids_B, _OPERATION + 3 * number + draw) for draw in range(3))
        kinds_BO[:, number] = (kind_B * len(KINDS)).astype(np.int64)
        strengths_BO[:, number] = strength_B * (augmentation.magnitude / 10) * np.where(direction_B < 0.5, -1.0, 1.0)
    return RandomOperations(kinds_BO, strengths_BO, _erased(augmentation.erase, key, ids_B, side))


def _erased(probability: float, key: int, ids_B: Integers, side: int) -> Integers:
    whether_B, area_B, ratio_B, top_B, left_B = (uniform(key, ids_B, _ERASE + draw) for draw in range(5))
    area_B = side**2 * (AREA[0] + (AREA[1] - AREA[0]) * area_B)
    ratio_B = np.exp(np.log(RATIO[0]) + (np.log(RATIO[1]) - np.log(RATIO[0])) * ratio_B)
    height_B = np.clip(np.rint(np.sqrt(area_B / ratio_B)).astype(np.int64), 1, side)
    width_B = np.clip(np.rint(np.sqrt(area_B * ratio_B)).astype(np.int64), 1, side)
    top_B = (top_B * (side - height_B + 1)).astype(np.int64)
    left_B = (left_B * (side - width_B + 1)).astype(np.int64)
    boxes_B4 = np.stack([top_B, left_B, height_B, width_B], axis=1)
    boxes_B4[whether_B >= probability] = 0
    return boxes_B4


def apply_random_operations(augmentation: Augmentation | None, key: int, ids_B: Integers, images_BCHW: Any) -> None:
    """Changes square uint8 images in place."""
    if augmentation is None or (augmentation.operations == 0 and augmentation.erase == 0.0):
        return
    chosen = random_operations(augmentation, key, ids_B, images_BCHW.shape[-1])
    alter(images_BCHW, chosen.kinds_BO, chosen.strengths_BO, chosen.boxes_B4)
