"""From the evaluations of a finished run folder to its row and its early-exit curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coe_dist.study.results import CurveRow, Row
from coe_dist.study.trainings import Training
from coe_dist.training.run_folder import evaluation_file


def outcome_of(
    training: Training, run_dir: Path, *, study: str, seconds: float, cpu_seconds: float, revision: str
) -> tuple[Row, list[CurveRow]]:
    """The row of a finished training, and its curve (none for a single network). Raises OSError, ValueError and
    KeyError where an evaluation is missing or not whole."""
    validation, test = _evaluation(run_dir, "validation"), _evaluation(run_dir, "test") if training.test else None
    shown = validation if test is None else test
    common: dict[str, Any] = {
        "study": study,
        "curve": training.curve,
        "point": training.point,
        "seed": training.seed,
        "config": training.digest,
        "overrides": " ".join(training.overrides),
        "expert_samples": training.samples,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "revision": revision,
    }
    if training.network is not None:
        val_top1, test_top1, macs = validation["top1"], None if test is None else test["top1"], validation["macs"]
        return Row(
            macs=macs,
            val_top1=val_top1,
            test_top1=test_top1,
            full_macs=macs,
            full_val_top1=val_top1,
            full_test_top1=test_top1,
            experts=1,
            **common,
        ), []
    curve = _curve(training.digest, validation, test)
    chosen, full = free_exit(curve), curve[-1]
    return Row(
        macs=_shown(chosen),
        val_top1=chosen.val_top1,
        test_top1=chosen.test_top1,
        threshold=chosen.threshold,
        full_macs=_shown(full),
        full_val_top1=full.val_top1,
        full_test_top1=full.test_top1,
        oracle_top1=shown["top1"]["oracle"],
        delegator_top1=shown["top1"]["delegator"],
        least_load=min(shown["load"]),
        experts=training.config.experts.count,
        **common,
    ), curve


def free_exit(curve: Sequence[CurveRow]) -> CurveRow:
    """The lowest threshold whose validation top-1 is at least that of the highest one, at which nobody exits (our own
    rule: early exit may save, but not cost on validation). The curve is sorted by rising threshold."""
    return next(line for line in curve if line.val_top1 >= curve[-1].val_top1)


def _curve(digest: str, validation: dict[str, Any], test: dict[str, Any] | None) -> list[CurveRow]:
    tested = [None] * len(validation["curve"]) if test is None else test["curve"]
    return [
        CurveRow(
            config=digest,
            threshold=point["threshold"],
            val_macs=point["average_macs"],
            val_top1=point["top1"],
            test_macs=None if other is None else other["average_macs"],
            test_top1=None if other is None else other["top1"],
        )
        for point, other in zip(validation["curve"], tested, strict=True)
    ]


def _shown(line: CurveRow) -> float:
    return line.val_macs if line.test_macs is None else line.test_macs


def _evaluation(run_dir: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / evaluation_file(split, stored=True)).read_text())
    return content
