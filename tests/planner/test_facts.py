"""What the planner counts of a network, against the network itself."""

from __future__ import annotations

import pytest
import torch
from planner.planned import OneLayer, config_of
from torch import nn

from coe_dist.bench.planning import data_of, facts_of
from coe_dist.errors import InputError
from coe_dist.planner.facts import count_network
from coe_dist.planner.memory import OPTIMIZER_TENSORS
from coe_dist.training.networks import NetworkBuilder


def saved_bytes(network: nn.Module, rows: int, config: dict[str, int]) -> int:
    """Of a real forward pass on the CPU: the bytes autograd keeps, each memory block once."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    images = torch.zeros(rows, config["channels"], config["side"], config["side"], dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network.train()(images)
    assert output is not None
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


@pytest.mark.parametrize(
    ("network", "side", "source"),
    [("small_cnn", 28, "fashion-mnist"), ("timm/mobilenetv3_small_050", 64, "imagefolder")],
)
def test_counts_are_those_of_the_real_network(network: str, side: int, source: str) -> None:
    options = {"width": 0.5} if network == "small_cnn" else {}
    section = {"network": network, "options": options}
    config = config_of(
        data={"source": source, "resolution": side}, delegator=section, experts={"count": 3, "per_sample": 2, **section}
    )
    info, _, _ = data_of(config)
    builder = NetworkBuilder(config, info)
    for facts, real in zip(facts_of(config, info), (builder.delegator(), builder.expert(0)), strict=True):
        assert facts.macs == builder.macs_of(real)
        assert facts.parameters == sum(p.numel() for p in real.parameters())
        assert facts.buffers == sum(b.numel() for b in real.buffers())
        assert facts.batchnorms == sum(isinstance(m, nn.BatchNorm2d) for m in real.modules()) > 0
        shape = {"channels": info.channels, "side": side}
        for rows in (4, 12):
            growth = saved_bytes(real, rows, shape) - saved_bytes(real, 2, shape)
            assert facts.saved_bytes_per_image == pytest.approx(growth / (rows - 2), rel=0.02)


def test_bf16_halves_what_moves() -> None:
    def facts(precision: str) -> float:
        config = config_of(training={"precision": precision})
        delegator, expert = facts_of(config, data_of(config)[0])
        assert expert.macs > delegator.macs * 0.5
        return expert.traffic_bytes_per_image + expert.saved_bytes_per_image

    assert facts("bf16") == pytest.approx(facts("fp32") / 2, rel=0.1)


def test_traffic_and_saved_bytes_of_a_network_done_by_hand() -> None:
    """One linear layer on an image of 4 pixels, 8 bytes an element: every operation counted by hand."""
    with torch.device("meta"):
        network = OneLayer()
    facts = count_network("linear", network, channels=1, resolution=2, precision="fp64")
    assert (facts.macs, facts.parameters, facts.tensors) == (12, 12, 1)
    assert facts.training_macs == 36
    assert facts.saved_bytes_per_image == 4 * 8  # the input, for the gradient of the weights
    # per image: conversion 4 + 32; product 32 in, 24 out; its sum 24 in; gradient of the weights 24 and 32 in
    least = 36 + 56 + 24 + 56
    assert least <= facts.traffic_bytes_per_image <= least + 3 * 24


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_keep_as_many_tensors_as_the_table_says(name: str) -> None:
    from coe_dist.planner.memory import optimizer_tensors
    from coe_dist.training.optim import build_optimizer

    for momentum in (0.9, 0.0):
        config = config_of(training={"optimizer": {"name": name, "momentum": momentum}})
        network = nn.Linear(50, 40)
        optimizer = build_optimizer(network, config.training.optimizer, 0.1)
        network(torch.ones(1, 50)).sum().backward()
        optimizer.step()
        kept = sum(
            value.numel()
            for state in optimizer.state.values()
            for key, value in state.items()
            if torch.is_tensor(value) and key != "step"
        )
        size = sum(p.numel() for p in network.parameters())
        assert kept == size * optimizer_tensors(config)


def test_the_table_has_every_optimizer_of_the_configuration() -> None:
    from typing import get_args

    from coe_dist.config import OptimizerConfig

    assert set(get_args(OptimizerConfig.model_fields["name"].annotation)) <= set(OPTIMIZER_TENSORS)


def test_networks_with_every_option_are_counted_and_refusals_have_one_line() -> None:
    options = {"activation": "pwlu", "condconv": 4, "resolution": 96}
    imagefolder = {"source": "imagefolder", "resolution": 128}
    section = {"network": "timm/mobilenetv3_small_050", "options": options}
    plain = {"network": "timm/mobilenetv3_small_050", "options": {"resolution": 96}}
    training = {"epochs": 9}

    def facts(delegator: dict[str, object]):
        config = config_of(data=imagefolder, delegator=delegator, training=training)
        return facts_of(config, data_of(config)[0])[0]

    rich, poor, large = facts(section), facts(plain), facts({**plain, "options": {}})
    assert rich.macs > poor.macs
    assert rich.traffic_bytes_per_image > poor.traffic_bytes_per_image
    assert rich.operations > poor.operations
    assert large.macs == pytest.approx(poor.macs * (128 / 96) ** 2, rel=0.15)
    vit = config_of(
        data={**imagefolder, "resolution": 100},
        delegator={**plain, "network": "timm/vit_tiny_patch16_224", "options": {}},
    )
    with pytest.raises(InputError, match=r"^data.resolution: 100 is not allowed; the delegator refuses it: [^\n]+$"):
        facts_of(vit, data_of(vit)[0])
