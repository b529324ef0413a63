"""What a rehearsal looks at when its commands have ended: each check says what it found, whether it passed or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe_dist.config import RunConfig
from coe_dist.data.progressive import resolution_of
from coe_dist.errors import EXIT_OK, EXIT_PREEMPTED, TrainingError
from coe_dist.tracking.journal import read_metrics
from coe_dist.tracking.runs import run_id_of
from coe_dist.tracking.store import connect, uri_of_run
from coe_dist.training.checkpoint import save_name
from coe_dist.training.inspection import inspect_run


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Ends:
    """Exit codes of the training that was stopped, of the one that went on, and of the evaluation (None: not run)."""

    stopped: int
    ended: int
    evaluated: int | None


def checks_of(config: RunConfig, ends: Ends) -> list[Check]:
    """Everything that is to be true of a rehearsal's run folder. Reads files and asks MLflow; starts nothing."""
    run_dir = config.run_dir
    records = list(read_metrics(run_dir))
    checks = [stopped(records, ends), resumed(records, ends), *while_training(config, records)]
    if ends.ended != EXIT_OK:  # the rest would only say the same again
        return checks
    saved = inspect_run(run_dir)
    total = _total(config, records)
    return [*checks, *of_networks(config, records, saved, total), evaluated(run_dir, ends), in_mlflow(config, total)]


def show_checks(checks: list[Check]) -> None:
    """Prints a line a check. Raises TrainingError naming those that failed."""
    for check in checks:
        print(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.found}", flush=True)
    failed = [check for check in checks if not check.passed]
    if failed:
        named = "; ".join(f"{check.name}: {check.found}" for check in failed)
        raise TrainingError(f"rehearsal: {len(failed)} of {len(checks)} checks failed: {named}")


def _of(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _total(config: RunConfig, records: list[dict[str, Any]]) -> int:
    starts = _of(records, "start")
    return config.training.epochs * int(starts[0]["steps_per_epoch"]) if starts else 0


def stopped(records: list[dict[str, Any]], ends: Ends) -> Check:
    steps, saves = [record["step"] for record in _of(records, "preempted")], _of(records, "checkpoint")
    passed = ends.stopped == EXIT_PREEMPTED and len(steps) == 1 and steps[0] in [save["step"] for save in saves]
    where = f"saved after step {steps[0]}" if steps else "no save because of it"
    return Check("SIGTERM stopped it", passed, f"exit code {ends.stopped}, {where}")


def resumed(records: list[dict[str, Any]], ends: Ends) -> Check:
    stops, starts = _of(records, "preempted"), _of(records, "start")
    later = starts[1:]
    passed = ends.ended == EXIT_OK and len(stops) == len(later) == 1
    passed = passed and (later[0]["step"], later[0].get("resumed_from")) == (
        stops[0]["step"],
        save_name(stops[0]["step"]),
    )
    found = ", ".join(f"from step {start['step']} ({start.get('resumed_from')})" for start in later) or "not at all"
    return Check("it was resumed", passed, f"{found}, exit code {ends.ended}")


def while_training(config: RunConfig, records: list[dict[str, Any]]) -> Iterator[Check]:
    lines, total = _of(records, "train"), _total(config, records)
    steps = [line["step"] for line in lines]
    once = steps == list(range(1, total + 1)) and total > 0
    yield Check(
        "each step was made once",
        once and [end["step"] for end in _of(records, "end")] == [total],
        f"{len(set(steps))} of {total}" + ("" if len(set(steps)) == len(steps) else ", some twice"),
    )
    values = {name: [line["metrics"][name] for line in lines if name in line["metrics"]] for name in _losses(records)}
    bad = [name for name, found in values.items() if len(found) != len(lines) or not all(map(math.isfinite, found))]
    yield Check(
        "losses are finite",
        bool(lines) and not bad,
        ", ".join(bad) or f"{', '.join(values)} of {len(lines)} steps",
    )
    distilled = values.get("train/loss_distillation", [])
    yield Check(
        "the teacher was used",
        config.distillation is not None and len(distilled) == len(lines) > 0 and min(distilled) > 0.0,
        f"loss of distillation {distilled[0]:.4g} to {distilled[-1]:.4g}" if distilled else "no loss of distillation",
    )
    sides = {(line["epoch"], line["metrics"].get("train/resolution", 0.0)) for line in lines}
    final, growing = config.data.resolution, config.data.progressive
    wanted = {(epoch, resolution_of(epoch, final, growing)) for epoch in range(config.training.epochs)}
    yield Check(
        "images grew",
        growing is not None and sides == wanted,
        ", ".join(f"epoch {epoch + 1}: {side:g} pixels" for epoch, side in sorted(sides, key=lambda pair: pair[0])),
    )
    loads = [_loads(line["metrics"]) for line in lines]
    idle = sorted({expert for load in loads for expert, share in load.items() if share == 0.0})
    yield Check(
        "every expert had images in every step",
        bool(lines) and not idle and all(len(load) == config.experts.count for load in loads),
        f"not {', '.join(idle)}" if idle else f"{config.experts.count} experts",
    )


def _losses(records: list[dict[str, Any]]) -> list[str]:
    """The names of all losses that a training of this kind records, in their order."""
    always = {"train/loss": None, "train/loss_experts": None, "train/loss_delegator": None}
    for line in _of(records, "train"):
        always |= dict.fromkeys(name for name in line["metrics"] if name.startswith("train/loss"))
    return list(always)


def _loads(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name.split("/")[1]: value
        for name, value in metrics.items()
        if name.startswith("expert/") and name.endswith("/load")
    }


def of_networks(config: RunConfig, records: list[dict[str, Any]], saved: dict[str, Any], total: int) -> Iterator[Check]:
    """Of the newest save."""
    yield Check(
        "the checkpoint verifies",
        bool(saved["valid"]) and saved["step"] == total and len(saved["networks"]) == config.experts.count + 1,
        f"{saved['checkpoint']}, {len(saved['networks'])} networks" + "".join(f"; {w}" for w in saved["warnings"]),
    )
    phases = [network["pwlu"] for network in saved["networks"]]
    begun = [record["step"] for record in _of(records, "pwlu")]
    wanted = config.training.pwlu_statistics_epochs * total // config.training.epochs
    yield Check(
        "PWLU were aligned anew and learn",
        begun == [wanted] and set(phases) == {"learned"},
        f"after step {', '.join(map(str, begun)) or 'none'}; {phases.count('learned')} of {len(phases)} networks learn",
    )
    routed = conditional(config.run_dir / "checkpoints" / saved["checkpoint"])
    yield Check("CondConv", "experts" in routed, f"in {' and '.join(routed) or 'no network'}")
    ema, averages = saved["ema"], [network["average"] for network in saved["networks"]]
    yield Check(
        "averages of the weights are there",
        ema is not None and ema["updates"] == total and set(averages) == {"ok"},
        f"of {averages.count('ok')} networks, {ema['updates']} updates" if ema else "none",
    )


def conditional(save: Path) -> list[str]:
    """Which of the two kinds of network have routings of conditional convolutions in their files."""
    from safetensors import safe_open

    found = []
    for kind, stem in (("delegator", "delegator"), ("experts", "expert-0000")):
        with safe_open(save / f"{stem}.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
            if any({"routing", "routing_fn"} & set(name.split(".")) for name in file.keys()):  # noqa: SIM118
                found.append(kind)
    return found


def evaluated(run_dir: Path, ends: Ends) -> Check:
    path = run_dir / "evaluation-test.json"
    if ends.evaluated != EXIT_OK or not path.is_file():
        return Check("it was evaluated", False, f"exit code {ends.evaluated}")
    result = json.loads(path.read_text())
    figures = [*result["top1"]["experts"], result["top1"]["coe"], result["exit_rate"], result["average_macs"]]
    return Check(
        "it was evaluated",
        result["weights"] == "ema" and result["images"] > 0 and all(map(math.isfinite, figures)),
        f"{result['images']} images, {result['weights']} weights, top-1 {result['top1']['coe']:.2%} (of made images), "
        f"exit rate {result['exit_rate']:.1%}",
    )


def in_mlflow(config: RunConfig, total: int) -> Check:
    run_id = run_id_of(config.run_dir)
    if run_id is None:
        return Check("MLflow has it", False, "no run")
    client = connect(uri_of_run(config.run_dir, config))
    status, steps = client.get_run(run_id).info.status, len(client.get_metric_history(run_id, "train/loss"))
    return Check("MLflow has it", (status, steps) == ("FINISHED", total), f"run {status}, {steps} of {total} steps")
