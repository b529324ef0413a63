"""What a checkpoint holds: hashes, sizes, loads, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_run import small_run, write_loads

from coe_dist.config import OptimizerConfig, TrainingConfig
from coe_dist.errors import InputError
from coe_dist.parallel.groups import create_groups
from coe_dist.training import checkpoint, saving
from coe_dist.training.checkpoint import Position
from coe_dist.training.engines import build_engine
from coe_dist.training.inspection import Loads, inspect_run, open_collaboration, recorded_loads, show_inspection
from coe_dist.training.optim import build_optimizer


def test_every_network_by_id_hash_size_and_load(tmp_path: Path) -> None:
    run = small_run(tmp_path, 4, steps=(2, 3))
    write_loads(run, [0.1, 0.2, 0.3, 0.4])
    save = run / "checkpoints" / "step-00000003"
    result = inspect_run(run)
    assert {key: result[key] for key in ("checkpoint", "step", "epoch", "step_in_epoch", "experts")} == {
        "checkpoint": "step-00000003",
        "step": 3,
        "epoch": 0,
        "step_in_epoch": 3,
        "experts": 4,
    }
    assert (result["valid"], result["resumes_from"], result["warnings"]) == (True, "step-00000003", [])
    assert [network["name"] for network in result["networks"]] == ["delegator", *(f"expert {e}" for e in range(4))]
    for network in result["networks"]:
        content = (save / f"{checkpoint.network_file(network['name'])}.safetensors").read_bytes()
        assert network["sha256"] == hashlib.sha256(content).hexdigest()
        assert network["bytes"] == len(content)
        assert (network["weights"], network["optimizer"]) == ("ok", "ok")
    assert [network["load"] for network in result["networks"]] == [None, 0.1, 0.2, 0.3, 0.4]
    assert len({network["sha256"] for network in result["networks"]}) == 5


def test_what_is_wrong_is_told_file_by_file(tmp_path: Path) -> None:
    run = small_run(tmp_path, 4, steps=(2, 3))
    save = run / "checkpoints" / "step-00000003"
    os.truncate(save / "expert-0001.safetensors", 100)
    (save / "expert-0003.safetensors").unlink()
    (save / "delegator.optim.pt").unlink()
    result = inspect_run(run)
    assert (result["checkpoint"], result["valid"], result["resumes_from"]) == ("step-00000003", False, "step-00000002")
    states = {network["name"]: (network["weights"], network["optimizer"]) for network in result["networks"]}
    assert states == {
        "delegator": ("ok", "missing"),
        "expert 0": ("ok", "ok"),
        "expert 1": ("does not match its sha256", "ok"),
        "expert 2": ("ok", "ok"),
        "expert 3": ("missing", "ok"),
    }
    assert result["networks"][4]["sha256"] is None

    manifest = json.loads((save / "manifest.json").read_text())
    del manifest["files"]["expert-0002.safetensors"]
    manifest["files"]["../../config.yaml"] = "0" * 64
    (save / "manifest.json").write_text(json.dumps(manifest))
    result = inspect_run(run)
    assert result["networks"][3]["weights"] == "not in the manifest"
    assert result["warnings"] == ["../../config.yaml: missing"]

    (save / "manifest.json").write_text("{")
    result = inspect_run(run)
    assert (result["checkpoint"], result["valid"]) == ("step-00000002", True)
    assert "step-00000003: manifest.json: " in result["warnings"][0]
    (save.parent / "step-00000002" / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match=r"it holds no checkpoint with a readable manifest .*step-00000003"):
        inspect_run(run)
    (save / "manifest.json").write_text('{"format": 7, "files": {}}')
    with pytest.raises(InputError, match="checkpoint format 7 is not allowed"):
        inspect_run(run)


def record(step: int, kind: str, field: str, *loads: float) -> str:
    metrics = {f"expert/{expert:02d}/{field}": load for expert, load in enumerate(loads)} | {"val/top1": 0.5}
    return json.dumps({"kind": kind, "step": step, "metrics": metrics})


def test_loads_are_those_of_the_step_or_the_nearest_record(tmp_path: Path) -> None:
    assert recorded_loads(tmp_path, 2, 1) is None
    lines = [record(1, "train", "load", 0.5, 0.5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert recorded_loads(tmp_path, 2, 1) == Loads([0.5, 0.5], "metrics.jsonl", 1)
    lines += [record(1, "evaluation", "val_load", 0.9, 0.1), record(1, "evaluation", "val_load", 0.7, 0.3)]
    lines += [record(4, "evaluation", "val_load", 0.6, 0.4), record(4, "train", "load", 0.4, 0.6)]
    lines += [record(4, "evaluation", "val_load", 0.3, 0.3, 0.4), '{"kind": "tra']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    first, second = Loads([0.7, 0.3], "metrics.jsonl", 1), Loads([0.6, 0.4], "metrics.jsonl", 4)
    assert [recorded_loads(tmp_path, 2, step) for step in (1, 2, 3, 4, 9)] == [first, first, second, second, second]
    three = Loads([0.3, 0.3, 0.4], "metrics.jsonl", 4)
    assert recorded_loads(tmp_path, 3, 1) == three
    assert recorded_loads(tmp_path, 5, 1) is None
    (tmp_path / "evaluation-validation.json").write_text('{"load": [1, 0')
    assert recorded_loads(tmp_path, 2, 4) == second
    write_loads(tmp_path, [1, 0], step=4)
    evaluated = Loads([1.0, 0.0], "evaluation-validation.json", 4)
    assert [recorded_loads(tmp_path, 2, step) for step in (1, 4, 9)] == [first, evaluated, evaluated]
    assert recorded_loads(tmp_path, 3, 4) == three
    write_loads(tmp_path, [1, 0], step=None)
    assert recorded_loads(tmp_path, 2, 4) == second
    (tmp_path / "metrics.jsonl").unlink()
    assert recorded_loads(tmp_path, 2, 4) == Loads([1.0, 0.0], "evaluation-validation.json", None)


def test_loads_of_an_older_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path, 3, steps=(1, 2, 3))
    (run / "metrics.jsonl").write_text(record(2, "evaluation", "val_load", 0.25, 0.5, 0.25) + "\n")
    write_loads(run, [0.5, 0.5, 0.0], step=3)
    told = {}
    for step in (1, 2, 3):
        result = inspect_run(run, str(step))
        assert result["warnings"] == []
        told[step] = ([network["load"] for network in result["networks"][1:]], result["loads_step"])
        show_inspection(result)
        other = f"how often each expert is chosen is that of step 2, none is recorded for step {step}"
        assert (other in capsys.readouterr().out) == (step == 1)
    assert told == {1: ([0.25, 0.5, 0.25], 2), 2: ([0.25, 0.5, 0.25], 2), 3: ([0.5, 0.5, 0.0], 3)}


def test_the_run_of_a_single_network(tmp_path: Path) -> None:
    groups, network = create_groups(2, timeout_seconds=300), torch.nn.Linear(2, 2)
    training = TrainingConfig(engine="torch")
    optimizer = build_optimizer(network, OptimizerConfig(), 0.1)
    engine = build_engine("single", network, optimizer, training, groups.world, groups.alone)
    saving.start(tmp_path / "checkpoints", [engine], groups, Position(1), extra={"config": {}}, keep=1).finish()
    result = inspect_run(tmp_path)
    assert [(n["name"], n["weights"], n["load"]) for n in result["networks"]] == [("single", "ok", None)]
    with pytest.raises(InputError, match="it is the run of a single network"):
        open_collaboration(tmp_path)


def test_the_command(tmp_path: Path, command: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path, 4)
    write_loads(run, [0.125, 0.375, 0.5, 0.0])
    code, text, _ = command("inspect", run)
    assert code == 0
    code, line, _ = command("inspect", run, "--json")
    assert code == 0
    result = json.loads(line)
    assert result == inspect_run(run)
    for words in (result["networks"][2]["sha256"][:12], "37.50%", "every file verifies"):
        assert words in text
    (run / "checkpoints" / "step-00000003" / "expert-0000.safetensors").unlink()
    show_inspection(inspect_run(run))
    assert "damaged; training would go on from the beginning" in capsys.readouterr().out
    nothing = f"coe-dist: {tmp_path}: it holds no checkpoint with a readable manifest\n"
    assert command("inspect", tmp_path) == (2, "", nothing)
