"""The saving in MACs at equal accuracy: collaborations against single networks of one family.

Every collaboration gets one exit threshold, common to its seeds, and one collaboration is reported as the saving; both
are chosen on validation, by the saving there; a baseline (schema.FrontierConfig) is never the one. The figures reported
for them are the test split's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coe_dist.study.results import CurveRow, Results, Row
from coe_dist.study.schema import StudyConfig
from coe_dist.study.statistics import Interval, bootstrap_saving, macs_for, spread
from coe_dist.study.trainings import Training


@dataclass(frozen=True)
class Point:
    """The finished trainings of one point, by seed."""

    curve: str
    point: str
    rows: Mapping[int, Row]
    thresholds: Mapping[int, Sequence[CurveRow]]  # none for single networks

    @property
    def macs(self) -> float:
        return statistics.fmean(row.macs for row in self.rows.values())


def finished_points(trainings: Sequence[Training], results: Results) -> dict[str, Point]:
    """By label, the points of which at least one seed is finished, in the study's order."""
    rows: dict[str, dict[int, Row]] = {}
    for training in trainings:
        row = results.row_of(training.digest, test=training.test)
        if row is not None:
            rows.setdefault(training.label, {})[training.seed] = row
    return {
        label: Point(
            label.split("/")[0],
            label.split("/")[1],
            rows[label],
            {seed: results.curve_of(row.config) for seed, row in rows[label].items() if row.experts > 1},
        )
        for label in dict.fromkeys(training.label for training in trainings)
        if label in rows
    }


def frontier(study: StudyConfig, trainings: Sequence[Training], results: Results) -> dict[str, Any] | None:
    """What docs/results/NAME.json holds; None while there are not single networks of two sizes and a collaboration.

    {study, complete, seeds (those of every point used), macs_saving: {mean, low, high, curve, point, threshold, macs,
    top1, single_macs, bound}, single: [point ...], collaborations: [point ...]}, each point with its saving and figures
    of the test split (top1: {mean, sd, seeds}). bound: whether single_macs is the end of the single networks' curve.
    """
    settings = study.frontier
    assert settings is not None
    points = finished_points(trainings, results)
    singles = _best_of_each_size([p for p in points.values() if p.curve in settings.single])
    systems = [p for p in points.values() if p.curve in (*settings.collaborations, *settings.baselines)]
    if len(singles) < 2 or not any(p.curve in settings.collaborations for p in systems):
        return None
    macs = [single.macs for single in singles]
    validation, test = ([_top1s(s, split) for s in singles] for split in ("val", "test"))
    # a point with thresholds that all its seeds have; those of one study share early_exit.DEFAULT_THRESHOLDS
    found = []
    for system in systems:
        threshold, expected = _chosen_threshold(system, macs, [statistics.fmean(one) for one in validation])
        chosen = _at(system, threshold, lambda line: (line.test_macs or 0.0, line.test_top1 or 0.0))
        saving = bootstrap_saving(list(zip(macs, test, strict=True)), chosen, draws=settings.draws)
        found.append(_described(system, threshold, expected, chosen, saving, macs, test))
    eligible = [point for point in found if point["curve"] in settings.collaborations]
    best = max(eligible, key=lambda point: float(point["validation_saving"]))
    used = [*singles, *systems]
    curves = (*settings.single, *settings.collaborations, *settings.baselines)
    wanted = {t.label for t in trainings if t.curve in curves}
    seeds = sorted(set.intersection(*(set(point.rows) for point in used)))
    whole = all(results.row_of(t.digest, test=True) is not None for t in trainings if t.label in wanted)
    names = ("curve", "point", "threshold", "macs", "single_macs", "bound")
    return {
        "study": study.name,
        "complete": whole,
        "seeds": seeds,
        "macs_saving": {**best["saving"], **{name: best[name] for name in names}, "top1": best["top1"]["mean"]},
        "single": [
            {"curve": s.curve, "point": s.point, "macs": s.macs, "top1": spread(top1)._asdict()}
            for s, top1 in zip(singles, test, strict=True)
        ],
        "collaborations": found,
    }


def _best_of_each_size(singles: Sequence[Point]) -> list[Point]:
    """By rising MACs; of several recipes for a network, the one with the best mean top-1 on validation, of those with
    the most finished seeds; of equal ones the first in the study. (The bootstrap does not choose again.)"""
    best: dict[float, Point] = {}
    for point in singles:
        best[point.macs] = max(best.get(point.macs, point), point, key=_merit)
    return [best[macs] for macs in sorted(best)]


def _merit(point: Point) -> tuple[int, float]:
    return len(point.rows), statistics.fmean(_top1s(point, "val"))


def _top1s(point: Point, split: str) -> list[float]:
    return [float(getattr(row, f"{split}_top1")) for _, row in sorted(point.rows.items())]


def _at(
    point: Point, threshold: float, figures: Callable[[CurveRow], tuple[float, float]]
) -> list[tuple[float, float]]:
    """(average MACs, top-1) of each seed at a threshold."""
    return [
        figures(next(line for line in lines if line.threshold == threshold))
        for _, lines in sorted(point.thresholds.items())
    ]


def _chosen_threshold(point: Point, macs: Sequence[float], top1: Sequence[float]) -> tuple[float, float]:
    """The threshold of the largest saving on validation by mean MACs and top-1 over seeds, and that saving."""
    savings = []
    for line in next(iter(point.thresholds.values())):
        pairs = _at(point, line.threshold, lambda other: (other.val_macs, other.val_top1))
        average, reached = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        needed = macs_for(macs, top1, reached)
        # below the curve a saving would be a guess: such thresholds stand behind all others
        savings.append((needed.bound != "at most", needed.macs / average, line.threshold))
    _, saving, threshold = max(savings)
    return threshold, saving


def _described(
    point: Point,
    threshold: float,
    expected: float,
    chosen: Sequence[tuple[float, float]],
    saving: Interval,
    macs: Sequence[float],
    singles: Sequence[Sequence[float]],
) -> dict[str, Any]:
    averages, top1s = zip(*chosen, strict=True)
    top1 = spread(top1s)
    needed = macs_for(macs, [statistics.fmean(one) for one in singles], top1.mean)
    rows = list(point.rows.values())
    return {
        "curve": point.curve,
        "point": point.point,
        "experts": rows[0].experts,
        "threshold": threshold,
        "macs": statistics.fmean(averages),
        "top1": top1._asdict(),
        "full_macs": statistics.fmean(row.full_macs for row in rows),
        "full_top1": spread([float(row.full_test_top1 or 0.0) for row in rows])._asdict(),
        "single_macs": needed.macs,
        "bound": needed.bound,
        "saving": saving._asdict(),
        "validation_saving": expected,
    }
