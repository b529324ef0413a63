"""Our own small network for small images (Fashion-MNIST's 28x28 and the like)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from coe_dist.coe.condconv import conditional

_CHANNELS = (10, 20, 40)
_FEATURES = 320


class SmallCNN(nn.Module):
    """A trunk: float images [N,channels,H,W] -> pooled features [N,self.features]; for any side of at least 8 pixels.

    1. Three stages of `depth` 3x3 convolutions with BatchNorm and ReLU, of 10, 20 and 40 times `width` channels; each
       stage halves the side with its first convolution (stride 2), the others are residual.
    2. Global average pooling.
    3. 1x1 convolution to 320 times `width` features with BatchNorm and ReLU: after the pooling it costs 5% of the
       MACs, and without it top-1 fell by 2 to 3 points (2 epochs of Fashion-MNIST at 240 and at 42 thousand MACs).

    At 1x28x28 with 10 classes width 1 costs about 240 thousand MACs and width 0.385 about 42 thousand. Plain
    convolutions because depthwise-separable ones of the same MACs were not better at these sizes and took twice as
    long on a CPU. Channels are rounded to whole numbers, not to multiples of 8, so that `width` sets the MACs finely.
    condconv: kernels that each sample's 3x3 convolutions mix their own from (condconv.py), one routing per block.
    Raises ValueError for a width outside (0, 64] or a depth that is not a whole number from 1 to 64.
    """

    def __init__(self, channels: int, *, width: float = 1.0, depth: int = 1, condconv: int | None = None) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 64:
            raise ValueError(f"options.width: {width!r} is not allowed; give a number above 0, up to 64")
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= 64:
            raise ValueError(f"options.depth: {depth!r} is not allowed; give a whole number from 1 to 64")
        stages: list[nn.Module] = []
        for base in _CHANNELS:
            out = max(1, round(base * width))
            blocks = [_ConvNormReLU(channels, out, kernel=3, stride=2, condconv=condconv)]
            blocks += [_ConvNormReLU(out, out, kernel=3, residual=True, condconv=condconv) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = out
        self.features = max(1, round(_FEATURES * width))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.widen = _ConvNormReLU(channels, self.features, kernel=1)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.widen(self.pool(self.stages(images_NCHW)))).flatten(1)


class _ConvNormReLU(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int = 1,
        residual: bool = False,
        condconv: int | None = None,
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.conv: nn.Module = convolution if condconv is None else conditional(convolution, condconv)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU(inplace=True)
        self.residual = residual
        self.routing = None if condconv is None else nn.Linear(inputs, condconv)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        if self.routing is None:
            convolved_NCHW = self.conv(images_NCHW)
        else:
            convolved_NCHW = self.conv(images_NCHW, torch.sigmoid(self.routing(images_NCHW.mean((2, 3)))))
        out_NCHW = cast(torch.Tensor, self.activation(self.norm(convolved_NCHW)))
        return images_NCHW + out_NCHW if self.residual else out_NCHW
