"""Runs on every rank: the real step over the real groups for a list of cases, compared with recorded references."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from reference import (
    BETA,
    GENERALIST,
    LEARNING_RATE,
    MOMENTUM,
    TEMPERATURE,
    TOP,
    WEIGHT_DECAY,
    Case,
    Outcome,
    batch_of,
    build_networks,
    build_teacher,
)

from coe_dist.data.order import share
from coe_dist.parallel.batchnorm import average_statistics, split_batchnorm
from coe_dist.parallel.groups import Groups, create_groups
from coe_dist.parallel.process_solver import ProcessSolver
from coe_dist.parallel.router import Router, Routing
from coe_dist.parallel.router_process import ChildChannel
from coe_dist.parallel.solvers import Problems, RankZeroSolver, ReplicatedSolver, Solver
from coe_dist.training.engines import build_engine
from coe_dist.training.optim import build_optimizer
from coe_dist.training.step import CollaborationStep, MicroBatch, StepSums
from coe_dist.training.teacher import Teacher


class ReplayRouter(Router):
    """Takes from a recording what goes to experts, dispatch sets and labels: fp32 rounding may flip a discrete choice
    between worlds."""

    recorded: Outcome

    def route(
        self, selection_BE: torch.Tensor, ids_B: torch.Tensor, step: int, confidence_B: torch.Tensor | None = None
    ) -> Routing:
        self.replayed = step
        free = super().route(selection_BE, ids_B, step, confidence_B)
        sets_Nk, sizes, chosen_S = self.recorded.dispatch_sets[step].to(free.ids_N.device), free.sizes, None
        if confidence_B is not None:
            world = self.groups.world.size
            bounds = [share(free.batch_images, rank, world) for rank in range(world)]
            kept_N = self.recorded.kept[step].to(free.ids_N.device)
            chosen_S, sizes = self._own(kept_N, [stop - start for start, stop in bounds])
        return self.routing(sets_Nk, free.ids_N, sizes, free.batch_images, chosen_S)

    def start_labels(self, losses_Bk: torch.Tensor, routing: Routing) -> Any:
        finish = super().start_labels(losses_Bk, routing)
        labels_Bk = self.recorded.labels[self.replayed][routing.rows].to(losses_Bk.device)
        return lambda: (labels_Bk, finish()[1])


def solver_of(case: Case, groups: Groups) -> Solver:
    problems = Problems(case.experts, case.labels, 1.0)
    if case.where == "rank0":
        return RankZeroSolver(problems, groups.world, groups.rank)
    if case.where == "process":
        channel = ChildChannel(problems) if groups.rank == 0 else None
        return ProcessSolver(channel, groups.world, timeout_seconds=300)
    return ReplicatedSolver(problems)


CPU = torch.device("cpu")


def build_step(case: Case, groups: Groups, recorded: Outcome | None, device: torch.device = CPU) -> CollaborationStep:
    # plain objects with the fields of OptimizerConfig and TrainingConfig: the GPU check has no pydantic
    optimizer = SimpleNamespace(name="sgd", momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    config = SimpleNamespace(
        engine=case.engine,
        zero_stage=case.zero_stage,
        clip_norm=case.clip_norm,
        precision=case.precision,
        batchnorm=case.batchnorm,
        optimizer=optimizer,
    )
    engines = {}
    for name, network in build_networks(case).items():
        expert = int(name.split()[1]) if name != "delegator" else None
        if expert is not None and expert not in groups.hosted:
            continue
        group = groups.world if expert is None else groups.experts[expert]
        split_batchnorm(network.train(), case.batchnorm, group).to(device)
        engines[name] = build_engine(
            name, network, build_optimizer(network, optimizer, LEARNING_RATE), config, group, groups.alone
        )
    kind = ReplayRouter if recorded is not None else Router
    router = kind(
        groups,
        solver_of(case, groups),
        experts=case.experts,
        per_sample=case.per_sample,
        generalist_weight=GENERALIST,
        variance=True,
        seed=3,
        share=case.share,
    )
    if recorded is not None:
        router.recorded = recorded
    return CollaborationStep(
        engines["delegator"],
        {int(name.split()[1]): engine for name, engine in engines.items() if name != "delegator"},
        router,
        selection_weight=BETA,
        label_rule=case.labels,
        call_empty=case.batchnorm == "group",
        teacher=teacher_of(case, device),
    )


def teacher_of(case: Case, device: torch.device) -> Teacher | None:
    if not case.distilled:
        return None
    network = build_teacher(case).to(device)
    return Teacher(network, top=TOP, temperature=TEMPERATURE, weight=case.distilled, delegator=case.taught_delegator)


def run_case(case: Case, groups: Groups, recorded: Outcome | None, device: torch.device = CPU) -> CollaborationStep:
    step = build_step(case, groups, recorded, device)
    for index in range(case.steps):
        batches = []
        for part in range(case.accumulation):
            images, labels, ids = (tensor.to(device) for tensor in batch_of(case, index, part))
            rows = slice(*share(len(labels), groups.rank, groups.world.size))
            batches.append(MicroBatch(images[rows], labels[rows], ids[rows]))
        assert step.step(batches, StepSums()), "a gradient was not finite"
    return step


def largest_error(step: CollaborationStep, expected: Outcome) -> tuple[float, str]:
    """Largest max-norm error over tensors, relative to the tensor's largest value; and where."""
    worst, where = 0.0, ""
    for engine in [step.delegator, *step.experts.values()]:
        average_statistics(engine.network, engine.group)
        state = engine.optimizer_state()
        pairs = [
            (name, engine.network.state_dict()[name], value) for name, value in expected.weights[engine.name].items()
        ]
        pairs += [
            (f"momentum of {name}", state[name]["momentum_buffer"], value)
            for name, value in expected.momentum[engine.name].items()
        ]
        for name, got, want in pairs:
            assert got.shape == want.shape, f"{engine.name} {name}: {got.shape} instead of {want.shape}"
            error = float((got.detach().cpu() - want).abs().max() / want.abs().max().clamp_min(1e-6))
            if not error <= worst:
                worst, where = error, f"{engine.name}: {name}"
    return worst, where


def run(folder: Path, device: torch.device = CPU) -> None:
    """cases.json: Case fields; <index>.pt: recorded outcome. Writes errors-<rank>.json."""
    cases = [Case(**fields) for fields in json.loads((folder / "cases.json").read_text())]
    by_experts: dict[int, Groups] = {}
    errors = []
    for index, case in enumerate(cases):
        if case.experts not in by_experts:
            by_experts[case.experts] = create_groups(case.experts, timeout_seconds=300)
        groups = by_experts[case.experts]
        expected = torch.load(folder / f"{index}.pt", weights_only=False)
        step = run_case(case, groups, expected if case.replay else None, device)
        step.router.solver.close()
        errors.append(largest_error(step, expected))
    (folder / f"errors-{groups.rank}.json").write_text(json.dumps(errors))
