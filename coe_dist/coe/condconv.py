"""Conditionally parameterised convolutions (CondConv, Yang et al., NeurIPS 2019), with timm's CondConv2d.

Each sample mixes its own kernel from a few: sum_k alpha_k W_k, alpha = sigmoid(linear(global average of the block's
input)), one routing per block, in the last three stages.
"""

from __future__ import annotations

from typing import Any

from torch import nn

STAGES = 3


def with_condconv(network: str, trunk: nn.Module, kernels: int) -> nn.Module:
    """Makes the inverted residual blocks of the last three stages that have some conditional, as timm's block strings
    do with `cc`, and draws all weights anew. For timm's EfficientNet and MobileNetV3 families.

    Raises ValueError for a network without such blocks.
    """
    from timm.models._efficientnet_blocks import CondConvResidual, InvertedResidual
    from timm.models._efficientnet_builder import efficientnet_init_weights

    stages: Any = getattr(trunk, "blocks", None) or ()
    found = [[block for block in _children(stage) if type(block) is InvertedResidual] for stage in stages]
    found = [blocks for blocks in found if blocks]
    if not found:
        raise ValueError(
            f"options.condconv: {kernels} is not allowed; {network} has no such form "
            "(timm's EfficientNets and MobileNetV3s, ofa_mobilenetv3 and small_cnn have)"
        )
    for block in (block for blocks in found[-STAGES:] for block in blocks):
        block.routing_fn = nn.Linear(block.conv_pw.in_channels, kernels)
        for name in ("conv_pw", "conv_dw", "conv_pwl"):
            setattr(block, name, conditional(getattr(block, name), kernels))
        block.num_experts = kernels  # timm's name for the number of kernels
        block.__class__ = CondConvResidual  # the same block; its forward gives every convolution the routing
    efficientnet_init_weights(trunk)
    return trunk


def conditional(convolution: nn.Conv2d, kernels: int) -> nn.Module:
    """timm's CondConv2d of the same shape, for forward(x, alpha [N,kernels]); its weights are random."""
    from timm.layers import CondConv2d
    from timm.layers.conv2d_same import Conv2dSame

    convolution_of_many: nn.Module = CondConv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        padding="same" if isinstance(convolution, Conv2dSame) else convolution.padding,
        dilation=convolution.dilation,
        groups=convolution.groups,
        bias=convolution.bias is not None,
        num_experts=kernels,
    )
    return convolution_of_many


def _children(stage: nn.Module) -> list[Any]:
    return list(stage.children())
