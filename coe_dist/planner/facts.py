"""What a network costs, counted on the meta device: no memory is taken and nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coe_dist.coe.macs import count_macs

_ROWS = (2, 4)  # two sizes, because what grows with the rows is wanted; one row is a special case of BatchNorm
_WIDTHS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class NetworkFacts:
    """Counts of one network; per image where the name says so, bytes in the given precision."""

    name: str
    macs: int  # forward, of one image
    parameters: int
    buffers: int  # elements
    tensors: int  # parameter tensors: an optimizer's and a reduction's fixed cost grows with them
    batchnorms: int
    operations: int  # kernels of one forward and backward pass
    saved_bytes_per_image: float  # that the forward pass keeps for the backward pass
    traffic_bytes_per_image: float  # read and written by all operations of both passes

    @property
    def training_macs(self) -> int:
        """Forward and backward: the gradients of inputs and of weights cost as much as the forward pass each."""
        return 3 * self.macs


@dataclass(frozen=True)
class ForwardFacts:
    """Counts of a network that only answers, such as a teacher; as NetworkFacts, but of the forward pass alone."""

    name: str
    macs: int
    parameters: int
    buffers: int
    operations: int
    traffic_bytes_per_image: float


def count_network(name: str, network: nn.Module, *, channels: int, resolution: int, precision: str) -> NetworkFacts:
    """Counts `network` (on the meta device), which takes uint8 images and returns a tensor or a tuple of them.

    With bf16 all tensors are counted as bfloat16: autocast, which training uses, keeps a few of them in float32.
    Saved activations are the storages that autograd keeps, each once, without the parameters. Traffic assumes that
    every operation reads its inputs from memory and writes its outputs there, as operations that are not fused do.
    """
    macs = count_macs(network, channels=channels, resolution=resolution)
    network.to(_WIDTHS[precision]).train()
    saved, traffic, operations = [], [], 0
    for rows in _ROWS:
        images = torch.zeros(rows, channels, resolution, resolution, dtype=torch.uint8, device="meta")
        counter = _Traffic()
        with counter, _saved_bytes(network) as kept:
            outputs = network(images)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            saved.append(sum(kept.values()))
            torch.stack([output.sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
        network.zero_grad(set_to_none=True)
        traffic.append(counter.bytes)
        operations = counter.operations
    parameters = list(network.parameters())
    return NetworkFacts(
        name=name,
        macs=macs,
        parameters=sum(parameter.numel() for parameter in parameters),
        buffers=sum(buffer.numel() for buffer in network.buffers()),
        tensors=len(parameters),
        batchnorms=sum(isinstance(module, _BatchNorm) for module in network.modules()),
        operations=operations,
        saved_bytes_per_image=(saved[1] - saved[0]) / (_ROWS[1] - _ROWS[0]),
        traffic_bytes_per_image=(traffic[1] - traffic[0]) / (_ROWS[1] - _ROWS[0]),
    )


def count_forward(name: str, network: nn.Module, *, channels: int, resolution: int, precision: str) -> ForwardFacts:
    """The same of a forward pass without gradients, in eval mode."""
    macs = count_macs(network, channels=channels, resolution=resolution)
    network.to(_WIDTHS[precision]).eval()
    traffic, operations = [], 0
    for rows in _ROWS:
        images = torch.zeros(rows, channels, resolution, resolution, dtype=torch.uint8, device="meta")
        counter = _Traffic()
        with torch.no_grad(), counter:
            network(images)
        traffic.append(counter.bytes)
        operations = counter.operations
    return ForwardFacts(
        name=name,
        macs=macs,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        buffers=sum(buffer.numel() for buffer in network.buffers()),
        operations=operations,
        traffic_bytes_per_image=(traffic[1] - traffic[0]) / (_ROWS[1] - _ROWS[0]),
    )


@contextmanager
def _saved_bytes(network: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, by the storage's address. Storages live as long as the graph does."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that move data, and the bytes of their tensor arguments and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.operations += 1
            tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor))
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
