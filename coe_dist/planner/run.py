"""A run that is planned, on any number of workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from coe_dist.coe.distillation import BYTES_PER_LOGIT
from coe_dist.config import RunConfig
from coe_dist.data.progressive import resolution_of
from coe_dist.planner.facts import ForwardFacts, NetworkFacts
from coe_dist.planner.layout import Layout
from coe_dist.planner.rates import Rates
from coe_dist.planner.step import StepTime, mean_step, predict_step

LARGEST_WORLD = 65_536  # as workers.count


@dataclass(frozen=True)
class Run:
    """What is planned: a configuration, its two kinds of network and its teacher, its data set, the rates of a machine.

    Where training images grow (data.progressive), `smallest` holds the rates for the first ones; for sizes in between
    they lie on a straight line in the number of pixels (our own rule: within some percent of counting each size).
    """

    config: RunConfig
    delegator: NetworkFacts
    expert: NetworkFacts
    channels: int
    train_images: int
    validation_images: int
    rates: Rates  # for images of data.resolution
    smallest: Rates | None = None  # for images of data.progressive.start
    teacher: ForwardFacts | None = None
    classes: int = 1000  # a teacher names no more of them

    def layout(self, world: int, side: int | None = None) -> Layout:
        """side: of the images, in pixels; none: data.resolution. An image travels with its teacher's hints."""
        config = self.config
        hints = 0 if config.distillation is None else BYTES_PER_LOGIT * min(config.distillation.top, self.classes)
        return Layout(
            experts=config.experts.count,
            per_sample=config.experts_per_sample,
            batch=config.micro_batch,
            world=world,
            image_bytes=self.channels * (side or config.data.resolution) ** 2 + hints,
            per_node=self.rates.per_node,
            sent_share=config.experts.share,
        )

    @property
    def stages(self) -> dict[int, int]:
        """Side of the training images in pixels -> number of epochs, in the order of training."""
        data = self.config.data
        return dict(
            Counter(
                resolution_of(epoch, data.resolution, data.progressive) for epoch in range(self.config.training.epochs)
            )
        )

    def rates_at(self, side: int) -> Rates:
        growing, full = self.config.data.progressive, self.config.data.resolution
        if growing is None or self.smallest is None:
            return self.rates
        share = (side**2 - growing.start**2) / (full**2 - growing.start**2)
        return self.smallest.towards(self.rates, share)

    def step_at(self, world: int, side: int) -> StepTime:
        return predict_step(self.config, self.layout(world, side), self.rates_at(side), self.delegator, self.expert)

    def step(self, world: int) -> StepTime:
        """The mean over all epochs."""
        return mean_step([(self.step_at(world, side), epochs) for side, epochs in self.stages.items()])

    def images_per_second(self, world: int) -> float:
        return self.config.training.global_batch / self.step(world).seconds

    def with_changes(self, **sections: dict[str, Any]) -> Run:
        """The same run with other settings, which must not change the networks or the sizes of images."""
        changed = {name: getattr(self.config, name).model_copy(update=values) for name, values in sections.items()}
        return replace(self, config=self.config.model_copy(update=changed))
