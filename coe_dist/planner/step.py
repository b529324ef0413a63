"""Seconds of one training step, part by part, on the slowest ranks (training/step.py is what is predicted).

The parts follow each other, because each needs the one before and a collective stands between them; so a step takes the
sum over the parts of the slowest rank's seconds in each. Two things overlap. FFCV's thread decodes the next batches
meanwhile, which costs nothing while there are free cores (see `_with_loader`). One float per pair travels back while
the experts run backward; only the start of that transfer is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coe_dist.config import RunConfig
from coe_dist.planner.facts import NetworkFacts
from coe_dist.planner.layout import Layout, all_gather_bytes, all_reduce_bytes
from coe_dist.planner.rates import Link, Rates, collective_rounds

PARTS = ("loader", "delegator", "route", "teacher", "exchange", "experts", "reduce", "optimizer")
PEER_OPERATIONS = 20  # small operations of dispatch() and combine() for each other rank
EXPERT_OPERATIONS = 8  # and for each hosted expert
_ELEMENT = {"fp32": 4, "bf16": 4, "fp64": 8}


@dataclass(frozen=True)
class StepTime:
    parts: dict[str, float]  # seconds of a whole optimizer step, in the order of PARTS
    slowest_rank: int  # whose experts have most to do
    waits_for_loader: bool  # decoding alone takes longer than all else

    @property
    def work(self) -> float:
        """Seconds without waiting for images."""
        return self.seconds - self.parts["loader"]

    @property
    def bottleneck(self) -> str:
        return "loader" if self.waits_for_loader else max(self.parts, key=self.parts.__getitem__)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def predict_step(
    config: RunConfig, layout: Layout, rates: Rates, delegator: NetworkFacts, expert: NetworkFacts
) -> StepTime:
    """A step of config.training.accumulation micro-batches; `layout` is of one of them."""
    repeats = config.training.accumulation
    pairs = zip(layout.hosted.tolist(), layout.rows_of_expert.tolist(), strict=True)
    computing = [hosted * rates.expert.seconds(rows) for hosted, rows in pairs]
    taught = layout.images if config.distillation and config.distillation.delegator else layout.sent
    work = {
        "delegator": repeats * rates.delegator.seconds(float(layout.images.max())),
        "route": repeats * _route(config, layout, rates),
        "teacher": repeats * rates.teacher.seconds(float(taught.max())) if rates.teacher else 0.0,
        "exchange": repeats * _exchange(layout, rates),
        "experts": repeats * max(computing),
        "reduce": _reduce(config, layout, rates, delegator, expert),
        "optimizer": rates.delegator_step + float(layout.hosted.max()) * rates.expert_step,
    }
    return _with_loader(config, layout, rates, work, computing.index(max(computing)))


def mean_step(steps: Sequence[tuple[StepTime, int]]) -> StepTime:
    """The mean of steps, each as often as the number beside it says. It waits for the loader where most of its time
    goes by in steps that do."""
    count = sum(times for _, times in steps)
    parts = {name: sum(step.parts[name] * times for step, times in steps) / count for name in PARTS}
    waiting = sum(step.seconds * times for step, times in steps if step.waits_for_loader)
    slowest, _ = max(steps, key=lambda pair: pair[0].seconds * pair[1])
    return StepTime(parts, slowest.slowest_rank, waits_for_loader=2 * waiting > count * sum(parts.values()))


def _with_loader(
    config: RunConfig, layout: Layout, rates: Rates, work: dict[str, float], slowest_rank: int
) -> StepTime:
    """What the cores of a machine allow: workers beyond the cores take turns, and decoding that finds no free core is
    added to the step."""
    workers = min(layout.world, layout.per_node)
    cores = rates.cores_per_worker * rates.per_node
    threads = config.workers.threads if rates.device in ("cpu", "here") else 1
    turns = max(1.0, workers * threads / cores)
    busy = sum(work.values())
    decoding = config.training.accumulation * float(layout.images.max()) * rates.loader_seconds_per_image
    alone = decoding / config.data.loader_threads
    shared = max(busy * turns, workers * (busy * threads + decoding) / cores)
    parts = {"loader": max(shared, alone) - busy * turns}
    parts |= {name: seconds * turns for name, seconds in work.items()}
    return StepTime(parts, slowest_rank, waits_for_loader=alone > shared)


def _route(config: RunConfig, layout: Layout, rates: Rates) -> float:
    """Gathers of logits, ids and losses; the two problems, solved on each rank (or of its rows only); the plan."""
    solved = layout.dispatched / layout.world if config.router.scope == "local" else layout.dispatched
    router = rates.router
    seconds = router.assign.seconds(solved) + router.labels.seconds(solved)
    seconds += router.plan.seconds(layout.dispatched) + router.plan_peer * layout.world
    link, rounds = _link(layout, rates, layout.world), collective_rounds(layout.world)
    return seconds + link.seconds(all_gather_bytes(layout.bytes_gathered, layout.world), 4 * rounds)


def _exchange(layout: Layout, rates: Rates) -> float:
    sent, received, outside = layout.bytes_sent, layout.bytes_received, layout.share_between_nodes
    between = max(float((sent * outside).max()), float((received * outside).max()))
    inside = max(float((sent * (1 - outside)).max()), float((received * (1 - outside)).max()))
    operations = PEER_OPERATIONS * (layout.world - 1) + EXPERT_OPERATIONS * float(layout.hosted.max())
    seconds = operations * rates.small_operation + float(layout.bytes_copied.max()) / rates.copy_bytes_per_second
    if layout.world > 1:
        seconds += 2 * (rates.inside if layout.nodes == 1 else rates.between).latency
        seconds += max(between / rates.between.bytes_per_second, inside / rates.inside.bytes_per_second)
    return seconds


def _link(layout: Layout, rates: Rates, ranks: int) -> Link:
    """Of a ring over `ranks` neighbouring ranks: between machines, one ring for each worker of a machine."""
    if ranks <= layout.per_node:
        return rates.inside_sums
    together = rates.between.bytes_per_second * layout.per_node
    return Link(rates.between.latency, min(rates.inside_sums.bytes_per_second, together))


def _reduce(config: RunConfig, layout: Layout, rates: Rates, delegator: NetworkFacts, expert: NetworkFacts) -> float:
    """Gradients of the delegator over all ranks and of replicated experts over their replicas, the sums of split
    BatchNorm layers, and the votes with which a step ends."""
    element, seconds = _ELEMENT[config.training.precision], 0.0
    for facts, ranks in ((delegator, layout.world), (expert, layout.largest_replica_group)):
        if ranks == 1:
            continue
        link, rounds, size = _link(layout, rates, ranks), 2 * collective_rounds(ranks), facts.parameters * element
        seconds += link.seconds(all_reduce_bytes(size, ranks), rounds)
        seconds += 2 * size / rates.copy_bytes_per_second  # into one flat tensor and back
        if config.training.batchnorm == "group":
            layers = 2 * facts.batchnorms * config.training.accumulation  # forward and backward
            seconds += layers * rounds * link.latency
    return seconds + 2 * collective_rounds(layout.world) * _link(layout, rates, layout.world).latency
