"""The model a user holds: delegator and experts, early termination, grouped inference.

What makes it faster on the processor (setting "options" of `coe-dist bench inference` measures it on the machine at
hand):

1. `keep_freed_memory()` (coe_dist/allocator.py), for the process: large batches do not get new pages each time.
2. `fused()`: no BatchNorm. On a GPU too. `.to(memory_format=torch.channels_last)` afterwards helps further.
3. `packed(images)`: fused, and small groups stop paying for the order of their experts' weights.

`compiled()` saves Python's own time, which counts for light networks and few images. `precision="bf16"` pays for large
batches where the processor or the GPU computes in bfloat16, and costs time for one image on a processor.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, cast

import torch
from torch import nn

from coe_dist.coe.early_exit import exits, probabilities
from coe_dist.coe.fusion import fuse_batchnorm
from coe_dist.coe.packing import pack_convolutions
from coe_dist.coe.side_by_side import run_pieces

FINAL_RULES = ("expert", "average")
PRECISIONS = ("weights", "bf16")


class Answer(NamedTuple):
    """The answer to a batch, rows in the order of the images; inference tensors (no autograd)."""

    probabilities_NC: torch.Tensor  # class probabilities, float32 (float64 for float64 networks)
    expert_N: torch.Tensor  # the expert that was used, int64; -1: the image exited early
    macs_N: torch.Tensor  # MACs spent on the image, int64


class CollaborationOfExperts(nn.Module):
    """A delegator and its experts; an image costs the delegator and at most ONE expert (the paper's framework).

    delegator: images_NCHW -> (class logits [N,C], selection logits [N,E]). experts: E networks, images_NCHW -> logits
    [N,C]. threshold: an image whose rough prediction has at least this confidence exits early; None: none does.
    final: an image that does not exit gets the class probabilities of the expert of largest selection logit
    ("expert"; ties: lowest id) or their mean with the delegator's ("average"). Both are our own rules. precision: what
    the networks compute in, the dtype of their "weights", or "bf16" by autocast; probabilities are float32 at least.

    Used for inference only: call `.eval()` first. The answer to an image does not depend on the rest of its batch,
    beyond floating point's rounding: in float32 probabilities agree to 1e-5 wherever the two largest selection logits,
    and confidence and threshold, are further apart than 1e-4. Raises ValueError for an unknown `final` or `precision`,
    or unequal numbers of experts and of their MACs.
    """

    _macs_E1: torch.Tensor

    def __init__(
        self,
        delegator: nn.Module,
        experts: Sequence[nn.Module],
        *,
        threshold: float | None,
        final: str,
        delegator_macs: int,
        expert_macs: Sequence[int],
        precision: str = "weights",
    ) -> None:
        super().__init__()
        for name, value, allowed in (("final", final, FINAL_RULES), ("precision", precision, PRECISIONS)):
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is not allowed; give one of {', '.join(allowed)}")
        if not experts or len(expert_macs) != len(experts):
            raise ValueError(
                f"expert_macs: {len(expert_macs)} values are not allowed; give one for each of {len(experts)} experts"
            )
        self.delegator = delegator
        self.experts = nn.ModuleList(experts)
        self.threshold, self.final, self.precision = threshold, final, precision
        self.delegator_macs, self.expert_macs = delegator_macs, tuple(expert_macs)
        self._any_batch = False  # compiled networks are told that the number of images varies
        # by expert; -1, the early exit, is the last
        macs_E1 = torch.tensor([*(delegator_macs + macs for macs in expert_macs), delegator_macs])
        self.register_buffer("_macs_E1", macs_E1, persistent=False)

    def fused(self) -> Self:
        """A copy whose convolutions have absorbed their BatchNorm (coe/fusion.py); the same answers up to rounding."""
        return self._with(fuse_batchnorm)

    def packed(self, images_NCHW: torch.Tensor) -> Self:
        """fused(), and the weights of convolutions in the order in which the processor reads them (coe/packing.py),
        which is what makes small groups fast; for float32 on the processor; compiled() and bf16 do without.

        images_NCHW: a few images of the size that is to come; every network is run on them once."""
        return self.fused()._with(lambda network: pack_convolutions(network, images_NCHW))

    def compiled(self) -> Self:
        """A model of the same networks (shared, not copied), compiled by torch.compile on their first calls, which then
        take seconds to minutes: for single images, for any other number of them, and seldom once more for a new number.
        Experts of the same architecture share what was compiled."""
        model = self._with(lambda network: cast(nn.Module, torch.compile(network)))
        model._any_batch = True
        return model

    def _with(self, change: Callable[[nn.Module], nn.Module]) -> Self:
        model = copy.copy(self)
        model._modules, model._buffers = dict(self._modules), dict(self._buffers)
        model.delegator = change(self.delegator)
        model.experts = nn.ModuleList([change(expert) for expert in self.experts])
        return model

    @torch.inference_mode()
    def forward(self, images_NCHW: torch.Tensor) -> Answer:
        """Images uint8 [N,channels,H,W], N from 0.

        1. The delegator runs once on all images; that decides for each: early exit (-1) or an expert.
        2. One stable sort by that decision makes every expert's images a run of neighbours. Their lengths are all that
           the processor needs to know of the decision: on a GPU it waits for it once.
        3. Every expert that is used runs ONE dense batch, several at a time where that is faster (side_by_side.py);
           the answers go back to their images' rows.

        Raises RuntimeError in training mode (BatchNorm would mix the images of a batch and change the networks),
        ValueError when the delegator selects among another number of experts.
        """
        if self.training:
            raise RuntimeError("CollaborationOfExperts answers in eval mode only; call .eval() first")
        images = len(images_NCHW)
        # some layers refuse empty batches: the class count of an empty batch comes from a blank image
        run_NCHW = images_NCHW if images else images_NCHW.new_zeros(1, *images_NCHW.shape[1:])
        with self._computing(images_NCHW):
            class_logits_NC, selection_NE = self._run(self.delegator, run_NCHW)
        if selection_NE.shape[1] != len(self.experts):
            raise ValueError(
                f"experts: {len(self.experts)} is not allowed; the delegator selects among {selection_NE.shape[1]}"
            )
        rough_NC = probabilities(class_logits_NC)
        if images == 1:
            return self._single(images_NCHW, rough_NC, selection_NE)
        expert_N = selection_NE.argmax(dim=1)
        if self.threshold is not None:
            expert_N = expert_N.masked_fill(exits(rough_NC.amax(dim=1), self.threshold), -1)
        if not images:
            return Answer(rough_NC[:0], expert_N[:0], self._macs_E1[:0])
        return Answer(self._grouped(images_NCHW, rough_NC, expert_N), expert_N, self._macs_E1[expert_N])

    def _single(self, image_1CHW: torch.Tensor, rough_1C: torch.Tensor, selection_1E: torch.Tensor) -> Answer:
        """The same rules for one image, in Python's own numbers (float64 as in `exits`): every operation on a tensor
        that is saved counts where the networks are light."""
        if self.threshold is not None and float(rough_1C.amax()) >= self.threshold:
            expert, macs, answer_1C = -1, self.delegator_macs, rough_1C
        else:
            expert = int(selection_1E.argmax())
            macs = self.delegator_macs + self.expert_macs[expert]
            answer_1C = self._final(self._expert(expert, image_1CHW), rough_1C, None)
        device = image_1CHW.device
        return Answer(answer_1C, torch.tensor([expert], device=device), torch.tensor([macs], device=device))

    def _grouped(self, images_NCHW: torch.Tensor, rough_NC: torch.Tensor, expert_N: torch.Tensor) -> torch.Tensor:
        exited, *loads = torch.bincount(expert_N + 1, minlength=len(self.experts) + 1).tolist()
        if exited == len(expert_N):
            return rough_NC
        rows = expert_N.argsort(stable=True)[exited:]  # -1 sorts first
        used = [expert for expert, load in enumerate(loads) if load]
        groups = torch.split(images_NCHW[rows], [loads[expert] for expert in used])
        works = [functools.partial(self._expert, expert) for expert in used]
        pieces = list(zip(works, groups, strict=True))
        # compiled code brings its own threads, and compiling is not for many threads at once
        answers = [work(group) for work, group in pieces] if self._any_batch else run_pieces(pieces)
        return rough_NC.index_copy(0, rows, self._final(torch.cat(answers), rough_NC, rows))

    def _expert(self, expert: int, images_NCHW: torch.Tensor) -> torch.Tensor:
        with self._computing(images_NCHW):
            return probabilities(self._run(self.experts[expert], images_NCHW))

    def _final(self, expert_nC: torch.Tensor, rough_NC: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """rows: those of rough_NC that the experts answered, in their order; None: all."""
        if self.final == "expert":
            return expert_nC
        return (expert_nC + (rough_NC if rows is None else rough_NC[rows])) / 2

    def _run(self, network: nn.Module, images_NCHW: torch.Tensor) -> torch.Tensor:
        if self._any_batch and len(images_NCHW) > 1:
            torch._dynamo.maybe_mark_dynamic(images_NCHW, 0)
        output: torch.Tensor = network(images_NCHW)
        return output

    def _computing(self, images_NCHW: torch.Tensor) -> contextlib.AbstractContextManager[object]:
        if self.precision == "weights":
            return contextlib.nullcontext()
        return torch.autocast(images_NCHW.device.type, torch.bfloat16)
