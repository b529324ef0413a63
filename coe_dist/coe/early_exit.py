"""Early termination: an image whose rough prediction is confident enough is answered by the delegator alone.

That a rough prediction may end the computation is the paper's; confidence, threshold and calibration are our own rules.
An image exits when its confidence is at least the threshold, so images of equal confidence exit together or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

NO_EXIT = 2.0
"""A threshold that no confidence reaches (a finite number, so that it can be written as JSON)."""

DEFAULT_THRESHOLDS: tuple[float, ...] = (
    0.0,
    *(step / 40 for step in range(4, 40)),  # 0.1, 0.125, ..., 0.975
    *(0.98, 0.985, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0, NO_EXIT),
)
"""The curve's grid, denser near 1 where trained networks' confidences lie; fixed, so that curves compare between
runs."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class CurvePoint(NamedTuple):
    """One threshold's outcome: fraction of images that exit, average MACs and top-1 accuracy (0 to 1)."""

    threshold: float
    exit_rate: float
    average_macs: float
    top1: float


def probabilities(logits_NC: torch.Tensor) -> torch.Tensor:
    """Softmax over classes, [N,C], in at least float32 (bfloat16 would blur confidences near 1)."""
    return logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32)).softmax(dim=1)


def confidence(logits_NC: torch.Tensor) -> torch.Tensor:
    """The largest class probability of each row, [N], float32 or float64."""
    return probabilities(logits_NC).amax(dim=1)


def exits(confidence_N: torch.Tensor, threshold: float | None) -> torch.Tensor:
    """bool [N]: which images, by their confidence [N] from 0 to 1, end at the delegator; none for threshold None.

    Compared in float64, like calibration does: a float32 confidence against 0.9 must not depend on who compares.
    """
    return confidence_N.double() >= (NO_EXIT if threshold is None else threshold)


def curve(
    confidence_N: npt.ArrayLike,
    delegator_correct_N: npt.ArrayLike,
    expert_correct_N: npt.ArrayLike,
    expert_macs_N: npt.ArrayLike,
    delegator_macs: int,
    thresholds: Sequence[float] | None = None,
) -> list[CurvePoint]:
    """Accuracy against average MACs, exact on the given images, sorted by rising threshold.

    expert_correct_N and expert_macs_N are those of the image's selected expert (of the answer it would get without
    early exit), for every image. Thresholds: DEFAULT_THRESHOLDS unless given. Raises ValueError for no images,
    unequal lengths or confidences that are not numbers.
    """
    confidences, macs = columns(confidence_N, expert_macs_N)
    _, early = columns(confidence_N, delegator_correct_N, "delegator_correct_N")
    _, late = columns(confidence_N, expert_correct_N, "expert_correct_N")
    order = np.argsort(confidences, kind="stable")
    ordered = confidences[order]
    # prefix sums: the rows before position p do not exit, the rows from p on do
    macs_before, late_before, early_before = (_prefix_sums(column[order]) for column in (macs, late, early))
    points = []
    for threshold in sorted(DEFAULT_THRESHOLDS if thresholds is None else thresholds):
        stay = int(np.searchsorted(ordered, threshold, side="left"))
        correct = int(late_before[stay] + early_before[-1] - early_before[stay])
        average = delegator_macs + int(macs_before[stay]) / len(ordered)
        points.append(
            CurvePoint(float(threshold), (len(ordered) - stay) / len(ordered), average, correct / len(ordered))
        )
    return points


def calibrate_threshold(
    confidence_N: npt.ArrayLike, expert_macs_N: npt.ArrayLike, delegator_macs: int, budget: float
) -> float:
    """The largest threshold (fewest early exits) whose average MACs on these images are within `budget`.

    Average MACs jump just above each confidence that occurs, so the answer is one of those confidences, or NO_EXIT when
    every image may go to its expert. Images of equal confidence exit together, hence the budget may not be used up.
    Raises ValueError when the budget does not pay the delegator, and as `curve` does for bad columns.
    """
    if not budget >= delegator_macs:
        raise ValueError(f"budget: {budget} MACs is not allowed; the delegator alone needs {delegator_macs}")
    confidences, macs = columns(confidence_N, expert_macs_N)
    order = np.argsort(confidences, kind="stable")
    values, first_N = np.unique(confidences[order], return_index=True)
    paid_before = _prefix_sums(macs[order])
    # threshold values[j] lets exactly the rows before its first occurrence go on
    average = delegator_macs + np.append(paid_before[first_N], paid_before[-1]) / len(confidences)
    affordable = int(np.flatnonzero(average <= budget)[-1])
    return float(values[affordable]) if affordable < len(values) else NO_EXIT


def cheapest_threshold(
    confidence_N: npt.ArrayLike,
    delegator_correct_N: npt.ArrayLike,
    expert_correct_N: npt.ArrayLike,
    expert_macs_N: npt.ArrayLike,
    delegator_macs: int,
    accuracy: float,
) -> float:
    """The threshold of the smallest average MACs whose top-1 accuracy on these images is at least `accuracy` (0 to 1).

    Average MACs rise with the threshold, so it is the lowest of the candidates of `calibrate_threshold` that is
    accurate enough. Columns as in `curve`. Raises ValueError naming the best accuracy that any threshold reaches when
    that is too low, and as `curve` does for bad columns.
    """
    confidences, _ = columns(confidence_N, expert_macs_N)
    candidates = [*np.unique(confidences).tolist(), NO_EXIT]
    points = curve(confidence_N, delegator_correct_N, expert_correct_N, expert_macs_N, delegator_macs, candidates)
    best = max(point.top1 for point in points)
    if not accuracy <= best:  # also for NaN
        raise ValueError(f"accuracy: {accuracy} is not allowed; the best that a threshold reaches is {best}")
    return next(point.threshold for point in points if point.top1 >= accuracy)


def affordable_threshold(points: Sequence[CurvePoint], budget: float) -> float:
    """The largest threshold of a curve (fewest early exits) whose average MACs are within `budget`.

    The rule of `calibrate_threshold` for when the images' records are gone; as fine as the curve's grid. Raises
    ValueError naming the cheapest point when the budget does not pay it.
    """
    affordable = [point.threshold for point in points if point.average_macs <= budget]
    if not affordable:
        cheapest = min(point.average_macs for point in points)
        raise ValueError(f"budget: {budget} MACs is not allowed; the cheapest threshold needs {cheapest}")
    return max(affordable)


def columns(
    confidence_N: npt.ArrayLike, other_N: npt.ArrayLike, name: str = "expert_macs_N"
) -> tuple[Floats, Integers]:
    """Confidences and a column of whole numbers or flags, checked: ValueError for no images, unequal lengths or NaN."""
    confidences, other = np.asarray(confidence_N, dtype=np.float64), np.asarray(other_N).astype(np.int64)
    if confidences.ndim != 1 or len(confidences) == 0:
        raise ValueError(
            f"confidence_N: shape {confidences.shape} is not allowed; give one number for at least one image"
        )
    if other.shape != confidences.shape:
        raise ValueError(
            f"{name}: shape {other.shape} is not allowed; give one number for each of {len(confidences)} images"
        )
    if np.isnan(confidences).any():
        raise ValueError("confidence_N: NaN is not allowed; the delegator's logits are not finite")
    return confidences, other


def _prefix_sums(column: Integers) -> Integers:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(column)])
