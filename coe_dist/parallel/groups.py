"""The process groups of a placement, each with a timeout, and the collectives that name themselves when they fail."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from coe_dist.errors import TrainingError
from coe_dist.parallel.placement import ExpertPlacement

# torch 2.14 renames it and warns at every first use of the old name
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


_GLOO_SOURCE = re.compile(r"^\[\S*/gloo/")  # the path of the machine it was built on
_GLOO_GUESS = " This is typically caused by"


@dataclass(frozen=True)
class Group:
    """One process group. `handle` is None when it has a single member: then no collective is ever issued."""

    name: str
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """How many ranks are members."""
        return len(self.ranks)

    @contextmanager
    def naming_failures(self, what: str) -> Iterator[None]:
        """Turns a failed or timed-out collective into a TrainingError that names rank and group."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            rank = dist.get_rank() if dist.is_initialized() else 0
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            line = _GLOO_SOURCE.sub("[gloo/", line).partition(_GLOO_GUESS)[0]
            raise TrainingError(
                f"rank {rank}, group {self.name!r} (ranks {list(self.ranks)}): {what} failed: {line}"
            ) from error

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the group in place; returns it. Raises TrainingError (see naming_failures). Collective."""
        if self.handle is not None:
            with self.naming_failures("all-reduce"):
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def all_gather_rows(self, rows: torch.Tensor, sizes: list[int] | None = None) -> tuple[torch.Tensor, list[int]]:
        """Every member's `rows` [n,...], whose n may differ, in rank order: [sum of n,...], and the n. Raises
        TrainingError (see naming_failures). Collective.

        `sizes` are the members' lengths if the caller knows them already (from an earlier gather of the same rows).
        """
        if self.handle is None:
            return rows, [rows.shape[0]]
        with self.naming_failures("all-gather"):
            if sizes is None:
                mine = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
                all_sizes = mine.new_empty(self.size)
                _all_gather(all_sizes, mine, group=self.handle)
                sizes = all_sizes.tolist()
            longest = max(sizes)
            padded = (
                rows
                if rows.shape[0] == longest
                else torch.cat([rows, rows.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
            )
            gathered = rows.new_empty(self.size * longest, *rows.shape[1:])
            _all_gather(gathered, padded.contiguous(), group=self.handle)
        if all(size == longest for size in sizes):
            return gathered, sizes
        parts = gathered.view(self.size, longest, *rows.shape[1:])
        return torch.cat([parts[member, :size] for member, size in enumerate(sizes)]), sizes


@dataclass(frozen=True)
class Groups:
    """All groups this rank belongs to."""

    placement: ExpertPlacement
    rank: int
    world: Group
    alone: dist.ProcessGroup | None  # this rank by itself: DeepSpeed wants a group object even for one member
    experts: dict[int, Group]  # hosted global expert id -> its replica group

    @property
    def hosted(self) -> tuple[int, ...]:
        """Global ids of the experts on this rank, ascending."""
        return self.placement.experts_of_rank[self.rank]


def _new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup | None:
    """None on ranks that are not members. Collective over the world, also for them."""
    created = dist.new_group(list(ranks), timeout=timeout)
    return created if isinstance(created, dist.ProcessGroup) else None


def create_groups(experts: int, *, timeout_seconds: float) -> Groups:
    """Creates the groups of ExpertPlacement(experts, world size). Collective: every rank calls it.

    Without an initialised torch.distributed the world is this process alone.
    """
    if not dist.is_initialized():
        placement = ExpertPlacement(experts, 1)
        members = {expert: Group(f"expert {expert}", (0,), None) for expert in range(experts)}
        return Groups(placement, 0, Group("world", (0,), None), None, members)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    timeout = timedelta(seconds=timeout_seconds)
    placement = ExpertPlacement(experts, world_size)
    everyone = tuple(range(world_size))
    world = Group("world", everyone, _new_group(everyone, timeout) if world_size > 1 else None)
    alone = None
    for member in everyone:  # every rank takes part in the creation of every group, in the same order
        created = _new_group([member], timeout)
        alone = created if member == rank else alone
    hosted: dict[int, Group] = {}
    for expert, ranks in enumerate(placement.ranks_of_expert):
        handle = _new_group(ranks, timeout) if len(ranks) > 1 else None
        if rank in ranks:
            hosted[expert] = Group(f"expert {expert}", ranks, handle)
    return Groups(placement, rank, world, alone, hosted)
