"""Writes checkpoints (see checkpoint.py) while training goes on.

`start` takes copies of everything on the CPU, which is all that training waits for, and hands them to a thread that
writes. `PendingSave.finish` makes the save exist: rank 0 collects the hashes, writes the manifest and renames. Each
network is written by exactly one rank of its group.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as to_bytes

from coe_dist.errors import TrainingError
from coe_dist.parallel.groups import Groups
from coe_dist.training.checkpoint import (
    AVERAGE,
    FORMAT,
    OPTIMIZER,
    WEIGHTS,
    Position,
    best_save,
    complete_saves,
    network_file,
    save_name,
)
from coe_dist.training.ema import WeightAverage, average_both
from coe_dist.training.engines import NetworkEngine, State
from coe_dist.training.ownership import Owner

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Network:
    """Copies of what one network's files hold."""

    stem: str
    weights: Weights
    average: Weights | None
    optimizer: State


def start(
    folder: Path,
    engines: list[NetworkEngine],
    groups: Groups,
    position: Position,
    *,
    averages: Mapping[str, WeightAverage] | None = None,
    extra: Mapping[str, Any],
    keep: int,
    owner: Owner | None = None,
) -> PendingSave:
    """Copies the networks and starts to write them to a hidden folder under `folder`. Collective.

    Running statistics of local BatchNorm are averaged over each network's group first. averages: moving averages of the
    weights by name of the network, for all engines or none. extra: further keys of the manifest. owner: rank 0's; a
    start that is no longer the newest one publishes nothing.
    """
    averages = averages or {}
    for engine in engines:
        average_both(engine.network, averages.get(engine.name), engine.group)
    networks = []
    for engine in engines:
        writes = groups.rank == engine.group.ranks[0]
        optimizer = engine.optimizer_state(wanted=writes)
        if writes:
            average = averages.get(engine.name)
            networks.append(
                _Network(
                    network_file(engine.name),
                    _copy(engine.network),
                    None if average is None else _copy(average.network),
                    optimizer,
                )
            )
    return PendingSave(folder, networks, groups, position, extra, keep, owner)


def _copy(network: torch.nn.Module) -> Weights:
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }


class PendingSave:
    """A save that is being written; it does not exist for readers before `finish`."""

    def __init__(
        self,
        folder: Path,
        networks: list[_Network],
        groups: Groups,
        position: Position,
        extra: Mapping[str, Any],
        keep: int,
        owner: Owner | None,
    ) -> None:
        self.position = position
        self.target = folder / save_name(position.step)
        self.bytes = 0  # of all ranks, known after finish
        self.seconds = 0.0  # from start to the end of finish
        self._began = time.perf_counter()
        # a folder of this name that a crash has left is overwritten
        self._partial = folder / f".partial-{save_name(position.step)}"
        self._groups, self._extra, self._keep, self._owner = groups, extra, keep, owner
        self._problem, self._sizes = "", 0
        self._hashes: dict[str, str] = {}
        # a daemon: a disk that never answers must not keep a failed process alive
        self._thread = threading.Thread(target=self._write_all, args=(networks,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def written(self) -> bool:
        """Whether this rank's part is on the disk (or has failed): `finish` then takes a moment only."""
        return not self._thread.is_alive()

    def _write_all(self, networks: list[_Network]) -> None:
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            while networks:
                for name, content in _files(networks.pop()):  # given up one by one: the copies need not stay
                    self._hashes[name] = _write(self._partial / name, content)
                    self._sizes += len(content)
        except OSError as error:
            self._problem = f"rank {self._groups.rank}: {error.strerror}"
        except Exception as error:  # the other ranks must learn of it
            self._problem = f"rank {self._groups.rank}: {type(error).__name__}: {error}"

    def finish(self) -> Path:
        """Waits for all ranks' parts and publishes the save; returns its folder. Collective.

        A failure on one rank (a full disk) is a TrainingError on all of them, and earlier saves stay valid; so is the
        end of a start that a later one has replaced.
        """
        self._thread.join()
        world, mine = self._groups.world, (self._problem, self._hashes, self._sizes)
        everything: list[Any] = [mine]
        if world.handle is not None:
            everything = [None] * world.size
            with world.naming_failures(f"checkpoint {self.target.name}"):
                dist.all_gather_object(everything, mine, group=world.handle)
        outcome = [""]
        if self._groups.rank == 0:
            try:
                if self._owner is not None:
                    self._owner.check()
                if problems := [problem for problem, _, _ in everything if problem]:
                    raise OSError(None, problems[0])
                self._publish({name: digest for _, part, _ in everything for name, digest in part.items()})
            except OSError as error:
                shutil.rmtree(self._partial, ignore_errors=True)
                outcome = [
                    f"checkpoint {self.target} could not be written ({error.strerror}); earlier ones are still valid"
                ]
            except TrainingError as error:
                outcome = [str(error)]
        if world.handle is not None:
            with world.naming_failures(f"checkpoint {self.target.name}"):
                dist.broadcast_object_list(outcome, src=0, group=world.handle)
        if outcome[0]:
            raise TrainingError(outcome[0])
        self.bytes = sum(sizes for _, _, sizes in everything)
        self.seconds = time.perf_counter() - self._began
        return self.target

    def _publish(self, files: dict[str, str]) -> None:
        experts, folder = self._groups.placement.experts, self.target.parent
        kinds = 3 if "ema" in self._extra else 2
        expected = kinds * (experts + 1 if any(name.startswith("expert") for name in files) else 1)
        assert len(files) == expected, (
            f"{len(files)} files for {experts} experts; every expert must be written exactly once"
        )
        manifest = {"format": FORMAT, "experts": experts, **vars(self.position), **self._extra, "files": files}
        _replace(self._partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        if self.target.exists():  # a damaged one, which training has gone back behind
            shutil.rmtree(self.target)
        self._partial.rename(self.target)
        _replace(folder / "latest", self.target.name.encode())
        _prune(folder, self.target, self._keep)
        for left in folder.glob(".partial-step-*"):  # by a crash
            shutil.rmtree(left, ignore_errors=True)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Removes what is neither among the `keep` newest saves nor the best one."""
    best = best_save(folder)
    for old in [save for save in complete_saves(folder) if save.name <= newest.name][keep:]:
        if best is None or old != best[0]:
            shutil.rmtree(old, ignore_errors=True)


def mark_best(save: Path, top1: float, *, keep: int) -> bool:
    """Names `save`, the newest one, as the best when its top-1 (0 to 1) beats the best so far; says whether it did.

    Rank 0 only. The best save is not removed until a better one takes its place.
    """
    folder = save.parent
    best = best_save(folder)
    if best is not None and top1 <= best[1]:
        return False
    _replace(folder / "best", json.dumps({"save": save.name, "top1": top1}).encode())
    _prune(folder, save, keep)
    return True


def _files(network: _Network) -> list[tuple[str, bytes | memoryview]]:
    """Made in memory and written by us: the libraries' own writers raise other errors than OSError for a full disk."""
    optimizer = io.BytesIO()
    torch.save(network.optimizer, optimizer)
    files: list[tuple[str, bytes | memoryview]] = [
        (f"{network.stem}.{WEIGHTS}", to_bytes(network.weights)),
        (f"{network.stem}.{OPTIMIZER}", optimizer.getbuffer()),
    ]
    if network.average is not None:
        files.append((f"{network.stem}.{AVERAGE}", to_bytes(network.average)))
    return files


def _write(path: Path, content: bytes | memoryview) -> str:
    """Writes to the disk itself, not only to its cache; returns the sha256 of what was meant to be written."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}")
    _write(temporary, content)
    temporary.replace(path)
