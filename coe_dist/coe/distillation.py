"""Distillation from a teacher's few largest logits (Hinton et al., 2015; what follows is our own rule).

The teacher's distribution p is the softmax, at temperature T, of its `top` largest logits alone: they are renormalised,
as if it held all other classes impossible. The student's q is its softmax over all classes at the same T. The loss is
T^2 * sum_c p_c (log p_c - log q_c), at least 0, whatever the temperature of the same size as cross-entropy.

A teacher's answer travels as hints: 4 bytes a logit, `top` float16 values (each less the largest, so that the
likely ones keep the most digits) and then `top` uint16 classes, 128 bytes for 32.
"""

from __future__ import annotations

import torch

BYTES_PER_LOGIT = 4
MOST_CLASSES = 65_536
_HALF = 32_768  # torch computes with int16, not with uint16


def pack_hints(logits_BC: torch.Tensor, top: int) -> torch.Tensor:
    """Hints, uint8 [B, 4*top], of a teacher's logits, float [B,C]. Needs top <= C <= 65536."""
    values, classes = logits_BC.topk(top, dim=1)  # descending
    values = (values - values[:, :1]).clamp_min(-60_000).half()
    places = (classes - _HALF).short()
    return torch.cat([values.contiguous().view(torch.uint8), places.contiguous().view(torch.uint8)], dim=1)


def unpack_hints(hints_BX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits less the largest one, float16 [B,top], descending, and their classes, int64 [B,top]."""
    half = hints_BX.shape[1] // 2
    values, places = hints_BX[:, :half].contiguous(), hints_BX[:, half:].contiguous()
    return values.view(torch.float16), places.view(torch.int16).long() + _HALF


def distillation_losses(logits_PC: torch.Tensor, hints_PX: torch.Tensor, temperature: float) -> torch.Tensor:
    """The loss of each pair (see above), [P], in the dtype of the student's logits, float [P,C]; hints as pack_hints
    makes them, temperature above 0. Differentiable in the logits."""
    values, classes = unpack_hints(hints_PX)
    teacher = torch.log_softmax(values.to(logits_PC.dtype) / temperature, dim=1)
    student = torch.log_softmax(logits_PC / temperature, dim=1).gather(1, classes)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)
