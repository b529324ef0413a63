"""Which rank hosts which expert: pure arithmetic, for any number of experts and any world size (our own rule).

E >= W: contiguous blocks of experts whose sizes differ by at most one, larger blocks first (6 on 4 -> 2, 2, 1, 1).
E <  W: contiguous blocks of ranks, likewise; the ranks of a block are the replicas of one expert (4 on 6 -> 2, 2, 1,
1). So a rank hosts several experts or one replica, never both, and nothing needs to divide anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


def block(total: int, index: int, parts: int) -> range:
    """The `index`-th of `parts` contiguous blocks of range(total); sizes differ by at most one, larger ones first.

    Raises ValueError for an index outside 0 to parts - 1.
    """
    if not 0 <= index < parts:
        raise ValueError(f"block index: {index} is not allowed; give a whole number from 0 to {parts - 1}")
    small, larger = divmod(total, parts)
    start = index * small + min(index, larger)
    return range(start, start + small + (index < larger))


@dataclass(frozen=True)
class ExpertPlacement:
    """Placement of `experts` global expert ids on `world_size` ranks. Raises ValueError when either is below 1."""

    experts: int
    world_size: int

    def __post_init__(self) -> None:
        for field in ("experts", "world_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: {getattr(self, field)} is not allowed; give a whole number of at least 1")

    @cached_property
    def ranks_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """For each global expert id the ranks that host it, ascending; more than one are replicas."""
        if self.experts < self.world_size:
            return tuple(tuple(block(self.world_size, expert, self.experts)) for expert in range(self.experts))
        hosts = [0] * self.experts
        for rank in range(self.world_size):
            for expert in block(self.experts, rank, self.world_size):
                hosts[expert] = rank
        return tuple((rank,) for rank in hosts)

    @cached_property
    def experts_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """For each rank the global ids of the experts it hosts, ascending; never empty."""
        hosted: list[list[int]] = [[] for _ in range(self.world_size)]
        for expert, ranks in enumerate(self.ranks_of_expert):
            for rank in ranks:
                hosted[rank].append(expert)
        return tuple(tuple(experts) for experts in hosted)

    def replicas(self, expert: int) -> int:
        """How many ranks host the expert."""
        return len(self.ranks_of_expert[expert])

    def writer(self, expert: int) -> int:
        """The one rank of the replica group that writes the expert's files."""
        return self.ranks_of_expert[expert][0]

    def load_imbalance(self) -> float:
        """Largest rank's share of the experts' work relative to an even share (1.0 is perfect), at balanced experts."""
        work = [sum(1 / self.replicas(expert) for expert in experts) for experts in self.experts_of_rank]
        return max(work) * self.world_size / self.experts
