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
import io
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
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from coe_dist.errors import InputError, TrainingError
from coe_dist.parallel.batchnorm import average_statistics
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

    Running statistics of local BatchNorm are averaged over each network's group first. A failure on one rank (a full
    disk) is a TrainingError on all of them, and earlier saves stay valid.
    """
    target = folder / f"step-{position.step:08d}"
    partial = folder / f".partial-step-{position.step:08d}"  # one that a crash has left is overwritten
    problem, hashes = "", {}
    for engine in engines:
        average_statistics(engine.network, engine.group)
    states = [(engine, engine.optimizer_state()) for engine in engines]  # collective under ZeRO
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for engine, state in states:
            if groups.rank == engine.group.ranks[0]:
                hashes.update(_write_network(partial, engine, state))
    except OSError as error:
        problem = f"rank {groups.rank}: {error.strerror}"
    everything: list[Any] = [(problem, hashes)]
    if groups.world.handle is not None:
        everything = [None] * groups.world.size
        with groups.world.naming_failures(f"checkpoint {target.name}"):
            dist.all_gather_object(everything, (problem, hashes), group=groups.world.handle)
    problems = [text for text, _ in everything if text]
    outcome = [""]
    if groups.rank == 0:
        try:
            if problems:
                raise OSError(None, problems[0])
            files = {name: digest for _, part in everything for name, digest in part.items()}
            _publish(folder, partial, target, files, position, config_digest, groups.placement.experts, extra, keep)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            outcome = [f"checkpoint {target} could not be written ({error.strerror}); earlier ones are still valid"]
    if groups.world.handle is not None:
        with groups.world.naming_failures(f"checkpoint {target.name}"):
            dist.broadcast_object_list(outcome, src=0, group=groups.world.handle)
    if outcome[0]:
        raise TrainingError(outcome[0])
    return target


def _write_network(folder: Path, engine: NetworkEngine, state: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Made in memory and written by us: the libraries' own writers raise other errors than OSError for a full disk."""
    stem = network_file(engine.name)
    weights = {name: value.detach().cpu().contiguous() for name, value in engine.network.state_dict().items()}
    optimizer = io.BytesIO()
    torch.save(state, optimizer)
    return {
        name: _write(folder / name, content)
        for name, content in ((f"{stem}.safetensors", to_bytes(weights)), (f"{stem}.optim.pt", optimizer.getbuffer()))
    }


def _write(path: Path, content: bytes | memoryview) -> str:
    """Writes to the disk itself, not only to its cache; returns the sha256 of what was meant to be written."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


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
    _write(partial / ".manifest.json", json.dumps(manifest, indent=1).encode())
    (partial / ".manifest.json").rename(partial / "manifest.json")
    if target.exists():  # a damaged one, which training has gone back behind
        shutil.rmtree(target)
    partial.rename(target)
    _write(folder / ".latest", target.name.encode())
    (folder / ".latest").replace(folder / "latest")
    for old in [save for save in complete_saves(folder) if save.name <= target.name][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(".partial-step-*"):  # by a crash
        shutil.rmtree(left, ignore_errors=True)


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
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{save}: checkpoint format {manifest.get('format')} is not allowed; this version reads format {FORMAT}"
        )
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
        path = save / f"{network_file(engine.name)}.optim.pt"
        # also without a state: the engine may hold copies of the weights
        engine.load_optimizer_state(torch.load(path, weights_only=True) if optimizer else {})
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
