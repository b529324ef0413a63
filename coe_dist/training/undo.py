"""What a step changes before anybody knows whether it can be taken: running statistics, kept so that they come back.

A forward pass updates them. When its loss or gradient then turns out not to be finite and the step is skipped
(training.non_finite: skip), what the images did to them must go too, or the network answers NaN for ever (our rule).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from coe_dist.parallel.batchnorm import SplitBatchNorm
from coe_dist.training.engines import NetworkEngine


class StatisticsBackup:
    """Copies of the buffers of the engines' networks, refreshed by `keep`; no communication."""

    def __init__(self, engines: Iterable[NetworkEngine]) -> None:
        networks = {engine.name: engine.network for engine in engines}
        self._buffers = {name: list(network.buffers()) for name, network in networks.items()}
        self._layers = {
            name: [layer for layer in network.modules() if isinstance(layer, SplitBatchNorm)]
            for name, network in networks.items()
        }
        self._kept = {name: [buffer.clone() for buffer in buffers] for name, buffers in self._buffers.items()}
        self._rows = {name: [layer.rows for layer in layers] for name, layers in self._layers.items()}

    @torch.no_grad()
    def keep(self) -> None:
        """Before the first forward pass of a step."""
        for name, buffers in self._buffers.items():
            if buffers:
                torch._foreach_copy_(self._kept[name], buffers)
            self._rows[name] = [layer.rows for layer in self._layers[name]]

    @torch.no_grad()
    def restore(self, names: Iterable[str]) -> None:
        """Undoes what happened to these networks' statistics since `keep`."""
        for name in names:
            if self._buffers[name]:
                torch._foreach_copy_(self._buffers[name], self._kept[name])
            for layer, rows in zip(self._layers[name], self._rows[name], strict=True):
                layer.rows = rows
