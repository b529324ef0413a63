"""Optimizer and learning rate of one network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from coe_dist.config import OptimizerConfig


def build_optimizer(network: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    """SGD or AdamW with two groups: weight decay on matrices and kernels, none on vectors and scalars (norms, biases,
    activations' own parameters). Asserts that every trainable parameter is in exactly one group."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim > 1]
    others = [parameter for parameter in trainable if parameter.ndim <= 1]
    decays = ((decayed, config.weight_decay), (others, 0.0))
    groups = [{"params": members, "weight_decay": decay} for members, decay in decays if members]
    assert len(decayed) + len(others) == len({id(parameter) for parameter in trainable}), "a parameter is in two groups"
    # fused: 2.5 (SGD) and 3.5 (AdamW) times faster than foreach on a CPU, where foreach is a loop over small tensors
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum, nesterov=nesterov, fused=True)
    # on other devices fused AdamW would want its step counters there; ours stay on the CPU (see set_full_state)
    on_cpu = all(parameter.device.type == "cpu" for parameter in trainable)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=on_cpu, foreach=not on_cpu)


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Factor on the base rate for optimizer step `step` (from 0): linear warm-up, then cosine to zero or constant."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
