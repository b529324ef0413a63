"""Who holds what, and what travels: images, pairs, experts and bytes of every rank of one global micro-batch.

Counts that depend on the router's answer are expectations: the assignment is balanced, so each expert has kN/E pairs
(within k of it), and over the dispatch permutations the k experts of an image are a uniformly random set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb

import numpy as np
import numpy.typing as npt

from coe_dist.coe.modules import sent_count
from coe_dist.data.order import share
from coe_dist.parallel.exchange import HEADER_BYTES
from coe_dist.parallel.placement import ExpertPlacement

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """One micro-batch of `batch` images on a world of ranks, `per_node` of them on a machine. Arrays are [world]."""

    experts: int
    per_sample: int  # k
    batch: int  # N
    world: int
    image_bytes: int  # C * H * W, uint8
    per_node: int
    sent_share: float = 1.0  # of the batch: what experts learn from

    @cached_property
    def placement(self) -> ExpertPlacement:
        return ExpertPlacement(self.experts, self.world)

    @property
    def nodes(self) -> int:
        return -(-self.world // self.per_node)

    @cached_property
    def images(self) -> Floats:
        """Rows of the global batch on each rank."""
        bounds = [share(self.batch, rank, self.world) for rank in range(self.world)]
        return np.array([stop - start for start, stop in bounds], dtype=np.float64)

    @property
    def dispatched(self) -> int:
        """Images that experts learn from."""
        return sent_count(self.batch, self.sent_share)

    @cached_property
    def sent(self) -> Floats:
        """Images of each rank that experts learn from."""
        return self.images * (self.dispatched / self.batch)

    @cached_property
    def hosted(self) -> Floats:
        """Experts on each rank."""
        return np.array([len(experts) for experts in self.placement.experts_of_rank], dtype=np.float64)

    @cached_property
    def replicas(self) -> Floats:
        """Of the experts on each rank."""
        replicas = [self.placement.replicas(experts[0]) for experts in self.placement.experts_of_rank]
        return np.array(replicas, dtype=np.float64)

    @cached_property
    def rows_of_expert(self) -> Floats:
        """Pairs of each expert that a rank hosts, its replicas sharing them."""
        return self.per_sample * self.dispatched / self.experts / self.replicas

    @cached_property
    def pairs(self) -> Floats:
        """(image, expert) pairs that each rank computes."""
        return self.hosted * self.rows_of_expert

    @property
    def largest_replica_group(self) -> int:
        return max(self.placement.replicas(expert) for expert in range(self.experts))

    @cached_property
    def _chances(self) -> Floats:
        """Probability that a rank wants a given image of a rank that hosts other experts. Replicas keep the pairs of
        their own images (they have room for them), so they want none of each other."""
        if self.experts < self.world:
            return self.rows_of_expert / self.dispatched
        sets = comb(self.experts, self.per_sample)
        without = {int(h): comb(self.experts - int(h), self.per_sample) / sets for h in np.unique(self.hosted)}
        return 1.0 - np.array([without[int(h)] for h in self.hosted])

    @cached_property
    def _siblings(self) -> npt.NDArray[np.int64]:
        """The same number for ranks that host the same experts."""
        return np.array([experts[0] for experts in self.placement.experts_of_rank], dtype=np.int64)

    def _of_others(self, values: Floats) -> Floats:
        """For each rank the sum of `values` over the ranks that host other experts."""
        others: Floats = values.sum() - np.bincount(self._siblings, weights=values)[self._siblings]
        return others

    @cached_property
    def images_sent(self) -> Floats:
        """Images that each rank sends to other ranks; an image goes to a rank once."""
        return self.sent * self._of_others(self._chances)

    @cached_property
    def images_received(self) -> Floats:
        return self._of_others(self.sent) * self._chances

    @cached_property
    def pairs_sent(self) -> Floats:
        """Pairs of each rank's own images that another rank computes."""
        if self.experts >= self.world:
            return self.sent * self.per_sample * (1.0 - self.hosted / self.experts)
        return self.images_sent  # a rank hosts one expert, so each pair has its own image

    @cached_property
    def pairs_received(self) -> Floats:
        if self.experts >= self.world:
            return (self.dispatched - self.sent) * self.per_sample * self.hosted / self.experts
        return self.images_received

    @cached_property
    def bytes_sent(self) -> Floats:
        """uint8 images and headers that each rank sends in dispatch()."""
        return self.images_sent * self.image_bytes + self.pairs_sent * HEADER_BYTES

    @cached_property
    def bytes_received(self) -> Floats:
        return self.images_received * self.image_bytes + self.pairs_received * HEADER_BYTES

    @property
    def bytes_gathered(self) -> float:
        """Of the batch, on every rank: selection logits (with the confidence where that decides who is sent), ids and
        losses."""
        confidence = 4.0 if self.sent_share < 1.0 else 0.0
        return self.batch * (4.0 * self.experts + confidence + 8) + self.dispatched * 4.0 * self.per_sample

    @cached_property
    def share_between_nodes(self) -> Floats:
        """Fraction of what a rank sends that leaves its machine, as if the replicas of an expert drew from all ranks
        alike (in fact low ranks send to low replicas)."""
        others = self._of_others(self._chances)
        node = np.arange(self.world) // self.per_node
        both = np.unique(np.stack([node, self._siblings]), axis=1, return_inverse=True)[1].reshape(-1)
        near = np.bincount(node, weights=self._chances)[node] - np.bincount(both, weights=self._chances)[both]
        share: Floats = np.divide(others - near, others, out=np.zeros(self.world), where=others > 0)
        return share.clip(0.0, 1.0) if self.nodes > 1 else np.zeros(self.world)

    @cached_property
    def bytes_taken(self) -> Floats:
        """Image bytes that each rank takes out of its batch, where experts learn from a part of it."""
        taken = self.sent if self.sent_share < 1.0 else np.zeros(self.world)
        return taken * self.image_bytes

    @cached_property
    def bytes_copied(self) -> Floats:
        """Image bytes that each rank copies in its own memory: taken out of the batch where experts learn from a part
        of it, gathered and joined for sending, joined with its own after receiving (not on a single rank), and gathered
        for each expert."""
        pool = 0.0 if self.world == 1 else (self.sent + self.images_received) * self.image_bytes
        return self.bytes_taken + 2 * self.bytes_sent + pool + self.pairs * self.image_bytes


def all_reduce_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank of a ring (or of recursive halving and doubling) sends to sum `size` bytes over `ranks`."""
    return 2 * (ranks - 1) / ranks * size


def all_gather_bytes(total: float, ranks: int) -> float:
    """Bytes that each rank receives to hold all `total` bytes of `ranks` equal parts."""
    return (ranks - 1) / ranks * total
