"""Exponential moving average of a network's weights, which evaluation and export use in place of the last step's.

The rate is TensorFlow's (tf.train.ExponentialMovingAverage with num_updates): after t updates the average keeps the
share d = min(decay, (1 + t) / (10 + t)) of itself, so that the first steps are forgotten soon. Floating buffers, such
as BatchNorm's running statistics, move with the parameters (our own rule): they belong to the averaged weights, not to
the last step's. Training never reads the average: a run is the same with it and without.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from coe_dist.parallel.batchnorm import SplitBatchNorm, average_statistics
from coe_dist.parallel.groups import Group


class WeightAverage:
    """The average of one network, as a network that answers.

    Replicas of a network hold equal averages, as they hold equal parameters, except for the running statistics of local
    BatchNorm: call `average_both` before the network or its average is evaluated or saved. What to save is
    network.state_dict() and `updates`.
    """

    network: nn.Module  # in eval mode, without gradients; shares no memory with the source
    updates: int  # so far; the same for all networks of a run

    def __init__(self, source: nn.Module, decay: float) -> None:
        """Starts as a copy of `source`, a network that an engine may own already; 0 < decay < 1."""
        self.decay, self.updates = decay, 0
        self.network = _copy_of(source).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Moves the average towards `source`; call it after each optimizer step. Communicates nothing."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for average, value in zip(_tensors(self.network), _tensors(source), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1.0 - decay)
        for mine, layer in zip(self.network.modules(), source.modules(), strict=True):
            if isinstance(mine, SplitBatchNorm) and isinstance(layer, SplitBatchNorm):
                mine.rows = layer.rows  # the statistics stand for the same rows, and are weighted by them
        self.updates += 1


def average_both(network: nn.Module, average: WeightAverage | None, group: Group) -> None:
    """Averages the running statistics of a network, and of the average of its weights where there is one, over the
    group; both at the same moments, because both are weighted by the rows since the last time. Collective."""
    average_statistics(network, group)
    if average is not None:
        average_statistics(average.network, group)


def _tensors(network: nn.Module) -> Iterator[torch.Tensor]:
    return chain(network.parameters(), network.buffers())


def _copy_of(network: nn.Module) -> nn.Module:
    """A deep copy that shares process groups, which cannot be copied, and leaves out the hooks of the network as a
    whole: an engine puts them there (DeepSpeed does), and they would tell it of the copy's forwards."""
    kept: dict[int, Any] = {
        id(layer.group): layer.group
        for layer in network.modules()
        if isinstance(layer, SplitBatchNorm) and layer.group is not None
    }
    hooks: dict[int, Any] = {
        id(value): OrderedDict()
        for name, value in vars(network).items()
        if name.startswith(("_forward_", "_backward_")) and isinstance(value, OrderedDict)
    }
    return copy.deepcopy(network, {**kept, **hooks})
