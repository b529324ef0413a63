"""A run that is planned, on any number of workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from coe_dist.config import RunConfig
from coe_dist.planner.facts import NetworkFacts
from coe_dist.planner.layout import Layout
from coe_dist.planner.rates import Rates
from coe_dist.planner.step import StepTime, predict_step

LARGEST_WORLD = 65_536  # as workers.count


@dataclass(frozen=True)
class Run:
    """What is planned: a configuration, its two kinds of network, its data set and the rates of a machine."""

    config: RunConfig
    delegator: NetworkFacts
    expert: NetworkFacts
    channels: int
    train_images: int
    validation_images: int
    rates: Rates

    def layout(self, world: int) -> Layout:
        config = self.config
        return Layout(
            experts=config.experts.count,
            per_sample=config.experts_per_sample,
            batch=config.micro_batch,
            world=world,
            image_bytes=self.channels * config.data.resolution**2,
            per_node=self.rates.per_node,
        )

    def step(self, world: int) -> StepTime:
        return predict_step(self.config, self.layout(world), self.rates, self.delegator, self.expert)

    def images_per_second(self, world: int) -> float:
        return self.config.training.global_batch / self.step(world).seconds

    def with_changes(self, **sections: dict[str, Any]) -> Run:
        """The same run with other settings, which must not change the networks."""
        changed = {name: getattr(self.config, name).model_copy(update=values) for name, values in sections.items()}
        return replace(self, config=self.config.model_copy(update=changed))
