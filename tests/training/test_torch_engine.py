"""The torch engine's norm and its optimizers, each against the plain way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coe_dist.config import OptimizerConfig, TrainingConfig
from coe_dist.parallel.groups import Group
from coe_dist.training.engines import TorchEngine, total_norm
from coe_dist.training.optim import build_optimizer


class TwoLayers(nn.Module):
    """`unused` is not reached by the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.unused = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.first(rows)


def engine_of(config: OptimizerConfig) -> TorchEngine:
    network = TwoLayers()
    optimizer = build_optimizer(network, config, config.learning_rate)
    return TorchEngine("network", network, optimizer, TrainingConfig(engine="torch"), Group("network", (0,), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_total_norm_is_that_of_all_elements(dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape, dtype=dtype) for shape in ((3, 4), (7,), ())]
    expected = torch.cat([tensor.reshape(-1) for tensor in tensors]).norm()
    assert torch.allclose(total_norm(tensors), expected)
    tensors[1][2] = torch.inf
    assert not torch.isfinite(total_norm(tensors))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_steps_equal_torchs_plain_optimizer_where_every_parameter_has_a_gradient(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.05, weight_decay=0.1)
    engine, network = engine_of(config), TwoLayers()
    weights, biases = ([p for p in network.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    if name == "sgd":
        plain = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, foreach=False)
    else:
        plain = torch.optim.AdamW(groups, lr=0.05, foreach=False)
    for seed in range(4):
        rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(rows).square().sum(), last=True)
        assert engine.step()
        network(rows).square().sum().backward()
        for parameter in network.unused.parameters():
            parameter.grad = torch.zeros_like(parameter)
        plain.step()
        plain.zero_grad()
    for ours, theirs in zip(engine.network.parameters(), network.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not torch.equal(engine.network.unused.weight, TwoLayers().unused.weight)  # its weight decay


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    engine = engine_of(OptimizerConfig())
    before = [parameter.clone() for parameter in engine.network.parameters()]
    engine.backward(engine(torch.full((1, 5), torch.nan)).sum(), last=True)
    assert not engine.step()
    for old, new in zip(before, engine.network.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None
