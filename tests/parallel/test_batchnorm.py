from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from timm.layers import BatchNormAct2d
from torch import nn

from coe_dist.parallel.batchnorm import SplitBatchNorm, split_batchnorm
from coe_dist.parallel.groups import Group

ALONE = Group("world", (0,), None)


def test_batchnorm_over_processes(tmp_path: Path) -> None:
    run_ranks(3, "parallel.batchnorm_cases:run", tmp_path)


@pytest.mark.parametrize("mode", ["local", "group"])
def test_one_value_per_channel_leaves_the_statistics_alone(mode: str) -> None:
    layer = split_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), mode, ALONE)
    layer(torch.randn(8, 4, 1, 1))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    output = layer(torch.randn(1, 4, 1, 1))  # torch's own layer raises here
    assert torch.isfinite(output).all()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("mode", ["local", "group"])
def test_one_rank_equals_torch_also_with_timms_fused_activation(mode: str) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    split = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    split.load_state_dict(original.state_dict())
    split_batchnorm(split, mode, ALONE)
    assert sum(isinstance(module, SplitBatchNorm) for module in split.modules()) == 2
    images = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(split(images), original(images))
    assert list(split.state_dict()) == list(original.state_dict())
    for name, value in original.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value)


def test_a_cumulative_average_is_refused() -> None:
    """Its weight would be another one on every rank."""
    with pytest.raises(ValueError, match=r"^BatchNorm momentum: None is not allowed; give a number from 0 to 1$"):
        split_batchnorm(nn.Sequential(nn.BatchNorm2d(4, momentum=None)), "local", ALONE)
