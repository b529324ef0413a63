import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.config import AugmentationConfig
from coe_dist.data.augment import RATIO, SCALE, augmentation_key, placements, random_crops, uniform
from coe_dist.preparation import centre_crops

IDS = np.arange(4000)
KEY = augmentation_key(0, 0)


def test_uniform_is_uniform_and_draws_are_independent() -> None:
    draws = np.stack([uniform(KEY, IDS, draw) for draw in range(64)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(1) - 0.5).max() < 0.02
    assert np.abs(draws.var(1) - 1 / 12).max() < 0.005
    correlations = np.corrcoef(draws) - np.eye(64)
    assert np.abs(correlations).max() < 0.08


def test_parameters_belong_to_the_sample_not_to_the_batch() -> None:
    augmentation = AugmentationConfig(shift=3)
    whole = placements(augmentation, KEY, IDS)
    some = np.array([7, 3999, 12, 7])
    part = placements(augmentation, KEY, some)
    assert all(np.array_equal(a[some], b) for a, b in zip(whole, part, strict=True))
    sizes = np.full(len(IDS), 300), np.full(len(IDS), 200)
    crops = random_crops(KEY, IDS, *sizes)
    assert np.array_equal(crops[some], random_crops(KEY, some, sizes[0][:4], sizes[1][:4]))


def test_epochs_and_seeds_change_the_parameters() -> None:
    keys = [augmentation_key(seed, epoch) for seed in range(3) for epoch in range(3)]
    shifts = {placements(AugmentationConfig(), key, IDS).down_B.tobytes() for key in keys}
    assert len(shifts) == 9


def test_shifts_take_every_value_equally_and_half_are_mirrored() -> None:
    place = placements(AugmentationConfig(shift=2), KEY, IDS)
    for shift_B in (place.down_B, place.right_B):
        values, counts = np.unique(shift_B, return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert np.abs(counts - 800).max() < 150
    assert abs(place.flip_B.mean() - 0.5) < 0.04


def test_nothing_happens_when_switched_off() -> None:
    for augmentation in (None, AugmentationConfig(flip=False, shift=0)):
        place = placements(augmentation, KEY, IDS)
        assert not any(part.any() for part in place)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**62))
def test_crops_lie_inside(height: int, width: int, key: int) -> None:
    ids = np.arange(50)
    heights, widths = np.full(50, height), np.full(50, width)
    for crops in (random_crops(key, ids, heights, widths), centre_crops(heights, widths)):
        top, left, crop_height, crop_width = crops.T
        assert (crops[:, 2:] >= 1).all()
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + crop_height <= height).all()
        assert (left + crop_width <= width).all()


def test_random_crops_have_the_areas_and_ratios_asked_for() -> None:
    crops = random_crops(KEY, IDS, np.full(4000, 500), np.full(4000, 400))
    area = crops[:, 2] * crops[:, 3] / (500 * 400)
    ratio = crops[:, 3] / crops[:, 2]
    assert area.min() > SCALE[0] - 0.01
    assert area.max() <= 1
    assert ratio.min() > RATIO[0] - 0.01
    assert ratio.max() < RATIO[1] + 0.01
    assert area.std() > 0.1
    assert len(np.unique(crops, axis=0)) > 3900


def test_a_strip_gets_the_largest_centred_crop() -> None:
    crops = random_crops(KEY, np.arange(2), np.array([10, 1000]), np.array([1000, 10]))
    assert crops.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10]]


def test_centre_crop_is_the_usual_one() -> None:
    assert centre_crops(np.array([256, 300]), np.array([256, 256])).tolist() == [[16, 16, 224, 224], [38, 16, 224, 224]]
