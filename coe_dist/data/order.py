"""Which sample comes when, and which rank reads it. Pure arithmetic (our own rules).

Everything random here is counter-based: a number is a hash of (key, counter), so that it depends neither on how many
numbers were drawn before it, nor on the batch, nor on the rank.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coe_dist.seeds import derive_seed

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def hash_counters(key: int, counters: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """SplitMix64 of the counters (any shape, whole numbers >= 0) under a 63-bit key; one-to-one for a fixed key."""
    x = np.atleast_1d(np.asarray(counters)).astype(np.uint64)  # arrays wrap around silently, scalars would warn
    x = (x + np.uint64(1)) * _GOLDEN + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return (x ^ (x >> np.uint64(31))).reshape(np.shape(counters))


def permutation(count: int, key: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..count-1 (int64). The hash is one-to-one, so there are no ties, and no library's generator
    whose stream may change between versions is involved."""
    return np.argsort(hash_counters(key, np.arange(count))).astype(np.int64)


def epoch_order(count: int, seed: int, epoch: int, *, shuffle: bool) -> npt.NDArray[np.int64]:
    """The global order of one epoch: sample ids (int64, [count]), each exactly once. Without shuffle: file order."""
    if not shuffle:
        return np.arange(count, dtype=np.int64)
    return permutation(count, derive_seed(seed, "order", epoch))


def share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [start, stop) of `total` items that belongs to `rank`.

    Parts differ by at most one item, larger parts first. They cover everything once, in rank order.
    Raises ValueError when rank is not in 0..world_size-1 or total is negative.
    """
    if not 0 <= rank < world_size or total < 0:
        raise ValueError(
            f"share: total={total}, rank={rank}, world_size={world_size}; need total >= 0 and 0 <= rank < world_size"
        )
    small, extra = divmod(total, world_size)
    start = rank * small + min(rank, extra)
    return start, start + small + (rank < extra)


def rank_batches(
    order_N: npt.NDArray[np.int64], global_batch: int, rank: int, world_size: int, start_step: int = 0
) -> list[npt.NDArray[np.int64]]:
    """This rank's sample ids of each global batch t = order[t*G:(t+1)*G] from start_step on; some may be empty.

    All but the last have the same size and no part of the last is larger than that.
    """
    batches = []
    for first in range(start_step * global_batch, len(order_N), global_batch):
        batch_G = order_N[first : first + global_batch]
        start, stop = share(len(batch_G), rank, world_size)
        batches.append(batch_G[start:stop])
    return batches
