"""A configuration made small enough for two cores, with every switch of training on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from coe_dist.config import DistillationConfig, NetworkConfig, ProgressiveConfig, RunConfig

SIDE, SMALLEST_SIDE = 64, 48  # pixels, of the last epoch's and of the first epoch's images
BATCH, STEPS, EPOCHS = 32, 4, 3  # STEPS of an epoch
WORKERS = 2
TEACHER = "efficientnet_b0"
KERNELS = 4  # of a conditional convolution, in networks that have none of their own


def shrunk(config: RunConfig, *, data: Path, weights: Path, classes: int, cores: int) -> RunConfig:
    """The same networks, recipe and schedule with smaller images and batches and few steps, on CPU workers.

    What the paper, or this project, has beside them is switched on where it is not: piecewise linear units, CondConv,
    averages of the weights, growing images, and distillation from a teacher (of `weights`, a file). Learning rates keep
    their ratio to the batch, and the exit budget the exit rate that it needs. Not yet validated as a whole: write it
    and load it again.
    """
    from coe_dist.training.macs_table import macs_table

    training, teacher = config.training, config.distillation or DistillationConfig(teacher=TEACHER, weights="")
    share = BATCH / training.global_batch
    expert_rate = training.optimizer.expert_learning_rate
    optimizer = {
        "learning_rate": training.optimizer.learning_rate * share,
        "expert_learning_rate": None if expert_rate is None else expert_rate * share,
        "warmup_epochs": 0.0,
    }
    images = {
        "source": "imagefolder",
        "folder": str(data),
        "resolution": SIDE,
        "progressive": ProgressiveConfig(start=SMALLEST_SIDE, until_epoch=EPOCHS - 1),
        "loader_threads": 1,
        "limit": BATCH * STEPS,
    }
    schedule = {
        "optimizer": training.optimizer.model_copy(update=optimizer),
        "epochs": EPOCHS,
        "global_batch": BATCH,
        "accumulation": training.accumulation if BATCH % training.accumulation == 0 else 1,
        "pwlu_statistics_epochs": 1,
        "precision": "fp32" if training.precision == "bf16" else training.precision,  # ten times faster on most CPUs
        "ema_decay": training.ema_decay or 0.999,
        "evaluate_every": EPOCHS,
        "checkpoint_every": EPOCHS,
        "checkpoint_every_steps": None,
    }
    small = config.model_copy(
        update={
            "name": f"{config.name}-rehearsal",
            "data": config.data.model_copy(update=images),
            "delegator": _small(config, config.delegator),
            "experts": _small(config, config.experts),
            "training": training.model_copy(update=schedule),
            "distillation": teacher.model_copy(update={"weights": str(weights), "resolution": None}),
            "early_exit": config.early_exit.model_copy(update={"macs_budget": None}),
            "workers": config.workers.model_copy(
                update={"count": WORKERS, "min": None, "max": None, "device": "cpu", "oversubscribe": cores < WORKERS}
            ),
            "tracking": config.tracking.model_copy(update={"enabled": True, "every_steps": 1}),
        }
    )
    if config.early_exit.macs_budget is None:
        return small
    rate = macs_table(config)["exit_rate_needed"]
    costs = macs_table(small, channels=3, classes=classes)
    budget = costs["delegator_macs"] + (1.0 - rate) * costs["expert_macs"][0]
    return small.model_copy(update={"early_exit": config.early_exit.model_copy(update={"macs_budget": budget})})


def _small(config: RunConfig, section: NetworkConfig) -> NetworkConfig:
    options: dict[str, Any] = {"condconv": KERNELS, **section.options, "activation": "pwlu"}
    if "resolution" in options:
        options["resolution"] = round(int(options["resolution"]) * SIDE / config.data.resolution)
    if not _builds(section.network, options):  # networks without residual blocks have no CondConv
        del options["condconv"]
    return section.model_copy(update={"options": options, "initial_weights": None})


def _builds(network: str, options: dict[str, Any]) -> bool:
    from coe_dist.coe.backbones import build_classifier

    try:
        with torch.device("meta"):
            build_classifier(network, options, channels=3, classes=2, mean=[0.0] * 3, std=[1.0] * 3, seed=0)
    except ValueError:
        return False
    return True
