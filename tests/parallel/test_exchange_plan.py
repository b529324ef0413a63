"""The exchange without processes: the plans of all ranks must fit together, for any dispatch sets and sizes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.parallel.exchange import HEADER_BYTES, ExchangePlan, combine, destinations, dispatch, plan_exchange
from coe_dist.parallel.groups import Group
from coe_dist.parallel.placement import ExpertPlacement


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], ExpertPlacement]:
    experts, world_size = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    k = draw(st.integers(1, experts))
    sizes = draw(st.lists(st.integers(0, 7), min_size=world_size, max_size=world_size))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skewed = draw(st.booleans())
    rows = [np.arange(k) if skewed else random.permutation(experts)[:k] for _ in range(sum(sizes))]
    sets = np.array(rows, dtype=np.int64).reshape(-1, k)
    return torch.from_numpy(sets), sizes, ExpertPlacement(experts, world_size)


def plans_of(sets: torch.Tensor, sizes: list[int], placement: ExpertPlacement) -> list[ExchangePlan]:
    return [plan_exchange(sets, sizes, placement, rank) for rank in range(placement.world_size)]


@given(problems())
def test_senders_and_receivers_agree_and_every_pair_is_computed_once(
    problem: tuple[torch.Tensor, list[int], ExpertPlacement],
) -> None:
    sets, sizes, placement = problem
    plans = plans_of(sets, sizes, placement)
    for sender, plan in enumerate(plans):
        for receiver in range(placement.world_size):
            assert len(plan.send_pairs[receiver]) == plans[receiver].receive_pairs[sender]
            if receiver != sender:
                assert len(plan.send_images[receiver]) == plans[receiver].receive_images[sender]
                assert len(plan.send_images[receiver].unique()) == len(plan.send_images[receiver])
        sent = torch.cat(plan.send_pairs)
        assert sorted(sent.tolist()) == list(range(sizes[sender] * sets.shape[1])), "no pair is dropped or doubled"
        assert plan.bytes_sent(0) == HEADER_BYTES * sum(
            len(pairs) for other, pairs in enumerate(plan.send_pairs) if other != sender
        )
    for expert in range(placement.experts):
        hosts = [plans[rank] for rank in placement.ranks_of_expert[expert]]
        counts = [len(plan.expert_pairs[expert]) for plan in hosts]
        assert sum(counts) == int((sets == expert).sum()) == hosts[0].expert_totals[expert]
        assert max(counts) - min(counts) <= 1, "replicas share an expert's pairs evenly"


@given(problems())
def test_rows_stay_at_home_where_they_fit(problem: tuple[torch.Tensor, list[int], ExpertPlacement]) -> None:
    sets, sizes, placement = problem
    source = np.repeat(np.arange(placement.world_size), sizes)
    dest = destinations(sets.numpy(), source, placement)
    for expert, ranks in enumerate(placement.ranks_of_expert):
        here = sets.numpy() == expert
        share = -(-int(here.sum()) // len(ranks))
        for rank in ranks:
            from_home = here & (source[:, None] == rank)
            kept = int((from_home & (dest == rank)).sum())
            assert kept >= min(int(from_home.sum()), share - 1) or kept == int(from_home.sum())


@given(problems())
def test_one_rank_exchanges_with_itself_without_communication(
    problem: tuple[torch.Tensor, list[int], ExpertPlacement],
) -> None:
    sets, sizes, placement = problem
    alone, rows, k = ExpertPlacement(placement.experts, 1), sum(sizes), sets.shape[1]
    plan = plan_exchange(sets, [rows], alone, 0)
    images = torch.arange(rows, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    labels, weights = torch.arange(rows) * 3, torch.arange(rows * k, dtype=torch.float32).view(rows, k)
    world = Group("world", (0,), None)
    batches = dispatch(plan, images, labels, weights, world)
    for expert, batch in batches.items():
        wanted = [(row, column) for row in range(rows) for column in range(k) if sets[row, column] == expert]
        assert batch.images[:, 0, 0, 0].tolist() == [row for row, _ in wanted]
        assert batch.labels.tolist() == [3 * row for row, _ in wanted]
        assert batch.weights.tolist() == [float(row * k + column) for row, column in wanted]
    back = combine(plan, {expert: batch.weights + 0.5 for expert, batch in batches.items()}, world)()
    assert torch.equal(back, weights + 0.5)
