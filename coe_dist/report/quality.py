"""What the rows of images-<split>.npz say about selection, confusion and calibration. Fractions from 0 to 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coe_dist.report.folder import Evaluation
from coe_dist.tracking.per_image import PerImage

BINS = 15  # of coe.calibration, whose expected calibration error is the weighted gap between the diagram's two columns


@dataclass(frozen=True)
class Standing:
    """One way to answer: its top-1 without early exit. used: the way in use."""

    name: str
    top1: float
    meaning: str
    used: bool = False


@dataclass(frozen=True)
class Bin:
    low: float
    high: float
    images: int
    confidence: float  # mean of the stated probabilities
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    name: str
    ece: float
    bins: list[Bin]


@dataclass(frozen=True)
class Confusion:
    """counts_CC[i, j]: images of class i that get the answer j."""

    counts_CC: npt.NDArray[np.int64]

    def shown(self, most: int) -> list[int]:
        """The classes with most errors of both kinds, in their order."""
        wrong = self.counts_CC - np.diag(np.diag(self.counts_CC))
        errors = wrong.sum(0) + wrong.sum(1)
        return sorted(np.argsort(-errors, kind="stable")[:most].tolist())

    def mistakes(self, most: int) -> list[tuple[int, int, int]]:
        """(true class, answer, images) of the most frequent mistakes."""
        wrong = self.counts_CC - np.diag(np.diag(self.counts_CC))
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [divmod(int(place), len(wrong)) for place in order]
        return [(i, j, int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def early_N(rows: PerImage, threshold: float | None) -> npt.NDArray[np.bool_]:
    """Which images the delegator answers alone (the rule of coe.early_exit)."""
    return rows.confidence_N >= (np.inf if threshold is None else threshold)


def answers_N(rows: PerImage, threshold: float | None) -> npt.NDArray[np.int32]:
    """The class that the collaboration answers."""
    return np.where(early_N(rows, threshold), rows.delegator_class_N, rows.final_class_N)


def confusion(rows: PerImage, threshold: float | None, classes: int) -> Confusion:
    cells = rows.labels_N.astype(np.int64) * classes + answers_N(rows, threshold)
    return Confusion(np.bincount(cells, minlength=classes * classes).reshape(classes, classes))


def reliabilities(rows: PerImage, threshold: float | None) -> list[Reliability]:
    """Of the delegator's answers to all images, and of the collaboration's."""
    stated = np.where(early_N(rows, threshold), rows.confidence_N, rows.final_confidence_N)
    return [
        reliability("CoE", stated, answers_N(rows, threshold) == rows.labels_N),
        reliability("delegator", rows.confidence_N, rows.delegator_class_N == rows.labels_N),
    ]


def reliability(name: str, confidence_N: npt.NDArray[np.float64], right_N: npt.NDArray[np.bool_]) -> Reliability:
    """Bins as in coe.calibration (Guo et al. 2017): (0, 1/15], (1/15, 2/15], ...; empty ones are left out."""
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(np.int64) - 1, 0, BINS - 1)
    bins = []
    for number in np.unique(bin_N).tolist():
        inside = bin_N == number
        stated, right = float(confidence_N[inside].mean()), float(right_N[inside].mean())
        bins.append(Bin(number / BINS, (number + 1) / BINS, int(inside.sum()), stated, right))
    gap = sum(b.images * abs(b.accuracy - b.confidence) for b in bins) / max(1, len(confidence_N))
    return Reliability(name, gap, bins)


def standings(evaluation: Evaluation, rows: PerImage | None) -> list[Standing]:
    """Ways to choose an expert, best first; without rows those that the evaluation's figures tell."""
    top1 = evaluation.top1
    experts = [value for value in top1.experts if value is not None]
    pairs = zip(evaluation.load, evaluation.expert_accuracy, strict=False)
    selected = sum(load * (right or 0) for load, right in pairs) if evaluation.expert_accuracy else None
    found = [Standing("oracle", top1.oracle, "always an expert that is right, where there is one")]
    if rows is not None and len(rows):
        selected = float(rows.right_NE[np.arange(len(rows)), rows.selected_N].mean())
    if selected is not None:
        found.append(Standing("selected", selected, "the expert that the delegator chooses", used=True))
    if experts:
        found.append(Standing("best single", max(experts), "one and the same expert for every image, the best one"))
        found.append(Standing("random", sum(experts) / len(experts), "an expert drawn at random"))
    if rows is not None and len(rows):
        worst = float(rows.right_NE.all(1).mean())
        found.append(Standing("worst", worst, "always an expert that is wrong, where there is one"))
    found.append(Standing("delegator", top1.delegator, "no expert: the delegator's own answer"))
    return found


def skill(found: list[Standing]) -> float | None:
    """How far selection is on the way from a random choice (0) to the oracle (1); None where that is undefined."""
    by_name = {standing.name: standing.top1 for standing in found}
    if not {"selected", "random"} <= by_name.keys() or by_name["oracle"] <= by_name["random"]:
        return None
    return (by_name["selected"] - by_name["random"]) / (by_name["oracle"] - by_name["random"])
