"""Multiply-adds against hand counts and published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coe_dist.coe.backbones import build_classifier
from coe_dist.coe.macs import average_macs, count_macs, count_pwlu_macs, exit_rate_for_budget


@pytest.mark.parametrize(
    ("name", "resolution", "published"),
    [
        ("tinynet_e", 106, 24.4e6),
        ("tinynet_d", 152, 51.6e6),
        ("tinynet_c", 184, 99.5e6),
        ("tinynet_a", 192, 336.9e6),
        ("mobilenetv3_small_100", 224, 56.5e6),
        ("mobilenetv3_large_100", 224, 216.6e6),
    ],
)
def test_published_figures(name: str, resolution: int, published: float) -> None:
    network = meta_classifier(name)
    assert count_macs(network, channels=3, resolution=resolution) == pytest.approx(published, rel=0.01)


def meta_classifier(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build_classifier(name, options, channels=3, classes=1000, mean=[0.0] * 3, std=[1.0] * 3, seed=0)


def test_condconv_counts_its_mixing_and_one_convolution() -> None:
    """A conditional convolution costs what it did, and kernels * weights to mix a sample's own."""
    plain, kernels = meta_classifier("tinynet_e"), 4
    conditional = meta_classifier("tinynet_e", condconv=kernels)
    mixing = sum(
        kernels * module.weight[0].numel() for module in conditional.modules() if type(module).__name__ == "CondConv2d"
    )
    routing = sum(module.weight.numel() for name, module in conditional.named_modules() if name.endswith("routing_fn"))
    assert mixing > 0
    assert routing > 0
    counts = [count_macs(network, channels=3, resolution=106) for network in (plain, conditional)]
    assert counts[1] - counts[0] == mixing + routing


def test_pwlu_is_counted_apart() -> None:
    plain, learned = (meta_classifier("tinynet_e", **options) for options in ({}, {"activation": "pwlu"}))
    size = {"channels": 3, "resolution": 106}
    assert count_macs(learned, **size) == count_macs(plain, **size)
    assert count_pwlu_macs(plain, **size) == 0
    small = build_classifier("small_cnn", {"activation": "pwlu"}, channels=1, classes=10, mean=[0.0], std=[1.0], seed=0)
    assert count_pwlu_macs(small, channels=1, resolution=16) == 2 * (10 * 64 + 20 * 16 + 40 * 4 + 320)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=True),
        nn.BatchNorm2d(6),
        nn.Dropout(0.5),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Flatten(),
        nn.Linear(6 * 5 * 5, 7),
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hand_count(device: str, dtype: torch.dtype) -> None:
    network = small().to(device=device, dtype=dtype)
    assert count_macs(network, channels=2, resolution=9) == 25 * 9 * 2 * 6 + 25 * 9 * 6 + 150 * 7


def test_the_module_and_the_random_state_are_left_as_they_were() -> None:
    network = small().train()
    network[1].eval()
    flags = [part.training for part in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random_state = torch.random.get_rng_state()
    count_macs(network, channels=2, resolution=9)
    assert [part.training for part in network.modules()] == flags
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_flags_return_also_when_the_network_refuses_the_resolution() -> None:
    network = small().train()
    with pytest.raises(RuntimeError):
        count_macs(network, channels=2, resolution=20)
    assert all(part.training for part in network.modules())


def test_the_papers_budgets_imply_these_exit_rates() -> None:
    assert exit_rate_for_budget(100e6, 24.4e6, 110e6) == pytest.approx(0.3127, abs=1e-4)
    assert exit_rate_for_budget(194e6, 56.5e6, 230e6) == pytest.approx(0.4022, abs=1e-4)


@given(st.floats(0, 1e9), st.floats(1, 1e9), st.floats(0, 2e9))
def test_exit_rate_is_the_smallest_that_keeps_the_budget(delegator: float, expert: float, spare: float) -> None:
    budget = delegator + spare
    rate = exit_rate_for_budget(budget, delegator, expert)
    assert 0.0 <= rate <= 1.0
    spent = average_macs(delegator, expert, rate)
    assert spent <= budget + 1e-6 * (budget + expert)
    if rate > 0:
        assert spent == pytest.approx(budget, abs=1e-6 * (budget + expert))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((9.0, 10.0, 5.0), "budget"), ((float("nan"), 10.0, 5.0), "budget"), ((20.0, 10.0, 0.0), "mean_expert_macs")],
)
def test_exit_rate_refuses(arguments: tuple[float, float, float], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        exit_rate_for_budget(*arguments)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_average_refuses_what_is_no_rate(rate: float) -> None:
    with pytest.raises(ValueError, match=r"^exit_rate: "):
        average_macs(1.0, 1.0, rate)
