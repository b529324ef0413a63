"""Packed convolutions give what the plain ones give, and what cannot be packed is left alone."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from coe_dist.coe.backbones import build_classifier
from coe_dist.coe.fusion import fuse_batchnorm
from coe_dist.coe.packing import PackedConvolution, pack_convolutions


def packed_layers(network: nn.Module) -> int:
    return sum(isinstance(layer, PackedConvolution) for layer in network.modules())


@pytest.mark.parametrize("name", ["small_cnn", "timm/mobilenetv3_small_050", "torchvision/resnet18"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@torch.inference_mode()
def test_all_convolutions_of_common_networks_are_packed(name: str, layout: torch.memory_format) -> None:
    network = fuse_batchnorm(build_classifier(name, {}, channels=3, classes=5, mean=[0.5] * 3, std=[0.2] * 3, seed=0))
    network.to(memory_format=layout)
    images = torch.randint(0, 256, (40, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    packed = pack_convolutions(network, images[:3])
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in network.modules())
    assert packed_layers(packed) == convolutions > 0
    assert packed_layers(network) == 0
    expected = network(images)
    limit = 1e-5 * float(expected.abs().max())
    for size in (1, 3, 40):
        answers = torch.cat([packed(part) for part in images.split(size)])
        torch.testing.assert_close(answers, expected, rtol=0, atol=limit)
    torch.testing.assert_close(packed(images[..., :40, :44]), network(images[..., :40, :44]), rtol=0, atol=limit)
    for mine, theirs in ((packed.state_dict(), before), (network.state_dict(), before)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def convolution(**changes: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"stride": (2, 1)}, {"padding": (2, 1)}, {"dilation": 2}, {"groups": 2}, {"bias": False}, {"kernel_size": 1}],
)
@torch.no_grad()
def test_every_kind_of_convolution(changes: dict[str, Any]) -> None:
    network = nn.Sequential(convolution(**changes))
    rows = torch.rand(5, 4, 9, 11, generator=torch.Generator().manual_seed(1))
    packed = pack_convolutions(network, rows[:1])
    assert packed_layers(packed) == 1
    for part in (rows, rows[:0], rows[:2]):
        torch.testing.assert_close(packed(part), network(part), rtol=0, atol=1e-6)


def test_what_the_packed_weights_are_not_for_is_computed_with_the_plain_ones() -> None:
    network = nn.Sequential(convolution())
    rows = torch.rand(5, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    packed = pack_convolutions(network, rows)
    with torch.no_grad():
        network[0].weight += 1
        packed[0].weight += 1
        assert not torch.allclose(packed(rows), network(rows), atol=0.1)  # the packed copy stays as it was
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(rows), network(rows))
    packed(rows).sum().backward()
    assert packed[0].weight.grad is not None
    packed.double()
    with torch.no_grad():
        torch.testing.assert_close(packed(rows.double()), network.double()(rows.double()))


@torch.no_grad()
def test_copies_and_pickles_compute_the_same() -> None:
    rows = torch.rand(5, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    packed = pack_convolutions(nn.Sequential(convolution()), rows)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert packed_layers(twin) == 1
        assert torch.equal(twin(rows), packed(rows))


@torch.no_grad()
def test_a_layer_of_two_names_stays_one_layer() -> None:
    shared = convolution(in_channels=4, out_channels=4, padding=1)
    packed = pack_convolutions(nn.Sequential(shared, nn.ReLU(), shared), torch.rand(1, 4, 8, 8))
    assert packed[0] is packed[2]
    assert packed_layers(packed) == 1


def with_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form computes weights in a hook
        return nn.utils.weight_norm(convolution())


KEPT: dict[str, Callable[[], nn.Module]] = {
    "hooks": with_weight_norm,
    "weights computed from others": lambda: nn.utils.parametrizations.weight_norm(convolution()),
    "reflected padding": lambda: convolution(padding=1, padding_mode="reflect"),
    "padding by name": lambda: convolution(padding="same"),
    "float64": lambda: convolution().double(),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 2, 1)),
}


@pytest.mark.parametrize("kind", KEPT)
@torch.no_grad()
def test_what_cannot_be_packed_is_kept(kind: str) -> None:
    network = nn.Sequential(KEPT[kind]())
    rows = torch.rand(2, 4, 9, 9, dtype=next(network.parameters()).dtype)
    packed = pack_convolutions(network, rows)
    assert packed_layers(packed) == 0
    assert torch.equal(packed(rows), network(rows))
