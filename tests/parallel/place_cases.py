"""Runs on every rank: the solvers of all places beside each other, and what becomes of a router process that ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from parallel.parity_cases import build_step, solver_of
from reference import Case, batch_of

from coe_dist.coe import modules
from coe_dist.coe.transport import balanced_assignment, balanced_assignment_sparse
from coe_dist.data.order import share
from coe_dist.errors import TrainingError
from coe_dist.parallel.groups import Groups, create_groups
from coe_dist.parallel.process_solver import ProcessSolver
from coe_dist.parallel.router_process import ChildChannel
from coe_dist.parallel.solvers import LocalSolver, Problems, Solver
from coe_dist.training.step import MicroBatch, StepSums


def batch(samples: int, experts: int, k: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """selection [N,E], losses [N,k] (both with ties), sample ids [N]."""
    generator = torch.Generator().manual_seed(seed)
    selection_NE = torch.randint(-3, 4, (samples, experts), generator=generator).to(dtype)
    losses_Nk = torch.randint(0, 4, (samples, k), generator=generator).to(dtype) / 3
    return selection_NE, losses_Nk, torch.randperm(10_000, generator=generator)[:samples]


def answers(
    solver: Solver, selection_NE: torch.Tensor, losses_Nk: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]
) -> list[torch.Tensor]:
    """Assignment, dispatch sets, labels."""
    assignment_N = solver.assign(selection_NE, ids_N, sizes)
    experts, k = selection_NE.shape[1], losses_Nk.shape[1]
    permutation = modules.step_permutation(0, 1, experts)
    experts_Nk = modules.dispatch_sets(assignment_N, permutation, experts=experts, per_sample=k)
    return [assignment_N, experts_Nk, solver.start_labels(losses_Nk, experts_Nk, ids_N, sizes)()]


def agree(folder: Path) -> None:
    """Every place gives bit-identical answers on every rank, over several batches (all but the first start warm)."""
    groups = create_groups(4, timeout_seconds=300)
    sorts = [(k, dtype) for k in (2, 3, 4) for dtype in (torch.float32, torch.float64)]
    for labels in ("balanced", "soft"):
        solvers = [
            solver_of(Case(groups.world.size, 4, 2, where=where, labels=labels), groups)
            for where in ("replicated", "rank0", "process")
        ]
        shapes = itertools.product(sorts, ([11, 10], [600, 600], [1, 0]))
        for seed, ((k, dtype), sizes) in enumerate(shapes):
            given = batch(sum(sizes), 4, k, seed, dtype)
            first, *others = ([*answers(solver, *given, sizes)] for solver in solvers)
            for other in others:
                for mine, theirs in zip(first, other, strict=True):
                    assert mine.dtype == theirs.dtype
                    assert torch.equal(mine, theirs), (labels, k, sizes)
        for solver in solvers:
            solver.close()
            solver.close()
    (folder / f"places-agreed-{groups.rank}").touch()


def told(work: Callable[[], object]) -> dict[str, object]:
    """The TrainingError that `work` ends with, and the seconds it took."""
    before = time.monotonic()
    try:
        work()
    except TrainingError as error:
        return {"message": str(error), "seconds": time.monotonic() - before}
    raise AssertionError("it went on")


def end(folder: Path) -> None:
    """A router process killed between two training steps, killed while it owes labels, stopped, and given a request
    that it cannot solve. Writes what every rank was told to ended-<rank>.json."""
    groups = create_groups(4, timeout_seconds=300)
    found, given = {}, batch(20, 4, 2, 0, torch.float32)
    found["between steps"] = told(lambda: _train(groups, kill_before_step=3))

    channel, solver = _open(groups, "balanced", timeout_seconds=300)
    assignment_N, experts_Nk, _ = answers(solver, *given, [10, 10])
    if channel is not None:
        os.kill(channel.pid, signal.SIGSTOP)  # it cannot answer before it is killed
    finish = solver.start_labels(given[1], experts_Nk, given[2], [10, 10])
    if channel is not None:
        os.kill(channel.pid, signal.SIGKILL)
    found["owing labels"] = told(finish)
    found["afterwards"] = told(lambda: solver.assign(given[0], given[2], [10, 10]))
    solver.close()

    channel, solver = _open(groups, "balanced", timeout_seconds=300)
    assert torch.equal(solver.assign(given[0], given[2], [10, 10]), assignment_N)
    solver.patience_seconds = 1.0
    if channel is not None:
        os.kill(channel.pid, signal.SIGSTOP)
    large = torch.zeros(200_000, 4), torch.arange(200_000), [100_000, 100_000]  # more than fits into a socket's buffer
    found["stopped"] = told(lambda: solver.assign(*large))
    solver.close()

    channel, solver = _open(groups, "no such rule", timeout_seconds=300)
    found["no such rule"] = told(lambda: answers(solver, *given, [10, 10]))
    solver.close()
    (folder / f"ended-{groups.rank}.json").write_text(json.dumps(found))


def _open(groups: Groups, rule: str, *, timeout_seconds: float) -> tuple[ChildChannel | None, ProcessSolver]:
    channel = ChildChannel(Problems(4, rule, 1.0)) if groups.rank == 0 else None
    return channel, ProcessSolver(channel, groups.world, timeout_seconds=timeout_seconds)


def _train(groups: Groups, *, kill_before_step: int) -> None:
    case = Case(groups.world.size, 4, 2, where="process")
    step = build_step(case, groups, None)
    solver = step.router.solver
    assert isinstance(solver, ProcessSolver)
    try:
        for index in range(5):
            if index == kill_before_step and solver.channel is not None:
                os.kill(solver.channel.pid, signal.SIGKILL)
            images, labels, ids = batch_of(case, index, 0)
            rows = slice(*share(len(labels), groups.rank, groups.world.size))
            assert step.step([MicroBatch(images[rows], labels[rows], ids[rows])], StepSums())
            assert index < kill_before_step
    finally:
        solver.close()


def local(folder: Path) -> None:
    """scope: local. On every rank the assignment and labels equal those of its rows solved alone, and its rows are
    balanced by themselves."""
    groups = create_groups(3, timeout_seconds=300)
    for seed, sizes in enumerate(([7, 6], [9, 9], [5, 0], [0, 1])):
        selection_NE, losses_Nk, ids_N = batch(sum(sizes), 3, 2, seed, torch.float32)
        solver = LocalSolver(Problems(3, "balanced", 1.0), groups.world, groups.rank)
        assignment_N, experts_Nk, labels_Nk = answers(solver, selection_NE, losses_Nk, ids_N, sizes)
        start = 0
        for rank, size in enumerate(sizes):
            rows, start = slice(start, start + size), start + size
            scores_BE = torch.log_softmax(selection_NE[rows], 1).numpy()
            alone_B = balanced_assignment(scores_BE, ids_N[rows].numpy()).expert_N
            assert assignment_N[rows].tolist() == alone_B.tolist()
            load_E = np.bincount(alone_B, minlength=3)
            assert load_E.max() - load_E.min() <= 1
            if rank == groups.rank:
                experts_Bk = experts_Nk[rows].numpy()
                chosen_B = balanced_assignment_sparse(
                    -losses_Nk[rows].numpy(), experts_Bk, 3, ids_N[rows].numpy(), feasible_N=experts_Bk[:, 0]
                ).expert_N
                assert (labels_Nk[rows].numpy() == (experts_Bk == chosen_B[:, None])).all()
        solver.close()
    (folder / f"local-agreed-{groups.rank}").touch()


def run(folder: Path) -> None:
    """All of the above in one set of ranks, because starting them takes seconds."""
    agree(folder)
    local(folder)
    end(folder)
