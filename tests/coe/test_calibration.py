"""Calibration error against a loop over bins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.coe.calibration import ece


@given(
    st.lists(st.tuples(st.floats(0, 1) | st.just(1 / 3), st.booleans()), min_size=1, max_size=30), st.integers(1, 15)
)
def test_ece_equals_a_loop_over_bins(rows: list[tuple[float, bool]], bins: int) -> None:
    expected = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [row for row in rows if low < row[0] <= high or (index == 0 and row[0] == 0)]
        if inside:
            confidence, accuracy = (float(np.mean([row[column] for row in inside])) for column in (0, 1))
            expected += len(inside) / len(rows) * abs(accuracy - confidence)
    assert ece(*zip(*rows, strict=True), bins=bins) == pytest.approx(expected, abs=1e-9)


def test_ece_of_known_cases() -> None:
    assert ece([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0.0)
    assert ece([0.9] * 4, [0, 0, 0, 0]) == pytest.approx(0.9)
    # a system that is right as often as it says, image by image of two kinds
    assert ece([0.5, 0.5, 1.0], [1, 0, 1]) == pytest.approx(0.0)
    # Guo et al. weigh bins by their images: (3 * |1/3 - 0.6| + 1 * |1 - 0.9|) / 4
    assert ece([0.6, 0.6, 0.6, 0.9], [1, 0, 0, 1]) == pytest.approx((3 * (0.6 - 1 / 3) + 0.1) / 4)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"^bins: 0 is not allowed"):
        ece([0.5], [1], bins=0)
    with pytest.raises(ValueError, match=r"^correct_N: "):
        ece([0.5, 0.5], [1])
    with pytest.raises(ValueError, match=r"^confidence_N: NaN"):
        ece([float("nan")], [1])
