"""Which networks `--checkpoint` and `--weights` mean, and the threshold that goes with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trained_run import CLASSES, small_run, write_loads

from coe_dist.errors import InputError
from coe_dist.inference import read_config
from coe_dist.prediction.model import open_model
from coe_dist.training.chosen import Networks, chosen_weights, find_save, valid_save
from coe_dist.training.saving import mark_best
from coe_dist.training.thresholds import Threshold, check_threshold, stored_threshold


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three saves, the second of which is the best; a threshold that was calibrated for it."""
    run = small_run(tmp_path, 3, steps=(1, 2, 3))
    assert mark_best(run / "checkpoints" / "step-00000002", 0.5, keep=3)
    write_loads(run, [0.2, 0.3, 0.5], threshold=0.25, calibrated_for=Networks(2, "raw"))
    (run / "details-test.json").write_text(json.dumps({"classes": CLASSES}))
    (run / "config.yaml").write_text("name: run\n")
    return run


@pytest.mark.parametrize(("checkpoint", "step"), [("latest", 3), ("best", 2), ("1", 1), ("3", 3), ("0002", 2)])
def test_a_save_is_named_by_its_step_or_what_it_is(checkpoint: str, step: int, run: Path) -> None:
    save = run / "checkpoints" / f"step-{step:08d}"
    assert find_save(run, checkpoint) == save
    assert valid_save(run, checkpoint) == (save, [])


@pytest.mark.parametrize("checkpoint", ["4", "-1", "", "newest", "step-00000002", "2.0", "../x", "99999999999"])
def test_what_is_not_there_is_refused_with_what_is(checkpoint: str, run: Path) -> None:
    words = (
        f"--checkpoint: {checkpoint} is not allowed; {run} holds the steps 1, 2, 3; give one of them, best or latest"
    )
    for choose in (find_save, valid_save):
        with pytest.raises(InputError) as caught:
            choose(run, checkpoint)
        assert str(caught.value) == words


def test_a_run_without_a_best_one(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "best").unlink()
    with pytest.raises(InputError, match=r"best is not allowed; .* or latest \(no best one is recorded\)$"):
        find_save(run, "best")
    for choose in (find_save, valid_save):
        with pytest.raises(InputError, match=r"it holds no (complete|valid) checkpoint$"):
            choose(tmp_path / "nothing", "latest")


def test_only_the_latest_gives_way_to_another(run: Path) -> None:
    damaged = run / "checkpoints" / "step-00000003" / "expert-0001.safetensors"
    os.truncate(damaged, 100)
    save, warnings = valid_save(run)
    assert save.name == "step-00000002"
    assert len(warnings) == 1
    assert "step-00000003 is damaged" in warnings[0]
    with pytest.raises(InputError) as caught:
        valid_save(run, "3")
    assert str(caught.value) == (
        f"--checkpoint: 3 is not allowed; {damaged.parent} is damaged "
        "(expert-0001.safetensors does not match its sha256)"
    )
    assert find_save(run, "3") == damaged.parent


def test_commands_take_the_save_that_is_asked_for(run: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    doubt = "coe-dist: the early-exit threshold 0.25 was calibrated for the raw weights of step 2, not for the raw "
    for checkpoint, step in (("best", 2), ("1", 1), ("latest", 3)):
        code, told, _ = command("inspect", run, "--checkpoint", checkpoint, "--json")
        assert (code, json.loads(told)["step"]) == (0, step)
        out = tmp_path / f"weights-{step}"
        code, told, errors = command("export", "weights", run, "--out", out, "--checkpoint", checkpoint)
        assert (code, told) == (0, f"{out}\n")
        assert errors == ("" if step == 2 else f"{doubt}weights of step {step}\n")
        assert (read_config(out).step, read_config(out).threshold) == (step, 0.25)
        opened = open_model(run, checkpoint=checkpoint)
        file = load_file(run / "checkpoints" / f"step-{step:08d}" / "delegator.safetensors")
        held = dict(opened.model.delegator.named_parameters())
        assert all(torch.equal(value, file[name]) for name, value in held.items())
        assert [f"coe-dist: {warning}\n" for warning in opened.warnings] == ([errors] if errors else [])
    assert open_model(run, checkpoint="1", threshold=0.5).warnings == []
    for arguments in (
        ["inspect", run],
        ["export", "weights", run, "--out", tmp_path / "x"],
        ["export", "mlflow", run, "--out", tmp_path / "x"],
        ["export", "onnx", run, "--out", tmp_path / "x"],
        ["predict", run, __file__],
    ):
        code, told, errors = command(*arguments, "--checkpoint", "7")
        assert (code, told) == (2, "")
        assert errors.startswith(f"coe-dist: --checkpoint: 7 is not allowed; {run} holds the steps 1, 2, 3; give one")
    code, _, errors = command("predict", tmp_path / "weights-1", __file__, "--checkpoint", "1")
    assert code == 2
    assert "--checkpoint: 1 is not allowed" in errors


def test_the_averages_are_the_rule_where_there_are_some(tmp_path: Path) -> None:
    assert [chosen_weights(tmp_path, None, averaged=averaged) for averaged in (True, False)] == ["ema", "raw"]
    assert chosen_weights(tmp_path, "raw", averaged=True) == "raw"
    assert chosen_weights(tmp_path, "ema", averaged=True) == "ema"
    with pytest.raises(InputError, match=r"^--weights: ema is not allowed; .* holds no averages"):
        chosen_weights(tmp_path, "ema", averaged=False)


def test_a_threshold_is_doubted_for_other_networks_alone(run: Path) -> None:
    stored = stored_threshold(run)
    assert stored == Threshold(0.25, Networks(2, "raw"))
    assert stored.doubts(Networks(2, "raw")) == []
    for other in (Networks(2, "ema"), Networks(3, "raw")):
        assert stored.doubts(other) == [
            f"the early-exit threshold 0.25 was calibrated for the raw weights of step 2, not for the {other.weights} "
            f"weights of step {other.step}"
        ]
        assert Threshold(0.25).doubts(other) == []
        assert Threshold(None, Networks(2, "raw")).doubts(other) == []
    (run / "evaluation-validation.json").write_text('{"curve": []}')
    with pytest.raises(InputError, match=r"evaluation-validation.json: not a readable evaluation"):
        stored_threshold(run)
    (run / "evaluation-validation.json").unlink()
    assert stored_threshold(run) is None


def test_only_one_way_to_set_a_threshold() -> None:
    check_threshold(None, 1e6)
    for value in (0.0, 1.0, 2.0):
        check_threshold(value, None)
    for value in (-0.1, 1.5, 2.1, float("nan")):
        with pytest.raises(InputError, match=r"^--threshold: .* give a number from 0 to 1, or 2 for no early exit"):
            check_threshold(value, None)
    with pytest.raises(InputError, match=r"^--threshold: 0.5 is not allowed; --macs-budget is given too"):
        check_threshold(0.5, 1e6)
