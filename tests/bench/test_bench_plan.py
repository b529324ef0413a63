"""The planner's benchmark and its measurements run on real workers; nothing here looks at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import small_config

from coe_dist.bench.plan_networks import affine
from coe_dist.bench.plan_rank import step_seconds
from coe_dist.bench.plan_rates import rates_of
from coe_dist.bench.planning import plan_run
from coe_dist.bench.run import run_bench
from coe_dist.config import parse_config
from coe_dist.planner.step import PARTS


def test_predicted_and_measured_seconds_of_a_real_training() -> None:
    record = run_bench("plan", quick=True)
    assert record["name"] == "plan"
    (measured,) = record["cases"]
    assert measured["case"]["workers"] == 2
    ours = measured["ours"]
    assert tuple(ours["parts"]) == PARTS
    assert ours["predicted_seconds"] == pytest.approx(sum(ours["parts"].values()))
    assert ours["error"] == pytest.approx(ours["predicted_seconds"] / ours["seconds"] - 1)
    assert record["worst_error"] == record["median_error"] == abs(ours["error"])
    for part in ("delegator", "route", "exchange", "experts", "reduce", "optimizer"):
        assert ours["parts"][part] > 0, part


def test_this_machine_is_measured_for_any_number_of_workers(tmp_path: Path) -> None:
    content = small_config(
        tmp_path / "none",
        tmp_path,
        distillation={"teacher": "test_efficientnet", "weights": "none"},
        workers={"count": 1, "device": "cpu"},
    )
    content["data"]["progressive"] = {"start": 16, "until_epoch": 1}
    plan = plan_run(parse_config(content), gpus=1, gpu="measure")
    rates = json.loads(json.dumps(plan["rates"]))
    assert plan["gpu"] == rates["device"] == "here"
    assert rates["source"] == "measured: 1 workers at once on this machine"
    assert rates["per_node"] == 1
    for cost in (
        rates["delegator"],
        rates["expert"],
        rates["teacher"],
        *(rates["router"][part] for part in ("assign", "labels", "plan")),
    ):
        assert cost["fixed"] >= 0
        assert cost["each"] >= 0
        assert cost["fixed"] + cost["each"] > 0
    assert rates["delegator_step"] > 0 < rates["expert_step"]
    assert rates["framework_bytes"] > 1e8
    assert plan["step"]["parts"]["reduce"] == 0
    assert plan["step"]["parts"]["teacher"] > 0
    assert [stage["resolution"] for stage in plan["stages"]] == [16, 28]


@pytest.mark.parametrize(("own", "a_worker_has"), [(True, 80e9), (False, 20e9)])
def test_a_gpu_is_a_workers_own_and_a_machines_memory_is_shared(own: bool, a_worker_has: float) -> None:
    cost, link = {"fixed": 0.0, "each": 1.0}, {"latency": 1.0, "bytes_per_second": 1.0}
    figures = {
        **dict.fromkeys(("delegator", "expert", "assign", "labels", "plan"), cost),
        **dict.fromkeys(("inside", "inside_sums"), link),
        **dict.fromkeys(("delegator_step", "expert_step", "plan_peer", "copy_bytes_per_second"), 1.0),
        **dict.fromkeys(("small_operation", "loader_seconds_per_image", "framework_bytes"), 1.0),
        "measured": 4,
        "memory_bytes": 80e9,
        "own_memory": own,
    }
    assert rates_of(figures, cores=8, per_node=4, network=None).memory_bytes == a_worker_has


@given(rows=st.floats(1, 1e6), more=st.floats(0, 1e6), seconds=st.floats(1e-9, 1e3), longer=st.floats(1e-9, 1e3))
def test_the_line_is_through_the_larger_measurement_and_nowhere_negative(
    rows: float, more: float, seconds: float, longer: float
) -> None:
    cost = affine((rows, seconds), (rows + more, longer))
    assert cost.seconds(rows + more) == pytest.approx(longer)
    assert cost.each >= 0
    assert cost.fixed >= 0
    if more > 1 and seconds < longer < seconds * (rows + more) / rows:
        assert cost.seconds(rows) == pytest.approx(seconds, rel=1e-6)


def test_seconds_of_a_step_leave_out_the_first_record_of_each_epoch(tmp_path: Path) -> None:
    config = parse_config(small_config(tmp_path, tmp_path))
    config.run_dir.mkdir()
    records = [
        {"kind": "train", "epoch": epoch, "metrics": {"train/images_per_second": speed}}
        for epoch, speed in [(0, 1.0), (0, 320.0), (0, 320.0), (1, 1.0), (1, 160.0), (2, 1.0)]
    ]
    records.insert(2, {"kind": "evaluation", "epoch": 0, "metrics": {}})
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert step_seconds(config) == pytest.approx(0.1)
