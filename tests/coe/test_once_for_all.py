"""Once-for-all subnets: their published MACs, their shape, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coe_dist.coe.backbones import build_classifier
from coe_dist.coe.macs import count_macs
from coe_dist.coe.once_for_all import block_strings


def subnet(**options: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return build_classifier(
            "ofa_mobilenetv3", options, channels=3, classes=1000, mean=[0.0] * 3, std=[1.0] * 3, seed=0
        )


@pytest.mark.parametrize(
    ("depth", "expand", "kernel", "resolution", "published"),
    [(3, 3, 3, 176, 111e6), (2, 4, 3, 192, 115e6), (3, 4, 3, 224, 225e6), (4, 3, 3, 224, 226e6), (2, 6, 3, 224, 223e6)],
)
def test_published_macs(depth: int, expand: int, kernel: int, resolution: int, published: float) -> None:
    network = subnet(depth=depth, expand=expand, kernel=kernel)
    assert count_macs(network, channels=3, resolution=resolution) == pytest.approx(published, rel=0.01)


def test_lists_give_each_stage_or_block_its_own() -> None:
    depth = [2, 3, 4, 2, 3]
    expand, kernel = [3, 4, 6, 3, 4], [7, 5, 3, 7, 5, *[3] * 11, 5, 5, 7, 3]
    network = subnet(depth=depth, expand=expand, kernel=kernel)
    stages = list(network.trunk.blocks)[1:-1]
    assert [len(stage) for stage in stages] == depth
    width = 16
    for place, (stage, channels) in enumerate(zip(stages, (24, 40, 80, 112, 160), strict=True)):
        for block, layer in enumerate(stage):
            assert layer.conv_pw.out_channels == pytest.approx(width * expand[place], abs=4)  # to a multiple of 8
            assert layer.conv_dw.kernel_size[0] == kernel[4 * place + block]
            assert layer.conv_dw.stride[0] == (2 if block == 0 and place != 3 else 1)
            width = layer.conv_pwl.out_channels
            assert width == channels
            assert (type(layer.se).__name__ == "SqueezeExcite") == (place in (1, 3, 4))
            assert type(layer.bn1.act).__name__ == ("ReLU" if place < 2 else "Hardswish")


def test_by_default_the_whole_network() -> None:
    assert block_strings({}) == block_strings({"depth": 4, "expand": 6, "kernel": 7})
    assert block_strings({"kernel": [5] * 5}) == block_strings({"kernel": [5] * 20}) == block_strings({"kernel": 5})
    assert count_macs(subnet(), channels=3, resolution=224) > 5e8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 5}, r"^options\.depth: 5 is not allowed; give 2, 3, 4 or a list of them$"),
        ({"depth": [3] * 20}, r"^options\.depth: 20 numbers are not allowed; give one number or 5$"),
        ({"expand": 5}, r"^options\.expand: 5 is not allowed; give 3, 4, 6 "),
        ({"kernel": [3, 3, 3]}, r"^options\.kernel: 3 numbers are not allowed; give one number or 5 or 20$"),
        ({"kernel": [3, 3, 3, 3, 4]}, r"^options\.kernel: 4 is not allowed"),
        ({"kernel": "3"}, r"^options\.kernel: '3' is not allowed"),
        ({"depth": True}, r"^options\.depth: True is not allowed"),
        ({"width": 1}, r"^options\.width: unknown; ofa_mobilenetv3 has depth, expand, kernel, "),
        ({"drop_rate": 1.0}, r"^options\.drop_rate: 1\.0 is not allowed"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subnet(**options)
