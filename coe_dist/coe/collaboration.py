"""The model a user holds: delegator and experts, early termination, grouped inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from coe_dist.coe.early_exit import exits, probabilities

FINAL_RULES = ("expert", "average")


class Answer(NamedTuple):
    """The answer to a batch, rows in the order of the images."""

    probabilities_NC: torch.Tensor  # class probabilities, float32 (float64 for float64 networks)
    expert_N: torch.Tensor  # the expert that was used, int64; -1: the image exited early
    macs_N: torch.Tensor  # MACs spent on the image, int64


class CollaborationOfExperts(nn.Module):
    """A delegator and its experts; an image costs the delegator and at most ONE expert (the paper's framework).

    delegator: images_NCHW -> (class logits [N,C], selection logits [N,E]). experts: E networks, images_NCHW -> logits
    [N,C]. threshold: an image whose rough prediction has at least this confidence exits early; None: none does.
    final: an image that does not exit gets the class probabilities of the expert of largest selection logit
    ("expert"; ties: lowest id) or their mean with the delegator's ("average"). Both are our own rules.

    Used for inference only: call `.eval()` first. The answer to an image does not depend on the rest of its batch,
    beyond floating point's rounding. Raises ValueError for an unknown `final` or unequal numbers of experts and of
    their MACs.
    """

    def __init__(
        self,
        delegator: nn.Module,
        experts: Sequence[nn.Module],
        *,
        threshold: float | None,
        final: str,
        delegator_macs: int,
        expert_macs: Sequence[int],
    ) -> None:
        super().__init__()
        if final not in FINAL_RULES:
            raise ValueError(f"final: {final!r} is not allowed; give one of {', '.join(FINAL_RULES)}")
        if not experts or len(expert_macs) != len(experts):
            raise ValueError(
                f"expert_macs: {len(expert_macs)} values are not allowed; give one for each of {len(experts)} experts"
            )
        self.delegator = delegator
        self.experts = nn.ModuleList(experts)
        self.threshold, self.final = threshold, final
        self.delegator_macs, self.expert_macs = delegator_macs, tuple(expert_macs)

    @torch.no_grad()
    def forward(self, images_NCHW: torch.Tensor) -> Answer:
        """Images uint8 [N,channels,H,W], N from 0. The delegator runs once; then each used expert runs ONE dense batch.

        Raises RuntimeError in training mode (BatchNorm would mix the images of a batch and change the networks),
        ValueError when the delegator selects among another number of experts.
        """
        if self.training:
            raise RuntimeError("CollaborationOfExperts answers in eval mode only; call .eval() first")
        images = len(images_NCHW)
        # some layers refuse empty batches: the class count of an empty batch comes from a blank image
        run_NCHW = images_NCHW if images else images_NCHW.new_zeros(1, *images_NCHW.shape[1:])
        class_logits_NC, selection_NE = (output[:images] for output in self.delegator(run_NCHW))
        if selection_NE.shape[1] != len(self.experts):
            raise ValueError(
                f"experts: {len(self.experts)} is not allowed; the delegator selects among {selection_NE.shape[1]}"
            )
        rough_NC = probabilities(class_logits_NC)
        exits_N = exits(rough_NC.amax(dim=1), self.threshold)
        expert_N = selection_NE.argmax(dim=1).masked_fill(exits_N, -1)
        answer_NC = rough_NC.clone()
        macs_N = torch.full_like(expert_N, self.delegator_macs)
        for expert in expert_N[~exits_N].unique().tolist():
            rows = (expert_N == expert).nonzero()[:, 0]
            probabilities_NC = probabilities(self.experts[expert](images_NCHW[rows]))
            if self.final == "average":
                probabilities_NC = (probabilities_NC + rough_NC[rows]) / 2
            answer_NC[rows] = probabilities_NC
            macs_N[rows] += self.expert_macs[expert]
        return Answer(answer_NC, expert_N, macs_N)
