"""The peer of our exchange: DeepSpeed's mixture-of-experts layer, expert-parallel over all ranks, dropless, top-1.

It is made to do the same job: the gate is forced to the given assignment (without its linear layer, and without the
random token selection that only matters when tokens are dropped), and an expert is a whole network on an image that
travels as one token of C*H*W values.

deepspeed_moe:   the layer as it is: float32 images out, and back rows as long as a token, because the layer demands an
                 output of its input's size.
deepspeed_parts: the layer's own functions in its order, arranged as favourably as they allow: uint8 images out, and
                 only the class logits back. Nobody offers this; it shows what is left of the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from coe_dist.bench.exchange_work import CLASSES, Work
from coe_dist.training.deepspeed_engine import prepare_deepspeed

_CERTAIN = 200.0  # softmax of one logit this high among zeros is exactly 1 in float32


class _TokenExpert(nn.Module):
    """Tokens [.., C*H*W] -> logits [.., width], zeros behind the C class logits."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.network, self.shape, self.width = network, shape, width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.network(tokens.reshape(-1, *self.shape))
        return F.pad(logits, (0, self.width - CLASSES)).reshape(*tokens.shape[:-1], self.width)


class DeepSpeedExchange:
    """A Way (exchange_work.py); `favourable` is deepspeed_parts. The number of experts must be divisible by the ranks.

    Collective: it creates DeepSpeed's groups.
    """

    def __init__(
        self, experts: int, shape: tuple[int, ...], build: Callable[[int], nn.Module], *, favourable: bool
    ) -> None:
        deepspeed = prepare_deepspeed()
        from deepspeed.moe.layer import MoE

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        world_size = dist.get_world_size()
        hosted = experts // world_size
        token = torch.Size(shape).numel()
        self.favourable = favourable
        expert = _TokenExpert(build(0), shape, CLASSES if favourable else token)
        layer = MoE(
            token,
            expert,
            num_experts=experts,
            ep_size=world_size,
            k=1,
            drop_tokens=False,
            use_rts=False,
            min_capacity=0,
        )
        layer.deepspeed_moe.gate = _assigned_gate(token, experts)
        layer.set_deepspeed_parallelism()
        self.layer = layer
        self.networks: dict[int, nn.Module] = {}
        for index, copy in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert_id = dist.get_rank() * hosted + index
            copy.network.load_state_dict(build(expert_id).state_dict())
            self.networks[expert_id] = copy.network

    def __call__(self, work: Work) -> torch.Tensor:
        self.layer.deepspeed_moe.gate.assigned = work.experts
        if self.favourable:
            logits = self._parts(work.images.flatten(1))
        else:
            logits = self.layer(work.pixels.flatten(1))[0][:, :CLASSES]
        losses = F.cross_entropy(logits, work.labels, reduction="none")
        (losses.sum() / work.samples).backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _parts(self, tokens: torch.Tensor) -> torch.Tensor:
        from deepspeed.moe import sharded_moe as parts

        moe = self.layer.deepspeed_moe
        _, capacity, experts, indices, locations, gates, _ = moe.gate(tokens, None, True)
        slots = parts._route_slots(indices, locations, experts, int(capacity))
        sent = parts._AllToAll.apply(moe.ep_group, parts._sparse_encode(tokens, slots, experts, int(capacity)))
        answers = moe.experts(sent.reshape(moe.ep_size, moe.num_local_experts, -1, tokens.shape[1]))
        returned = parts._AllToAll.apply(moe.ep_group, answers.reshape(experts, -1, CLASSES))
        logits: torch.Tensor = parts._sparse_decode(returned.reshape(-1, CLASSES), slots, gates, len(tokens))
        return logits


def _assigned_gate(token: int, experts: int) -> Any:
    from deepspeed.moe.sharded_moe import TopKGate, top1gating

    class AssignedGate(TopKGate):  # type: ignore[misc]
        """DeepSpeed's top-1 gating on logits that leave no choice."""

        assigned: torch.Tensor

        def forward(self, tokens: Any, used: Any = None, sparse_routes: bool = False, use_tutel: bool = False) -> Any:
            logits = F.one_hot(self.assigned, experts) * _CERTAIN
            return top1gating(
                logits,
                self.capacity_factor,
                self.min_capacity,
                used,
                drop_tokens=False,
                use_rts=False,
                ep_group=self.ep_group,
                sparse_routes=sparse_routes,
                use_tutel=use_tutel,
            )

    return AssignedGate(token, experts, k=1, min_capacity=0, drop_tokens=False, use_rts=False)
