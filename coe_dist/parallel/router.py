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
    """The router's answer for the N images of one global micro-batch that experts learn from."""

    plan: ExchangePlan
    sizes: list[int]  # rows of each rank
    ids_N: torch.Tensor  # sample ids, int64 [N]
    experts_Nk: torch.Tensor  # dispatch sets, int64 [N,k]; column 0 is the assigned expert
    weights_k: torch.Tensor  # loss weights of the columns, float32 [k]
    rows: slice  # this rank's rows of these N
    batch_images: int  # of the whole global micro-batch, N or more
    chosen_S: torch.Tensor | None  # which of this rank's images they are, ascending, int64 [S]; None: all of them

    @property
    def samples(self) -> int:
        """N."""
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
    allow. variance: without it every image has VCM weight 1. seed: of the dispatch permutations. share: the part of the
    global batch, rounded up, that experts learn from (modules.least_sure).
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
        share: float = 1.0,
    ) -> None:
        self.groups, self.solver = groups, solver
        self.experts, self.per_sample, self.variance, self.seed = experts, per_sample, variance, seed
        self.share = share
        self.weights_k = modules.dispatch_weights(experts, per_sample, generalist_weight)

    def route(
        self, selection_BE: torch.Tensor, ids_B: torch.Tensor, step: int, confidence_B: torch.Tensor | None = None
    ) -> Routing:
        """Assigns the global batch, or the images of it that experts learn from. selection float [B,E], ids int64 [B];
        `step` counts micro-batches and names the dispatch permutation. confidence: the delegator's largest class
        probability, float [B], given where `share` is below 1 and only there. Raises NonFiniteError when any rank's
        logits are not finite, those of the classes too where the confidence is given. Collective.
        """
        assert (confidence_B is None) == (self.share == 1.0), "confidences go with a share below 1"
        answers = selection_BE.detach()
        if confidence_B is not None:  # travels as one more column
            answers = torch.cat([answers, confidence_B.detach()[:, None].to(answers.dtype)], dim=1)
        answers, sizes = self.groups.world.all_gather_rows(answers)
        ids_N, _ = self.groups.world.all_gather_rows(ids_B, sizes)
        selection_NE = answers[:, : self.experts]
        if not bool(torch.isfinite(answers).all()):
            kind = "class" if bool(torch.isfinite(selection_NE).all()) else "selection"
            raise NonFiniteError(f"the delegator's {kind} logits are not finite (NaN or infinity)")
        batch_images, chosen_S = len(ids_N), None
        if confidence_B is not None:
            chosen_N = modules.least_sure(answers[:, -1], ids_N, modules.sent_count(batch_images, self.share))
            selection_NE, ids_N = selection_NE[chosen_N], ids_N[chosen_N]
            chosen_S, sizes = self._own(chosen_N, sizes)
        assignment_N = self.solver.assign(selection_NE, ids_N, sizes)
        permutation = modules.step_permutation(self.seed, step, self.experts)
        experts_Nk = modules.dispatch_sets(assignment_N, permutation, experts=self.experts, per_sample=self.per_sample)
        return self.routing(experts_Nk, ids_N, sizes, batch_images, chosen_S)

    def _own(self, chosen_N: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Of chosen rows of the global batch, ascending: this rank's, counted from its first; and how many each rank
        has. sizes: rows of each rank."""
        ends = torch.tensor(sizes, device=chosen_N.device).cumsum(0)
        below = torch.searchsorted(chosen_N, ends).tolist()  # chosen rows before each rank's end
        before, rank = [0, *below], self.groups.rank
        mine = chosen_N[before[rank] : before[rank + 1]] - sum(sizes[:rank])
        return mine, [after - first for first, after in zip(before, below, strict=False)]

    def routing(
        self,
        experts_Nk: torch.Tensor,
        ids_N: torch.Tensor,
        sizes: list[int],
        batch_images: int | None = None,
        chosen_S: torch.Tensor | None = None,
    ) -> Routing:
        """Wraps given dispatch sets (used by route, and to replay recorded ones).

        experts_Nk int64 [N,k] and ids_N int64 [N], rows in rank order; sizes: rows of each rank, N together.
        batch_images, chosen_S: see Routing; by default the N images are all there are.
        """
        rank = self.groups.rank
        start = sum(sizes[:rank])
        plan = plan_exchange(experts_Nk, sizes, self.groups.placement, rank)
        weights_k = self.weights_k.to(experts_Nk.device)
        rows = slice(start, start + sizes[rank])
        return Routing(plan, sizes, ids_N, experts_Nk, weights_k, rows, batch_images or len(ids_N), chosen_S)

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
