"""`coe-dist calibrate`: from which confidence images exit early, chosen on validation and kept with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from coe_dist.errors import InputError
from coe_dist.orchestration.display import show_evaluation
from coe_dist.orchestration.progress_state import percent
from coe_dist.orchestration.runs import evaluate


def calibrate(
    run_dir: str | Path,
    *,
    macs_budget: float | None = None,
    min_accuracy: float | None = None,
    checkpoint: str = "latest",
    weights: Literal["ema", "raw"] | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on validation and stores the threshold with the run (evaluation-validation.json), where
    evaluation, export and prediction find it. Returns that file's figures; `ece` are calibration errors, see
    coe_dist.coe.calibration.

    checkpoint, weights: as in `evaluate`; what uses the threshold later, for other networks, says so. Give one of
    macs_budget (average MACs per image to stay within, with the fewest early exits) and min_accuracy (top-1 to reach, 0
    to 1, with the fewest average MACs). Raises InputError for anything else, a budget that does not pay the delegator,
    an accuracy that no threshold reaches (naming the best; nothing is stored), and as `evaluate` does.
    """
    if (macs_budget is None) == (min_accuracy is None):
        given = "neither of them is given" if macs_budget is None else "both are given"
        raise InputError(f"--macs-budget, --min-accuracy: {given}; give one of them")
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise InputError(f"--min-accuracy: {min_accuracy:g} is not allowed; give a fraction from 0 to 1")
    return evaluate(
        run_dir,
        split="validation",
        macs_budget=macs_budget,
        min_accuracy=min_accuracy,
        checkpoint=checkpoint,
        weights=weights,
        store=True,
        address=address,
    )


def show_calibration(result: dict[str, Any], run_dir: Path) -> None:
    """Prints what `calibrate` returns."""
    show_evaluation(result, run_dir)
    ece = result["ece"]
    print(f"calibration error (15 bins): collaboration {percent(ece['coe'])}, delegator {percent(ece['delegator'])}")
    print(f"kept in {run_dir / 'evaluation-validation.json'}; evaluate, export and predict use it from now on")
