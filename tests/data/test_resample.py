"""The kernel against Pillow's filter, over sizes, crops, shifts and mirrors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coe_dist.data.resample import resample


def image_of(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def by_pillow(image_HW3: np.ndarray, crop: tuple[int, int, int, int], side: tuple[int, int]) -> np.ndarray:
    top, left, height, width = crop
    part = Image.fromarray(image_HW3[top : top + height, left : left + width])
    resized = part.resize(side[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1).astype(int)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_crop_and_size_is_pillows_to_within_one_level(data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, 90)) for _ in range(2))
    crop_height, crop_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - crop_height)), data.draw(st.integers(0, width - crop_width))
    side = (data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50)))
    image, crop = image_of(height, width, seed=height), (top, left, crop_height, crop_width)
    found = np.empty((3, *side), np.uint8)
    resample(image, *crop, 0, 0, False, found)
    assert np.abs(found - by_pillow(image, crop, side)).max() <= 1


def test_a_crop_of_the_size_asked_for_is_exact() -> None:
    image, found = image_of(40, 50), np.empty((3, 19, 19), np.uint8)
    resample(image, 7, 11, 19, 19, 0, 0, False, found)
    assert np.array_equal(found.transpose(1, 2, 0), image[7:26, 11:30])


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-5, 4), (-8, 0), (0, 17), (16, 0), (40, -40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_shift_and_mirror_equal_numpys(channels: int, shift: tuple[int, int], mirrored: bool) -> None:
    image, side = image_of(60, 44), 17  # two blocks of eight rows and one over
    plain = np.empty((3, side, side), np.uint8)
    resample(image, 2, 3, 50, 40, 0, 0, False, plain)
    padded = np.pad(plain, ((0, 0), (50, 50), (50, 50)))
    down, right = shift
    expected = padded[:channels, 50 - down : 50 - down + side, 50 - right : 50 - right + side]
    found = np.full((channels, side, side), 255, np.uint8)
    resample(image, 2, 3, 50, 40, down, right, mirrored, found)
    assert np.array_equal(found, expected[:, :, ::-1] if mirrored else expected)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 9_000)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    image, found = image_of(*shape), np.empty((3, 32, 32), np.uint8)
    resample(image, 0, 0, *shape, 0, 0, False, found)
    assert np.abs(found - by_pillow(image, (0, 0, *shape), (32, 32))).max() <= 1


def test_a_constant_image_stays_constant() -> None:
    for value in (0, 1, 254, 255):
        image, found = np.full((91, 67, 3), value, np.uint8), np.empty((3, 23, 23), np.uint8)
        resample(image, 0, 0, 91, 67, 0, 0, False, found)
        assert (found == value).all()
