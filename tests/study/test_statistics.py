"""Statistics of studies on cases worked out by hand, and against scipy's isotonic regression."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from coe_dist.study.statistics import (
    Needed,
    bootstrap_saving,
    macs_for,
    non_decreasing,
    paired_difference,
    pooled_deviation,
    spread,
)


def test_mean_and_sample_deviation() -> None:
    assert spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert spread([0.5]) == (0.5, None, 1)


def test_differences_are_taken_seed_by_seed() -> None:
    ours, baseline = {0: 5.0, 1: 9.0, 7: 100.0}, {1: 6.0, 0: 4.0, 3: 0.0}
    assert paired_difference(ours, baseline) == (2.0, pytest.approx(math.sqrt(2)), 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_pooled_deviation_weighs_by_degrees_of_freedom() -> None:
    # variances 1 (2 degrees of freedom) and 8 (1): (2 * 1 + 1 * 8) / 3; the single value has none
    assert pooled_deviation([[1.0, 2.0, 3.0], [0.0, 4.0], [9.0]]) == pytest.approx(math.sqrt(10 / 3))
    assert pooled_deviation([[1.0], []]) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ([1.0, 3.0, 2.0, 4.0], [1.0, 2.5, 2.5, 4.0]),
        ([3.0, 2.0, 1.0], [2.0, 2.0, 2.0]),
        ([2.0, 6.0, 1.0, 1.0], [2.0, 8 / 3, 8 / 3, 8 / 3]),
    ],
)
def test_isotonic_by_hand(values: list[float], expected: list[float]) -> None:
    assert non_decreasing(values) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_isotonic_is_scipys(values: list[float]) -> None:
    assert non_decreasing(values) == pytest.approx(isotonic_regression(values).x.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("top1", "wanted", "needed"),
    [
        ([0.5, 0.7, 0.8], 0.7, Needed(100.0, "exact")),
        ([0.5, 0.7, 0.8], 0.75, Needed(math.sqrt(100.0 * 10_000.0), "exact")),  # half way over log MACs
        ([0.5, 0.7, 0.8], 0.55, Needed(10 * 10**0.25, "exact")),
        ([0.5, 0.5, 0.8], 0.5, Needed(10.0, "exact")),  # the cheapest that reaches it
        ([0.5, 0.8, 0.6], 0.6, Needed(10 * 10**0.5, "exact")),  # made non-decreasing: 0.5, 0.7, 0.7
        ([0.5, 0.7, 0.8], 0.81, Needed(10_000.0, "at least")),
        ([0.5, 0.7, 0.8], 0.49, Needed(10.0, "at most")),
    ],
)
def test_macs_for_an_accuracy(top1: list[float], wanted: float, needed: Needed) -> None:
    found = macs_for([10.0, 100.0, 10_000.0], top1, wanted)
    assert found.bound == needed.bound
    assert found.macs == pytest.approx(needed.macs)


def test_a_saving_without_spread_has_no_width() -> None:
    singles = [(100.0, [0.5, 0.5]), (10_000.0, [0.7, 0.7])]
    assert bootstrap_saving(singles, [(250.0, 0.6)] * 2, draws=200) == pytest.approx((4.0, 4.0, 4.0))


def test_the_interval_is_that_of_all_draws() -> None:
    """Two seeds: means of two draws are one seed, their mean, or the other, with 1/4, 1/2 and 1/4. On a curve that
    gains 0.1 per factor of 10 those are 100, 1000 and 10000 MACs."""
    singles = [(100.0, [0.1]), (10_000.0, [0.3])]
    system = [(100.0, 0.1), (100.0, 0.3)]
    interval = bootstrap_saving(singles, system, draws=2000)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((10.0, 1.0, 100.0))
    assert interval == bootstrap_saving(singles, system, draws=2000)


def test_seeds_of_the_single_networks_are_drawn_too() -> None:
    singles = [(1.0, [0.0]), (100.0, [0.5, 0.9])]  # the mean of a draw is 0.5, 0.7 or 0.9
    interval = bootstrap_saving(singles, [(1.0, 0.35)], draws=2000)
    assert interval.mean == pytest.approx(10.0)
    assert (interval.low, interval.high) == pytest.approx((100 ** (0.35 / 0.9), 100**0.7))
