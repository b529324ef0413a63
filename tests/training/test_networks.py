from __future__ import annotations

from pathlib import Path

import pytest

from coe_dist.config import NetworkConfig, parse_config
from coe_dist.data.sidecar import SplitInfo
from coe_dist.errors import InputError
from coe_dist.training.networks import NetworkBuilder

INFO = SplitInfo(
    source="none", split="train", classes=("a", "b"), count=2, counts_per_class=(1, 1), channels=3, shape=None,
    mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), bytes=1, sha256="",
)  # fmt: skip


def builder(tmp_path: Path) -> NetworkBuilder:
    return NetworkBuilder(parse_config({"name": "n", "runs_dir": str(tmp_path), "data": {"resolution": 32}}), INFO)


def test_a_network_whose_batchnorm_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"experts\.network: levit_128s is not allowed; it has BatchNorm1d layers"):
        builder(tmp_path).single(NetworkConfig(network="levit_128s"), "experts", 0)


def test_experts_start_different_and_the_same_each_time(tmp_path: Path) -> None:
    first, again, other = (builder(tmp_path).expert(expert).state_dict() for expert in (0, 0, 1))
    assert all(bool((first[name] == again[name]).all()) for name in first)
    assert any(bool((first[name] != other[name]).any()) for name in first if name.endswith("conv.weight"))
