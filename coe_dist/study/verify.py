"""Trains finished points of a study again, to see whether the committed figures come out again."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from coe_dist.study.comparison import accuracy_of
from coe_dist.study.frontier import Point
from coe_dist.study.results import Results, Row
from coe_dist.study.statistics import pooled_deviation
from coe_dist.study.trainings import Training

ALLOWED_WITHOUT_SPREAD = 0.01  # of top-1, where no point of the curve has two seeds


def drawn(trainings: Sequence[Training], results: Results, *, generator: random.Random) -> list[Training]:
    """One random finished training of each curve that has one."""
    by_curve: dict[str, list[Training]] = {}
    for training in trainings:
        if results.row_of(training.digest, test=training.test) is not None:
            by_curve.setdefault(training.curve, []).append(training)
    return [generator.choice(finished) for finished in by_curve.values()]


def repeated(training: Training) -> Training:
    """The same training in a run folder of its own, unknown to MLflow."""
    config = training.config
    again = {"name": f"again.{config.name}", "tracking": config.tracking.model_copy(update={"enabled": False})}
    return replace(training, config=config.model_copy(update=again))


def allowed_difference(curve: str, points: Mapping[str, Point]) -> float:
    """Of top-1 without early exit: 3 standard deviations of the difference of two trainings that differ only in their
    seed, pooled over the curve's points (our own rule).

    On one machine with one version of the libraries a training on one CPU thread comes out bit-equal. Another processor
    or library rounds sums differently, after some hundred steps as different as another seed.
    """
    groups = [[accuracy_of(row) for row in point.rows.values()] for point in points.values() if point.curve == curve]
    deviation = pooled_deviation(groups)
    return ALLOWED_WITHOUT_SPREAD if deviation is None else 3 * math.sqrt(2) * deviation


def compared(before: Row, after: Row, allowed: float) -> dict[str, Any]:
    """{curve, point, seed, before, after, equal, allowed, verified}; equal: every figure but time and revision."""
    ours, theirs = (_figures(row) for row in (before, after))
    equal = ours.keys() == theirs.keys() and all(math.isclose(ours[n], theirs[n], rel_tol=1e-9) for n in ours)
    one, other = accuracy_of(before), accuracy_of(after)
    return {
        "curve": before.curve,
        "point": before.point,
        "seed": before.seed,
        "before": one,
        "after": other,
        "equal": equal,
        "allowed": allowed,
        "verified": equal or abs(one - other) <= allowed,
    }


def sentence(answer: Mapping[str, Any]) -> str:
    """What `compared` found, in a line."""
    point = f"{answer['curve']}/{answer['point']} seed {answer['seed']}"
    if answer["equal"]:
        return f"{point}: {100 * answer['after']:.2f}, every figure as before"
    verdict = "within" if answer["verified"] else "MORE THAN"
    return (
        f"{point}: {100 * answer['after']:.2f} in place of {100 * answer['before']:.2f}, {verdict} the "
        f"{100 * answer['allowed']:.2f} that another processor or library may make"
    )


def _figures(row: Row) -> dict[str, float]:
    content = row.model_dump(exclude={"seconds", "cpu_seconds", "seed"})
    return {name: value for name, value in content.items() if isinstance(value, int | float)}
