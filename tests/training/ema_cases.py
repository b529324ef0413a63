"""Runs on every rank: averages of replicas under each engine and BatchNorm mode, and evaluation with them."""

from __future__ import annotations

from pathlib import Path

import torch
from reference import CLASSES, TinyNetwork
from training.evaluation_cases import batches

from coe_dist.config import OptimizerConfig, TrainingConfig
from coe_dist.parallel.batchnorm import SplitBatchNorm, average_statistics, split_batchnorm
from coe_dist.parallel.groups import Group, Groups, create_groups
from coe_dist.training.ema import WeightAverage
from coe_dist.training.engines import NetworkEngine, build_engine
from coe_dist.training.evaluation import Evaluator
from coe_dist.training.optim import build_optimizer

DECAY, STEPS, IMAGES, EXPERTS = 0.4, 6, 17, 2
ENGINES = {
    "torch-local": TrainingConfig(engine="torch", precision="fp64"),
    "torch-group": TrainingConfig(engine="torch", precision="fp64", batchnorm="group"),
    "torch-bf16": TrainingConfig(engine="torch", precision="bf16"),
    **{f"deepspeed-{stage}": TrainingConfig(zero_stage=stage) for stage in (0, 1, 2)},
}


def engine_of(
    name: str, network: torch.nn.Module, config: TrainingConfig, groups: Groups, group: Group
) -> NetworkEngine:
    network.to(torch.float64 if config.precision == "fp64" else torch.float32).train()
    split_batchnorm(network, config.batchnorm, group)
    optimizer = build_optimizer(network, OptimizerConfig(), 0.2)
    return build_engine(name, network, optimizer, config, group, groups.alone)


def rows_of(rank: int, step: int) -> int:
    """Unequal, and more on one rank in one step, fewer in the next."""
    return 3 + (rank + 2 * step) % 5


def train(kind: str, groups: Groups, folder: Path) -> None:
    """Steps with unequal rows; keeps the source's states for the formula, and the average before and after its
    statistics are averaged, which happens once on the way and once at the end."""
    torch.manual_seed(3)
    engine = engine_of("network", TinyNetwork(4, [CLASSES]), ENGINES[kind], groups, groups.world)
    average = WeightAverage(engine.network, DECAY)
    probe = torch.randint(0, 256, (5, 1, 12, 12), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    seen, sources, before = 0, [copy_of(engine.network)], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * groups.rank + step)
        rows = rows_of(groups.rank, step)
        images = torch.randint(0, 256, (rows, 1, 12, 12), generator=generator, dtype=torch.uint8)
        answers = engine(images)
        average.network(probe)  # between forward and backward: an engine must not take it for its own network's
        engine.backward(answers.float().square().mean(), last=True)
        assert engine.step()
        average.update(engine.network)
        sources.append(copy_of(engine.network))
        seen += rows
        if step in (2, STEPS - 1):
            before.append((copy_of(average.network), seen))
            average_statistics(engine.network, groups.world)
            average_statistics(average.network, groups.world)
            seen = 0
    assert average.updates == STEPS
    if kind == "torch-group":
        layers = [m for m in average.network.modules() if isinstance(m, SplitBatchNorm)]
        assert layers
        assert all(layer.group is groups.world for layer in layers)
    with torch.no_grad():
        output = average.network(probe)
    result = {"sources": sources, "before": before, "after": copy_of(average.network), "output": output}
    torch.save(result, folder / f"{kind}-rank{groups.rank}.pt")


def copy_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def set_statistics(network: torch.nn.Module, rank: int) -> None:
    for layer in (m for m in network.modules() if isinstance(m, SplitBatchNorm)):
        assert layer.running_mean is not None
        layer.running_mean.fill_(0.1 * rank)
        layer.rows = 1 + rank


def evaluate(groups: Groups, folder: Path) -> None:
    """The split through averages that differ strongly, through plain engines of the same weights, and without them."""
    config = ENGINES["torch-local"]
    engines, same, averages = [], [], {}
    members = {"delegator": groups.world} | {f"expert {expert}": group for expert, group in groups.experts.items()}
    for name, group in members.items():
        heads = [CLASSES, EXPERTS] if name == "delegator" else [CLASSES]
        torch.manual_seed(len(engines))
        engine = engine_of(name, TinyNetwork(4, heads), config, groups, group)
        twin = engine_of(name, TinyNetwork(4, heads), config, groups, group)
        averages[name] = WeightAverage(engine.network, DECAY)
        for parameter in averages[name].network.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))  # confidences below 1
        twin.network.load_state_dict(averages[name].network.state_dict())
        for network in (engine.network, twin.network, averages[name].network):
            set_statistics(network, groups.rank)
        engines.append(engine)
        same.append(twin)
    results = {}
    for kind, those, theirs in (("average", engines, averages), ("twin", same, None), ("raw", engines, None)):
        evaluator = Evaluator(
            those[0],
            {int(engine.name[-1]): engine for engine in those[1:]},
            groups,
            classes=CLASSES,
            precision="fp64",
            final="expert",
            averages=theirs,
        )
        results[kind] = evaluator.run(batches(IMAGES, groups.rank, groups.world.size))
    assert all(engine.network.training for engine in engines)
    assert not any(average.network.training for average in averages.values())
    torch.save(results, folder / f"records-rank{groups.rank}.pt")


def run(folder: Path) -> None:
    groups = create_groups(EXPERTS, timeout_seconds=300)
    for kind in ENGINES:
        train(kind, groups, folder)
    evaluate(groups, folder)
