"""A run with the figures of the exit threshold in use, which `coe-dist calibrate` may have changed since the test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from coe_dist.report.folder import Evaluation, Run, read_run
from coe_dist.report.quality import answers_N, early_N, reliabilities
from coe_dist.tracking.per_image import PerImage


def run_in_use(folder: str | Path) -> Run:
    """Reads a run folder. Its figures are those on test images with the threshold that was kept on validation; on
    validation images where those on test images are of another threshold and cannot be counted anew.

    Raises InputError as read_run does.
    """
    run = read_run(folder)
    evaluation, kept = run.evaluation, run.kept
    if evaluation is None or kept is None or evaluation.threshold == kept.threshold:
        return run
    if run.rows is not None and len(run.rows) and len(evaluation.macs.experts) == len(evaluation.load):
        return replace(run, evaluation=at_threshold(evaluation, run.rows, kept.threshold))
    problem = (
        f"evaluation-{evaluation.split}.json is left out: its exit threshold is no longer the one in use; "
        "`coe-dist evaluate` renews it"
    )
    run = read_run(folder, splits=["validation"])
    return replace(run, problems=[problem, *run.problems])


def at_threshold(evaluation: Evaluation, rows: PerImage, threshold: float | None) -> Evaluation:
    """What evaluating the same networks on the same images (`rows`) finds with another threshold."""
    early = early_N(rows, threshold)
    macs_N = np.where(early, 0, np.array(evaluation.macs.experts)[rows.selected_N])
    top1 = float((answers_N(rows, threshold) == rows.labels_N).mean())
    changed = {
        "threshold": threshold,
        "exit_rate": float(early.mean()),
        "average_macs": round(evaluation.macs.delegator + float(macs_N.mean())),
        "top1": evaluation.top1.model_copy(update={"coe": top1}),
        "ece": evaluation.ece | {"coe": reliabilities(rows, threshold)[0].ece} if evaluation.ece else {},
    }
    return evaluation.model_copy(update=changed)
