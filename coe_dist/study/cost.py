"""How long trainings will take: counted work times what it takes here, by the finished trainings of the study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coe_dist.data.sidecar import SplitInfo
from coe_dist.errors import InputError
from coe_dist.study.trainings import Training
from coe_dist.training.networks import NetworkBuilder
from coe_dist.training.teacher import unlearned_teacher

# of one core of a 2-core machine (small_cnn, engine torch); only until a training of the study has finished
SECONDS_A_NETWORK_STEP = 5.5e-3  # forward, backward and optimizer step, whatever the batch
SECONDS_A_SAMPLE = 3e-5  # decoding, activations and norms
SECONDS_A_MAC = 1.4e-10


def counted_seconds(training: Training, train: SplitInfo) -> float:
    """Seconds by the constants above: network steps, samples and MACs (three times the forward's, of a teacher once)
    of all epochs.

    Raises InputError naming the point when a network refuses its options.
    """
    config, builder = training.config, NetworkBuilder(training.config, train)
    passes: list[tuple[float, int]]  # of each network, over an image
    try:
        if training.network is None:
            delegator, experts = builder.collaboration_macs()
            passes = [(1, delegator), (config.expert_samples, experts[0])]
        else:
            passes = [(1, builder.macs_of(builder.single(training.network, "experts", 0)))]
        if config.distillation is not None:
            taught = 1.0 if training.network or config.distillation.delegator else config.experts.share
            passes.append((taught / 3, builder.macs_of(unlearned_teacher(config, train).network)))
    except InputError as error:
        raise InputError(f"curves.{training.curve}.points.{training.point}: {error}") from None
    images = min(train.count, config.data.limit or train.count)
    steps = -(-images // config.micro_batch)
    networks = 1 if training.network else 1 + config.experts.count
    return config.training.epochs * (
        steps * networks * SECONDS_A_NETWORK_STEP
        + images * sum(times * (SECONDS_A_SAMPLE + 3 * macs * SECONDS_A_MAC) for times, macs in passes)
    )


def calibration(finished: Iterable[tuple[float, float]]) -> float:
    """Seconds a counted second takes: total of what was measured over total of what was counted, (counted, measured)
    each; 1 without any."""
    pairs = list(finished)
    counted = sum(pair[0] for pair in pairs)
    return sum(pair[1] for pair in pairs) / counted if counted > 0 else 1.0


def makespan(seconds: Sequence[float], slots: int) -> float:
    """Seconds until the last of these, begun in order on whatever slot is free, has ended."""
    ends = [0.0] * slots
    for one in seconds:
        first = min(range(slots), key=lambda slot: ends[slot])
        ends[first] += one
    return max(ends)
