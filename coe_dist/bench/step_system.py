"""The demonstration's networks on synthetic images: our whole step, ready to run, for the benchmark of the step."""

from __future__ import annotations

import torch

from coe_dist.config import RunConfig, parse_config
from coe_dist.data.order import share
from coe_dist.data.sidecar import SplitInfo
from coe_dist.parallel.groups import Groups
from coe_dist.training.collaboration_task import CollaborationTask
from coe_dist.training.job import Job
from coe_dist.training.networks import NetworkBuilder
from coe_dist.training.step import CollaborationStep, MicroBatch

SIDE, CLASSES = 28, 10


def configuration(*, experts: int, per_sample: int, engine: str, batch: int) -> RunConfig:
    """The demonstration's: small_cnn experts of width 1 (240 thousand MACs), a delegator of width 0.385."""
    return parse_config(
        {
            "name": "bench",
            "data": {"resolution": SIDE},
            "delegator": {"options": {"width": 0.385}},
            "experts": {"count": experts, "per_sample": per_sample, "options": {"width": 1.0}},
            "training": {"engine": engine, "global_batch": batch, "optimizer": {"learning_rate": 0.02}},
        }
    )


def network_builder(config: RunConfig) -> NetworkBuilder:
    return NetworkBuilder(
        config,
        SplitInfo(
            source="synthetic",
            split="train",
            classes=tuple(map(str, range(CLASSES))),
            count=CLASSES,
            counts_per_class=(1,) * CLASSES,
            channels=1,
            shape=(SIDE, SIDE),
            mean=(0.5,),
            std=(0.25,),
            bytes=0,
            sha256="",
        ),
    )


def build_step(config: RunConfig, groups: Groups) -> CollaborationStep:
    """Engines, router and step as training builds them. Collective."""
    job = Job(task="train", config=config, run_dir="unused")
    return CollaborationTask(job, network_builder(config), groups, torch.device("cpu")).step


def global_batch(samples: int, seed: int) -> MicroBatch:
    """Noisy images of ten kinds, uint8 [N,1,28,28], so that networks can learn and the router has preferences."""
    kinds = torch.randint(0, 256, (CLASSES, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed + 2)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    noise = torch.randint(0, 256, (samples, 1, SIDE, SIDE), generator=generator)
    images = ((kinds[labels] + 3 * noise) // 4).to(torch.uint8)
    return MicroBatch(images, labels, torch.arange(samples) + seed * samples)


def rank_share(batch: MicroBatch, rank: int, world_size: int) -> MicroBatch:
    rows = slice(*share(len(batch.labels), rank, world_size))
    return MicroBatch(batch.images[rows], batch.labels[rows], batch.ids[rows])
