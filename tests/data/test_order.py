import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coe_dist.data.order import epoch_order, hash_counters, permutation, rank_batches, share


def test_hash_is_splitmix64() -> None:
    # the published first outputs of the generator with seed 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash_counters(0, np.arange(3)).tolist() == expected


@given(st.integers(0, 2**63 - 1), st.integers(0, 2000))
def test_permutation_has_each_number_once(key: int, count: int) -> None:
    assert np.array_equal(np.sort(permutation(count, key)), np.arange(count))


def test_permutation_is_fair() -> None:
    places = np.array([permutation(8, key).argsort() for key in range(4000)])
    counts = np.array([np.bincount(places[:, item], minlength=8) for item in range(8)])
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_epochs_differ_and_repeat() -> None:
    orders = [epoch_order(100, 7, epoch, shuffle=True) for epoch in range(5)]
    assert len({order.tobytes() for order in orders}) == 5
    assert np.array_equal(orders[3], epoch_order(100, 7, 3, shuffle=True))
    assert not np.array_equal(orders[3], epoch_order(100, 8, 3, shuffle=True))
    assert np.array_equal(epoch_order(5, 7, 3, shuffle=False), np.arange(5))


@given(st.integers(0, 300), st.integers(1, 40))
def test_shares_cover_everything_once_in_rank_order(total: int, world: int) -> None:
    parts = [share(total, rank, world) for rank in range(world)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("total", "rank", "world"), [(-1, 0, 1), (4, 2, 2), (4, -1, 2), (4, 0, 0)])
def test_share_refuses(total: int, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="world_size"):
        share(total, rank, world)


@given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 9), st.integers(0, 3))
def test_ranks_together_read_the_global_batches(count: int, batch: int, world: int, start: int) -> None:
    order = permutation(count, 1)
    per_rank = [rank_batches(order, batch, rank, world, start) for rank in range(world)]
    steps = max(-(-count // batch) - start, 0)
    assert [len(batches) for batches in per_rank] == [steps] * world
    for step in range(steps):
        together = np.concatenate([batches[step] for batches in per_rank])
        assert np.array_equal(together, order[(start + step) * batch : (start + step + 1) * batch])
    for batches in per_rank:  # FFCV cuts one list into equal batches: only the last may be smaller
        assert len({len(ids) for ids in batches[:-1]}) <= 1
        assert not batches or all(len(ids) >= len(batches[-1]) for ids in batches)
