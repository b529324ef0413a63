"""Growing images and a teacher: their part of steps, hours, bytes and memory, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from planner.planned import OneLayer, config_of, planned

from coe_dist.bench.planning import plan_run
from coe_dist.errors import InputError
from coe_dist.planner.devices import loader_seconds
from coe_dist.planner.display import show_plan
from coe_dist.planner.facts import count_forward
from coe_dist.planner.memory import fullest_rank
from coe_dist.planner.plan import make_plan
from coe_dist.planner.rates import Cost, Rates, RouterRates
from coe_dist.planner.run import Run

GROWING = {"data": {"resolution": 28, "progressive": {"start": 14, "until_epoch": 2}}, "training": {"epochs": 4}}
TEACHER = {"teacher": "tinynet_e", "weights": "not-there-yet.safetensors", "top": 8}
STEPS = 573  # of 96 images, in an epoch of 55,000


def only_networks(rates: Rates, share: float, *, loader: float = 0.0) -> Rates:
    """An image costs the delegator 1 ms, an expert 2 ms and the teacher 4 ms, times `share`; all else is free."""
    free = Cost(0.0, 0.0)
    return replace(
        rates,
        delegator=Cost(0.0, 1e-3 * share),
        expert=Cost(0.0, 2e-3 * share),
        teacher=Cost(0.0, 4e-3 * share),
        delegator_step=0.0,
        expert_step=0.0,
        router=RouterRates(free, free, free, 0.0),
        copy_bytes_per_second=float("inf"),
        small_operation=0.0,
        loader_seconds_per_image=loader,
        cores_per_worker=64.0,
    )


def by_hand(*, loader: tuple[float, float] = (0.0, 0.0)) -> Run:
    run = planned("cpu", distillation=TEACHER, **GROWING)
    assert run.smallest is not None
    small, full = (only_networks(run.rates, share, loader=of) for share, of in zip((0.25, 1.0), loader, strict=True))
    return replace(run, rates=full, smallest=small)


def test_steps_hours_and_parts_by_hand() -> None:
    # 96 images for the delegator and the teacher, 64 for each of three experts, all on one worker
    delegator, experts, teacher = 0.096, 0.384, 0.384
    full, first = 0.864, 0.216
    second = first + (full - first) * (16**2 - 14**2) / (28**2 - 14**2)  # 21 pixels become 16, a multiple of 16
    plan = make_plan(by_hand(), 1)
    found = [(stage["resolution"], stage["epochs"], stage["seconds"]) for stage in plan["stages"]]
    assert found == [(14, 1, pytest.approx(first)), (16, 1, pytest.approx(second)), (28, 2, pytest.approx(full))]
    parts = plan["stages"][-1]["parts"]
    assert (parts["delegator"], parts["experts"], parts["teacher"]) == pytest.approx((delegator, experts, teacher))
    mean = (first + second + 2 * full) / 4
    assert plan["step"]["seconds"] == pytest.approx(mean)
    assert plan["step"]["parts"]["teacher"] == pytest.approx(mean * teacher / full)
    assert plan["images_per_second"] == pytest.approx(96 / mean)
    assert plan["train_seconds"] == pytest.approx(STEPS * (first + second + 2 * full))
    # 5,000 images of full size, forward only: 52.08 batches; delegator, and every image in all three experts
    evaluation = 4 * 5000 / 96 * (delegator + 3 * 96 * 2e-3) / 3
    assert plan["evaluation_seconds"] == pytest.approx(evaluation)
    assert plan["gpu_hours"] == plan["hours"] == pytest.approx((plan["train_seconds"] + evaluation) / 3600)


def test_experts_and_their_teacher_get_a_share_of_the_images_by_hand() -> None:
    whole, half = by_hand(), by_hand().with_changes(experts={"share": 0.5})
    parts, all_parts = half.step_at(1, 28).parts, whole.step_at(1, 28).parts
    assert parts["experts"] == pytest.approx(0.192)  # 32 images for each of three
    assert parts["teacher"] == pytest.approx(48 * 4e-3)
    assert parts["delegator"] == all_parts["delegator"] == pytest.approx(0.096)
    taught = half.with_changes(distillation={"delegator": True})
    assert taught.step_at(1, 28).parts["teacher"] == all_parts["teacher"]
    plan, whole_plan = make_plan(half, 2), make_plan(whole, 2)
    assert plan["evaluation_seconds"] == pytest.approx(whole_plan["evaluation_seconds"])
    assert plan["rows"]["pairs_per_expert"] == 32
    assert plan["bytes_per_step"]["exchange"] == pytest.approx(whole_plan["bytes_per_step"]["exchange"] / 2)
    assert plan["memory"]["activations"] < whole_plan["memory"]["activations"]


def test_a_teacher_looks_once_at_each_image_on_the_rank_that_has_read_it() -> None:
    run = by_hand()
    assert run.step_at(2, 28).parts["teacher"] == pytest.approx(48 * 4e-3)
    dense = run.with_changes(experts={"per_sample": 3})
    assert dense.step_at(2, 28).parts["teacher"] == run.step_at(2, 28).parts["teacher"]
    halves = run.with_changes(training={"accumulation": 2})
    assert halves.step_at(2, 28).parts["teacher"] == pytest.approx(48 * 4e-3)
    assert planned("cpu").step(2).parts["teacher"] == 0.0


def test_reading_small_images_takes_less() -> None:
    run = by_hand(loader=(0.5, 2.0))  # seconds of one core for an image: longer than everything else
    for side, seconds in ((14, 48.0), (28, 192.0)):
        step = run.step_at(1, side)
        assert step.waits_for_loader
        assert step.seconds == pytest.approx(seconds)
    slow = replace(run, smallest=only_networks(run.rates, 0.25))
    plan = make_plan(slow, 1)  # only the later epochs wait, but most of the time goes by in them
    assert [stage["parts"]["loader"] > 0 for stage in plan["stages"]] == [False, True, True]
    assert plan["bottleneck"] == "loader"


def test_the_table_of_the_loader_by_hand() -> None:
    plain = {"source": "imagefolder", "resolution": 100}
    assert loader_seconds(config_of(data=plain)) == pytest.approx(0.8 / 1500 + 3.5e-5)
    changed = {**plain, "augmentation": {"operations": 2}}
    assert loader_seconds(config_of(data=changed)) == pytest.approx(0.8 / 1500 + 3 * 3.5e-5)
    assert loader_seconds(config_of()) == 1 / 40_000  # raw images


def test_hints_travel_and_the_teacher_takes_memory() -> None:
    run, plain = planned("cpu", distillation=TEACHER), planned("cpu")
    assert run.layout(2).image_bytes == 28 * 28 + 4 * 8 == plain.layout(2).image_bytes + 32
    assert planned("cpu", distillation={**TEACHER, "top": 32}).layout(2).image_bytes == 28 * 28 + 4 * 10  # ten classes
    assert run.layout(2, 14).image_bytes == 14 * 14 + 32
    teacher = run.teacher
    assert teacher is not None
    with_it, without = (
        fullest_rank(run.config, run.layout(2), run.delegator, run.expert, 0.0, of)[1].weights for of in (teacher, None)
    )
    assert with_it - without == 4 * (teacher.parameters + teacher.buffers)
    assert make_plan(run, 2)["memory"]["weights"] == with_it


def test_a_forward_pass_done_by_hand() -> None:
    with torch.device("meta"):
        network = OneLayer()
    facts = count_forward("linear", network, channels=1, resolution=2, precision="fp64")
    assert (facts.macs, facts.parameters, facts.buffers) == (12, 12, 0)
    # per image: conversion 4 bytes in, 32 out; product 32 in, 24 out
    assert facts.traffic_bytes_per_image == 36 + 56


def test_counted_networks_cost_less_on_small_images() -> None:
    def seconds(**sections: Any) -> list[float]:
        growing = {"source": "imagefolder", "resolution": 96, "progressive": {"start": 48, "until_epoch": 2}}
        network = {"network": "timm/tinynet_e", "options": {}}
        run = planned("a100", data=growing, training={"epochs": 3, "global_batch": 9600}, **sections, experts={
            "count": 3, "per_sample": 2, **network})  # fmt: skip
        return [run.step_at(1, side).parts[part] for part in ("experts", "teacher") for side in (48, 96)]

    small, large, teacher_small, teacher_large = seconds(delegator={}, distillation=TEACHER)
    assert small == pytest.approx(large / 4, rel=0.15)
    assert teacher_small == pytest.approx(teacher_large / 4, rel=0.15)
    # forward alone is between a quarter and a half of forward and backward; 9600 images, 2 * 9600 pairs
    assert 0.25 < 2 * teacher_large / large < 0.5
    fixed = seconds(delegator={}, distillation={**TEACHER, "resolution": 96})
    assert fixed[2] == pytest.approx(fixed[3], rel=0.1)  # it sees images of 96 pixels at any time


def test_the_page_shows_sizes_and_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(plan_run(config_of(distillation=TEACHER, **GROWING), gpus=2, gpu="h100"))
    page = capsys.readouterr().out
    assert "mean over all epochs" in page
    assert "Training images grow" in page
    assert "teacher" in page
    show_plan(plan_run(config_of(), gpus=2, gpu="h100"))
    page = capsys.readouterr().out
    assert "Training images grow" not in page
    assert "teacher" not in page


def test_an_unknown_teacher_is_named() -> None:
    with pytest.raises(InputError, match=r"^distillation\.teacher: 'nobody' is not allowed"):
        plan_run(config_of(distillation={**TEACHER, "teacher": "nobody"}), gpus=2, gpu="h100")
