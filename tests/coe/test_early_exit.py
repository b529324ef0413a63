"""Curve, calibration and calibration error against loops over the images and searches over all thresholds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.coe import early_exit
from coe_dist.coe.early_exit import NO_EXIT, calibrate_threshold, curve, ece

DELEGATOR_MACS = 40

# few distinct confidences, so that ties abound; 1.0 occurs when a softmax saturates
image = st.tuples(
    st.sampled_from([0.1, 0.3, 0.5, 0.5000001, 0.7, 0.9, 1.0]) | st.floats(0.01, 1.0),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 100, 240, 1000]),
)
images = st.lists(image, min_size=1, max_size=40)


def outcome(rows: list[tuple[float, bool, bool, int]], threshold: float) -> tuple[float, float, float]:
    """(exit rate, average MACs, top-1), image by image."""
    exited, spent, correct = 0, 0, 0
    for confidence, delegator_correct, expert_correct, macs in rows:
        if confidence >= threshold:
            exited, correct = exited + 1, correct + delegator_correct
        else:
            spent, correct = spent + macs, correct + expert_correct
    return exited / len(rows), DELEGATOR_MACS + spent / len(rows), correct / len(rows)


@given(images, st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.9, 1.0, 2.0]) | st.floats(0, 2), max_size=8) | st.none())
def test_curve_equals_a_loop(rows: list[tuple[float, bool, bool, int]], thresholds: list[float] | None) -> None:
    points = curve(*zip(*rows, strict=True), DELEGATOR_MACS, thresholds)
    asked = sorted(early_exit.DEFAULT_THRESHOLDS if thresholds is None else thresholds)
    assert [point.threshold for point in points] == asked
    for point in points:
        assert (point.exit_rate, point.average_macs, point.top1) == outcome(rows, point.threshold)


def test_the_default_grid_goes_from_all_exit_to_none() -> None:
    grid = early_exit.DEFAULT_THRESHOLDS
    assert list(grid) == sorted(set(grid))
    assert len(grid) <= 60
    points = curve([0.0, 1.0], [1, 0], [0, 1], [100, 100], DELEGATOR_MACS)
    assert (points[0].exit_rate, points[0].average_macs) == (1.0, 40.0)
    assert (points[-1].exit_rate, points[-1].average_macs) == (0.0, 140.0)
    assert json.loads(json.dumps(points)) == [list(point) for point in points]


@given(images, st.floats(40, 1200) | st.sampled_from([40.0, 140.0, 160.0, 280.0]))
def test_calibration_equals_an_exhaustive_search(rows: list[tuple[float, bool, bool, int]], budget: float) -> None:
    confidences, _, _, macs = zip(*rows, strict=True)
    threshold = calibrate_threshold(confidences, macs, DELEGATOR_MACS, budget)
    # between two neighbouring confidences nothing changes, so these candidates stand for every threshold
    candidates = {*confidences, *(float(np.nextafter(value, 2)) for value in confidences), NO_EXIT}
    allowed = [value for value in candidates if outcome(rows, value)[1] <= budget]
    if NO_EXIT in allowed:
        assert threshold == NO_EXIT
    else:
        assert threshold == max(allowed)


def test_equal_confidences_exit_together() -> None:
    # the budget would pay two of the four experts' runs, but the three images at 0.5 cannot be parted
    assert calibrate_threshold([0.5, 0.5, 0.4, 0.5], [100] * 4, 40, 90) == 0.5
    assert curve([0.5, 0.5, 0.4, 0.5], [0] * 4, [1] * 4, [100] * 4, 40, [0.5])[0].average_macs == 65


def test_float32_confidences_decide_alike_in_calibration_and_inference() -> None:
    logits_NC = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)) * 3
    confidence_N = early_exit.confidence(logits_NC)
    macs_N = torch.full((500,), 240)
    threshold = calibrate_threshold(confidence_N, macs_N, 40, 40 + 240 * 0.6)
    exit_rate = float(early_exit.exits(confidence_N, threshold).double().mean())
    assert exit_rate == curve(confidence_N, macs_N > 0, macs_N > 0, macs_N, 40, [threshold])[0].exit_rate
    assert exit_rate == pytest.approx(0.4, abs=0.01)
    # the float32 nearest to 0.9 lies below it: compared in float64 such an image has not reached 0.9, in both places
    assert not early_exit.exits(torch.tensor([0.9]), 0.9).any()
    assert curve(torch.tensor([0.9]), [1], [1], [240], 40, [0.9])[0].exit_rate == 0.0
    assert not early_exit.exits(torch.ones(3), None).any()


def test_confidence_is_the_largest_probability_also_from_bfloat16() -> None:
    logits_NC = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [-1e4, 1e4]])
    torch.testing.assert_close(early_exit.confidence(logits_NC), torch.tensor([0.5, 0.75, 1.0]))
    assert early_exit.confidence(logits_NC.bfloat16()).dtype == torch.float32
    assert early_exit.confidence(logits_NC.double()).dtype == torch.float64


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


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: curve([], [], [], [], 40), "confidence_N"),
        (lambda: curve([0.5], [1], [1, 1], [100], 40), "expert_correct_N"),
        (lambda: curve([float("nan")], [1], [1], [100], 40), "confidence_N"),
        (lambda: calibrate_threshold([0.5], [100, 100], 40, 90), "expert_macs_N"),
        (lambda: calibrate_threshold([0.5], [100], 40, 39.9), "budget"),
        (lambda: calibrate_threshold([0.5], [100], 40, float("nan")), "budget"),
        (lambda: ece([0.5], [1], bins=0), "bins"),
    ],
)
def test_refused(call: object, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        call()
