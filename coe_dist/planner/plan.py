"""The whole plan of a run as plain numbers: what `coe-dist plan --json` prints. Field names are stable."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from coe_dist.errors import InputError
from coe_dist.planner.advice import advise
from coe_dist.planner.layout import Layout, all_reduce_bytes
from coe_dist.planner.memory import fullest_rank
from coe_dist.planner.run import LARGEST_WORLD, Run

WORLDS = tuple(2**power for power in range(13))  # 1 to 4096


def check_world(gpus: int) -> int:
    if not 1 <= gpus <= LARGEST_WORLD:
        raise InputError(f"--gpus: {gpus} is not allowed; give a whole number from 1 to {LARGEST_WORLD}")
    return gpus


def make_plan(run: Run, gpus: int) -> dict[str, Any]:
    """See the module; times in seconds, sizes in bytes. Where training images grow, "step" is the mean over all epochs
    and "stages" has each size of image; memory and bytes are those of the largest images. Raises InputError for a
    number of workers out of range."""
    layout, step, rates = run.layout(check_world(gpus)), run.step(gpus), run.rates
    rank, memory = fullest_rank(run.config, layout, run.delegator, run.expert, rates.framework_bytes, run.teacher)
    epochs = _epochs(run, gpus)
    hours = (epochs["train_seconds"] + epochs["evaluation_seconds"]) / 3600
    fits = memory.total <= rates.memory_bytes
    return {
        "name": run.config.name,
        "gpus": gpus,
        "gpu": rates.device,
        "nodes": layout.nodes,
        "networks": {facts.name: asdict(facts) for facts in (run.delegator, run.expert, run.teacher) if facts},
        "placement": {
            "experts_per_rank": [int(layout.hosted.min()), int(layout.hosted.max())],
            "replicas_per_expert": [
                min(len(ranks) for ranks in layout.placement.ranks_of_expert),
                layout.largest_replica_group,
            ],
            "imbalance": layout.placement.load_imbalance(),
            "slowest_rank": step.slowest_rank,
        },
        "rows": {
            "images_per_rank": [float(layout.images.min()), float(layout.images.max())],
            "pairs_per_expert": layout.per_sample * layout.dispatched / layout.experts,
            "pairs_per_rank": [float(layout.pairs.min()), float(layout.pairs.max())],
        },
        "memory": {
            **asdict(memory),
            "total": memory.total,
            "available": rates.memory_bytes,
            "rank": rank,
            "fits": bool(fits),
        },
        "bytes_per_step": _bytes(run, layout),
        "step": {"seconds": step.seconds, "parts": step.parts},
        "stages": _stages(run, gpus),
        "images_per_second": run.images_per_second(gpus),
        **epochs,
        "hours": hours,
        "gpu_hours": hours * gpus,
        "bottleneck": step.bottleneck,
        "advice": advise(run, gpus, step.bottleneck, memory, fits),
        "scaling": scaling(run, gpus),
        "rates": asdict(rates),
    }


def _stages(run: Run, gpus: int) -> list[dict[str, Any]]:
    """Epochs with training images of one size."""
    steps = {side: run.step_at(gpus, side) for side in run.stages}
    return [
        {
            "resolution": side,
            "epochs": run.stages[side],
            "seconds": step.seconds,  # of a step
            "parts": step.parts,
            "images_per_second": run.config.training.global_batch / step.seconds,
        }
        for side, step in steps.items()
    ]


def _epochs(run: Run, gpus: int) -> dict[str, Any]:
    """Steps and seconds of the whole run; each evaluation runs every image through the delegator and all experts."""
    training = run.config.training
    images = min(run.train_images, run.config.data.limit or run.train_images)
    micro_batches = math.ceil(images / run.config.micro_batch)
    steps = math.ceil(micro_batches / training.accumulation)
    evaluations = math.ceil(training.epochs / training.evaluate_every)
    layout, rates = run.layout(gpus), run.rates
    # a forward pass is a third of a training pass, and every expert sees every image
    rows = layout.batch / layout.replicas
    experts = max(h * rates.expert.seconds(n) for h, n in zip(layout.hosted.tolist(), rows.tolist(), strict=True))
    per_batch = (rates.delegator.seconds(float(layout.images.max())) + experts) / 3
    validation = min(run.validation_images, run.config.data.limit or run.validation_images)
    return {
        "images_per_epoch": images,
        "steps": steps * training.epochs,
        "train_seconds": steps * training.epochs * run.step(gpus).seconds,
        "evaluation_seconds": evaluations * (validation / layout.batch) * per_batch,
    }


def _bytes(run: Run, layout: Layout) -> dict[str, float]:
    """Of all ranks together unless the name says otherwise; each micro-batch exchanges, each step reduces once."""
    repeats, element = run.config.training.accumulation, 8 if run.config.training.precision == "fp64" else 4
    sent, outside = layout.bytes_sent, layout.share_between_nodes
    delegator, expert = run.delegator.parameters * element, run.expert.parameters * element
    groups = [len(ranks) for ranks in layout.placement.ranks_of_expert]
    return {
        "exchange": repeats * float(sent.sum()),
        "exchange_between_nodes": repeats * float((sent * outside).sum()),
        "exchange_of_slowest_rank": repeats * float(max(sent.max(), layout.bytes_received.max())),
        "pairs": repeats * float(layout.pairs.sum()),
        "pairs_remote": repeats * float(layout.pairs_sent.sum()),
        "returned": repeats * float(layout.pairs_sent.sum()) * element,
        "gathered_per_rank": repeats * layout.bytes_gathered,
        "gradients": layout.world * all_reduce_bytes(delegator, layout.world)
        + sum(ranks * all_reduce_bytes(expert, ranks) for ranks in groups),
        "gradients_of_a_rank": all_reduce_bytes(delegator, layout.world) + all_reduce_bytes(expert, max(groups)),
    }


def scaling(run: Run, gpus: int) -> list[dict[str, float]]:
    """Other worlds: the same global batch (strong), and the global batch growing with the world so that a worker keeps
    its images (weak). Efficiency is images/s per worker, relative to one worker (strong) and to the planned number of
    workers (weak)."""
    training = run.config.training
    alone = run.images_per_second(1)
    share = max(1, round(training.global_batch / gpus / training.accumulation)) * training.accumulation

    def weak(world: int) -> float:
        return run.with_changes(training={"global_batch": share * world}).images_per_second(world)

    rows = []
    for world in sorted({*WORLDS, gpus}):
        strong, grown = run.images_per_second(world), weak(world)
        rows.append(
            {
                "workers": world,
                "images_per_second": strong,
                "efficiency": strong / world / alone,
                "weak_global_batch": share * world,
                "weak_images_per_second": grown,
                "weak_efficiency": grown / world / (weak(gpus) / gpus),
            }
        )
    return rows
