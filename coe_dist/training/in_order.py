"""Gradients that reach their parameters in a fixed order, whatever the backward pass that computed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def in_order(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """A scalar zero whose backward pass gives `parameters`, in their order, their gradients of `loss` (zeros for those
    that it does not reach). Runs the backward pass of `loss`, which no hook of the parameters sees."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    result: torch.Tensor = _Given.apply(gradients, *parameters)
    return result


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: tuple[torch.Tensor | None, ...], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.gradients
