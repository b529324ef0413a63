"""Our own small network for small images (Fashion-MNIST's 28x28 and the like), tuned for accuracy per MAC on CPU."""

from __future__ import annotations

from torch import nn


class SmallCNN(nn.Module):
    """A trunk: float images [N,channels,H,W] -> pooled features [N,features]; any side of at least 8 pixels.

    1. Stem: 3x3 convolution of stride 2 to 16*width channels, BatchNorm, ReLU.
    2. Three stages of `depth` depthwise-separable blocks with 16, 32 and 64 times width channels; stages 2 and 3 begin with
       stride 2. A block that keeps its shape is residual.
    3. 1x1 convolution to 128*width features, BatchNorm, ReLU, after global average pooling where it costs next to nothing.

    Channels are rounded to whole numbers, not to multiples of 8, so that MACs can be set finely through width. Raises
    ValueError for a width that is not above 0 or a depth below 1.
    """

    def __init__(self, channels: int, *, width: float = 1.0, depth: int = 1) -> None:
        super().__init__()
        if not 0 < width <= 64:
            raise ValueError(f"options.width: {width} is not allowed; give a number above 0, up to 64")
        if isinstance(depth, bool) or depth != int(depth) or not 1 <= depth <= 64:
            raise ValueError(f"options.depth: {depth} is not allowed; give a whole number from 1 to 64")
