"""The peer of our training step: a plain single-process PyTorch loop over the same networks, without any routing.

The delegator learns from all N images, each expert from its own kN/E, as if a loader had always known whose they are:
the peer is handed ready expert batches, selection labels and variance weights. One SGD optimizer steps all networks
with its multi-tensor kernels; nothing is checked for finiteness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from coe_dist.coe import modules
from coe_dist.config import OptimizerConfig
from coe_dist.parallel.exchange import ExpertBatch
from coe_dist.parallel.router import Router, Routing
from coe_dist.training.step import MicroBatch


class RecordingRouter(Router):
    """A router that also keeps what it last answered. Takes over the state of the router it replaces."""

    routing_kept: Routing
    labels_kept: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, original: Router) -> None:
        self.__dict__.update(original.__dict__)

    def route(
        self, selection_BE: torch.Tensor, ids_B: torch.Tensor, step: int, confidence_B: torch.Tensor | None = None
    ) -> Routing:
        self.routing_kept = super().route(selection_BE, ids_B, step, confidence_B)
        return self.routing_kept

    def start_labels(
        self, losses_Bk: torch.Tensor, routing: Routing
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        finish = super().start_labels(losses_Bk, routing)

        def keep() -> tuple[torch.Tensor, torch.Tensor]:
            self.labels_kept = finish()
            return self.labels_kept

        return keep


@dataclass(frozen=True)
class PlainBatch:
    """What a step of the plain loop learns from: all images, and the experts' share of them."""

    images: torch.Tensor  # uint8 [N,C,H,W]
    labels: torch.Tensor  # int64 [N]
    experts_Nk: torch.Tensor
    labels_Nk: torch.Tensor  # of the selection
    variance_N: torch.Tensor
    shares: list[ExpertBatch]  # in the order of the experts


def plain_batch(batch: MicroBatch, router: RecordingRouter) -> PlainBatch:
    """The batch as our step routed it last (world size 1)."""
    routing = router.routing_kept
    assert routing.chosen_S is None, "rows are those of the whole batch"
    shares = []
    for expert in range(router.experts):
        rows, columns = torch.nonzero(routing.experts_Nk == expert, as_tuple=True)
        shares.append(ExpertBatch(batch.images[rows], batch.labels[rows], routing.weights_k[columns]))
    return PlainBatch(batch.images, batch.labels, routing.experts_Nk, *router.labels_kept, shares)


class PlainLoop:
    """`delegator` and `experts` are ordinary modules with parameters of their own."""

    def __init__(self, delegator: nn.Module, experts: list[nn.Module], config: OptimizerConfig) -> None:
        self.networks = nn.ModuleList([delegator, *experts]).train()
        parameters = list(self.networks.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )

    def step(self, batch: PlainBatch) -> None:
        delegator, *experts = self.networks
        samples = len(batch.labels)
        for expert, share in zip(experts, batch.shares, strict=True):
            losses = F.cross_entropy(expert(share.images), share.labels, reduction="none")
            ((losses * share.weights).sum() / samples).backward()  # type: ignore[no-untyped-call]
        class_logits_NC, selection_NE = delegator(batch.images)
        classes = F.cross_entropy(class_logits_NC, batch.labels, reduction="sum")
        selection_N = modules.selection_losses(selection_NE, batch.experts_Nk, batch.labels_Nk) * batch.variance_N
        ((classes + selection_N.sum()) / samples).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
