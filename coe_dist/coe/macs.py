"""Multiply-add accounting: what one image costs, and the exit rate that a budget of average MACs needs.

MACs of convolutions, linear layers and attention only, as in the literature ("FLOPs" there); norms, activations,
pooling and resizing are not counted. A conditional convolution (CondConv) counts its mixing, kernels times weights, and
the one convolution with the mixed kernel. What piecewise linear units cost is counted apart.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coe_dist.coe.pwlu import units


def count_macs(module: nn.Module, *, channels: int, resolution: int) -> int:
    """MACs of one image [1,channels,resolution,resolution] through `module` in eval mode, on the module's own device.

    Parameters, buffers, training flags and the random state are left as they were. A module on the meta device is
    counted without computing anything.
    """
    with FlopCounterMode(display=False) as counter:
        _see_one_image(module, channels, resolution)
    return int(counter.get_total_flops()) // 2


def count_pwlu_macs(module: nn.Module, *, channels: int, resolution: int) -> int:
    """Pointwise multiply-adds of the piecewise linear units for one image: 2 a value, one to find its place between the
    bounds and one on its piece (our own count of our own unit). By convention they are not in count_macs, which counts
    no activations; otherwise as count_macs."""
    values = 0

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
        nonlocal values
        values += inputs[0].numel()

    hooks = [unit.register_forward_hook(count) for unit in units(module)]
    try:
        _see_one_image(module, channels, resolution)
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * values


def _see_one_image(module: nn.Module, channels: int, resolution: int) -> None:
    reference = next(module.parameters(), torch.empty(0))
    image_1CHW = torch.zeros(1, channels, resolution, resolution, dtype=reference.dtype, device=reference.device)
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            module(image_1CHW)
    finally:
        for part, training in flags:
            part.training = training  # not .train(), which acts on the whole subtree


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
