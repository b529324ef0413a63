"""LAMB (You et al., "Large batch optimization for deep learning", ICLR 2020) with its state by parameter.

timm's keeps the count of steps in its parameter groups, where no checkpoint of ours would find it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-6


class Lamb(torch.optim.Optimizer):
    """Adam's bias-corrected step plus weight decay, per tensor scaled to the length of that tensor.

    Tensors without weight decay (norms, biases, activations' own parameters) take Adam's step unscaled, as in timm.
    Gradients are not clipped here. A tensor's length counts, so an optimizer that sees a part of it (ZeRO 1, 2) would
    take other steps. State of a parameter: exp_avg, exp_avg_sq (its shape and dtype), step (float32 scalar, CPU); all
    begin at zero.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "no training of ours evaluates the loss again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = torch.zeros(())
        state["step"] += 1
        count = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - BETA1)
        state["exp_avg_sq"].mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        spread = (state["exp_avg_sq"] / (1 - BETA2**count)).sqrt_().add_(EPSILON)
        update = (state["exp_avg"] / (1 - BETA1**count)).div_(spread)
        if decay:
            update.add_(parameter, alpha=decay)
            length, reach = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            update.mul_(torch.where((length > 0) & (reach > 0), length / reach, 1.0))
        parameter.sub_(update, alpha=rate)
