"""The piecewise linear unit, a learned activation (Zhou, Zhu, Zhong: "Learning specialized activation functions with
the Piecewise Linear Unit", ICCV 2021).

N intervals of width d = (B_R - B_L) / N between two bounds; values Y_0..Y_N at their ends, a slope on either side:

    f(x) = Y_0 + K_L (x - B_L)                      x < B_L
         = Y_i + (Y_{i+1} - Y_i) (x - B_i) / d      inside, B_i = B_L + i d
         = Y_N + K_R (x - B_R)                      x >= B_R

Two phases. At first the unit is a ReLU whose parameters rest while the mean and the standard deviation of its input are
tracked: each forward in training adds to the unit's `sums`, and after a step `track` moves the running statistics with
them. `realign` then puts the bounds at mean -+ 3 standard deviations, the values on ReLU again, and ends the first
phase: from there on everything is learned. Nothing here communicates: a caller whose network has replicas adds up what
`take_sums` gives over them before `track`, so that all replicas hold the statistics of the union.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coe_dist.coe.pwlu_function import NARROWEST, piecewise_linear, relu_at_rest


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
    sums: torch.Tensor | None  # float64 [3, functions] of inputs not tracked yet: count, sum, sum of squares

    def __init__(self, channels: int | None, intervals: int = 16) -> None:
        super().__init__()
        if isinstance(intervals, bool) or not isinstance(intervals, int) or not 2 <= intervals <= 1024 or intervals % 2:
            raise ValueError(f"intervals: {intervals!r} is not allowed; give an even number from 2 to 1024")
        self.channels, self.intervals, self.learned, self.sums = channels, intervals, False, None
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
        parameters = (self.left, self.right, self.values, self.left_slope, self.right_slope)
        if self.learned:
            return piecewise_linear(x, *parameters)
        if self.training and x.numel():
            self._add(x.detach())
        return relu_at_rest(x, *parameters)

    @torch.no_grad()
    def _add(self, x: torch.Tensor) -> None:
        # moments are stable around their own mean; the sums are then formed in float64
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = tuple(range(x.dim())) if self.channels is None else (0, *range(2, x.dim()))
        variance, mean = (moment.double().reshape(-1) for moment in torch.var_mean(x, dim=dims, correction=0))
        count = x.numel() // mean.numel()
        sums = count * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])
        self.sums = sums if self.sums is None else self.sums + sums

    @torch.no_grad()
    def track(self, sums: torch.Tensor) -> None:
        """Running statistics take weight 0.1 for the newest inputs; the first ones count fully (our own rule). sums:
        float64 [3, functions], as the attribute of this name."""
        count, total, squares = sums
        mean = total / count.clamp_min(1.0)
        std = (squares / count.clamp_min(1.0) - mean.square()).clamp_min(0.0).sqrt()
        weight = torch.where(self.seen == 0, 1.0, 0.1) * (count > 0)
        for running, newest in ((self.running_mean, mean), (self.running_std, std)):
            running.lerp_(newest.to(running.dtype), weight.to(running.dtype))
        self.seen += count[0].long()

    @torch.no_grad()
    def _become_relu(self) -> None:
        share = torch.linspace(0, 1, self.intervals + 1, device=self.left.device, dtype=self.left.dtype)
        points = self.left[:, None] + share * (self.right - self.left)[:, None]
        self.values.copy_(points.relu().view(-1))
        self.left_slope.zero_()
        self.right_slope.fill_(1.0)

    @torch.no_grad()
    def realign(self) -> None:
        """Begins the second phase; without any input so far the bounds stay where they are."""
        if int(self.seen) > 0:
            spread = 3.0 * self.running_std.clamp_min(NARROWEST)
            self.left.copy_(self.running_mean - spread)
            self.right.copy_(self.running_mean + spread)
        self._become_relu()
        self.realigned.fill_(True)
        self.learned, self.sums = True, None

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        if (realigned := state.get(f"{prefix}realigned")) is not None:
            self.learned = bool(realigned)


def units(network: nn.Module) -> list[PWLU]:
    """The network's piecewise linear units, in the order of its modules."""
    return [module for module in network.modules() if isinstance(module, PWLU)]


def tracking(network: nn.Module) -> bool:
    """Whether the network has units in the first phase."""
    return any(not unit.learned for unit in units(network))


def take_sums(network: nn.Module) -> torch.Tensor:
    """What the units have seen in training since the last call: float64 [3, functions of all units], rows count, sum
    and sum of squares, zero where they have seen nothing. Those of replicas add up to those of their union."""
    columns = []
    for unit in units(network):
        empty = torch.zeros(3, unit.left.numel(), dtype=torch.float64, device=unit.left.device)
        columns.append(empty if unit.sums is None else unit.sums)
        unit.sums = None
    return torch.cat(columns, dim=1)


def track(network: nn.Module, sums: torch.Tensor) -> None:
    """Moves the units' running statistics once; `sums` as from take_sums, in the same order. Replicas that are given
    the same sums stay the same. Raises ValueError for the sums of another network."""
    found = units(network)
    sizes = [unit.left.numel() for unit in found]
    if sums.shape != (3, sum(sizes)):
        raise ValueError(f"sums: {tuple(sums.shape)} is not allowed; the network's units need (3, {sum(sizes)})")
    for unit, part in zip(found, torch.split(sums, sizes, dim=1), strict=True):
        unit.track(part)


def realign(network: nn.Module) -> None:
    """Ends the first phase of all units that are still in it.

    Parameters change in place: copies of them elsewhere (ZeRO's float32 partitions) have to be renewed.
    """
    for unit in units(network):
        if not unit.learned:
            unit.realign()
