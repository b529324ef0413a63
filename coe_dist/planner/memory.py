"""Peak memory of a rank in one training step.

All experts of a rank run forward before the first runs backward, and the delegator's activations are kept through that
(training/step.py), so the activations of every network of a rank are alive at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from coe_dist.config import RunConfig
from coe_dist.planner.facts import ForwardFacts, NetworkFacts
from coe_dist.planner.layout import Layout

# tensors of the size of a parameter that an optimizer keeps for it
OPTIMIZER_TENSORS = {"sgd": 1, "adamw": 2, "rmsprop": 2, "lamb": 2}
_LOADER_BATCHES = 5  # FFCV's slots (three batches ahead and the one being filled), and the batch in use
_ELEMENT = {"fp32": 4, "bf16": 4, "fp64": 8}  # bf16 is autocast: parameters stay float32


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step."""

    weights: float
    gradients: float  # also the flat copy in which they are reduced
    optimizer: float  # also the partition of float32 copies that ZeRO steps from
    averages: float
    activations: float
    images: float  # uint8, in the loader and in the exchange
    framework: float  # libraries, the device's context

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))


def optimizer_tensors(config: RunConfig) -> int:
    optimizer = config.training.optimizer
    plain = optimizer.momentum == 0 and optimizer.name in ("sgd", "rmsprop")
    return OPTIMIZER_TENSORS[optimizer.name] - plain


def fullest_rank(
    config: RunConfig,
    layout: Layout,
    delegator: NetworkFacts,
    expert: NetworkFacts,
    framework: float,
    teacher: ForwardFacts | None = None,
) -> tuple[int, Memory]:
    """The rank that needs most, and what it needs."""
    kinds: dict[tuple[float, ...], int] = {}  # ranks differ in few ways only
    for rank, kind in enumerate(zip(layout.images, layout.hosted, layout.rows_of_expert, strict=True)):
        kinds.setdefault(tuple(kind), rank)
    all_kinds = [
        (rank, of_rank(config, layout, rank, delegator, expert, framework, teacher)) for rank in kinds.values()
    ]
    return max(all_kinds, key=lambda pair: pair[1].total)


def of_rank(
    config: RunConfig,
    layout: Layout,
    rank: int,
    delegator: NetworkFacts,
    expert: NetworkFacts,
    framework: float,
    teacher: ForwardFacts | None = None,
) -> Memory:
    """See the module. An expert's replicas all hold it whole; ZeRO partitions over its replicas, over all ranks for
    the delegator. Of a teacher only the weights count: its activations are gone before the experts' come."""
    training, element = config.training, _ELEMENT[config.training.precision]
    replicas = layout.placement.replicas(layout.placement.experts_of_rank[rank][0])
    weights = gradients = optimizer = averages = 0.0
    if teacher is not None:
        weights = float(teacher.parameters * element + teacher.buffers * 4)
    for facts, count, ranks in ((delegator, 1, layout.world), (expert, int(layout.hosted[rank]), replicas)):
        size = count * facts.parameters * element
        weights += size + count * facts.buffers * 4
        gradients += size / (ranks if training.zero_stage == 2 else 1)
        if ranks > 1:  # one network is reduced at a time
            gradients = max(gradients, gradients + facts.parameters * element)
        partition = size / (ranks if training.zero_stage else 1)
        optimizer += partition * (optimizer_tensors(config) + (training.zero_stage > 0))
        averages += size + count * facts.buffers * 4 if training.ema_decay is not None else 0.0
    rows, sent_rows, pairs = (np.ceil(counts[rank]) for counts in (layout.images, layout.sent, layout.pairs))
    activations = rows * delegator.saved_bytes_per_image + pairs * expert.saved_bytes_per_image
    received, sent = layout.bytes_received[rank], layout.bytes_sent[rank]
    pool = 0.0 if layout.world == 1 else sent_rows * layout.image_bytes + received
    exchange = layout.bytes_taken[rank] + sent + received + pool + pairs * layout.image_bytes
    return Memory(
        weights=float(weights),
        gradients=float(gradients),
        optimizer=float(optimizer),
        averages=float(averages),
        activations=float(activations),
        images=float(_LOADER_BATCHES * rows * layout.image_bytes + exchange),
        framework=framework,
    )
