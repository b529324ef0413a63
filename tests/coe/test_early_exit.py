"""Curve and choices of a threshold against loops over the images and searches over all thresholds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.coe import early_exit
from coe_dist.coe.early_exit import NO_EXIT, affordable_threshold, calibrate_threshold, cheapest_threshold, curve

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


@given(images, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1))
def test_the_cheapest_threshold_equals_an_exhaustive_search(
    rows: list[tuple[float, bool, bool, int]], accuracy: float
) -> None:
    # between two neighbouring confidences nothing changes, so these candidates stand for every threshold
    candidates = [0.0, *sorted(float(np.nextafter(row[0], 2)) for row in rows)]
    outcomes = [outcome(rows, value) for value in candidates]
    best = max(top1 for _, _, top1 in outcomes)
    if accuracy > best:
        with pytest.raises(ValueError, match=rf"^accuracy: {accuracy} .* reaches is {best}$"):
            cheapest_threshold(*zip(*rows, strict=True), DELEGATOR_MACS, accuracy)
        return
    threshold = cheapest_threshold(*zip(*rows, strict=True), DELEGATOR_MACS, accuracy)
    _, macs, top1 = outcome(rows, threshold)
    assert top1 >= accuracy
    assert macs == min(macs for _, macs, top1 in outcomes if top1 >= accuracy)
    assert threshold in {*(row[0] for row in rows), NO_EXIT}


def test_more_experts_are_not_always_better() -> None:
    # the delegator alone is right three times in four, the expert twice: accuracy falls with more MACs
    rows = ([0.9, 0.8, 0.7, 0.6], [1, 1, 1, 0], [0, 1, 0, 1], [100] * 4)
    assert cheapest_threshold(*rows, 40, 0.75) == 0.6
    assert cheapest_threshold(*rows, 40, 1.0) == 0.7
    with pytest.raises(ValueError, match=r"^accuracy: nan "):
        cheapest_threshold(*rows, 40, float("nan"))


@given(images, st.floats(40, 1200) | st.sampled_from([40.0, 140.0, 160.0]))
def test_a_curve_over_all_confidences_affords_what_calibration_does(
    rows: list[tuple[float, bool, bool, int]], budget: float
) -> None:
    confidences, early, late, macs = zip(*rows, strict=True)
    points = curve(confidences, early, late, macs, DELEGATOR_MACS, [*confidences, NO_EXIT])
    exact = calibrate_threshold(confidences, macs, DELEGATOR_MACS, budget)
    assert outcome(rows, affordable_threshold(points, budget))[1] == outcome(rows, exact)[1]
    with pytest.raises(ValueError, match=r"^budget: 39 MACs is not allowed; the cheapest threshold needs"):
        affordable_threshold(points, 39)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: curve([], [], [], [], 40), "confidence_N"),
        (lambda: curve([0.5], [1], [1, 1], [100], 40), "expert_correct_N"),
        (lambda: curve([float("nan")], [1], [1], [100], 40), "confidence_N"),
        (lambda: calibrate_threshold([0.5], [100, 100], 40, 90), "expert_macs_N"),
        (lambda: calibrate_threshold([0.5], [100], 40, 39.9), "budget"),
        (lambda: calibrate_threshold([0.5], [100], 40, float("nan")), "budget"),
        (lambda: cheapest_threshold([0.5], [1], [1, 0], [100], 40, 0.5), "expert_correct_N"),
    ],
)
def test_refused(call: object, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        call()
