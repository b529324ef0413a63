"""Runs on every rank: values that are not finite, experts without rows, ranks that die."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from parallel.parity_cases import ReplayRouter, build_step, solver_of
from reference import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Case, Outcome, batch_of
from torch import nn
from training.checkpoint_cases import ENGINES, digests, engines_of, train

from coe_dist.config import parse_config
from coe_dist.data.order import share
from coe_dist.errors import TrainingError
from coe_dist.parallel.groups import Groups, create_groups
from coe_dist.parallel.router import NonFiniteError
from coe_dist.training import step as step_module
from coe_dist.training.engines import NetworkEngine
from coe_dist.training.job import Job
from coe_dist.training.step import CollaborationStep, MicroBatch, StepSums
from coe_dist.training.worker import run_worker


class _BrokenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grads[0], float("nan"))


@contextmanager
def broken(network: nn.Module, where: str) -> Iterator[None]:
    """Every output of `network` is infinite, or everything it passes backward is NaN."""

    def spoil(output: torch.Tensor) -> torch.Tensor:
        return output * float("inf") if where == "forward" else _BrokenGradient.apply(output)

    def hook(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
        return tuple(spoil(output) for output in outputs) if isinstance(outputs, tuple) else spoil(outputs)

    handle = network.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def micro_batch(case: Case, groups: Groups, index: int) -> MicroBatch:
    images, labels, ids = batch_of(case, index, 0)
    rows = slice(*share(len(labels), groups.rank, groups.world.size))
    return MicroBatch(images[rows], labels[rows], ids[rows])


def check_non_finite(case: Case, groups: Groups) -> list[dict[str, Any]]:
    """Breaks one network on ONE rank for one step. Nothing changes, on any rank; and the next step is as if the broken
    one had never been."""
    results = []
    for network, where in product(("delegator", "expert 3"), ("forward", "backward")):
        step, undisturbed = build_step(case, groups, None), build_step(case, groups, None)
        for each in (step, undisturbed):
            train(case, groups, each, 0, 1)
        before = digests(engines_of(step))
        mine = {engine.name: engine for engine in engines_of(step)}
        sums, told = StepSums(), ""
        victim = groups.rank == 1 and mine[network].network
        try:
            with broken(victim, where) if victim else nullcontext():
                finished = step.step([micro_batch(case, groups, 1)], sums)
        except NonFiniteError as error:
            finished, told = False, str(error)
        assert not finished, f"{network}, {where}: not noticed"
        after = digests(engines_of(step))
        if where == "forward":
            assert after == before, f"{network}, {where}: something changed"
            undisturbed.micro_step += 1  # the permutation of the lost micro-batch is not used again
        elif network in mine:
            assert after[network] == before[network], f"{network}, {where}: it changed"
        if where == "forward":
            for each in (step, undisturbed):
                train(case, groups, each, 2, 3)
            assert digests(engines_of(step)) == digests(engines_of(undisturbed)), (
                f"{network}, {where}: something was left of the broken step"
            )
        results.append({"network": network, "where": where, "told": told, "skipped": sums.skipped})
    return results


def check_without_rows(case: Case, groups: Groups) -> None:
    """Every image to expert 0, three steps long: the others step on a zero gradient (decay and momentum)."""
    step = build_step(case, groups, None)
    train(case, groups, step, 0, 1)
    recorded = Outcome()
    for index in range(4):
        samples = len(batch_of(case, index, 0)[1])
        recorded.dispatch_sets.append(torch.zeros(samples, 1, dtype=torch.int64))
        recorded.labels.append(torch.ones(samples, 1))
    router = ReplayRouter(
        groups,
        solver_of(case, groups),
        experts=case.experts,
        per_sample=1,
        generalist_weight=0.0,
        variance=True,
        seed=3,
    )
    router.recorded = recorded
    step.router = router
    expected = {engine.name: coasting(engine, steps=3) for engine in engines_of(step)}
    train(case, groups, step, 1, 4)
    for engine in engines_of(step):
        idle = engine.name not in ("delegator", "expert 0")
        same = all(
            torch.allclose(value, expected[engine.name][name], rtol=1e-5, atol=1e-8)
            for name, value in engine.network.named_parameters()
        )
        assert same == idle, f"{engine.name} in {case.name}: {'not as on zero gradients' if idle else 'not trained'}"


def coasting(engine: NetworkEngine, steps: int) -> dict[str, torch.Tensor]:
    """The parameters after some steps of SGD with Nesterov momentum and weight decay on zero gradients. Collective."""
    state, result = engine.optimizer_state(), {}
    for name, parameter in engine.network.named_parameters():
        value, momentum = parameter.detach().clone(), state[name]["momentum_buffer"].clone()
        for _ in range(steps):
            gradient = (WEIGHT_DECAY if value.ndim > 1 else 0.0) * value
            momentum = MOMENTUM * momentum + gradient
            value = value - LEARNING_RATE * (gradient + MOMENTUM * momentum)
        result[name] = value
    return result


def check_replicas_without_rows(case: Case, groups: Groups) -> None:
    """Two images on three ranks, two experts: some ranks have no image, and a replica has none for its expert."""
    step = build_step(case, groups, None)
    for index in range(3):
        images, labels, ids = (part[: 2 - index % 2] for part in batch_of(case, index, 0))
        rows = slice(*share(len(labels), groups.rank, groups.world.size))
        assert step.step([MicroBatch(images[rows], labels[rows], ids[rows])], StepSums())
    for engine in engines_of(step):
        for value in engine.network.state_dict().values():
            assert bool(torch.isfinite(value).all()), f"{engine.name} in {case.name}"


def run(folder: Path) -> None:
    groups = create_groups(4, timeout_seconds=300)
    results = {}
    for engine, stage in ENGINES:
        case = Case(2, 4, 2, engine=engine, zero_stage=stage)
        results[f"{engine} {stage}"] = check_non_finite(case, groups)
        for batchnorm in ("local", "group"):
            check_without_rows(
                # labels: best, because there is no balanced choice among one expert
                Case(2, 4, 2, engine=engine, zero_stage=stage, batchnorm=batchnorm, labels="best"),
                groups,
            )
    (folder / f"results-{groups.rank}.json").write_text(json.dumps(results))


def run_replicas(folder: Path) -> None:
    groups = create_groups(2, timeout_seconds=300)
    for engine, stage in ENGINES:
        for batchnorm in ("local", "group"):
            check_replicas_without_rows(Case(3, 2, 2, engine=engine, zero_stage=stage, batchnorm=batchnorm), groups)


def attempt(folder: Path, name: str, **training: Any) -> str:
    """Runs the job of <folder>/config.json under another name; returns the error it ends with, or ''."""
    content = json.loads((folder / "config.json").read_text())
    content["name"] = name
    content["training"] |= training
    config = parse_config(content)
    try:
        run_worker(Job(task="train", config=config, run_dir=str(config.run_dir.absolute())))
    except TrainingError as error:
        return str(error)
    return ""


def run_jobs(folder: Path) -> None:
    """A learning rate that makes the logits infinite after the first step; then rank 1 is killed in the third step."""
    rank = torch.distributed.get_rank()
    huge = {"name": "sgd", "learning_rate": 1e30, "warmup_epochs": 0}
    told = {kind: attempt(folder, kind, non_finite=kind, optimizer=huge) for kind in ("stop", "skip")}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    die_in_step(3, folder, signal.SIGKILL)


def run_stopped(folder: Path) -> None:
    """Rank 1 stops answering in the third step, without dying: only the timeout can end the others."""
    die_in_step(3, folder, signal.SIGSTOP)


def die_in_step(number: int, folder: Path, how: signal.Signals) -> None:
    rank = torch.distributed.get_rank()
    if rank == 1:
        original: Callable[..., bool] = step_module.CollaborationStep.step
        steps = iter(range(1, 100))

        def step(self: CollaborationStep, batches: Any, sums: StepSums, votes: list[int] | None = None) -> bool:
            if next(steps) == number:
                dispatch = step_module.dispatch

                def fatal(*arguments: Any) -> Any:
                    os.kill(os.getpid(), how)
                    return dispatch(*arguments)

                step_module.dispatch = fatal
            return original(self, batches, sums, votes)

        step_module.CollaborationStep.step = step  # type: ignore[method-assign]
    begun = time.monotonic()
    told = attempt(folder, how.name.lower(), timeout_seconds=8)
    (folder / f"died-{rank}.json").write_text(json.dumps([told, time.monotonic() - begun]))
    os._exit(0 if told else 1)  # the process group is broken: there is no barrier to meet at
