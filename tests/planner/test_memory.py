"""Memory against what real engines hold after a step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from planner.planned import planned

from coe_dist.bench.planning import data_of
from coe_dist.parallel.groups import create_groups
from coe_dist.planner.memory import fullest_rank, of_rank
from coe_dist.planner.run import Run
from coe_dist.training.ema import WeightAverage
from coe_dist.training.networks import NetworkBuilder, averages_of, collaboration_engines


def memory_of(run: Run, world: int, rank: int):
    return of_rank(run.config, run.layout(world), rank, run.delegator, run.expert, framework=0.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_gradients_optimizer_and_averages_are_those_of_real_engines(optimizer: str) -> None:
    training = {"optimizer": {"name": optimizer, "learning_rate": 0.01}, "ema_decay": 0.9}
    run = planned(training=training)
    info, _, _ = data_of(run.config)
    delegator, experts = collaboration_engines(
        run.config, NetworkBuilder(run.config, info), create_groups(3, timeout_seconds=300), torch.device("cpu")
    )
    engines = [delegator, *experts.values()]
    images, gradients = torch.zeros(4, 1, 28, 28, dtype=torch.uint8), 0
    for engine in engines:
        output = engine(images)
        logits, selection = output if isinstance(output, tuple) else (output, None)
        loss = F.cross_entropy(logits, torch.arange(4))
        engine.backward(loss if selection is None else loss + selection.square().sum(), last=True)
        gradients += sum(p.grad.nbytes for p in engine.network.parameters() if p.grad is not None)
        assert engine.step()
    averages: dict[str, WeightAverage] = averages_of(engines, 0.9)
    memory = memory_of(run, 1, 0)

    def held(network: torch.nn.Module) -> int:
        return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))

    state = [value for e in engines for entry in e.optimizer_state().values() for value in entry.values()]
    counters = sum(buffer.numel() for e in engines for buffer in e.network.buffers() if buffer.ndim == 0)
    # counters are int64, the planner takes every buffer for float32
    assert memory.weights == sum(held(e.network) for e in engines) - 4 * counters
    assert memory.averages == sum(held(average.network) for average in averages.values()) - 4 * counters
    assert memory.gradients == gradients
    assert memory.optimizer == sum(value.nbytes for value in state if value.ndim > 0)
    assert memory.total == sum(v for k, v in vars(memory).items())


def test_activations_grow_with_the_images_and_with_the_pairs_of_a_rank() -> None:
    run = planned(experts={"count": 3, "per_sample": 3})
    small, large = memory_of(run, 2, 0), memory_of(run.with_changes(training={"global_batch": 192}), 2, 0)
    assert large.activations == 2 * small.activations
    # 48 images for the delegator; two experts of 96 pairs each on rank 0, one on rank 1
    expected = 48 * run.delegator.saved_bytes_per_image + 192 * run.expert.saved_bytes_per_image
    assert small.activations == expected
    assert memory_of(run, 2, 1).activations < expected
    rank, fullest = fullest_rank(run.config, run.layout(2), run.delegator, run.expert, 0.0)
    assert rank == 0
    assert fullest == small


def test_the_fullest_rank_is_found_among_all() -> None:
    for world in (1, 2, 3, 4, 7):
        run = planned()
        rank, fullest = fullest_rank(run.config, run.layout(world), run.delegator, run.expert, 0.0)
        every = [memory_of(run, world, other).total for other in range(world)]
        assert fullest.total == max(every) == every[rank]


def test_zero_stages_divide_over_the_replicas() -> None:
    def at(stage: int):
        run = planned(training={"engine": "deepspeed", "zero_stage": stage})
        return memory_of(run, 6, 0), run

    (plain, run), (first, _), (second, _) = at(0), at(1), at(2)
    delegator, expert = 4 * run.delegator.parameters, 4 * run.expert.parameters
    assert plain.optimizer == delegator + expert
    assert first.optimizer == pytest.approx(2 * (delegator / 6 + expert / 2))  # momentum and the stepped copy
    assert second.gradients < first.gradients == plain.gradients
    assert plain.weights == first.weights == second.weights
