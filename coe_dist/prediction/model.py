"""A run folder or an exported folder -> the model, with the threshold asked for."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from coe_dist.coe.early_exit import CurvePoint, affordable_threshold
from coe_dist.errors import InputError
from coe_dist.inference import CONFIG_FILE, CollaborationOfExperts, read_config
from coe_dist.training.checks import check_budget
from coe_dist.training.chosen import LATEST, Networks, Weights
from coe_dist.training.export import export_weights
from coe_dist.training.run_folder import evaluation_file
from coe_dist.training.thresholds import Threshold, check_threshold


@dataclass(frozen=True)
class Opened:
    model: CollaborationOfExperts  # on the CPU, in eval mode
    warnings: list[str]  # damaged saves that were passed over, a threshold calibrated for other networks, ...


def open_model(
    folder: str | Path,
    *,
    threshold: float | None = None,
    macs_budget: float | None = None,
    top: int = 1,
    checkpoint: str = LATEST,
    weights: Weights | None = None,
) -> Opened:
    """Loads a valid save of a run, as `coe-dist export weights` would write it, or an exported folder.

    threshold: from which confidence images exit early; macs_budget: average MACs, for which the threshold is the
    largest affordable one of the curve that the run's last evaluation on validation has left; neither: the threshold
    stored with the run or folder. checkpoint, weights: of a run, see training.export. Raises InputError for both of the
    former, an unusable value, `top` classes that the model does not have, a folder that is neither kind, and one
    without a curve when a budget is given.
    """
    folder = Path(folder)
    check_threshold(threshold, macs_budget)
    is_run = (folder / "config.yaml").is_file()
    if not is_run and not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"{folder}: neither a run folder (no config.yaml) nor one of exported weights (no {CONFIG_FILE})"
        )
    if not is_run and macs_budget is not None:
        raise InputError(
            f"--macs-budget: {macs_budget:g} is not allowed; {folder} holds exported weights, which have no curve of "
            "accuracy against MACs; give the run, or --threshold"
        )
    for option, value, usual in (("--weights", weights, None), ("--checkpoint", checkpoint, LATEST)):
        if not is_run and value != usual:
            raise InputError(f"{option}: {value} is not allowed; {folder} holds exported weights, of one kind only")
    if is_run:
        model, warnings = _load_run(folder, checkpoint, weights, threshold, macs_budget)
    else:
        model, warnings = CollaborationOfExperts.from_pretrained(folder), []
        model.threshold = model.threshold if threshold is None else threshold
    if not 1 <= top <= len(model.classes):
        raise InputError(f"--top: {top} is not allowed; the model has {len(model.classes)} classes, give at most that")
    return Opened(model, warnings)


def _load_run(
    run_dir: Path, checkpoint: str, weights: Weights | None, threshold: float | None, budget: float | None
) -> tuple[CollaborationOfExperts, list[str]]:
    """By way of an export, so that both are always the same model."""
    own = threshold is None and budget is None
    with tempfile.TemporaryDirectory(prefix="coe-dist-") as temporary:
        folder = Path(temporary) / "weights"
        warnings = export_weights(run_dir, folder, weights, checkpoint, None if own else Threshold(threshold))
        model, config = CollaborationOfExperts.from_pretrained(folder), read_config(folder)
    if budget is not None:
        affordable = _affordable(run_dir, budget, model)
        model.threshold = affordable.value
        warnings += affordable.doubts(Networks(config.step, config.weights))
    return model, warnings


def _affordable(run_dir: Path, budget: float, model: CollaborationOfExperts) -> Threshold:
    check_budget("--macs-budget", budget, model.delegator_macs, list(model.expert_macs))
    path = run_dir / evaluation_file("validation", stored=True)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; `coe-dist calibrate {run_dir} --macs-budget {budget:g}` evaluates on validation"
        )
    try:
        evaluation = json.loads(path.read_text())
        points = [CurvePoint(**point) for point in evaluation["curve"]]
        networks = Networks(evaluation["step"], evaluation["weights"])
        return Threshold(affordable_threshold(points, budget), networks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an evaluation with a usable curve ({error})") from None
