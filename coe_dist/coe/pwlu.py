"""The piecewise linear unit, a learned activation (Zhou, Zhu, Zhong: "Learning specialized activation functions with
the Piecewise Linear Unit", ICCV 2021).

N intervals of width d = (B_R - B_L) / N between two bounds; values Y_0..Y_N at their ends, a slope on either side:

    f(x) = Y_0 + K_L (x - B_L)                      x < B_L
         = Y_i + (Y_{i+1} - Y_i) (x - B_i) / d      inside, B_i = B_L + i d
         = Y_N + K_R (x - B_R)                      x >= B_R

Two phases. At first the unit is a ReLU whose parameters rest while it tracks the mean and the standard deviation of its
input. `realign` then puts the bounds at mean -+ 3 standard deviations, the values on ReLU again, and ends the first
phase: from there on everything is learned. Nothing here communicates: sum `statistics` over the ranks of a network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coe_dist.coe.pwlu_function import NARROWEST, piecewise_linear


class PWLU(nn.Module):
    """images_NCHW or features_NC, any floating type -> the same shape and type.

    channels: that many functions, one per channel; None: one function for the whole layer. The parameters are vectors
    (values is [C * (N + 1)], by channel): optimizers exempt vectors from weight decay, and these must have none. Raises
    ValueError for an odd number of intervals.
    """

    learned: bool  # the second phase; a copy of the buffer `realigned`, which no forward has to wait for
    running_mean: torch.Tensor
    running_std: torch.Tensor
    seen: torch.Tensor
    realigned: torch.Tensor

    def __init__(self, channels: int | None, intervals: int = 16) -> None:
        super().__init__()
        if isinstance(intervals, bool) or not isinstance(intervals, int) or not 2 <= intervals <= 1024 or intervals % 2:
            raise ValueError(f"intervals: {intervals!r} is not allowed; give an even number from 2 to 1024")
        self.channels, self.intervals, self.learned = channels, intervals, False
        functions = channels or 1
        self.left = nn.Parameter(torch.full((functions,), -3.0))
        self.right = nn.Parameter(torch.full((functions,), 3.0))
        self.values = nn.Parameter(torch.empty(functions * (intervals + 1)))
        self.left_slope = nn.Parameter(torch.zeros(functions))
        self.right_slope = nn.Parameter(torch.ones(functions))
        self.register_buffer("running_mean", torch.zeros(functions))
        self.register_buffer("running_std", torch.ones(functions))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # values per function
        self.register_buffer("realigned", torch.zeros((), dtype=torch.bool))
        self._become_relu()

    def extra_repr(self) -> str:
        return f"{self.channels or 'one for all'}, intervals={self.intervals}, learned={self.learned}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.learned:
            return piecewise_linear(x, self.left, self.right, self.values, self.left_slope, self.right_slope)
        if self.training and x.numel():
            self._track(x.detach())
        return F.relu(x)

    @torch.no_grad()
    def _track(self, x: torch.Tensor) -> None:
        """Running statistics with weight 0.1 for the newest batch; the first batch counts fully (our own rule)."""
        x = x.to(self.running_mean.dtype)
        dims = tuple(range(x.dim())) if self.channels is None else (0, *range(2, x.dim()))
        variance, mean = torch.var_mean(x, dim=dims, correction=0)
        weight = torch.where(self.seen == 0, 1.0, 0.1).to(mean.dtype)
        self.running_mean.lerp_(mean.view_as(self.running_mean), weight)
        self.running_std.lerp_(variance.sqrt().view_as(self.running_std), weight)
        self.seen += x.numel() // self.running_mean.numel()

    @torch.no_grad()
    def _become_relu(self) -> None:
        share = torch.linspace(0, 1, self.intervals + 1, device=self.left.device, dtype=self.left.dtype)
        points = self.left[:, None] + share * (self.right - self.left)[:, None]
        self.values.copy_(points.relu().view(-1))
        self.left_slope.zero_()
        self.right_slope.fill_(1.0)

    @torch.no_grad()
    def begin_learning(self, mean: torch.Tensor, std: torch.Tensor, seen: torch.Tensor) -> None:
        """The second phase, with bounds at mean -+ 3 std (each [C]) for functions that have seen a value."""
        spread = 3.0 * std.clamp_min(NARROWEST)
        self.left.copy_(torch.where(seen > 0, mean - spread, self.left.to(mean)))
        self.right.copy_(torch.where(seen > 0, mean + spread, self.right.to(mean)))
        self._become_relu()
        self.realigned.fill_(True)
        self.learned = True

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        if (realigned := state.get(f"{prefix}realigned")) is not None:
            self.learned = bool(realigned)


def units(network: nn.Module) -> list[PWLU]:
    """The network's piecewise linear units, in the order of its modules."""
    return [module for module in network.modules() if isinstance(module, PWLU)]


def statistics(network: nn.Module) -> torch.Tensor:
    """What all units have tracked: float64 [3, functions of all units], rows count, sum and sum of squares.

    Tensors of several ranks add up to the statistics of their union; a rank weighs by the values that it has seen.
    """
    columns = []
    for unit in units(network):
        mean, std = unit.running_mean.double(), unit.running_std.double()
        count = unit.seen.double().expand_as(mean)
        columns.append(torch.stack([count, count * mean, count * (std.square() + mean.square())]))
    return torch.cat(columns, dim=1) if columns else torch.zeros(3, 0, dtype=torch.float64)


def realign(network: nn.Module, reduced: torch.Tensor) -> None:
    """Ends the first phase of all units with the sum of the ranks' `statistics`; every replica does the same.

    Parameters change in place: copies of them elsewhere (ZeRO's float32 partitions) have to be renewed, and a moving
    average of the network needs the same call. Raises ValueError when `reduced` belongs to another network.
    """
    for unit, mean, std, count in _moments(network, reduced):
        unit.begin_learning(mean, std, count)


def set_statistics(network: nn.Module, reduced: torch.Tensor, ranks: int) -> None:
    """Gives a replica the mean and standard deviation over all, and its 1/ranks of their count, so that what one of
    them saves stands for all. For the first phase, before saving; otherwise as realign."""
    for unit, mean, std, count in _moments(network, reduced):
        if float(count[0]) > 0:
            unit.running_mean.copy_(mean)
            unit.running_std.copy_(std)
            unit.seen.copy_((count[0] / ranks).ceil())


def _moments(network: nn.Module, reduced: torch.Tensor) -> list[tuple[PWLU, torch.Tensor, torch.Tensor, torch.Tensor]]:
    found = units(network)
    sizes = [unit.left.numel() for unit in found]
    if reduced.shape != (3, sum(sizes)):
        raise ValueError(f"reduced: {tuple(reduced.shape)} is not allowed; the network's units need (3, {sum(sizes)})")
    result = []
    for unit, part in zip(found, torch.split(reduced.double(), sizes, dim=1), strict=True):
        count, total, squares = part.to(unit.left.device)
        mean = total / count.clamp_min(1.0)
        std = (squares / count.clamp_min(1.0) - mean.square()).clamp_min(0.0).sqrt()
        result.append((unit, mean, std, count))
    return result
