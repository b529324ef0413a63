from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.parallel.placement import ExpertPlacement, block


@given(experts=st.integers(1, 40), world_size=st.integers(1, 40))
def test_every_expert_has_ranks_and_every_rank_has_work(experts: int, world_size: int) -> None:
    placement = ExpertPlacement(experts, world_size)
    assert len(placement.ranks_of_expert) == experts
    for expert, ranks in enumerate(placement.ranks_of_expert):
        assert ranks == tuple(sorted(set(ranks)))
        assert placement.writer(expert) == ranks[0]
        for rank in ranks:
            assert expert in placement.experts_of_rank[rank]
    hosted = [len(of_rank) for of_rank in placement.experts_of_rank]
    replicas = [placement.replicas(expert) for expert in range(experts)]
    assert min(hosted) >= 1
    assert max(hosted) - min(hosted) <= 1
    assert max(replicas) - min(replicas) <= 1
    assert sum(hosted) == sum(replicas) == max(experts, world_size)
    assert placement.load_imbalance() >= 1 - 1e-9


@pytest.mark.parametrize(
    ("experts", "world_size", "expected"),
    [
        (6, 4, ((0, 1), (2, 3), (4,), (5,))),
        (4, 6, ((0,), (0,), (1,), (1,), (2,), (3,))),
        (3, 2, ((0, 1), (2,))),
        (4, 1, ((0, 1, 2, 3),)),
        (2, 2, ((0,), (1,))),
    ],
)
def test_known_layouts(experts: int, world_size: int, expected: tuple[tuple[int, ...], ...]) -> None:
    assert ExpertPlacement(experts, world_size).experts_of_rank == expected


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="world_size: 0 is not allowed"):
        ExpertPlacement(4, 0)
    with pytest.raises(ValueError, match="block index: 3 is not allowed"):
        block(10, 3, 3)
