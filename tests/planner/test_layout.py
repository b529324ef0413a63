"""Counts of a layout against brute force: real dispatch sets, real exchange plans of every rank."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.coe.modules import dispatch_sets, step_permutation
from coe_dist.parallel.exchange import ExchangePlan, plan_exchange
from coe_dist.parallel.placement import ExpertPlacement
from coe_dist.planner.layout import Layout, all_gather_bytes, all_reduce_bytes

IMAGE = 784
STEPS = 24


def plans_of(layout: Layout, step: int) -> list[ExchangePlan]:
    """The plans of all ranks for one balanced assignment in random order."""
    generator = torch.Generator().manual_seed(step)
    dispatched = ceil(layout.sent_share * layout.batch)
    order = torch.randperm(dispatched, generator=generator)
    sets_Nk = dispatch_sets(
        order % layout.experts,
        step_permutation(0, step, layout.experts),
        experts=layout.experts,
        per_sample=layout.per_sample,
    )
    ends = layout.images.cumsum()
    sent = torch.randperm(layout.batch, generator=generator)[:dispatched]
    sizes = np.histogram(sent.numpy(), bins=[0, *ends])[0].tolist()
    placement = ExpertPlacement(layout.experts, layout.world)
    return [plan_exchange(sets_Nk, sizes, placement, rank) for rank in range(layout.world)]


@pytest.mark.parametrize(
    ("experts", "per_sample", "world", "share"),
    [
        *((4, 2, 1, 1.0), (4, 2, 2, 1.0), (6, 2, 4, 1.0), (6, 3, 4, 1.0), (16, 2, 4, 1.0)),
        *((4, 4, 2, 1.0), (2, 2, 3, 1.0), (3, 2, 7, 1.0), (2, 2, 8, 1.0), (5, 5, 5, 1.0)),
        *((4, 2, 1, 0.6), (6, 2, 4, 0.6), (3, 2, 5, 0.4)),
    ],
)
def test_counts_are_those_of_real_plans(experts: int, per_sample: int, world: int, share: float) -> None:
    layout = Layout(experts, per_sample, 240, world, IMAGE, per_node=2, sent_share=share)
    sent, received, pairs, pairs_sent, hosted, between = (np.zeros((STEPS, world)) for _ in range(6))
    for step in range(STEPS):
        for rank, plan in enumerate(plans_of(layout, step)):
            others = [other for other in range(world) if other != rank]
            away = [other for other in others if other // 2 != rank // 2]
            sent[step, rank] = plan.bytes_sent(IMAGE)
            received[step, rank] = sum(plan.receive_images[o] * IMAGE + plan.receive_pairs[o] * 8 for o in others)
            between[step, rank] = sum(len(plan.send_images[o]) * IMAGE + len(plan.send_pairs[o]) * 8 for o in away)
            pairs[step, rank] = sum(len(rows) for rows in plan.expert_pairs.values())
            pairs_sent[step, rank] = sum(len(plan.send_pairs[o]) for o in others)
            hosted[step, rank] = len(plan.expert_pairs)
    assert (hosted == layout.hosted).all()
    assert pairs.sum(1) == pytest.approx(layout.pairs.sum())
    # an expert has kN/E pairs within k, and its replicas share them within one
    assert (abs(pairs - layout.pairs) <= layout.hosted * (per_sample + 1)).all()
    noise = {"rel": 0.05, "abs": 3 * IMAGE}
    assert sent.mean(0) == pytest.approx(layout.bytes_sent, **noise)
    assert received.mean(0) == pytest.approx(layout.bytes_received, **noise)
    assert pairs_sent.mean(0) == pytest.approx(layout.pairs_sent, rel=0.05, abs=3)
    assert sent.sum(1).mean() == pytest.approx(layout.bytes_sent.sum(), rel=0.02)
    leaving = layout.bytes_sent * layout.share_between_nodes
    assert between.sum(1).mean() == pytest.approx(leaving.sum(), rel=0.12)
    if experts >= world:
        assert between.mean(0) == pytest.approx(leaving, **noise)
    if world == 1:
        assert layout.bytes_sent.sum() == 0


@given(
    experts=st.integers(2, 40),
    per_sample=st.integers(1, 40),
    batch=st.integers(1, 500),
    world=st.integers(1, 60),
    per_node=st.integers(1, 9),
    share=st.floats(0.01, 1.0),
)
def test_what_is_sent_is_received_and_nothing_is_lost(
    experts: int, per_sample: int, batch: int, world: int, per_node: int, share: float
) -> None:
    layout = Layout(experts, min(per_sample, experts), batch, world, IMAGE, per_node, share)
    assert layout.images.sum() == batch
    assert layout.pairs.sum() == pytest.approx(layout.dispatched * layout.per_sample)
    assert layout.bytes_sent.sum() == pytest.approx(layout.bytes_received.sum())
    assert layout.pairs_sent.sum() == pytest.approx(layout.pairs_received.sum())
    assert (layout.bytes_sent >= 0).all()
    assert (layout.pairs_sent <= layout.images * layout.per_sample + 1e-9).all()
    assert (layout.images_sent <= layout.pairs_sent + 1e-9).all()
    assert (layout.share_between_nodes >= 0).all()
    assert (layout.share_between_nodes <= 1 + 1e-9).all()
    if layout.nodes == 1:
        assert (layout.share_between_nodes == 0).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_ring_bytes_against_a_ring(ranks: int) -> None:
    """Each rank passes a part on in each of ranks-1 rounds to sum, and as often to gather."""
    size = ranks * 100
    sent = np.zeros(ranks)
    for _ in range(2 * (ranks - 1)):
        sent += size / ranks
    assert all_reduce_bytes(size, ranks) == sent[0] == sent[-1]
    assert all_gather_bytes(size, ranks) == (ranks - 1) * size / ranks
