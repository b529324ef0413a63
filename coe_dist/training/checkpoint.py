"""Checkpoints: one folder per save, files keyed by GLOBAL expert id, readable on any world size.

    checkpoints/step-00001200/  delegator.safetensors  delegator.optim.pt  (delegator.ema.safetensors)
                                expert-0003.safetensors  expert-0003.optim.pt  (expert-0003.ema.safetensors) ...
                                manifest.json   written last; a folder without a valid one does not exist for resume
    checkpoints/latest          names the newest complete save, replaced atomically
    checkpoints/best            names the save with the best top-1 on validation, and that top-1

Weights are safetensors, optimizer state is a tensor dictionary by parameter name read with weights_only, so loading
never runs code from the file. This module names, checks and reads saves; saving.py writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from coe_dist.data.sidecar import sha256_of
from coe_dist.errors import InputError
from coe_dist.parallel.groups import Groups
from coe_dist.training.ema import WeightAverage
from coe_dist.training.engines import NetworkEngine

FORMAT = 1
WEIGHTS, OPTIMIZER, AVERAGE = "safetensors", "optim.pt", "ema.safetensors"  # ends of a network's files


@dataclass(frozen=True)
class Position:
    """Where training stands: optimizer steps done, epoch, optimizer steps done within the epoch, micro-steps done."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    micro_step: int = 0


def save_name(step: int) -> str:
    """Name of the save made after `step` optimizer steps."""
    return f"step-{step:08d}"


def network_file(name: str) -> str:
    """'delegator' -> delegator, 'expert 3' -> expert-0003 (stem of its files)."""
    return f"expert-{int(name.split()[1]):04d}" if name.startswith("expert") else name


def _saves(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)), reverse=True)


def complete_saves(folder: Path) -> list[Path]:
    """Folders with a manifest, newest first."""
    return [path for path in _saves(folder) if (path / "manifest.json").is_file()]


def damage(save: Path) -> str:
    """What is wrong with a save, or '' when its manifest and every file verify.

    Raises InputError for a manifest of another format version.
    """
    try:
        manifest = json.loads((save / "manifest.json").read_bytes())
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError) as error:
        return f"manifest.json: {error}"
    if not isinstance(manifest, dict):
        return "manifest.json: not a mapping of keys"
    _check_format(save, manifest)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or any(name not in manifest for name in ("experts", *vars(Position()))):
        return "manifest.json: incomplete"
    for name, digest in files.items():
        path = save / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} does not match its sha256"
    return ""


def latest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest save that verifies, and a warning for each newer one that does not."""
    warnings: list[str] = []
    for candidate in _saves(folder):
        problem = damage(candidate)
        if not problem:
            return candidate, warnings
        warnings.append(f"{candidate} is damaged ({problem}); falling back to the checkpoint before it")
    return None, warnings


def agreed_save(folder: Path, groups: Groups) -> tuple[Path | None, list[str]]:
    """latest_valid as rank 0 sees it, on every rank: only one reads all files, and none goes its own way.

    The warnings are rank 0's alone. Raises as `damage` does, on every rank. Collective.
    """
    answer: list[Any] = [None]
    warnings: list[str] = []
    if groups.rank == 0:
        try:
            answer[0], warnings = latest_valid(folder)
        except InputError as error:
            answer[0] = error
    if groups.world.handle is not None:
        with groups.world.naming_failures("search for a checkpoint"):
            dist.broadcast_object_list(answer, src=0, group=groups.world.handle)
    if isinstance(answer[0], InputError):
        raise answer[0]
    return answer[0], warnings


def best_save(folder: Path) -> tuple[Path, float] | None:
    """The complete save with the best top-1 on validation (0 to 1), and that top-1; None where none is recorded."""
    try:
        best = json.loads((folder / "best").read_bytes())
        save, top1 = folder / Path(str(best["save"])).name, float(best["top1"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (save, top1) if (save / "manifest.json").is_file() else None


def load(
    save: Path,
    engines: list[NetworkEngine],
    *,
    experts: int,
    classes: Sequence[str] | None = None,
    averages: Mapping[str, WeightAverage] | None = None,
    optimizer: bool = True,
) -> tuple[Position, dict[str, Any]]:
    """Loads this rank's networks from a save of any world size; returns the position and the manifest.

    Raises InputError when the save holds other networks, was trained for other classes than those given, or holds no
    averages where some are asked for.
    """
    manifest = json.loads((save / "manifest.json").read_text())
    _check_content(save, manifest, experts, classes)
    for engine in engines:
        load_weights(save, engine.network, engine.name)
        path = save / f"{network_file(engine.name)}.{OPTIMIZER}"
        # also without a state: the engine may hold copies of the weights
        engine.load_optimizer_state(torch.load(path, weights_only=True) if optimizer else {})
    for name, average in (averages or {}).items():
        if "ema" not in manifest:
            raise InputError(f"{save}: it holds no averages of the weights, training.ema_decay asks for them")
        load_weights(save, average.network, name, AVERAGE)
        average.updates = int(manifest["ema"]["updates"])
    position = Position(*(manifest[name] for name in ("step", "epoch", "step_in_epoch", "micro_step")))
    return position, manifest


def check_newest(folder: Path, *, experts: int, classes: Sequence[str]) -> None:
    """Raises InputError where the newest save is of another format version, of another number of experts or of other
    classes. Reads a manifest, not the files: before any worker starts."""
    for save in complete_saves(folder)[:1]:
        try:
            manifest = json.loads((save / "manifest.json").read_bytes())
        except (OSError, ValueError):
            return  # damaged: the workers fall back to the one before
        if isinstance(manifest, dict):
            _check_format(save, manifest)
            if "experts" in manifest:
                _check_content(save, manifest, experts, classes)


def _check_format(save: Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{save}: checkpoint format {manifest.get('format')} is not allowed; this version reads format {FORMAT}"
        )


def _check_content(save: Path, manifest: Mapping[str, Any], experts: int, classes: Sequence[str] | None) -> None:
    if manifest["experts"] != experts:
        raise InputError(
            f"{save}: it holds {manifest['experts']} experts, experts.count is {experts}; "
            "`coe-dist scale` changes the count"
        )
    trained = manifest.get("classes")
    if classes is not None and trained is not None and list(classes) != trained:
        raise InputError(f"{save}: its classes are {_told(trained)}, those of the data {_told(classes)}")


def _told(classes: Sequence[str]) -> str:
    return ", ".join(classes[:3]) + (f", ... ({len(classes)})" if len(classes) > 3 else "")


def load_weights(save: Path, network: torch.nn.Module, name: str, end: str = WEIGHTS) -> None:
    """Loads one network's weights; needs no optimizer file. Raises InputError naming what does not fit."""
    path = save / f"{network_file(name)}.{end}"
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    weights = load_file(path)
    own = network.state_dict()
    wrong = [key for key in sorted(set(own) ^ set(weights))] + [
        f"{key} {list(weights[key].shape)} instead of {list(own[key].shape)}"
        for key in sorted(set(own) & set(weights))
        if own[key].shape != weights[key].shape
    ]
    if wrong:
        raise InputError(f"{path}: it does not fit the configured network: {', '.join(wrong[:3])}")
    network.load_state_dict(weights)


def stems(experts: int) -> Iterator[str]:
    yield "delegator"
    for expert in range(experts):
        yield f"expert {expert}"
