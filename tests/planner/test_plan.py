"""The plan as a whole: parts, monotony, scaling, advice, and the sanity of the tabulated rates."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from planner.planned import config_of, planned

from coe_dist.bench.planning import plan_run
from coe_dist.coe.backbones import build_classifier
from coe_dist.errors import InputError
from coe_dist.planner.devices import DEVICES, parse_bandwidth, tabulated
from coe_dist.planner.display import show_plan
from coe_dist.planner.facts import count_network
from coe_dist.planner.plan import WORLDS, make_plan
from coe_dist.planner.run import Run
from coe_dist.planner.step import PARTS

FIELDS = {
    "name", "gpus", "gpu", "nodes", "networks", "placement", "rows", "memory", "bytes_per_step", "step",
    "images_per_second", "images_per_epoch", "steps", "train_seconds", "evaluation_seconds", "hours", "gpu_hours",
    "bottleneck", "advice", "scaling", "rates", "assumptions", "stages",
}  # fmt: skip


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in numbers(value)]
    return [tree] if isinstance(tree, float) else []


@pytest.mark.parametrize("gpus", [1, 2, 5, 64])
@pytest.mark.parametrize("gpu", sorted(DEVICES))
def test_fields_and_sums(gpu: str, gpus: int) -> None:
    plan = json.loads(json.dumps(plan_run(config_of(), gpus=gpus, gpu=gpu)))
    assert set(plan) == FIELDS
    assert tuple(plan["step"]["parts"]) == PARTS
    assert plan["step"]["seconds"] == pytest.approx(sum(plan["step"]["parts"].values()))
    assert all(np.isfinite(number) and number >= 0 for number in numbers(plan))
    assert plan["images_per_second"] == pytest.approx(96 / plan["step"]["seconds"])
    assert plan["steps"] == 2 * -(-55_000 // 96)
    assert plan["train_seconds"] == pytest.approx(plan["steps"] * plan["step"]["seconds"])
    assert plan["gpu_hours"] == pytest.approx(gpus * (plan["train_seconds"] + plan["evaluation_seconds"]) / 3600)
    assert plan["bottleneck"] in ("loader", max(PARTS, key=plan["step"]["parts"].__getitem__))
    assert plan["advice"].startswith(plan["bottleneck"])
    assert plan["nodes"] == -(-gpus // DEVICES[gpu].per_node)
    worlds = [row["workers"] for row in plan["scaling"]]
    assert worlds == sorted({*WORLDS, gpus})
    own = plan["scaling"][worlds.index(gpus)]
    assert own["images_per_second"] == pytest.approx(plan["images_per_second"])
    assert plan["scaling"][0]["efficiency"] == pytest.approx(1.0)


def test_the_page_for_people_names_what_the_plan_holds(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_run(config_of(), gpus=5, gpu="h100")
    show_plan(plan)
    page = capsys.readouterr().out
    assert all(part in page for part in PARTS if part != "teacher")
    assert "5 x h100" in page
    assert "experts per worker 1, replicas of an expert 1 to 2" in page
    assert plan["advice"] in page
    assert all(line in page for line in plan["assumptions"])
    assert "no data in no-data" in page


def test_slowest_rank_and_imbalance() -> None:
    run = planned(gpu="cpu", experts={"count": 6}, training={"global_batch": 9600})
    even, uneven = run.step(3), run.step(4)  # 2,2,2 and 2,2,1,1
    assert uneven.parts["experts"] == pytest.approx(even.parts["experts"])
    assert uneven.slowest_rank == 0
    plan = make_plan(run, 4)
    assert plan["placement"] == {
        "experts_per_rank": [1, 2],
        "replicas_per_expert": [1, 1],
        "imbalance": pytest.approx(4 / 3),
        "slowest_rank": 0,
    }
    replicated = run.step(7)  # expert 0 has two ranks, expert 1 on one of its own does all its pairs
    assert replicated.slowest_rank == 2


def at(world: int, **sections: Any) -> dict[str, float]:
    return planned(gpu="cpu", **sections).step(world).parts


def test_parts_move_the_right_way() -> None:
    base = {"experts": {"count": 4, "per_sample": 2}, "training": {"global_batch": 4096}}
    four = at(4, **base)
    assert at(2, **base)["experts"] == pytest.approx(2 * four["experts"])
    assert at(2, **base)["delegator"] == pytest.approx(2 * four["delegator"])
    assert at(1, **base)["exchange"] < at(2, **base)["exchange"]
    assert at(1, **base)["reduce"] == 0 < at(2, **base)["reduce"] < four["reduce"]
    dense = at(4, **{**base, "experts": {"count": 4, "per_sample": 4}})
    assert dense["experts"] == pytest.approx(2 * four["experts"])
    assert dense["exchange"] > four["exchange"]
    assert dense["delegator"] == four["delegator"]
    big = at(4, **{**base, "training": {"global_batch": 8192}})
    assert all(big[part] >= four[part] for part in PARTS)
    halves = at(4, **{**base, "training": {"global_batch": 8192, "accumulation": 2}})
    for part in ("delegator", "route", "exchange", "experts"):
        assert halves[part] == pytest.approx(2 * four[part])
    assert halves["reduce"] == four["reduce"]
    assert halves["optimizer"] == four["optimizer"]
    local = at(4, **base, router={"scope": "local"})
    assert local["route"] < four["route"]
    averaged = at(4, **{**base, "training": {"global_batch": 4096, "ema_decay": 0.9}})
    assert averaged["optimizer"] > four["optimizer"]
    grouped = at(4, **{**base, "training": {"global_batch": 4096, "batchnorm": "group"}})
    assert grouped["reduce"] > four["reduce"]


def test_a_slower_network_between_machines_only_hurts_there() -> None:
    def step(world: int, network: float):
        return planned("h100", network=network, per_node=4, training={"global_batch": 4096}).step(world).parts

    assert step(4, 1e9) == step(4, 50e9)
    assert step(8, 1e9)["exchange"] > step(8, 50e9)["exchange"]
    assert step(8, 1e9)["reduce"] > step(8, 50e9)["reduce"]
    assert step(8, 1e9)["experts"] == step(8, 50e9)["experts"]


def with_rates(run: Run, **rates: Any) -> Run:
    from dataclasses import replace

    return replace(run, rates=replace(run.rates, **rates))


def test_loading_is_hidden_while_cores_are_free_and_added_when_they_are_not() -> None:
    run = with_rates(planned(gpu="cpu"), loader_seconds_per_image=1e-5, per_node=2)
    free, taken = (with_rates(run, cores_per_worker=cores).step(2) for cores in (2.0, 1.0))
    assert free.parts["loader"] == 0
    assert taken.parts["loader"] == pytest.approx(48 * 1e-5)
    turns = with_rates(run, cores_per_worker=0.5).step(2)
    assert turns.parts["experts"] == pytest.approx(2 * taken.parts["experts"])
    assert turns.seconds == pytest.approx(2 * taken.seconds)
    slow = with_rates(run, loader_seconds_per_image=1.0, cores_per_worker=2.0).step(2)
    assert slow.seconds == pytest.approx(48)


def test_advice_is_a_change_that_was_planned() -> None:
    run = with_rates(planned(gpu="cpu"), loader_seconds_per_image=1.0, cores_per_worker=64.0)
    plan = make_plan(run, 2)
    assert plan["bottleneck"] == "loader"
    assert plan["advice"].endswith(
        "data.loader_threads=2 would give 2.00 times, 4 workers would give 2.00 times the images/s"
    )
    slightly = with_rates(run, loader_seconds_per_image=1.1 * run.step(2).work / 48)
    plan = make_plan(slightly, 2)
    assert plan["bottleneck"] == "loader" != max(PARTS, key=plan["step"]["parts"].__getitem__)
    assert "all else takes 91% of it; data.loader_threads=2 would give 1.10 times" in plan["advice"]
    dense = planned(gpu="cpu", experts={"count": 8, "per_sample": 8}, training={"global_batch": 8192})
    assert "experts are 69% of the step; experts.per_sample=2 would give 2." in make_plan(dense, 8)["advice"]
    full = with_rates(dense, memory_bytes=1e8)
    plan = make_plan(full, 8)
    assert plan["memory"]["fits"] is False
    assert plan["advice"].startswith("a worker would need ")
    assert "activations" in plan["advice"]


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [("25GB/s", 25e9), ("200Gbit/s", 25e9), ("200 Gbps", 25e9), ("1.5MB/s", 1.5e6), ("100kB/s", 1e5), ("1TB/s", 1e12)],
)
def test_bandwidths(text: str, bytes_per_second: float) -> None:
    assert parse_bandwidth(text) == bytes_per_second


@pytest.mark.parametrize("text", ["", "25", "25GB", "25Gb/s", "-1GB/s", "0GB/s", "nanGB/s", "GB/s", "1e3GB/s"])
def test_other_bandwidths_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--network: .* is not allowed; give for instance 25GB/s or 200Gbit/s$"):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 0}, "--gpus: 0 is not allowed; give a whole number from 1 to 65536"),
        ({"gpus": 70_000}, "--gpus: 70000 is not allowed"),
        ({"gpu": "b300"}, "--gpu: 'b300' is not allowed; give h100, h200, a100, v100, l4, rtx3090, cpu or measure"),
        ({"gpus_per_machine": 0}, "--gpus-per-machine: 0 is not allowed"),
        ({"network": "fast"}, "--network: 'fast' is not allowed"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_run(config_of(), **{"gpus": 2, "gpu": "h100", **options})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# images/s of training, automatic mixed precision and channels last, batch 512, that timm publishes for an RTX 3090
# (results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv)
PUBLISHED = [
    ("tinynet_e", 106, 11915.85),
    ("mobilenetv3_small_100", 224, 8035.08),
    ("tinynet_a", 192, 2334.41),
    ("mobilenetv3_large_100", 224, 2732.43),
    ("efficientnet_b0", 224, 1751.72),
    ("resnet50", 224, 1218.01),
]


@pytest.mark.parametrize(("network", "resolution", "published"), PUBLISHED)
def test_tabulated_rates_reproduce_published_throughputs(network: str, resolution: int, published: float) -> None:
    config = config_of(training={"precision": "bf16", "engine": "deepspeed"})
    with torch.device("meta"):
        built = build_classifier(
            f"timm/{network}", {}, channels=3, classes=1000, mean=[0.5] * 3, std=[0.25] * 3, seed=0
        )
    facts = count_network("expert", built, channels=3, resolution=resolution, precision="bf16")
    rates = tabulated("rtx3090", config, facts, facts, network=None, per_node=None)
    predicted = 512 / (rates.expert.seconds(512) + rates.expert_step)
    assert predicted == pytest.approx(published, rel=0.25)
