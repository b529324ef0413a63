"""Runs on every rank: each optimizer under each engine, its state carried over by name into a fresh engine."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from coe_dist.config import OptimizerConfig, TrainingConfig
from coe_dist.parallel.groups import Groups, create_groups
from coe_dist.training.engines import NetworkEngine, build_engine
from coe_dist.training.optim import build_optimizer

STEPS, ROWS, RATE, DECAY = 6, 8, 0.02, 0.3
ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]
# stage 0 to 0, and for what may be cut up every stage to another one
MOVES = {
    "rmsprop": [(ENGINES[0], ENGINES[1]), (ENGINES[1], ENGINES[2]), (ENGINES[2], ENGINES[3]), (ENGINES[3], ENGINES[0])],
    "lamb": [(ENGINES[0], ENGINES[1]), (ENGINES[1], ENGINES[0])],
}


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    return (outputs - torch.arange(3.0)).square().sum()


def engine_of(name: str, kind: tuple[str, int], groups: Groups) -> NetworkEngine:
    config = TrainingConfig(engine=kind[0], zero_stage=kind[1])  # type: ignore[arg-type]
    optimizer = OptimizerConfig(name=name, weight_decay=DECAY)  # type: ignore[arg-type]
    fresh = network()
    return build_engine("network", fresh, build_optimizer(fresh, optimizer, RATE), config, groups.world, groups.alone)


def steps(engine: NetworkEngine, groups: Groups, first: int, last: int) -> None:
    world = groups.world.size
    for step in range(first, last):
        rows = batch(step).chunk(world)[groups.rank]
        engine.backward(loss_of(engine(rows)) * (world / ROWS), last=True)
        assert engine.step()


def run(folder: Path) -> None:
    groups = create_groups(2, timeout_seconds=300)
    results = {}
    for name, moves in MOVES.items():
        for before, after in moves:
            engine = engine_of(name, before, groups)
            steps(engine, groups, 0, STEPS // 2)
            weights = {key: value.clone() for key, value in engine.network.state_dict().items()}
            torch.save(engine.optimizer_state(), folder / f"state-{groups.rank}.pt")
            fresh = engine_of(name, after, groups)
            fresh.network.load_state_dict(weights)
            fresh.load_optimizer_state(torch.load(folder / f"state-{groups.rank}.pt", weights_only=True))
            steps(fresh, groups, STEPS // 2, STEPS)
            final = {key: value.tolist() for key, value in fresh.network.state_dict().items()}
            results[f"{name} {before} {after}"] = final
    (folder / f"weights-{groups.rank}.json").write_text(json.dumps(results))
