"""The rehearsal's checks, each against records in which one thing is wrong; the whole of it with --full."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from namespaces import ROOT, in_private_network
from trained_run import small_run

from coe_dist import tracking
from coe_dist.config import RunConfig, load_config
from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.rehearsal import middle_of, rehearse
from coe_dist.orchestration.rehearsal_checks import (
    Check,
    Ends,
    evaluated,
    in_mlflow,
    of_networks,
    resumed,
    show_checks,
    stopped,
    while_training,
)
from coe_dist.orchestration.rehearsal_config import shrunk
from coe_dist.training.inspection import inspect_run, open_collaboration
from coe_dist.training.macs_table import macs_table

LARGE = ROOT / "configs/imagenet_coe_large.yaml"
COMMAND = [sys.executable, "-m", "coe_dist", "rehearsal"]
ENDS = Ends(stopped=75, ended=0, evaluated=0)


@functools.cache
def small(size: str) -> RunConfig:
    return shrunk(
        load_config(ROOT / f"configs/imagenet_coe_{size}.yaml"),
        data=Path("d"),
        weights=Path("w"),
        classes=1000,
        cores=2,
    )


@pytest.mark.parametrize(("size", "exit_rate"), [("small", 0.3178), ("large", 0.4062)])
def test_only_sizes_and_steps_change_and_everything_is_on(size: str, exit_rate: float, tmp_path: Path) -> None:
    real = load_config(ROOT / f"configs/imagenet_coe_{size}.yaml")
    config = small(size)
    path = tmp_path / "rehearsal.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config  # it is allowed
    assert (config.experts.count, config.experts.per_sample) == (real.experts.count, real.experts.per_sample)
    for before, after in ((real.delegator, config.delegator), (real.experts, config.experts)):
        assert after.network == before.network
        changed = {"activation", "condconv", "resolution"}
        assert {n: v for n, v in after.options.items() if n not in changed} == {
            n: v for n, v in before.options.items() if n not in changed
        }
        assert (after.options["activation"], after.options["condconv"]) == ("pwlu", 4)
    assert config.router == real.router
    assert config.data.augmentation == real.data.augmentation
    kept = {"label_smoothing", "clip_norm", "ema_decay", "engine", "zero_stage", "batchnorm"}
    assert config.training.model_dump(include=kept) == real.training.model_dump(include=kept)
    rates = real.training.optimizer, config.training.optimizer
    assert rates[1].learning_rate / rates[1].expert_learning_rate == pytest.approx(
        rates[0].learning_rate / rates[0].expert_learning_rate
    )
    assert rates[1].learning_rate == pytest.approx(rates[0].learning_rate * 32 / 1024)
    assert macs_table(config)["exit_rate_needed"] == pytest.approx(exit_rate, abs=1e-4)


def test_a_machine_of_one_core_is_shared() -> None:
    config = load_config(ROOT / "configs/fashion_mnist.yaml")
    for cores in (1, 2):
        made = shrunk(config, data=Path("d"), weights=Path("w"), classes=10, cores=cores)
        assert made.workers.oversubscribe is (cores == 1)


def good_records() -> list[dict[str, Any]]:
    """A run of 3 epochs of 3 steps, stopped after step 5."""

    def train(step: int) -> dict[str, Any]:
        epoch, sides = (step - 1) // 3, (48, 64, 64)
        metrics = {f"train/loss{part}": 1.0 for part in ("", "_experts", "_delegator", "_selection", "_distillation")}
        metrics |= {f"expert/{expert:02d}/load": 1 / 16 for expert in range(16)} | {"train/resolution": sides[epoch]}
        return {"kind": "train", "step": step, "epoch": epoch, "metrics": metrics}

    def start(step: int, **more: str) -> dict[str, Any]:
        return {"kind": "start", "step": step, "epoch": step // 3, "steps_per_epoch": 3, "metrics": {}, **more}

    return [
        start(0),
        *map(train, (1, 2, 3)),
        {"kind": "pwlu", "step": 3, "epoch": 1},
        *map(train, (4, 5)),
        {"kind": "checkpoint", "step": 5, "epoch": 1},
        {"kind": "preempted", "step": 5, "epoch": 1},
        start(5, resumed_from="step-00000005"),
        *map(train, (6, 7, 8, 9)),
        {"kind": "end", "step": 9, "epoch": 2},
    ]


def failed_on(records: list[dict[str, Any]], ends: Ends = ENDS) -> list[str]:
    """Names of the checks on records that do not pass."""
    checks = [stopped(records, ends), resumed(records, ends), *while_training(small("large"), records)]
    return [check.name for check in checks if not check.passed]


def test_good_records_pass() -> None:
    assert failed_on(good_records()) == []


@pytest.mark.parametrize(
    ("ends", "names"),
    [
        (Ends(0, 0, 0), ["SIGTERM stopped it"]),
        (Ends(143, 0, 0), ["SIGTERM stopped it"]),
        (Ends(75, 1, None), ["it was resumed"]),
    ],
)
def test_exit_codes_count(ends: Ends, names: list[str]) -> None:
    assert failed_on(good_records(), ends) == names


LOSS = "losses are finite"


@pytest.mark.parametrize(
    ("index", "change", "names"),
    [
        (8, None, ["SIGTERM stopped it", "it was resumed"]),  # no answer to the SIGTERM
        (7, None, ["SIGTERM stopped it"]),  # no save of it
        (9, {"step": 3}, ["it was resumed"]),
        (9, {"resumed_from": "step-00000004"}, ["it was resumed"]),
        (11, None, ["each step was made once"]),
        (11, {"step": 6}, ["each step was made once"]),
        (14, None, ["each step was made once"]),  # no end
        (2, {"train/loss_experts": float("nan")}, [LOSS]),
        (2, {"train/loss_selection": float("inf")}, [LOSS]),
        (2, {"train/loss_distillation": None}, [LOSS, "the teacher was used"]),
        (2, {"train/loss_distillation": 0.0}, ["the teacher was used"]),
        (2, {"train/resolution": 64.0}, ["images grew"]),
        (2, {"train/resolution": None}, ["images grew"]),
        (12, {"train/resolution": 48.0}, ["images grew"]),
        (2, {"expert/03/load": 0.0}, ["every expert had images in every step"]),
        (2, {"expert/03/load": None}, ["every expert had images in every step"]),
    ],
)
def test_one_wrong_record_fails_its_check(index: int, change: dict[str, Any] | None, names: list[str]) -> None:
    """change: None leaves the record out; names with a / are of metrics, where None leaves one out."""
    records = good_records()
    if change is None:
        del records[index]
    else:
        ((name, value),) = change.items()
        of = records[index]["metrics"] if "/" in name else records[index]
        if value is None:
            del of[name]
        else:
            of[name] = value
    assert failed_on(records) == names


def test_no_records_fail_everything() -> None:
    assert len(failed_on([])) == 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save after 9 steps, with averages; the delegator has CondConv, and piecewise linear units that do not learn
    yet."""
    network = {"network": "small_cnn", "options": {"width": 0.25, "activation": "pwlu", "condconv": 2}}
    training = {"ema_decay": 0.9, "epochs": 3, "pwlu_statistics_epochs": 1}
    return small_run(tmp_path_factory.mktemp("runs"), 3, steps=(9,), delegator=network, training=training)


def test_networks_of_a_save(run: Path) -> None:
    config = open_collaboration(run).config
    saved = inspect_run(run)
    records = [{"kind": "pwlu", "step": 3}]

    def failed(saved: dict[str, Any], records: list[dict[str, Any]] = records, total: int = 9) -> list[str]:
        checks = {check.name: check for check in of_networks(config, records, saved, total)}
        assert checks.pop("CondConv") == Check("CondConv", False, "in delegator")  # and not in the experts
        return [check.name for check in checks.values() if not check.passed]

    updates = saved["ema"]["updates"]
    saved = {**saved, "ema": {**saved["ema"], "updates": 9}}
    assert failed(saved) == ["PWLU were aligned anew and learn"]
    learned = {**saved, "networks": [{**network, "pwlu": "learned"} for network in saved["networks"]]}
    assert failed(learned) == []
    assert failed(learned, []) == ["PWLU were aligned anew and learn"]
    assert failed({**learned, "valid": False}) == ["the checkpoint verifies"]
    assert failed({**learned, "step": 8}) == ["the checkpoint verifies"]
    assert failed({**learned, "ema": None}) == ["averages of the weights are there"]
    assert failed({**learned, "ema": {"decay": 0.9, "updates": updates - 1}}) == ["averages of the weights are there"]
    plain = [dict(learned["networks"][0], average="missing"), *learned["networks"][1:]]
    assert failed({**learned, "networks": plain}) == ["averages of the weights are there"]


def test_evaluation_and_mlflow(run: Path) -> None:
    config = open_collaboration(run).config
    assert not evaluated(run, ENDS).passed  # there is none
    figures = {"top1": {"experts": [0.1], "coe": 0.1}, "exit_rate": 0.4, "average_macs": 10, "images": 5}
    for weights, code, passed in (("ema", 0, True), ("raw", 0, False), ("ema", 1, False)):
        (run / "evaluation-test.json").write_text(json.dumps({**figures, "weights": weights}))
        assert evaluated(run, Ends(75, 0, code)).passed is passed
    assert in_mlflow(config, 2) == Check("MLflow has it", False, "no run")
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": True})})
    run_id = tracking.start_run(config, run_name=config.name)
    recorder = tracking.Recorder(run, config, run_id)
    for step in (1, 2):
        recorder.record("train", step=step, epoch=0, metrics={"train/loss": 1.0})
    recorder.close()
    assert in_mlflow(config, 2) == Check("MLflow has it", False, "run RUNNING, 2 of 2 steps")
    tracking.finish_run(config, run_id, "FINISHED")
    assert in_mlflow(config, 2).passed
    assert not in_mlflow(config, 3).passed


def test_the_failed_ones_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("losses are finite", True, "of 9 steps"), Check("CondConv", False, "in no network")]
    with pytest.raises(TrainingError, match=r"^rehearsal: 1 of 2 checks failed: CondConv: in no network$"):
        show_checks(checks)
    assert capsys.readouterr().out.splitlines() == [
        "ok      losses are finite: of 9 steps",
        "FAILED  CondConv: in no network",
    ]
    show_checks(checks[:1])


def test_training_is_stopped_in_its_second_epoch() -> None:
    assert middle_of(small("large"), 2000) == 5  # four steps an epoch
    assert middle_of(small("large"), 40) == 3  # 32 images and 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": 1}, "--classes: 1 is not allowed"),
        ({"per_class": 1}, "--per-class: 1 is not allowed"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        rehearse(LARGE, **{"folder": tmp_path, **options})
    assert not list(tmp_path.rglob("*.JPEG"))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_whole_of_it(tmp_path: Path) -> None:
    options = ["--classes", "20", "--per-class", "8", "workers.oversubscribe=true"]
    done = in_private_network([*COMMAND, str(LARGE), *options], cwd=tmp_path, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok  ", "FAILED  "))]
    assert len(lines) == 13
    assert all(line.startswith("ok  ") for line in lines)
