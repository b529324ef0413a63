"""Moving averages of the weights: the formula, replicas, memory, and evaluation with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from reference import CLASSES, TinyNetwork
from trained_run import images_of
from training import ema_cases as cases

from coe_dist.parallel.batchnorm import split_batchnorm
from coe_dist.parallel.groups import create_groups
from coe_dist.training.ema import WeightAverage
from coe_dist.training.single import SingleStep
from coe_dist.training.step import MicroBatch

State = dict[str, torch.Tensor]


def by_the_formula(states: list[State], decay: float) -> State:
    """One parameter after the other in float64, from the source's state at first and after each step."""
    result = {name: value.double() for name, value in states[0].items()}
    for done, state in enumerate(states[1:]):
        rate = min(decay, (1 + done) / (10 + done))
        for name, value in state.items():
            whole = not value.is_floating_point()
            result[name] = value.double() if whole else rate * result[name] + (1 - rate) * value.double()
    return result


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_updates_follow_the_formula(decay: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = TinyNetwork(4, [CLASSES, 3]).to(dtype).train()
    split_batchnorm(network, "local", create_groups(2, timeout_seconds=300).world)
    average, states = WeightAverage(network, decay), [cases.copy_of(network)]
    for _ in range(200):
        network(torch.randint(0, 256, (6, 1, 12, 12), dtype=torch.uint8))  # moves the running statistics
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        average.update(network)
        states.append(cases.copy_of(network))
    expected, tolerance = by_the_formula(states, decay), 1e-12 if dtype is torch.float64 else 1e-5
    assert average.updates == 200
    for name, value in average.network.state_dict().items():
        assert value.dtype == states[0][name].dtype
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=tolerance)
        if value.is_floating_point():
            assert not torch.equal(value, states[-1][name])
    assert int(average.network.state_dict()["trunk.1.num_batches_tracked"]) == 200


def test_the_first_update_goes_nine_tenths_of_the_way() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    average = WeightAverage(network, 0.99)
    torch.nn.init.ones_(network.weight)
    average.update(network)
    assert float(average.network.weight) == pytest.approx(0.9)
    average.update(network)
    assert float(average.network.weight) == pytest.approx(1 - 0.1 * 2 / 11)


def test_a_copy_of_its_own() -> None:
    network = TinyNetwork(4, [CLASSES]).train()
    split_batchnorm(network, "local", create_groups(2, timeout_seconds=300).world)
    calls: list[str] = []
    network.register_forward_pre_hook(lambda *_: calls.append("before"))
    network.register_forward_hook(lambda *_: calls.append("after"))
    images = torch.randint(0, 256, (6, 1, 12, 12), dtype=torch.uint8)
    network(images).sum().backward()
    average = WeightAverage(network, 0.5)
    mine, theirs = (
        {value.untyped_storage().data_ptr() for value in [*net.parameters(), *net.buffers()]}
        for net in (average.network, network)
    )
    assert not mine & theirs
    assert list(average.network.state_dict()) == list(network.state_dict())
    assert not any(p.requires_grad or p.grad is not None for p in average.network.parameters())
    assert not any(module.training for module in average.network.modules())
    assert all(module.training for module in network.modules())
    before, calls[:] = cases.copy_of(average.network), []
    network(images)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7.0)
    assert calls == ["before", "after"]
    average.network(images)  # an engine's hooks hear nothing of it
    assert calls == ["before", "after"]
    assert all(torch.equal(value, before[name]) for name, value in average.network.state_dict().items())


def test_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, "training.ema_cases:run", tmp_path)
    for kind in cases.ENGINES:
        check_replicas(kind, [torch.load(tmp_path / f"{kind}-rank{rank}.pt") for rank in (0, 1)])
    for rank in (0, 1):
        results = torch.load(tmp_path / f"records-rank{rank}.pt", weights_only=False)
        columns = {kind: list(vars(records).values()) for kind, records in results.items()}
        for average, twin in zip(columns["average"], columns["twin"], strict=True):
            torch.testing.assert_close(average, twin, rtol=1e-12, atol=0)
        assert float(results["average"].confidence_N.min()) < 0.9
        assert not torch.equal(results["average"].confidence_N, results["raw"].confidence_N)
        assert not torch.equal(results["average"].experts_NE, results["raw"].experts_NE)


def check_replicas(kind: str, ranks: list[dict[str, Any]]) -> None:
    """Each rank's average follows the formula over its own states; statistics are then averaged by rows, and equal."""
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12} if "torch-" in kind and "bf16" not in kind else {"rtol": 2e-5, "atol": 1e-6}
    )
    for rank in ranks:
        half, whole = (by_the_formula(rank["sources"][: steps + 1], cases.DECAY) for steps in (3, cases.STEPS))
        for name, value in rank["before"][0][0].items():
            torch.testing.assert_close(value.double(), half[name], **tolerance)
            if "running" not in name:  # those were averaged over the ranks after three steps
                torch.testing.assert_close(rank["after"][name].double(), whole[name], **tolerance)
    rows = [rank["before"][1][1] for rank in ranks]
    assert rows == [sum(cases.rows_of(number, step) for step in range(3, cases.STEPS)) for number in (0, 1)]
    assert rows[0] != rows[1]
    for name, value in ranks[0]["after"].items():
        mine, other = (rank["before"][1][0][name].double() for rank in ranks)
        expected = mine
        if "running" in name and kind != "torch-group":
            assert not torch.equal(mine, other)
            expected = (rows[0] * mine + rows[1] * other) / sum(rows)
        torch.testing.assert_close(value.double(), expected, **tolerance)
        torch.testing.assert_close(value, ranks[1]["after"][name], rtol=1e-12, atol=0)
        assert name.endswith("tracked") or not torch.equal(value, ranks[0]["sources"][-1][name])
    torch.testing.assert_close(ranks[0]["output"], ranks[1]["output"], rtol=1e-6, atol=0)


def test_a_single_network_is_measured_by_its_average() -> None:
    groups, torch_engine = create_groups(2, timeout_seconds=300), cases.ENGINES["torch-local"]
    engine = cases.engine_of("single", TinyNetwork(4, [CLASSES]), torch_engine, groups, groups.world)
    average = WeightAverage(engine.network, 0.5)
    with torch.no_grad():
        for network, label in ((engine.network, 1), (average.network, 3)):
            network.heads[0].bias[label] = 100.0
    batch = MicroBatch(images_of(8)[..., :12, :12], torch.tensor([1, 3, 3, 3, 3, 1, 0, 2]), torch.arange(8))
    for given, right in ((None, 2), (average, 4)):
        step = SingleStep(engine, groups.world, label_smoothing=0.0, call_empty=False, average=given)
        assert step.accuracy([batch], "fp64") == (right, 8)
        assert (engine.network.training, average.network.training) == (True, False)
