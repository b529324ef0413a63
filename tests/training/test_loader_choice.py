"""Training with data.loader: torchvision needs no FFCV, and on images that both give to the byte it is the same run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import small_config, write_config


def train(config: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "coe_dist.training.worker", str(config), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def weights(run: Path) -> dict[str, str]:
    files = json.loads((run / "checkpoints" / "step-00000004" / "manifest.json").read_text())["files"]
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def test_the_same_run_without_ffcv(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(
        tmp_path / "run.yaml", small_config(small_data, tmp_path / "runs", training={"epochs": 1}, workers={"count": 1})
    )
    train(config, "name=ffcv")
    blocked = tmp_path / "blocked" / "ffcv"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('this machine has no FFCV')\n")
    monkeypatch.setenv("PYTHONPATH", f"{blocked.parent}:{Path(__file__).resolve().parents[2]}")
    train(config, "name=torchvision", "data.loader=torchvision")
    found = weights(tmp_path / "runs" / "torchvision")
    assert len(found) == 4  # the delegator and three experts
    assert found == weights(tmp_path / "runs" / "ffcv")
