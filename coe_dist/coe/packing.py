"""Convolutions whose weights lie as the processor's kernels read them, for networks that only answer.

PyTorch keeps weights in one plain order, and its library for the processor (oneDNN) reorders them in every call. That
cost depends on the weights, not on the images: EfficientNet-B0 at 224 pixels takes 1.6 times as long for 6 images with
plain weights as with packed ones, for 64 images about the same. Packed, many small batches cost little more than one
large batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class PackedConvolution(nn.Conv2d):
    """A convolution of the same weights, and a packed copy of them, made for inputs of about `input_shape` (other
    shapes work too). float32 on the processor without autograd, autocast or torch.compile is computed with the copy,
    which does not follow later changes of the weights; all else as nn.Conv2d does.

    The operators are those that torch.compile calls (torch/_inductor/fx_passes/mkldnn_fusion.py).
    """

    def __init__(self, convolution: nn.Conv2d, input_shape: Sequence[int]) -> None:
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
            convolution.dilation,  # type: ignore[arg-type]
            convolution.groups,
            bias=convolution.bias is not None,
            device="meta",
        )
        self.weight, self.bias = convolution.weight, convolution.bias
        self.input_shape = list(input_shape)
        self.train(convolution.training)
        self._pack()

    def _pack(self) -> None:
        self._shape = [list(self.padding), list(self.stride), list(self.dilation), self.groups]
        self._packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(
            self.weight.detach().to_mkldnn(),
            *self._shape,
            self.input_shape,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if not input.is_cpu or input.dtype != torch.float32:
            return super().forward(input)
        output: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            input, self._packed, self.bias, *self._shape, "none", [], ""
        )
        return output

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, which cannot read packed tensors."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()


@torch.no_grad()
def pack_convolutions(network: nn.Module, images_NCHW: torch.Tensor) -> nn.Module:
    """A copy of `network`, in eval mode, whose convolutions are packed for inputs like `images_NCHW`, on which it is
    run once. Left as they are: convolutions of other classes than nn.Conv2d, on another device or in another dtype
    than float32, with padding other than by numbers and zeros, with hooks, or not used; and all where PyTorch has no
    oneDNN."""
    network = copy.deepcopy(network).eval()
    shapes: dict[nn.Module, torch.Size] = {}

    def remember(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        shapes[layer] = inputs[0].shape

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and _can_be_packed(layer)]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    network(images_NCHW)
    for hook in hooks:
        hook.remove()
    packed = {layer: PackedConvolution(layer, shapes[layer]) for layer in layers if layer in shapes}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.Conv2d) and module in packed:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, packed[module])
    return network


def _can_be_packed(layer: nn.Conv2d) -> bool:
    own = type(layer) is nn.Conv2d and not layer._forward_pre_hooks and not layer._forward_hooks
    known = hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    numbers = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    plain = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return onednn and known and own and numbers and plain
