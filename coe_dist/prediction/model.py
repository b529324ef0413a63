"""A run folder or an exported folder -> the model, with the threshold asked for, and how its images are prepared."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coe_dist.coe.early_exit import NO_EXIT, CurvePoint, affordable_threshold
from coe_dist.data.sidecar import read_sidecar
from coe_dist.errors import InputError
from coe_dist.inference import CONFIG_FILE, CollaborationOfExperts
from coe_dist.prediction.decode import Preparation
from coe_dist.training.checks import check_budget
from coe_dist.training.export import export_weights
from coe_dist.training.run_folder import load_run_config


@dataclass(frozen=True)
class Opened:
    model: CollaborationOfExperts  # on the CPU, in eval mode
    preparation: Preparation
    warnings: list[str]  # one for each damaged save that was passed over


def open_model(
    folder: str | Path,
    *,
    threshold: float | None = None,
    macs_budget: float | None = None,
    top: int = 1,
    weights: Literal["ema", "raw"] | None = None,
) -> Opened:
    """Loads the newest valid save of a run, as `coe-dist export weights` would write it, or an exported folder.

    threshold: from which confidence images exit early; macs_budget: average MACs, for which the threshold is the
    largest affordable one of the curve that the run's last evaluation on validation has left; neither: the threshold
    stored with the run or folder. weights: of a run, see training.export. Raises InputError for both of the former, an
    unusable value, `top` classes that the model does not have, a folder that is neither kind, and one without a curve
    when a budget is given.
    """
    folder = Path(folder)
    if macs_budget is not None and threshold is not None:
        raise InputError(f"--threshold: {threshold} is not allowed; --macs-budget is given too, give only one of them")
    if threshold is not None and not 0 <= threshold <= NO_EXIT:
        raise InputError(
            f"--threshold: {threshold} is not allowed; give a number from 0 to 1, or {NO_EXIT:g} for no early exit"
        )
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
    if not is_run and weights is not None:
        raise InputError(f"--weights: {weights} is not allowed; {folder} holds exported weights, of one kind only")
    model, warnings = _load_run(folder, weights) if is_run else (CollaborationOfExperts.from_pretrained(folder), [])
    if not 1 <= top <= len(model.classes):
        raise InputError(f"--top: {top} is not allowed; the model has {len(model.classes)} classes, give at most that")
    if macs_budget is not None:
        threshold = _threshold_of(folder, macs_budget, model)
    if threshold is not None:
        model.threshold = threshold
    return Opened(model, _preparation(folder if is_run else None, model), warnings)


def _load_run(run_dir: Path, weights: Literal["ema", "raw"] | None) -> tuple[CollaborationOfExperts, list[str]]:
    """By way of an export, so that both are always the same model."""
    with tempfile.TemporaryDirectory(prefix="coe-dist-") as temporary:
        warnings = export_weights(run_dir, Path(temporary) / "weights", weights)
        return CollaborationOfExperts.from_pretrained(Path(temporary) / "weights"), warnings


def _threshold_of(run_dir: Path, budget: float, model: CollaborationOfExperts) -> float:
    check_budget("--macs-budget", budget, model.delegator_macs, list(model.expert_macs))
    path = run_dir / "evaluation-validation.json"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; `coe-dist calibrate {run_dir} --macs-budget {budget:g}` evaluates on validation"
        )
    try:
        points = [CurvePoint(**point) for point in json.loads(path.read_text())["curve"]]
        return affordable_threshold(points, budget)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an evaluation with a usable curve ({error})") from None


def _preparation(run_dir: Path | None, model: CollaborationOfExperts) -> Preparation:
    """As the run's data set, where it is still there, says how the loader treats its images."""
    plain = Preparation(model.channels, model.resolution)
    if run_dir is None:
        return plain
    try:
        info = read_sidecar(Path(load_run_config(run_dir).data.folder) / "train.beton")
    except InputError:
        return plain
    return Preparation(
        model.channels,
        model.resolution,
        crop_all=info.shape != (model.resolution, model.resolution),
        max_resolution=info.written.max_resolution,
    )
