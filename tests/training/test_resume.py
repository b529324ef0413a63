"""A run that is stopped and goes on is the run that was never stopped, to the last bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from small_data import small_config, write_config
from training.test_training_job import lines_of, torchrun
from waiting import until

from coe_dist.config import load_config
from coe_dist.training.job import Job
from coe_dist.training.stopping import clear_stop, preempted_at, request_stop

EPOCHS, STEPS_PER_EPOCH = 2, 7  # 101 images in batches of 16
TEACHER = "test_efficientnet"  # timm's own, of 360,000 weights
# what is not a function of the seed alone
MOMENTARY = ("train/images_per_second", "system/")


def job_file(
    folder: Path, data: Path, name: str, sections: dict[str, Any] | None = None, **training: Any
) -> tuple[Path, Path]:
    """sections: further settings, by section."""
    content = small_config(
        data,
        folder / "runs",
        name=name,
        training={"global_batch": 16, "epochs": EPOCHS, "ema_decay": 0.9, "timeout_seconds": 120, **training},
        tracking={"every_steps": 1},
    )
    for section, settings in (sections or {}).items():
        content[section] = {**content.get(section, {}), **settings}
    config = load_config(write_config(folder / f"{name}.yaml", content))
    config.run_dir.mkdir(parents=True)
    path = folder / f"{name}.json"
    path.write_text(Job(task="train", config=config, run_dir=str(config.run_dir.absolute())).model_dump_json())
    return path, config.run_dir


def save_teacher(path: Path) -> Path:
    """Random weights of a tiny network, with an opinion on every image."""
    torch.manual_seed(8)
    network = timm.create_model(TEACHER, num_classes=10, in_chans=1)
    torch.nn.init.normal_(network.get_classifier().weight)
    torch.save({"state_dict": network.state_dict()}, path)
    return path


def weights_of(run: Path) -> dict[str, bytes]:
    """Every tensor of the newest save's weights and averages. Running statistics are left out: a save averages those of
    local BatchNorm over the ranks, and no weight depends on them."""
    (save,) = (run / "checkpoints").glob(f"step-{EPOCHS * STEPS_PER_EPOCH:08d}")
    tensors: dict[str, bytes] = {}
    for path in save.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                if "running_" not in name:
                    tensors[f"{path.name} {name}"] = file.get_tensor(name).numpy().tobytes()
    return tensors


@pytest.mark.parametrize(
    "training",
    [
        {"engine": "torch", "accumulation": 2, "deterministic": True},
        {"engine": "deepspeed", "zero_stage": 1, "batchnorm": "group"},
        {
            "optimizer": {"name": "rmsprop", "learning_rate": 0.01},
            "sections": {
                "data": {
                    "progressive": {"start": 20, "until_epoch": 1},
                    "augmentation": {"operations": 2, "erase": 0.3},
                },
                "distillation": {"teacher": TEACHER, "weights": "teacher.pth", "top": 4, "delegator": True},
            },
        },
    ],
)
def test_a_stopped_run_goes_on_to_the_last_bit(small_data: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    """The wish to stop is there before the workers start, so that the first run makes one step."""
    if "sections" in training:
        taught = {**training["sections"]["distillation"], "weights": str(save_teacher(tmp_path / "teacher.pth"))}
        training = {**training, "sections": {**training["sections"], "distillation": taught}}
    whole, whole_run = job_file(tmp_path, small_data, "whole", **training)
    done = torchrun(2, str(whole))
    assert done.returncode == 0, done.stderr[-4000:]
    parts, run = job_file(tmp_path, small_data, "parts", **training)
    request_stop(run)
    assert torchrun(2, str(parts)).returncode != 0
    assert preempted_at(run) == 1
    assert (run / "checkpoints" / "latest").read_text() == "step-00000001"
    manifest = json.loads((run / "checkpoints" / "step-00000001" / "manifest.json").read_text())
    assert (manifest["epoch"], manifest["step_in_epoch"]) == (0, 1)
    assert manifest["ema"] == {"decay": 0.9, "updates": 1}
    assert len(manifest["router"]["prices"]) == 3
    clear_stop(run)  # as whoever starts the workers does
    done = torchrun(2, str(parts))
    assert done.returncode == 0, done.stderr[-4000:]

    first, second = lines_of(run, "start")
    assert (first["step"], second["step"], second["resumed_from"]) == (0, 1, "step-00000001")
    expected, found = lines_of(whole_run, "train"), lines_of(run, "train")
    assert [line["step"] for line in found] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    for one, other in zip(expected, found, strict=True):
        assert (one["step"], one["epoch"]) == (other["step"], other["epoch"])
        assert set(one["metrics"]) == set(other["metrics"])
        for name in (name for name in one["metrics"] if not name.startswith(MOMENTARY)):
            assert one["metrics"][name] == other["metrics"][name], f"{name} of step {one['step']}"
    before, after = weights_of(whole_run), weights_of(run)
    assert before == after
    assert any(name.startswith("expert-0002.ema.safetensors") for name in before)


def test_sigterm_saves_and_exits_with_75(small_data: Path, tmp_path: Path) -> None:
    job, run = job_file(tmp_path, small_data, "run", epochs=500, checkpoint_every=10_000)
    process = subprocess.Popen([sys.executable, "-m", "coe_dist.training.worker", str(job)])
    try:
        until(lambda: (run / "metrics.jsonl").exists() and lines_of(run, "train"), "steps", process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        process.kill()
    (last,) = lines_of(run, "preempted")
    assert preempted_at(run) == last["step"] > 0
    assert (run / "checkpoints" / "latest").read_text() == f"step-{last['step']:08d}"
    assert lines_of(run, "train")[-1]["step"] == last["step"]
