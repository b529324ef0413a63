"""From a run to a folder of weights that needs no run: see coe_dist.inference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from coe_dist.coe.macs import count_macs
from coe_dist.config import NetworkConfig
from coe_dist.data.sidecar import read_sidecar
from coe_dist.errors import InputError
from coe_dist.inference import CONFIG_FILE, PretrainedConfig, WeightsFile
from coe_dist.training.checkpoint import load_weights
from coe_dist.training.inspection import Collaboration, described, open_collaboration
from coe_dist.training.scaling import check_new


def export_weights(run_dir: Path, out: Path) -> list[str]:
    """Copies the weights of the newest valid save to the new folder `out`; returns a warning for each damaged save.

    `out` appears whole or not at all. Raises InputError for a run without a valid checkpoint of a collaboration, a
    MACs budget that no threshold was calibrated for, class names that are nowhere, and an `out` that exists or cannot
    be written.
    """
    check_new(out)
    source = open_collaboration(run_dir)
    config = pretrained_config(run_dir, source)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # a crash may have left one
        partial.mkdir(parents=True)
        for name in config.files:
            shutil.copyfile(source.save / name, partial / name)
        (partial / CONFIG_FILE).write_text(json.dumps(config.model_dump(mode="json"), indent=1, ensure_ascii=False))
        partial.rename(out)
    except OSError as error:
        raise InputError(f"--out: {out} is not allowed; it cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return source.warnings


def pretrained_config(run_dir: Path, source: Collaboration) -> PretrainedConfig:
    """What config.json says. The pixel statistics are those inside the weights, not the data set's of today."""
    config, save = source.config, source.save
    shape = described(load_file(save / "delegator.safetensors"), save / "delegator.safetensors")
    weights = {name: digest for name, digest in source.manifest["files"].items() if name.endswith(".safetensors")}
    draft: dict[str, Any] = {
        "delegator": NetworkConfig(network=config.delegator.network, options=config.delegator.options),
        "experts": NetworkConfig(network=config.experts.network, options=config.experts.options),
        "count": config.experts.count,
        "threshold": _threshold(run_dir, source),
        **shape,
        "classes": _class_names(run_dir, source, shape["classes"]),
        "resolution": config.data.resolution,
        "final": config.early_exit.final,
        "delegator_macs": 1,  # until the networks are there to be counted
        "expert_macs": [1] * config.experts.count,
        "files": {
            name: WeightsFile(sha256=digest, bytes=(save / name).stat().st_size) for name, digest in weights.items()
        },
        "run": run_dir.resolve().name,
        "step": source.manifest["step"],
        "epoch": source.manifest["epoch"],
    }
    built, macs = PretrainedConfig(**draft), []
    for name in ("delegator", "expert 0"):
        network = built.build(name)
        load_weights(save, network, name)  # refuses weights of other networks than the configuration's
        macs.append(count_macs(network, channels=built.channels, resolution=built.resolution))
    return built.model_copy(update={"delegator_macs": macs[0], "expert_macs": [macs[1]] * built.count})


def _threshold(run_dir: Path, source: Collaboration) -> float | None:
    """The one that evaluation uses: stored with the run, else the configuration's."""
    exits, path = source.config.early_exit, run_dir / "evaluation-validation.json"
    if path.is_file():
        try:
            threshold = json.loads(path.read_text())["threshold"]
            return None if threshold is None else float(threshold)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a readable evaluation ({error})") from None
    if exits.macs_budget is not None:
        raise InputError(
            f"{run_dir}: no threshold is calibrated yet for early_exit.macs_budget = {exits.macs_budget:g}; "
            f"run `coe-dist evaluate {run_dir} --macs-budget {exits.macs_budget:g}` first"
        )
    return exits.threshold


def _class_names(run_dir: Path, source: Collaboration, count: int) -> list[str]:
    """From the data set's side-car or, where the data set is gone, from the run's own evaluations."""
    beton = Path(source.config.data.folder) / "train.beton"
    try:
        classes, place = list(read_sidecar(beton).classes), beton
    except InputError:
        for place in (run_dir / "details-test.json", run_dir / "details-validation.json"):
            try:
                classes = list(json.loads(place.read_text())["classes"])
                break
            except (OSError, ValueError, KeyError, TypeError):
                continue
        else:
            raise
    if len(classes) != count:
        raise InputError(f"{place}: {len(classes)} classes are not allowed; the networks answer with {count}")
    return classes
