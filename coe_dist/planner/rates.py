"""How fast a machine is, as numbers: the same form whether they are tabulated or measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cost:
    """Seconds of a piece of work of n rows: fixed + each * n, and never less than `floor` (launching its kernels)."""

    fixed: float
    each: float
    floor: float = 0.0

    def seconds(self, rows: float) -> float:
        return max(self.floor, self.fixed + self.each * rows)

    def towards(self, other: Cost, share: float) -> Cost:
        """On the straight line from this cost (share 0) to the other (share 1)."""
        return Cost(*(a + share * (b - a) for a, b in zip(_fields(self), _fields(other), strict=True)))


def _fields(cost: Cost) -> tuple[float, float, float]:
    return cost.fixed, cost.each, cost.floor


@dataclass(frozen=True)
class Link:
    """What connects workers: seconds until a message starts to arrive, and bytes per second of one worker, each way."""

    latency: float
    bytes_per_second: float

    def seconds(self, size: float, rounds: float) -> float:
        """`size` bytes sent in `rounds` messages, one after another."""
        return rounds * self.latency + size / self.bytes_per_second


def collective_rounds(ranks: int) -> int:
    """Messages one after another of a tree or of recursive doubling."""
    return math.ceil(math.log2(ranks)) if ranks > 1 else 0


@dataclass(frozen=True)
class RouterRates:
    """Seconds of the router's own work on one core, each a Cost in the images N of a micro-batch.

    They hold for the E and k that they were made for.
    """

    assign: Cost  # the transportation problem, dispatch sets included
    labels: Cost  # selection labels and variance weights
    plan: Cost  # the exchange plan on one rank
    plan_peer: float  # more for each rank


@dataclass(frozen=True)
class Rates:
    """Everything the time of a step is computed from."""

    source: str  # "tabulated: ..." or "measured: ..."
    device: str
    delegator: Cost  # forward, loss and backward of n images, seconds
    expert: Cost
    delegator_step: float  # norm, clipping, optimizer and, where the run has one, the average of the weights
    expert_step: float
    router: RouterRates
    inside: Link  # between workers of one machine
    inside_sums: Link  # the same for all-reduce
    between: Link  # between machines
    copy_bytes_per_second: float  # gathering rows of images in the device's memory
    small_operation: float  # seconds of an operation on a few numbers
    loader_seconds_per_image: float  # of one core
    cores_per_worker: float
    memory_bytes: float  # of one worker
    framework_bytes: float  # that a worker takes without any network
    per_node: int  # workers on a machine
    teacher: Cost | None = None  # its forward pass; none without distillation

    def towards(self, other: Rates, share: float) -> Rates:
        """What the size of the images changes, on the straight line to the other rates; all else is this one's."""
        teacher = self.teacher
        return replace(
            self,
            delegator=self.delegator.towards(other.delegator, share),
            expert=self.expert.towards(other.expert, share),
            teacher=teacher.towards(other.teacher, share) if teacher and other.teacher else teacher,
            loader_seconds_per_image=self.loader_seconds_per_image
            + share * (other.loader_seconds_per_image - self.loader_seconds_per_image),
        )
