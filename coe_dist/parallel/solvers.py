"""Where the transportation problems of a step are solved; every choice gives the same answer.

replicated: every rank solves the global problem (no further communication).
rank0:      rank 0 solves, the others receive the result.
local:      every rank solves its own rows only (`scope: local`, another rule: balance holds per rank).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from coe_dist.coe import modules
from coe_dist.parallel.groups import Group


class Solver(Protocol):
    """Solves for the global batch; all ranks call it with the same arguments and get the same results.

    ids_N: sample ids, int64 [N]. sizes: rows of each rank, N together. Failing collectives raise TrainingError.
    """

    def assign(self, selection_NE: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The balanced assignment of the selection logits, float [N,E] -> int64 [N]."""

    def start_labels(
        self, losses_Nk: torch.Tensor, experts_Nk: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]
    ) -> Callable[[], torch.Tensor]:
        """Starts label generation; the returned function gives labels [N,k], in the dtype of the losses, float [N,k].
        experts_Nk: dispatch sets, int64 [N,k]."""

    def close(self) -> None:
        """Ends what the solver started."""


class Problems:
    """The two problems of a step, solved in this process, with the dual prices of the last step as a warm start.

    rule, temperature: of modules.selection_labels.
    """

    def __init__(self, experts: int, rule: str, temperature: float) -> None:
        self.experts, self.rule, self.temperature = experts, rule, temperature
        self.prices_E: np.ndarray | None = None

    def assign(self, selection_NE: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """See modules.route: float [N,E], int64 [N] -> int64 [N] on the logits' device."""
        solved = modules.route(selection_NE.cpu(), ids_N.cpu(), warm_prices_E=self.prices_E)
        self.prices_E = solved.prices_E
        return torch.from_numpy(solved.expert_N).to(selection_NE.device)

    def labels(self, losses_Nk: torch.Tensor, experts_Nk: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        """See modules.selection_labels: float [N,k], int64 [N,k], int64 [N] -> labels [N,k]."""
        return modules.selection_labels(
            losses_Nk,
            experts_Nk,
            experts=self.experts,
            rule=self.rule,
            temperature=self.temperature,
            sample_ids_N=ids_N,
        )


class ReplicatedSolver:
    """Every rank solves the whole problem; no collectives."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def assign(self, selection_NE: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return self.problems.assign(selection_NE, ids_N)

    def start_labels(
        self, losses_Nk: torch.Tensor, experts_Nk: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]
    ) -> Callable[[], torch.Tensor]:
        labels_Nk = self.problems.labels(losses_Nk, experts_Nk, ids_N)
        return lambda: labels_Nk

    def close(self) -> None:
        pass


class RankZeroSolver:
    """Rank 0 solves and broadcasts the answers."""

    def __init__(self, problems: Problems, world: Group, rank: int) -> None:
        self.problems, self.world, self.rank = problems, world, rank

    def _share(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world.handle is not None:
            with self.world.naming_failures("broadcast of the router's result"):
                dist.broadcast(tensor, src=0, group=self.world.handle)
        return tensor

    def assign(self, selection_NE: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        result = self.problems.assign(selection_NE, ids_N) if self.rank == 0 else ids_N.new_empty(ids_N.shape)
        return self._share(result)

    def start_labels(
        self, losses_Nk: torch.Tensor, experts_Nk: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]
    ) -> Callable[[], torch.Tensor]:
        solved = self.problems.labels(losses_Nk, experts_Nk, ids_N) if self.rank == 0 else torch.empty_like(losses_Nk)
        return lambda: self._share(solved.contiguous())

    def close(self) -> None:
        pass


class LocalSolver:
    """Solves this rank's rows only; the assignments are gathered so that every rank still derives the whole plan."""

    def __init__(self, problems: Problems, world: Group, rank: int) -> None:
        self.problems, self.world, self.rank = problems, world, rank

    def _rows(self, sizes: list[int]) -> slice:
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def assign(self, selection_NE: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        rows = self._rows(sizes)
        return self.world.all_gather_rows(self.problems.assign(selection_NE[rows], ids_N[rows]), sizes)[0]

    def start_labels(
        self, losses_Nk: torch.Tensor, experts_Nk: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]
    ) -> Callable[[], torch.Tensor]:
        rows = self._rows(sizes)
        labels_Nk = torch.zeros_like(losses_Nk)  # the other ranks' rows are never read here
        labels_Nk[rows] = self.problems.labels(losses_Nk[rows], experts_Nk[rows], ids_N[rows])
        return lambda: labels_Nk

    def close(self) -> None:
        pass
