"""The single-network baseline in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from coe_dist.parallel.groups import Groups
from coe_dist.seeds import derive_seed
from coe_dist.tracking.store import write_json
from coe_dist.training.engines import NetworkEngine
from coe_dist.training.job import Job
from coe_dist.training.networks import NetworkBuilder, averages_of, engine_for
from coe_dist.training.single import SingleStep
from coe_dist.training.step import StepSums
from coe_dist.training.tasks import Batches, reduced
from coe_dist.training.teacher import configured_teacher


class SingleTask:
    experts, expert_samples = 1, 1.0

    def __init__(self, job: Job, builder: NetworkBuilder, groups: Groups, device: torch.device) -> None:
        assert job.network is not None
        config = job.config
        self.config, self.groups, self.device, self.run_dir = config, groups, device, Path(job.run_dir)
        self.classes, self.splits = builder.info.classes, job.final_splits
        optimizer = config.training.optimizer
        self.learning_rate = optimizer.expert_learning_rate or optimizer.learning_rate
        # the seed of expert 0: the baseline starts from the very weights that expert starts from
        network = builder.single(job.network, "network", derive_seed(config.seed, "expert", 0))
        self.macs = builder.macs_of(network)
        self.engine = engine_for("single", network, config, groups.world, groups, device, self.learning_rate)
        self.averages = averages_of([self.engine], config.training.ema_decay)
        training = config.training
        self.step = SingleStep(
            self.engine,
            groups.world,
            label_smoothing=training.label_smoothing,
            call_empty=training.batchnorm == "group",
            average=self.averages.get("single"),
            teacher=configured_teacher(config, builder.info, device),
            skips=training.non_finite == "skip",
        )

    def engines(self) -> list[NetworkEngine]:
        return [self.engine]

    def router_state(self) -> dict[str, Any]:
        return {}

    def load_router_state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def set_learning_rate(self, factor: float) -> None:
        self.engine.set_learning_rate(factor * self.learning_rate)

    def metrics(self, sums: StepSums) -> dict[str, float]:
        total = reduced(sums, ("expert_loss",), self.groups, self.device)
        return {"train/loss": total["expert_loss"] / max(1.0, total["images"])}

    def evaluate(self, batches: Batches) -> dict[str, float]:
        right, images = self.step.accuracy(batches("validation"), self.config.training.precision)
        return {"val/top1": right / images}

    def finish(self, batches: Batches, step: int) -> None:
        result = {}
        for split in self.splits:
            right, images = self.step.accuracy(batches(split), self.config.training.precision)
            result[split] = {"split": split, "images": images, "top1": right / images, "macs": self.macs, "step": step}
        if self.groups.rank == 0:
            for split, figures in result.items():
                write_json(self.run_dir / f"evaluation-{split}.json", figures)
