"""The step's benchmark runs and trains the same as the plain loop; nothing here looks at a time."""

from __future__ import annotations

import pytest
import torch

from coe_dist.bench.run import run_bench
from coe_dist.bench.step_parts import PARTS, Clock
from coe_dist.bench.step_rank import _equal
from coe_dist.bench.step_system import configuration, global_batch, network_builder, rank_share

FIGURES = {"seconds", "fastest_seconds", "spread", "cpu_seconds"}


@pytest.fixture(scope="module")
def cases():
    record = run_bench("step", quick=True)
    assert record["name"] == "step"
    return record["cases"]


def test_fields_of_every_case(cases) -> None:
    systems = [(c["case"]["world_size"], c["case"]["engine"], c["case"]["experts"]) for c in cases]
    plain = [(1, "torch", 2), (1, "deepspeed", 2)]
    assert systems == plain + [(2, engine, experts) for engine in ("torch", "deepspeed") for experts in (2, 4)]
    for measured in cases:
        assert set(measured["case"]) == {"world_size", "experts_per_sample", "samples", "experts", "engine"}
        ours = measured["ours"]
        assert ours.keys() >= FIGURES | {"images_per_second", "parts"}
        assert ours["images_per_second"] == measured["case"]["samples"] / ours["seconds"]
        assert ours["fastest_seconds"] <= ours["seconds"]
        assert tuple(ours["parts"]) == PARTS
        assert all(seconds > 0 for seconds in ours["parts"].values())


def test_one_step_equals_the_plain_loop(cases) -> None:
    for measured in cases:
        if measured["case"]["world_size"] == 2:
            assert measured["peers"] == {}
            continue
        peer = measured["peers"]["plain_loop"]
        assert peer["equal"] is True
        assert peer["ratio"] == peer["seconds"] / measured["ours"]["seconds"]


def test_growth_is_relative_to_the_fewest_experts_of_the_engine(cases) -> None:
    growing = [c for c in cases if c["case"]["world_size"] == 2]
    for engine in ("torch", "deepspeed"):
        first, more = (c["ours"] for c in growing if c["case"]["engine"] == engine)
        assert first["growth"] == first["growth_cpu"] == 1.0
        assert more["growth"] == more["seconds"] / first["seconds"]


def test_equal_tells_a_difference() -> None:
    config = configuration(experts=2, per_sample=2, engine="torch", batch=8)
    ours, same, other = (network_builder(config).expert(expert) for expert in (0, 0, 1))
    assert _equal(ours, same)
    assert not _equal(ours, other)
    with torch.no_grad():
        same.class_head.bias[0] += 1e-3
    assert not _equal(ours, same)


def test_batches_are_a_function_of_the_seed_and_split_without_loss() -> None:
    batch = global_batch(10, seed=1)
    assert torch.equal(batch.images, global_batch(10, seed=1).images)
    assert not torch.equal(batch.images, global_batch(10, seed=2).images)
    parts = [rank_share(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)


def test_clock_adds_up_work_that_raises_and_the_functions_it_returns() -> None:
    clock = Clock()

    def raising() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        clock.timing("route", raising)()
    finish = clock.timing("labels", lambda: lambda: 7, result=True)()
    after_start = clock.seconds["labels"]
    assert finish() == 7
    assert clock.seconds["route"] > 0
    assert clock.seconds["labels"] > after_start > 0
