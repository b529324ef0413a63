"""Rows of studies made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coe_dist.study.results import CurveRow, Row
from coe_dist.study.trainings import Training


def row_for(training: Training, *, macs: float, top1: float, **changes: Any) -> Row:
    """Of a training whose accuracy is the same on both splits and with every exit threshold."""
    content: dict[str, Any] = {
        "study": "tiny",
        "curve": training.curve,
        "point": training.point,
        "seed": training.seed,
        "config": training.digest,
        "overrides": " ".join(training.overrides),
        "macs": macs,
        "val_top1": top1,
        "test_top1": top1,
        "full_macs": macs,
        "full_val_top1": top1,
        "full_test_top1": top1,
        "experts": 1 if training.kind == "single" else training.config.experts.count,
        "expert_samples": training.samples,
        "seconds": 10.0,
        "cpu_seconds": 9.0,
        "revision": "abc",
    }
    return Row(**(content | changes))


def curve_for(
    training: Training, points: Sequence[tuple[float, float, float, float | None, float | None]]
) -> list[CurveRow]:
    """points: (threshold, MACs and top-1 on validation, MACs and top-1 on test)."""
    names = ("threshold", "val_macs", "val_top1", "test_macs", "test_top1")
    return [CurveRow(config=training.digest, **dict(zip(names, point, strict=True))) for point in points]
