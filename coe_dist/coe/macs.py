"""Multiply-add accounting: what one image costs, and the exit rate that a budget of average MACs needs.

MACs of convolutions, linear layers and attention only, as in the literature ("FLOPs" there); norms, activations and
pooling are not counted.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(module: nn.Module, *, channels: int, resolution: int) -> int:
    """MACs of one image [1,channels,resolution,resolution] through `module` in eval mode, on the module's own device.

    Parameters, buffers, training flags and the random state are left as they were. A module on the meta device is
    counted without computing anything.
    """
    reference = next(module.parameters(), torch.empty(0))
    image_1CHW = torch.zeros(1, channels, resolution, resolution, dtype=reference.dtype, device=reference.device)
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(image_1CHW)
    finally:
        for part, training in flags:
            part.training = training  # not .train(), which acts on the whole subtree
    return int(counter.get_total_flops()) // 2


def average_macs(delegator_macs: float, mean_expert_macs: float, exit_rate: float) -> float:
    """Average MACs of one image: every image pays the delegator, those that do not exit early also their expert.

    mean_expert_macs: mean over the images that reach an expert. Raises ValueError for an exit rate outside 0 to 1.
    """
    if not 0.0 <= exit_rate <= 1.0:
        raise ValueError(f"exit_rate: {exit_rate} is not allowed; give a fraction from 0 to 1")
    return delegator_macs + (1.0 - exit_rate) * mean_expert_macs


def exit_rate_for_budget(budget: float, delegator_macs: float, mean_expert_macs: float) -> float:
    """The smallest fraction of images that must exit early so that average_macs stays within `budget` (0 to 1).

    Raises ValueError when the budget does not even pay the delegator, or when the experts' MACs are not positive.
    """
    if mean_expert_macs <= 0:
        raise ValueError(f"mean_expert_macs: {mean_expert_macs} is not allowed; give a number above 0")
    if not budget >= delegator_macs:
        raise ValueError(f"budget: {budget} MACs is not allowed; the delegator alone needs {delegator_macs}")
    return max(0.0, 1.0 - (budget - delegator_macs) / mean_expert_macs)
