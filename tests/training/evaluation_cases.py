"""Runs on every rank: the evaluator over splits of awkward sizes; writes the records and the averaged networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from reference import CHANNELS, CLASSES, LEARNING_RATE, RESOLUTION, Case, build_networks

from coe_dist.config import OptimizerConfig, TrainingConfig
from coe_dist.data.order import epoch_order, rank_batches
from coe_dist.parallel.batchnorm import SplitBatchNorm, split_batchnorm
from coe_dist.parallel.groups import Groups, create_groups
from coe_dist.training.engines import build_engine
from coe_dist.training.evaluation import Evaluator
from coe_dist.training.optim import build_optimizer
from coe_dist.training.step import MicroBatch

GLOBAL_BATCH = 8
IMAGES = (23, 17, 2, 1)  # 17: the last batch has one image; 2 and 1: fewer than three ranks
EXPERTS = (4, 2)  # 2 on 3 ranks: replicas


def split(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(images)
    labels = generator.integers(0, CLASSES, images)
    brightness = generator.uniform(0, 1, (images, 1, 1, 1)) ** 2
    pixels = brightness * generator.integers(0, 256, (images, CHANNELS, RESOLUTION, RESOLUTION))
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)


def case_of(experts: int, world_size: int) -> Case:
    return Case(world_size, experts, 2, precision="fp64")


def perturb(network: torch.nn.Module, rank: int) -> None:
    """As after training under local BatchNorm: statistics and row counts that differ between ranks."""
    with torch.no_grad():
        for index, layer in enumerate(m for m in network.modules() if isinstance(m, SplitBatchNorm)):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.fill_(0.1 * (rank + 1) + 0.01 * index)
            layer.running_var.fill_(0.05 * (rank + 1))
            layer.rows = rank + 1


def evaluate(groups: Groups, folder: Path, final: str) -> None:
    experts, rank, world_size = groups.placement.experts, groups.rank, groups.world.size
    config = TrainingConfig(engine="torch", precision="fp64")
    engines = {}
    for name, network in build_networks(case_of(experts, world_size)).items():
        group = groups.world if name == "delegator" else groups.experts.get(int(name.split()[1]))
        if group is None:
            continue
        torch.manual_seed(17)
        for parameter in network.parameters():  # far from the initialisation, so that answers differ
            parameter.data.add_(2 * torch.randn_like(parameter))
        split_batchnorm(network.train(), "local", group)
        perturb(network, rank)
        optimizer = build_optimizer(network, OptimizerConfig(), LEARNING_RATE)
        engines[name] = build_engine(name, network, optimizer, config, group, groups.alone)
    evaluator = Evaluator(
        engines["delegator"],
        {int(name.split()[1]): engine for name, engine in engines.items() if name != "delegator"},
        groups,
        classes=CLASSES,
        precision="fp64",
        final=final,  # type: ignore[arg-type]
    )
    for images in IMAGES:
        records = evaluator.run(batches(images, rank, world_size))
        torch.save(records, folder / f"records-{final}-{experts}-{images}-rank{rank}.pt")
        assert all(engine.network.training for engine in engines.values()), "evaluation must leave training mode on"
    for name, engine in engines.items():
        torch.save(engine.network.state_dict(), folder / f"{experts}-{name}-rank{rank}.pt")


def batches(images: int, rank: int, world_size: int) -> Iterator[MicroBatch]:
    pixels, labels = split(images)
    for ids in rank_batches(epoch_order(images, 0, 0, shuffle=False), GLOBAL_BATCH, rank, world_size):
        rows = torch.from_numpy(ids)
        yield MicroBatch(pixels[rows], labels[rows], rows)


def run(folder: Path) -> None:
    for experts in EXPERTS:
        groups = create_groups(experts, timeout_seconds=300)
        for final in ("expert", "average"):
            evaluate(groups, folder, final)
