"""From a run to a folder of weights that needs no run: see coe_dist.inference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file

from coe_dist.coe.macs import count_macs
from coe_dist.config import NetworkConfig
from coe_dist.errors import InputError
from coe_dist.inference import CONFIG_FILE, PreparationRecord, PretrainedConfig, WeightsFile
from coe_dist.storage.datasets import place_of, sidecar_of
from coe_dist.training.checkpoint import AVERAGE, WEIGHTS, load_weights
from coe_dist.training.chosen import LATEST, Networks, Weights, chosen_weights
from coe_dist.training.inspection import Collaboration, described, open_collaboration
from coe_dist.training.new_folder import check_new, new_folder
from coe_dist.training.thresholds import Threshold, stored_threshold


def export_weights(
    run_dir: Path,
    out: Path,
    weights: Weights | None = None,
    checkpoint: str = LATEST,
    threshold: Threshold | None = None,
) -> list[str]:
    """Copies the weights of a valid save to the new folder `out`; returns warnings: one for each damaged save that was
    passed over, one where nothing says how validation prepared its images, one when the threshold was calibrated for
    other networks than these.

    weights: the moving averages (which evaluation uses where the run holds them) or the last step's; None: the averages
    where there are some. checkpoint: see chosen.py. threshold: instead of the run's own. `out` appears whole or not at
    all. Raises InputError for a run without such a checkpoint of a collaboration, averages that it does not hold, a
    MACs budget that no threshold was calibrated for, class names that are nowhere, and an `out` that exists or cannot
    be written.
    """
    check_new(out)
    source = open_collaboration(run_dir, checkpoint)
    weights = chosen_weights(run_dir, weights, averaged=source.manifest.get("ema") is not None)
    if threshold is None:
        threshold = _threshold(run_dir, source)
    preparation, notes = _preparation(source)
    config = pretrained_config(run_dir, source, weights, threshold.value, preparation)
    with new_folder(out) as partial:
        for name in config.files:
            shutil.copyfile(source.save / _saved_as(name, weights), partial / name)
        (partial / CONFIG_FILE).write_text(json.dumps(config.model_dump(mode="json"), indent=1, ensure_ascii=False))
    return [*source.warnings, *notes, *threshold.doubts(Networks(config.step, weights))]


def _saved_as(name: str, weights: Weights) -> str:
    """What a save calls the file that an export calls `name` (expert-0003.safetensors)."""
    return name if weights == "raw" else f"{name.removesuffix(WEIGHTS)}{AVERAGE}"


def pretrained_config(
    run_dir: Path, source: Collaboration, weights: Weights, threshold: float | None, preparation: PreparationRecord
) -> PretrainedConfig:
    """What config.json says. The pixel statistics are those inside the weights, not the data set's of today."""
    config, save, saved = source.config, source.save, source.manifest["files"]
    shape = described(load_file(save / "delegator.safetensors"), save / "delegator.safetensors")
    files = {name: _saved_as(name, weights) for name in saved if name.count(".") == 1 and name.endswith(".safetensors")}
    draft: dict[str, Any] = {
        "delegator": NetworkConfig(network=config.delegator.network, options=config.delegator.options),
        "experts": NetworkConfig(network=config.experts.network, options=config.experts.options),
        "count": config.experts.count,
        "threshold": threshold,
        **shape,
        "classes": _class_names(run_dir, source, shape["classes"]),
        "resolution": config.data.resolution,
        "preparation": preparation,
        "final": config.early_exit.final,
        "delegator_macs": 1,  # until the networks are there to be counted
        "expert_macs": [1] * config.experts.count,
        "weights": weights,
        "files": {
            name: WeightsFile(sha256=saved[own], bytes=(save / own).stat().st_size) for name, own in files.items()
        },
        "run": run_dir.resolve().name,
        "step": source.manifest["step"],
        "epoch": source.manifest["epoch"],
    }
    built, macs = PretrainedConfig(**draft), []
    for name in ("delegator", "expert 0"):
        network = built.build(name)
        # refuses weights of other networks than the configuration's
        load_weights(save, network, name, AVERAGE if weights == "ema" else WEIGHTS)
        macs.append(count_macs(network, channels=built.channels, resolution=built.resolution))
    return built.model_copy(update={"delegator_macs": macs[0], "expert_macs": [macs[1]] * built.count})


def _preparation(source: Collaboration) -> tuple[PreparationRecord, list[str]]:
    """As the save says; of older ones, as the data set says. A warning where neither does."""
    side = source.config.data.resolution
    try:
        if "preparation" in source.manifest:
            return PreparationRecord.model_validate(source.manifest["preparation"]), []
        validation = sidecar_of(source.config.data, "validation")
        return PreparationRecord(**validation.preparation(side).record()), []
    except ValidationError as error:
        raise InputError(f"{source.save / 'manifest.json'}: preparation: {error.errors()[0]['msg']}") from None
    except InputError as error:
        doubt = f"{source.save}: it does not say how validation prepared its images, and {error}"
        return PreparationRecord(crop_all=False, max_resolution=None), [
            f"{doubt}; files of {side} x {side} pixels are taken whole, others cropped and resized"
        ]


def _threshold(run_dir: Path, source: Collaboration) -> Threshold:
    """The one that evaluation uses: stored with the run, else the configuration's."""
    exits, stored = source.config.early_exit, stored_threshold(run_dir)
    if stored is not None:
        return stored
    if exits.macs_budget is not None:
        raise InputError(
            f"{run_dir}: no threshold is calibrated yet for early_exit.macs_budget = {exits.macs_budget:g}; "
            f"run `coe-dist calibrate {run_dir} --macs-budget {exits.macs_budget:g}` first"
        )
    return Threshold(exits.threshold)


def _class_names(run_dir: Path, source: Collaboration, count: int) -> list[str]:
    """From the data set's side-car or, where the data set is gone, from the run's own evaluations."""
    try:
        classes, place = list(sidecar_of(source.config.data, "train").classes), place_of(source.config.data, "train")
    except InputError:
        for file in (run_dir / "details-test.json", run_dir / "details-validation.json"):
            try:
                classes, place = list(json.loads(file.read_text())["classes"]), str(file)
                break
            except (OSError, ValueError, KeyError, TypeError):
                continue
        else:
            raise
    if len(classes) != count:
        raise InputError(f"{place}: {len(classes)} classes are not allowed; the networks answer with {count}")
    return classes
