"""From every rank's selection logits to the assignment, the dispatch plan and the selection labels of the global batch.

The one place where the method (coe_dist.coe.modules) meets the processes. Where the transportation problems are solved
is a Solver's business (coe_dist.parallel.solvers); all of them give identical plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from coe_dist.coe import modules
from coe_dist.errors import TrainingError
from coe_dist.parallel.exchange import ExchangePlan, plan_exchange
from coe_dist.parallel.groups import Groups
from coe_dist.parallel.solvers import Solver


class NonFiniteError(TrainingError):
    """A logit, loss or gradient is NaN or infinite. Raised on all ranks of the step together."""


@dataclass(frozen=True)
class Routing:
    """The router's answer for one global micro-batch."""

    plan: ExchangePlan
    sizes: list[int]  # rows of each rank
    ids_N: torch.Tensor  # sample ids, int64 [N]
    experts_Nk: torch.Tensor  # dispatch sets, int64 [N,k]; column 0 is the assigned expert
    weights_k: torch.Tensor  # loss weights of the columns, float32 [k]
    rows: slice  # this rank's rows of the global batch

    @property
    def samples(self) -> int:
        """N: images of the global micro-batch."""
        return int(self.ids_N.shape[0])

    @property
    def experts_Bk(self) -> torch.Tensor:
        """This rank's rows of the dispatch sets, int64 [B,k]."""
        return self.experts_Nk[self.rows]

    def load_E(self, experts: int) -> torch.Tensor:
        """Images assigned to each expert, int64 [E] on the CPU."""
        return torch.bincount(self.experts_Nk[:, 0].cpu(), minlength=experts)


class Router:
    """WGM before the experts, LGM and VCM after them, on the global batch whatever the number of ranks.

    per_sample: k. generalist_weight: lambda of modules.dispatch_weights, which raises ValueError for what it does not
    allow. variance: without it every image has VCM weight 1. seed: of the dispatch permutations.
    """

    def __init__(
        self,
        groups: Groups,
        solver: Solver,
        *,
        experts: int,
        per_sample: int,
        generalist_weight: float,
        variance: bool,
        seed: int,
    ) -> None:
        self.groups, self.solver = groups, solver
        self.experts, self.per_sample, self.variance, self.seed = experts, per_sample, variance, seed
        self.weights_k = modules.dispatch_weights(experts, per_sample, generalist_weight)

    def route(self, selection_BE: torch.Tensor, ids_B: torch.Tensor, step: int) -> Routing:
        """Assigns the global batch. selection float [B,E], ids int64 [B]; `step` counts micro-batches and names the
        dispatch permutation. Raises NonFiniteError when any rank's logits are not finite. Collective."""
        selection_NE, sizes = self.groups.world.all_gather_rows(selection_BE.detach())
        ids_N, _ = self.groups.world.all_gather_rows(ids_B, sizes)
        if not bool(torch.isfinite(selection_NE).all()):
            raise NonFiniteError("the delegator's selection logits are not finite (NaN or infinity)")
        assignment_N = self.solver.assign(selection_NE, ids_N, sizes)
        permutation = modules.step_permutation(self.seed, step, self.experts)
        experts_Nk = modules.dispatch_sets(assignment_N, permutation, experts=self.experts, per_sample=self.per_sample)
        return self.routing(experts_Nk, ids_N, sizes)

    def routing(self, experts_Nk: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]) -> Routing:
        """Wraps given dispatch sets (used by route, and to replay recorded ones).

        experts_Nk int64 [N,k] and ids_N int64 [N], rows in rank order; sizes: rows of each rank, N together.
        """
        rank = self.groups.rank
        start = sum(sizes[:rank])
        plan = plan_exchange(experts_Nk, sizes, self.groups.placement, rank)
        weights_k = self.weights_k.to(experts_Nk.device)
        return Routing(plan, sizes, ids_N, experts_Nk, weights_k, slice(start, start + sizes[rank]))

    def start_labels(
        self, losses_Bk: torch.Tensor, routing: Routing
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Starts labelling; the returned function gives this rank's selection labels [B,k] and VCM weights [B].

        losses_Bk: cross-entropy of each dispatched pair, float [B,k]; both answers have its dtype. Raises
        NonFiniteError on all ranks together. Collective; the returned function must be called on every rank too.
        """
        losses_Nk, _ = self.groups.world.all_gather_rows(losses_Bk, routing.sizes)
        if not bool(torch.isfinite(losses_Nk).all()):
            broken = torch.unique(routing.experts_Nk[~torch.isfinite(losses_Nk)]).tolist()
            raise NonFiniteError(f"the losses of experts {broken} are not finite (NaN or infinity)")
        pending = self.solver.start_labels(losses_Nk, routing.experts_Nk, routing.ids_N, routing.sizes)
        variance_N = modules.variance_weights(losses_Nk) if self.variance else torch.ones_like(losses_Nk[:, 0])

        def finish() -> tuple[torch.Tensor, torch.Tensor]:
            return pending()[routing.rows], variance_N[routing.rows]

        return finish
