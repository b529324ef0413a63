"""CondConv's layer in every form that computes it: the same answer, another order of the work.

An image's kernel is the mixture sum_k r_k W_k of K kernels, r from the image (Yang et al., NeurIPS 2019).

batched      timm's forward: mixes a kernel for each image, then ONE convolution with a group for each image.
loop         mixes a kernel for each image, then an ordinary convolution for each image.
matmul       1x1 kernels only: mixes, then one batched matrix product; no convolution at all.
all_kernels  convolves each image with all K kernels, then mixes the outputs: K times the multiply-adds, but no kernel
             of an image's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._efficientnet_blocks import CondConvResidual
from torch import nn

from coe_dist.bench.fastest import fastest
from coe_dist.coe.fusion import fuse_batchnorm

FORMS = ("batched", "loop", "matmul", "all_kernels")


class CondConv(nn.Module):
    """A CondConv2d of timm's and the BatchNorm after it, folded into its kernels.

    form: one of FORMS, or "fastest": the next call measures all on its own input and keeps the fastest.
    """

    kernels_KP: torch.Tensor
    shift_C: torch.Tensor

    def __init__(self, layer: Any, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        if layer.bias is not None or layer.dynamic_padding:
            raise ValueError("layer: a bias or padding by input size is not allowed; give a CondConv2d without")
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale_C = norm.weight * (norm.running_var + norm.eps).rsqrt()
        kernels = layer.weight.detach().view(layer.num_experts, layer.out_channels, -1) * scale_C.detach()[:, None]
        self.register_buffer("kernels_KP", kernels.flatten(1))
        self.register_buffer("shift_C", (norm.bias - norm.running_mean * scale_C).detach())
        self.shape, self.groups = tuple(layer.weight_shape), int(layer.groups)  # shape: [out, in / groups, h, w]
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.form = "batched"

    def forward(self, x_NCHW: torch.Tensor, routing_NK: torch.Tensor) -> torch.Tensor:
        if self.form == "fastest":
            self.form = fastest({form: partial(self._compute, form, x_NCHW, routing_NK) for form in self.forms()})
        return self._compute(self.form, x_NCHW, routing_NK)

    def forms(self) -> list[str]:
        pointwise = self.shape[2:] == (1, 1) and self.groups == 1 and tuple(self.stride) == (1, 1)
        return [form for form in FORMS if form != "matmul" or pointwise]

    def _compute(self, form: str, x_NCHW: torch.Tensor, routing_NK: torch.Tensor) -> torch.Tensor:
        compute: Callable[..., torch.Tensor] = getattr(self, f"_{form}")
        return compute(x_NCHW, routing_NK)

    def _batched(self, x_NCHW: torch.Tensor, routing_NK: torch.Tensor) -> torch.Tensor:
        images, channels, height, width = x_NCHW.shape
        kernels = torch.matmul(routing_NK, self.kernels_KP).view(images * self.shape[0], *self.shape[1:])
        x = x_NCHW.reshape(1, images * channels, height, width)
        y = self._convolve(x, kernels, self.shift_C.repeat(images), self.groups * images)
        return y.view(images, self.shape[0], *y.shape[2:])

    def _loop(self, x_NCHW: torch.Tensor, routing_NK: torch.Tensor) -> torch.Tensor:
        kernels = torch.matmul(routing_NK, self.kernels_KP).view(-1, *self.shape)
        pairs = zip(torch.split(x_NCHW, 1), kernels.unbind(), strict=True)
        return torch.cat([self._convolve(x, kernel, self.shift_C, self.groups) for x, kernel in pairs])

    def _matmul(self, x_NCHW: torch.Tensor, routing_NK: torch.Tensor) -> torch.Tensor:
        """In the layout of its input: pixels by channels where channels come last, else channels by pixels."""
        images, channels, height, width = x_NCHW.shape
        kernels_NOI = torch.matmul(routing_NK, self.kernels_KP).view(images, *self.shape[:2])
        if x_NCHW.is_contiguous(memory_format=torch.channels_last):
            x_NPI = x_NCHW.permute(0, 2, 3, 1).reshape(images, height * width, channels)
            y_NPO = torch.baddbmm(self.shift_C, x_NPI, kernels_NOI.transpose(1, 2))
            return y_NPO.view(images, height, width, -1).permute(0, 3, 1, 2)
        x_NIP = x_NCHW.reshape(images, channels, height * width)
        return torch.baddbmm(self.shift_C[:, None], kernels_NOI, x_NIP).view(images, -1, height, width)

    def _all_kernels(self, x_NCHW: torch.Tensor, routing_NK: torch.Tensor) -> torch.Tensor:
        out, *rest = self.shape
        # a group's outputs must be neighbours: [K, groups, out of the group, ...] -> [groups, K, ...]
        kernels = self.kernels_KP.view(-1, self.groups, out // self.groups, *rest).transpose(0, 1).reshape(-1, *rest)
        y = self._convolve(x_NCHW, kernels, None, self.groups)
        images, _, height, width = y.shape
        y = y.view(images, self.groups, routing_NK.shape[1], out // self.groups, height, width)
        mixed = torch.einsum("nk,ngkohw->ngohw", routing_NK, y).reshape(images, out, height, width)
        return mixed + self.shift_C[:, None, None]

    def _convolve(
        self, x: torch.Tensor, kernels: torch.Tensor, shift: torch.Tensor | None, groups: int
    ) -> torch.Tensor:
        return F.conv2d(x, kernels, shift, self.stride, self.padding, self.dilation, groups)


def condconv_trunk(network: Any) -> nn.Module:
    """A timm EfficientNet with CondConv blocks, without its classifier -> the same function with each BatchNorm folded
    and CondConv in a form that set_form chooses. The network is copied, not changed."""
    network = copy.deepcopy(network).eval()
    blocks = [block for stage in network.blocks for block in stage]
    return nn.Sequential(
        fuse_batchnorm(nn.Sequential(network.conv_stem, network.bn1)),
        *(_folded(block) if isinstance(block, CondConvResidual) else fuse_batchnorm(block) for block in blocks),
        fuse_batchnorm(nn.Sequential(network.conv_head, network.bn2)),
        network.global_pool,
    ).eval()


def set_form(network: nn.Module, form: str) -> None:
    for layer in network.modules():
        if isinstance(layer, CondConv):
            layer.form = form


def _folded(block: Any) -> nn.Module:
    for convolution, norm in (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")):
        old = getattr(block, norm)
        setattr(block, convolution, CondConv(getattr(block, convolution), old))
        setattr(block, norm, old.act)
    folded: nn.Module = block
    return folded
