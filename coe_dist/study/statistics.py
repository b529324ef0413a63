"""Means and spreads over seeds, the single networks' curve, and the saving in MACs on it. Pure functions.

The saving of a system of m average MACs and top-1 a is M / m, where M are the MACs at which single networks reach a
(our own rule): their mean top-1s over seeds, made non-decreasing in MACs by isotonic regression, joined by straight
lines over log MACs. Nothing is extrapolated: outside the curve M is its end, and `bound` says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Bound = Literal["exact", "at least", "at most"]


class Spread(NamedTuple):
    """Mean, sample standard deviation (none for one value) and number of values."""

    mean: float
    sd: float | None
    seeds: int


class Needed(NamedTuple):
    """MACs that a single network needs for an accuracy, and whether the curve ends there."""

    macs: float
    bound: Bound


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Spread | None:
    """Of what both have, seed by seed; None where they share no seed."""
    seeds = sorted(ours.keys() & baseline.keys())
    return spread([ours[seed] - baseline[seed] for seed in seeds]) if seeds else None


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Square root of the pooled variance of groups; None where no group has two values."""
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    if not freedom:
        return None
    return math.sqrt(sum(statistics.variance(g) * (len(g) - 1) for g in groups if len(g) > 1) / freedom)


def non_decreasing(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence of least squared distance to `values` (pool adjacent violators, equal weights)."""
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, m), (second, n) = blocks[-2:]
            blocks[-2:] = [((m * first + n * second) / (m + n), m + n)]
    return [mean for mean, length in blocks for _ in range(length)]


def macs_for(macs: Sequence[float], top1: Sequence[float], wanted: float) -> Needed:
    """The fewest MACs at which the curve (macs rising, top1 in the same order) reaches `wanted`."""
    rising = non_decreasing(top1)
    if wanted > rising[-1]:
        return Needed(macs[-1], "at least")
    if wanted < rising[0]:
        return Needed(macs[0], "at most")
    after = next(i for i, value in enumerate(rising) if value >= wanted)
    if rising[after] == wanted:
        return Needed(macs[after], "exact")
    share = (wanted - rising[after - 1]) / (rising[after] - rising[after - 1])
    low, high = math.log(macs[after - 1]), math.log(macs[after])
    return Needed(math.exp(low + share * (high - low)), "exact")


def bootstrap_saving(
    singles: Sequence[tuple[float, Sequence[float]]],
    system: Sequence[tuple[float, float]],
    *,
    draws: int,
    seed: int = 0,
) -> Interval:
    """The saving of mean MACs and mean top-1, with the 95% percentile interval of a bootstrap over seeds.

    singles: by rising MACs, (MACs, top-1 of each seed). system: (average MACs, top-1) of each seed. Every draw takes as
    many seeds as there are, with replacement, anew for each single network and for the system: all are trainings of
    their own. Few seeds make such intervals too narrow (with 3 by about a fifth).
    """
    generator = np.random.default_rng(seed)
    macs = [one for one, _ in singles]

    def means(values: Sequence[float] | Sequence[tuple[float, float]]) -> np.ndarray:
        array = np.asarray(values, dtype=np.float64)
        chosen = generator.integers(len(array), size=(draws, len(array)))
        return np.asarray(array[chosen].mean(axis=1))

    curves = np.stack([means(top1) for _, top1 in singles], axis=1)
    systems = means(system)
    savings = [
        macs_for(macs, curve.tolist(), float(top1)).macs / average
        for curve, (average, top1) in zip(curves, systems, strict=True)
    ]
    middle = np.mean(np.asarray(system, dtype=np.float64), axis=0)
    whole = macs_for(macs, [statistics.fmean(top1) for _, top1 in singles], float(middle[1]))
    low, high = np.quantile(savings, [0.025, 0.975], method="inverted_cdf")
    return Interval(whole.macs / float(middle[0]), float(low), float(high))
