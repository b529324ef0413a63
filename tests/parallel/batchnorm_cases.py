"""Runs on every rank: split BatchNorm over real processes against torch's layer on the unsplit rows."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from coe_dist.parallel.batchnorm import average_statistics, split_batchnorm
from coe_dist.parallel.groups import Group, create_groups

CHANNELS = 4


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(2, CHANNELS, 3),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(),
            nn.BatchNorm2d(CHANNELS, affine=False),
            nn.Conv2d(CHANNELS, 2, 1),
        ).double()


def compare_group(world: Group, sizes: list[int]) -> None:
    """Outputs, gradients and running statistics equal those of one process; some ranks may have no rows."""
    rank = dist.get_rank()
    images = torch.randn(sum(sizes), 2, 6, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3 + 20
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    whole, split = network(), split_batchnorm(network(), "group", world)
    whole_images, split_images = images.clone().requires_grad_(), images[mine].clone().requires_grad_()
    for _ in range(2):
        expected, got = whole(whole_images), split(split_images)
        expected.square().sum().backward()
        got.square().sum().backward()
    torch.testing.assert_close(got, expected[mine], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(split_images.grad, whole_images.grad[mine], rtol=1e-8, atol=1e-9)
    for (name, wanted), parameter in zip(whole.named_parameters(), split.parameters(), strict=True):
        total = world.all_reduce_sum(parameter.grad.clone())
        torch.testing.assert_close(total, wanted.grad, rtol=1e-8, atol=1e-8, msg=name)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-9, atol=1e-10, msg=name)


def compare_single_value(world: Group) -> None:
    """One row of 1x1 over the whole group: running statistics are used and stay."""
    layer = split_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), "group", world)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    rows = 1 if dist.get_rank() == 1 else 0
    output = layer(torch.full((rows, 3, 1, 1), 7.0))
    torch.testing.assert_close(output, torch.full((rows, 3, 1, 1), 7.0), rtol=1e-4, atol=1e-4)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


def compare_average(world: Group) -> None:
    """Local statistics are averaged by the rows each rank has seen."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layer = split_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), "local", world)
    rows = rank + 2
    layer(torch.randn(rows, 2, 3, 3, generator=torch.Generator().manual_seed(rank)))
    expected, total = torch.zeros(2), sum(range(2, size + 2))
    for other in range(size):
        single = nn.BatchNorm2d(2)
        single(torch.randn(other + 2, 2, 3, 3, generator=torch.Generator().manual_seed(other)))
        expected += single.running_mean * (other + 2) / total
    average_statistics(layer, world)
    torch.testing.assert_close(layer.state_dict()["0.running_mean"], expected)
    before = layer[0].running_mean.clone()
    average_statistics(layer, world)  # nobody has seen anything since
    assert torch.equal(layer[0].running_mean, before)


def run(folder: Path) -> None:
    world = create_groups(2, timeout_seconds=300).world
    compare_group(world, [3, 4, 2][: world.size])
    compare_group(world, [5, 0, 1][: world.size])
    compare_single_value(world)
    compare_average(world)
