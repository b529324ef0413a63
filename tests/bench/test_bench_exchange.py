"""The exchange's benchmark runs, its two sides agree, and its bytes are exact; nothing here looks at a time."""

from __future__ import annotations

import pytest
import torch

from coe_dist.bench.exchange_rank import _close
from coe_dist.bench.exchange_work import PlainExpert, SentBytes
from coe_dist.bench.ranks import measure_in_ranks
from coe_dist.bench.run import run_bench
from coe_dist.errors import TrainingError

IMAGE = 28 * 28  # bytes of an image
SAMPLES, WORLD_SIZE, EXPERTS = 64, 2, 16


@pytest.fixture(scope="module")
def cases():
    record = run_bench("exchange", quick=True)
    assert record["name"] == "exchange"
    assert record["versions"]["deepspeed"] != "not installed"
    return {measured["case"]["load"]: measured for measured in record["cases"]}


def test_every_case_computed_the_same_as_deepspeed(cases) -> None:
    assert set(cases) == {"balanced", "shuffled", "one"}
    for load, measured in cases.items():
        assert measured["case"] == {
            "world_size": WORLD_SIZE,
            "experts": EXPERTS,
            "samples": SAMPLES,
            "load": load,
            "image": [1, 28, 28],
        }
        assert measured["ours"]["equal"] is True
        for peer in measured["peers"].values():
            assert peer["ratio"] == peer["seconds"] / measured["ours"]["seconds"]
            assert peer["cpu_seconds"] > 0


def test_bytes_of_a_pair_that_travels(cases) -> None:
    for measured in cases.values():
        ours, layer, parts = measured["ours"], *(measured["peers"][f"deepspeed_{n}"] for n in ("moe", "parts"))
        assert ours["bytes_per_pair"] == layer["bytes_per_pair"] / 4 + 8  # uint8 for float32, label and weight
        assert layer["bytes_per_pair"] == 4 * IMAGE
        assert ours["bytes_back_per_pair"] == 4  # one float
        assert layer["bytes_back_per_pair"] == 2 * 4 * IMAGE  # an answer as long as the token, and its gradient
        assert parts["bytes_per_pair"] == IMAGE
        assert parts["bytes_back_per_pair"] == 2 * 4 * 10


def test_bytes_sent_are_those_of_the_remote_pairs_while_the_peer_pads(cases) -> None:
    rows = SAMPLES // WORLD_SIZE
    for load in ("balanced", "one"):  # half of the pairs are remote
        assert cases[load]["ours"]["bytes_sent"] == rows * (IMAGE + 8 + 4)
    token = 3 * 4 * IMAGE  # out, back, gradient
    assert cases["balanced"]["peers"]["deepspeed_moe"]["bytes_sent"] == rows * token
    assert cases["one"]["peers"]["deepspeed_moe"]["bytes_sent"] == EXPERTS * rows * token


def test_close_tells_a_difference() -> None:
    one = torch.tensor([1.0, 0.0])
    assert _close(one, one + 9e-5)
    assert not _close(one, one + 2e-4)
    assert not _close(one, torch.tensor([1.0, float("nan")]))
    assert not _close(PlainExpert(1, 0).layers[0].weight, PlainExpert(1, 1).layers[0].weight)


def test_counting_ends_with_the_block() -> None:
    original = torch.distributed.all_to_all_single
    with SentBytes().counting():
        assert torch.distributed.all_to_all_single is not original
    assert torch.distributed.all_to_all_single is original


def test_a_rank_that_fails_is_named() -> None:
    request = {"cases": [{"experts": 16, "samples": 4, "load": "no such load", "image": [1, 8, 8]}], "repeats": 1}
    with pytest.raises(TrainingError, match=r"exchange_rank: rank \d ended with 1: .*no such load"):
        measure_in_ranks("coe_dist.bench.exchange_rank", 2, request, timeout_seconds=60)


def test_time_is_limited() -> None:
    with pytest.raises(TrainingError, match=r"exchange_rank: rank 0 ended with -9"):
        measure_in_ranks("coe_dist.bench.exchange_rank", 1, {}, timeout_seconds=0.0)
