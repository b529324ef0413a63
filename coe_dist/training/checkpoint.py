"""Checkpoints: one folder per save, files keyed by GLOBAL expert id, readable on any world size.

    checkpoints/step-00001200/  delegator.safetensors  delegator.optim.pt
                                expert-0003.safetensors  expert-0003.optim.pt  ...
                                manifest.json   written last; a folder without a valid one does not exist for resume
    checkpoints/latest          names the newest complete save, replaced atomically

Each network is written by exactly one rank of its group. Weights are safetensors, optimizer state is a tensor
dictionary by parameter name read with weights_only, so loading never runs code from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from coe_dist.errors import InputError, TrainingError
from coe_dist.parallel.groups import Groups
from coe_dist.training.engines import NetworkEngine

FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where training stands: optimizer steps done, epoch, optimizer steps done within the epoch, micro-steps done."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    micro_step: int = 0


def network_file(name: str) -> str:
    """'delegator' -> delegator, 'expert 3' -> expert-0003 (stem of the two files)."""
    return f"expert-{int(name.split()[1]):04d}" if name.startswith("expert") else name


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    folder: Path,
    engines: list[NetworkEngine],
    groups: Groups,
    position: Position,
    *,
    config_digest: str,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Writes checkpoints/step-<step> under `folder`; returns it. Collective: every rank calls it.

    A failure on one rank (a full disk) is raised on all of them, and earlier saves stay valid.
    """
    target = folder / f"step-{position.step:08d}"
    partial = folder / f".partial-step-{position.step:08d}"
    problem, hashes = "", {}
    states = [(engine, engine.optimizer_state()) for engine in engines]  # collective under ZeRO
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for engine, state in states:
            if groups.rank == engine.group.ranks[0]:
                hashes.update(_write_network(partial, engine, state))
    except OSError as error:
        problem = f"rank {groups.rank}: {error}"
    everything: list[Any] = [(problem, hashes)]
    if groups.world.handle is not None:
        everything = [None] * groups.world.size
        dist.all_gather_object(everything, (problem, hashes), group=groups.world.handle)
    problems = [text for text, _ in everything if text]
    outcome = [""]
    if groups.rank == 0:
        try:
            if problems:
                raise OSError(problems[0])
            files = {name: digest for _, part in everything for name, digest in part.items()}
            _publish(folder, partial, target, files, position, config_digest, groups.placement.experts, extra, keep)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            outcome = [f"checkpoint {target.name} could not be written ({error}); the one before it is still valid"]
    if groups.world.handle is not None:
        dist.broadcast_object_list(outcome, src=0, group=groups.world.handle)
    if outcome[0]:
        raise TrainingError(outcome[0])
    return target


def _write_network(folder: Path, engine: NetworkEngine, state: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    stem = network_file(engine.name)
    weights = {name: value.detach().cpu().contiguous() for name, value in engine.network.state_dict().items()}
    save_file(weights, folder / f"{stem}.safetensors")
    torch.save(state, folder / f"{stem}.optim.pt")
    written = {}
    for name in (f"{stem}.safetensors", f"{stem}.optim.pt"):
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
        written[name] = sha256_of(folder / name)
    return written


def _publish(
    folder: Path,
    partial: Path,
    target: Path,
    files: dict[str, str],
    position: Position,
    digest: str,
    experts: int,
    extra: dict[str, Any],
    keep: int,
) -> None:
    expected = 2 * (experts + 1) if any(name.startswith("expert") for name in files) else len(files)
    assert len(files) == expected, (
        f"{len(files)} files for {experts} experts; every expert must be written exactly once"
    )
    manifest = {
        "format": FORMAT,
        "config_digest": digest,
        "experts": experts,
        **vars(position),
        **extra,
        "files": files,
    }
    temporary = partial / ".manifest.json"
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.rename(partial / "manifest.json")
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    pointer = folder / ".latest"
    pointer.write_text(target.name)
    pointer.replace(folder / "latest")
    for old in complete_saves(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def complete_saves(folder: Path) -> list[Path]:
    """Folders with a manifest, newest first."""
    saves = [
        path
        for path in folder.glob("step-*")
        if re.fullmatch(r"step-\d{8}", path.name) and (path / "manifest.json").is_file()
    ]
    return sorted(saves, reverse=True)


def damage(save: Path) -> str:
    """What is wrong with a save, or '' when its manifest and every file verify."""
    try:
        manifest = json.loads((save / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json: {error}"
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{save}: checkpoint format {manifest.get('format')} is not allowed; this version reads format {FORMAT}"
        )
    for name, digest in manifest["files"].items():
        path = save / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} does not match its sha256"
    return ""


def latest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest save that verifies, and a warning for each newer one that does not."""
    warnings: list[str] = []
    for candidate in complete_saves(folder):
        problem = damage(candidate)
        if not problem:
            return candidate, warnings
        warnings.append(f"{candidate} is damaged ({problem}); falling back to the checkpoint before it")
    return None, warnings


def load(
    save: Path, engines: list[NetworkEngine], *, experts: int, optimizer: bool = True
) -> tuple[Position, dict[str, Any]]:
    """Loads this rank's networks from a save of any world size. Raises InputError when the save holds other
    networks."""
    manifest = json.loads((save / "manifest.json").read_text())
    if manifest["experts"] != experts:
        raise InputError(
            f"{save}: it holds {manifest['experts']} experts, experts.count is {experts}; "
            "`coe-dist scale` changes the count"
        )
    for engine in engines:
        load_weights(save, engine.network, engine.name)
        if optimizer:
            state = torch.load(save / f"{network_file(engine.name)}.optim.pt", weights_only=True)
            engine.load_optimizer_state(state)
    position = Position(*(manifest[name] for name in ("step", "epoch", "step_in_epoch", "micro_step")))
    return position, manifest


def load_weights(save: Path, network: torch.nn.Module, name: str) -> None:
    """Loads one network's weights; needs no optimizer file. Raises InputError naming what does not fit."""
    path = save / f"{network_file(name)}.safetensors"
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
