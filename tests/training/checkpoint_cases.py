"""Runs on every rank: train a few steps from the newest checkpoint, save, and write down what the networks hold."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from parallel.parity_cases import build_step, largest_error
from reference import Case, batch_of
from small_disk import fill

from coe_dist.data.order import share
from coe_dist.errors import TrainingError
from coe_dist.parallel.groups import Groups, create_groups
from coe_dist.training import checkpoint, saving
from coe_dist.training.checkpoint import Position
from coe_dist.training.engines import NetworkEngine
from coe_dist.training.step import CollaborationStep, MicroBatch, StepSums

WORLDS = (4, 2, 1, 3)
STEPS = 2 * len(WORLDS)  # two on each
ENGINES = (("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2))
EXPERTS = (4, 2)  # 2 experts on 3 ranks: one is replicated


def cases() -> list[Case]:
    """batchnorm: group, so that the reference is one and the same for every world size."""
    return [
        Case(1, experts, 2, engine=engine, zero_stage=stage, batchnorm="group", steps=STEPS, clip_norm=0.5)
        for engine, stage in ENGINES
        for experts in EXPERTS
    ]


def digests(engines: list[NetworkEngine]) -> dict[str, dict[str, str]]:
    """Network -> tensor -> hash of its bytes, for weights, statistics and optimizer state. Collective under ZeRO."""
    result: dict[str, dict[str, str]] = {}
    for engine in engines:
        tensors = {f"weights {name}": value for name, value in engine.network.state_dict().items()}
        for name, entries in engine.optimizer_state().items():
            tensors |= {f"optimizer {name} {key}": value for key, value in entries.items()}
        result[engine.name] = {
            name: hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
            for name, value in tensors.items()
        }
    return result


def engines_of(step: CollaborationStep) -> list[NetworkEngine]:
    return [step.delegator, *(step.experts[expert] for expert in sorted(step.experts))]


def train(case: Case, groups: Groups, step: CollaborationStep, first: int, last: int) -> None:
    for index in range(first, last):
        images, labels, ids = batch_of(case, index, 0)
        rows = slice(*share(len(labels), groups.rank, groups.world.size))
        assert step.step([MicroBatch(images[rows], labels[rows], ids[rows])], StepSums())


def save(folder: Path, step: CollaborationStep, groups: Groups, position: Position, keep: int = 2) -> Path:
    return saving.start(folder, engines_of(step), groups, position, extra={"config": {}}, keep=keep).finish()


def run(folder: Path) -> None:
    """<index>/: the checkpoints of a case; writes hashes before each save and after each load, and last the errors."""
    errors = []
    for index, case in enumerate(cases()):
        groups = create_groups(case.experts, timeout_seconds=300)
        recorded = torch.load(folder / f"{index}.pt", weights_only=False)
        step, place = build_step(case, groups, recorded), folder / str(index)
        newest, warnings = checkpoint.agreed_save(place, groups)
        assert not warnings
        position = Position()
        if newest is not None:
            position, _ = checkpoint.load(newest, engines_of(step), experts=case.experts)
            note(folder, f"{index}-loaded-{position.step}", groups, step)
        step.micro_step = position.micro_step
        done = position.step + 2
        train(case, groups, step, position.step, done)
        note(folder, f"{index}-saved-{done}", groups, step)
        save(place, step, groups, Position(done, 0, done, step.micro_step))
        if done == STEPS:
            errors.append((asdict(case), largest_error(step, recorded)))
    (folder / f"errors-{groups.rank}.json").write_text(json.dumps(errors))


def note(folder: Path, name: str, groups: Groups, step: CollaborationStep) -> None:
    hashes = digests(engines_of(step))
    (folder / f"{name}-rank{groups.rank}.json").write_text(json.dumps(hashes))


def run_full_disk(folder: Path) -> None:
    """The disk fills up: first while a network is written, then when only the manifest is left to write."""
    small = folder / "small-disk"
    case = Case(2, 4, 2)
    groups = create_groups(case.experts, timeout_seconds=300)
    step = build_step(case, groups, None)
    train(case, groups, step, 0, 1)
    first = save(small / "checkpoints", step, groups, Position(1))
    before = digests(engines_of(step))
    train(case, groups, step, 1, 2)
    messages = []
    if groups.rank == 0:
        fill(small / "ballast", leave=12 * 1024)  # room for some of the files, not for all
    torch.distributed.barrier()
    for position in (Position(2), Position(2), Position(3)):  # a failed save must not make the next one hang
        try:
            save(small / "checkpoints", step, groups, position)
        except TrainingError as error:
            messages.append(str(error))
        assert checkpoint.agreed_save(small / "checkpoints", groups) == (first, [])
    again = build_step(case, groups, None)
    checkpoint.load(first, engines_of(again), experts=case.experts)
    assert digests(engines_of(again)) == before
    if groups.rank == 0:
        (small / "ballast").unlink()
    torch.distributed.barrier()
    latest = save(small / "checkpoints", step, groups, Position(4))
    assert checkpoint.agreed_save(small / "checkpoints", groups) == (latest, [])
    (folder / f"messages-{groups.rank}.json").write_text(json.dumps(messages))
