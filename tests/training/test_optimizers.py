"""RMSprop and LAMB under every engine that may run them, on two ranks, against torch's and timm's own on all rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from timm.optim.lamb import Lamb as TimmLamb
from torch import nn
from training.optimizer_cases import DECAY, MOVES, RATE, ROWS, STEPS, batch, loss_of, network

from coe_dist.training.lamb import Lamb


def plain(name: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=RATE, alpha=0.9, eps=1e-3, momentum=0.9, foreach=False)
    return TimmLamb(groups, lr=RATE, max_grad_norm=None)


def expected(name: str) -> dict[str, torch.Tensor]:
    model = network()
    optimizer = plain(name, model)
    for step in range(STEPS):
        (loss_of(model(batch(step))) / ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_steps_and_state_are_the_same_under_every_engine_and_across_a_change_of_engine(tmp_path: Path) -> None:
    run_ranks(2, "training.optimizer_cases:run", tmp_path)
    wanted = {name: expected(name) for name in MOVES}
    start = network().state_dict()
    for rank in range(2):
        results = json.loads((tmp_path / f"weights-{rank}.json").read_text())
        assert len(results) == sum(len(moves) for moves in MOVES.values())
        for case, weights in results.items():
            for name, value in wanted[case.split()[0]].items():
                got = torch.tensor(weights[name])
                assert torch.allclose(got, value, rtol=1e-4, atol=1e-6), f"rank {rank}, {case}: {name}"
                assert not torch.allclose(got, start[name], atol=1e-3), f"{case}: {name} has not moved"


def test_lamb_moves_a_tensor_by_its_length_and_a_vector_as_adam_does() -> None:
    matrix, vector = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.full((2,), 3.0))
    optimizer = Lamb([{"params": [matrix], "weight_decay": 1e-9}, {"params": [vector], "weight_decay": 0.0}], lr=0.1)
    for parameter in (matrix, vector):
        parameter.grad = torch.full_like(parameter, 1e3)
    optimizer.step()
    assert matrix.tolist() == [[pytest.approx(3.0 - 0.1 * 3.0, rel=1e-5)] * 2] * 2  # |step| = rate * |matrix|
    assert vector.tolist() == [pytest.approx(3.0 - 0.1, rel=1e-5)] * 2
