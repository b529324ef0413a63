"""BatchNorm folded into convolutions: equal answers, and layers that must not be folded are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from coe_dist.coe.backbones import build_classifier
from coe_dist.coe.fusion import fuse_batchnorm

COMMON: list[tuple[str, dict[str, Any]]] = [
    ("small_cnn", {}),
    ("small_cnn", {"activation": "pwlu"}),
    ("timm/mobilenetv3_small_050", {}),
    ("timm/mobilenetv3_small_050", {"activation": "pwlu"}),
    ("timm/tf_efficientnet_b0", {}),
    ("torchvision/resnet18", {}),
]


def trained(network: nn.Module) -> nn.Module:
    """BatchNorm as after training: not the identity."""
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low in ((layer.running_mean, -0.5), (layer.running_var, 0.5), (layer.weight, 0.5)):
                if tensor is not None:
                    tensor.data.uniform_(low, 1.5, generator=generator)
    return network.double().eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


@pytest.mark.parametrize(("name", "options"), COMMON)
@torch.no_grad()
def test_all_batchnorm_of_common_networks_is_folded(name: str, options: dict[str, Any]) -> None:
    network = trained(build_classifier(name, options, channels=3, classes=5, mean=[0.5] * 3, std=[0.2] * 3, seed=0))
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = network(images)
    fused = fuse_batchnorm(network)
    assert norms(network) > 0
    assert norms(fused) == 0
    torch.testing.assert_close(fused(images), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert torch.equal(network(images), expected)


@torch.no_grad()
def test_networks_of_conditional_convolutions_answer_the_same() -> None:
    options = {"condconv": 4}
    network = build_classifier("small_cnn", options, channels=3, classes=5, mean=[0.5] * 3, std=[0.2] * 3, seed=0)
    network = trained(network)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fuse_batchnorm(network)(images), network(images), rtol=1e-9, atol=1e-12)


class TwoUses(nn.Module):
    """The convolution's output is used beside the BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convolution(x)
        return self.norm(y) + y


class CalledTwice(TwoUses):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(self.norm(self.convolution(x))))


class WeightUsedElsewhere(TwoUses):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(x)) + self.convolution.weight.sum()


class Untraceable(TwoUses):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.convolution(x))
        return y if float(y.sum()) > 1e9 else -y


def standardised() -> nn.Module:
    from timm.layers import StdConv2d

    return nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4))


KEPT: dict[str, Callable[[], Any]] = {
    "two uses": TwoUses,
    "called twice": CalledTwice,
    "weight used elsewhere": WeightUsedElsewhere,
    "untraceable": Untraceable,
    "standardised weights": standardised,
    "weights computed from others": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
    ),
    "statistics of the batch": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
}


@pytest.mark.parametrize("kind", KEPT)
@torch.no_grad()
def test_what_must_not_be_folded_is_kept(kind: str) -> None:
    network = trained(KEPT[kind]())
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fused = fuse_batchnorm(network)
    assert norms(fused) == 1
    torch.testing.assert_close(fused(x), network(x), rtol=1e-12, atol=0)
