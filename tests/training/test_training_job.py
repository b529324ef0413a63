"""The worker as torchrun starts it: what it writes, how it goes on after a stop, and the single-network baseline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_data import IMAGES, small_config, write_config

from coe_dist.config import NetworkConfig, load_config
from coe_dist.preparation import Preparation
from coe_dist.tracking.per_image import PerImage
from coe_dist.training.job import Job
from coe_dist.training.worker import main

STEPS = 4  # of an epoch: 101 images in batches of 32
EXPERTS = 3
VALUES = {
    *("train/loss", "train/images_per_second", "train/learning_rate"),
    *("system/memory_bytes", "system/memory_free_bytes", "system/cpu_percent"),
}


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, "-m", "coe_dist.training.worker", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def lines_of(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


@pytest.fixture(scope="module")
def trained(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch on two ranks, then, from its checkpoint, a second one on three."""
    folder = tmp_path_factory.mktemp("job")
    config = write_config(
        folder / "run.yaml",
        small_config(
            small_data, folder / "runs", early_exit={"macs_budget": 20_000}, training={"timeout_seconds": 120}
        ),
    )
    for ranks, epochs in ((2, 1), (3, 2)):
        done = torchrun(ranks, str(config), f"training.epochs={epochs}")
        assert done.returncode == 0, done.stderr[-4000:]
    return folder / "runs" / "run"


def test_metrics_follow_their_contract(trained: Path) -> None:
    starts = lines_of(trained, "start")
    for start, ranks, epochs, step in zip(starts, (2, 3), (1, 2), (0, STEPS), strict=True):
        fields = {key: start[key] for key in ("task", "epochs", "steps_per_epoch", "world_size", "step", "images")}
        assert fields == {
            "task": "train",
            "epochs": epochs,
            "steps_per_epoch": STEPS,
            "world_size": ranks,
            "step": step,
            "images": IMAGES,
        }
        assert (start["experts"], start["experts_per_sample"]) == (EXPERTS, 2)
    for line in lines_of(trained, "train"):
        assert set(line["metrics"]) >= VALUES | {
            *("train/loss_experts", "train/loss_delegator", "train/loss_selection"),
            *("train/top1_delegator", "train/bytes_sent"),
        }
        assert sum(line["metrics"][f"expert/{expert:02d}/load"] for expert in range(EXPERTS)) == pytest.approx(1)
    evaluations = lines_of(trained, "evaluation")
    assert [(line["epoch"], line["step"], line["split"]) for line in evaluations] == [
        (0, STEPS, "validation"),
        (1, 2 * STEPS, "validation"),
    ]
    for line in evaluations:
        metrics = line["metrics"]
        assert set(metrics) >= {
            *("val/top1", "val/top1_delegator", "val/top1_oracle", "val/exit_rate", "val/average_macs"),
        }
        assert metrics["val/average_macs"] <= 20_000
        assert sum(metrics[f"expert/{expert:02d}/val_load"] for expert in range(EXPERTS)) == pytest.approx(1)
    ends = lines_of(trained, "end")
    assert [end["step"] for end in ends] == [STEPS, 2 * STEPS]
    assert all(end["seconds"] > 0 for end in ends)
    times = [line["time"] for line in lines_of(trained)]
    assert times == sorted(times)


def test_training_goes_on_where_it_stopped(trained: Path) -> None:
    """On another number of ranks, with no step and no epoch done twice."""
    assert [(line["epoch"], line["step"]) for line in lines_of(trained, "train")] == [(0, 2), (0, 4), (1, 6), (1, 8)]
    saves = sorted(path.name for path in (trained / "checkpoints").glob("step-*"))
    assert saves == ["step-00000004", "step-00000008"]
    manifest = json.loads((trained / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("format", "experts", "step", "epoch", "step_in_epoch", "micro_step")} == {
        "format": 1,
        "experts": EXPERTS,
        "step": 2 * STEPS,
        "epoch": 2,
        "step_in_epoch": 0,
        "micro_step": 2 * STEPS,
    }
    assert manifest["preparation"] == Preparation(1, 28).record()
    assert load_config(trained / "config.yaml").training.epochs == 2


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_files_follow_their_contract(trained: Path, split: str) -> None:
    result = json.loads((trained / f"evaluation-{split}.json").read_text())
    fields = {"split", "images", "top1", "exit_rate", "average_macs", "load", "threshold", "curve"}
    assert set(result) == fields | {"macs", "expert_accuracy", "ece", "step", "weights", "calibrated_for", "stored"}
    assert result["split"] == split
    assert result["images"] == IMAGES
    assert set(result["top1"]) == {"coe", "delegator", "oracle", "experts"}
    assert len(result["top1"]["experts"]) == len(result["load"]) == len(result["macs"]["experts"]) == EXPERTS
    assert sum(result["load"]) == pytest.approx(1)
    assert {set(point) == {"threshold", "exit_rate", "average_macs", "top1"} for point in result["curve"]} == {True}
    whole = [result["images"], result["average_macs"], result["macs"]["delegator"], *result["macs"]["experts"]]
    assert {type(number) for number in whole + [point["average_macs"] for point in result["curve"]]} == {int}
    stored = json.loads((trained / "evaluation-validation.json").read_text())
    assert stored["average_macs"] <= 20_000
    assert result["threshold"] == stored["threshold"]  # calibrated on validation, used on test
    details = json.loads((trained / f"details-{split}.json").read_text())
    assert set(details) == {"classes", "selected", "correct", "images_per_class"}
    assert sum(details["images_per_class"]) == sum(map(sum, details["selected"])) == IMAGES
    assert [len(row) for row in details["selected"]] == [EXPERTS] * len(details["classes"])
    rows = PerImage.read(trained / f"images-{split}.npz")
    assert rows.ids_N.tolist() == list(range(IMAGES))
    assert rows.right_NE.mean(0).tolist() == pytest.approx(result["top1"]["experts"])
    assert ((rows.selection_confidence_N >= 1 / EXPERTS - 1e-6) & (rows.selection_confidence_N <= 1)).all()


def test_another_configuration_is_not_resumed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before a process group is joined."""
    assert main([str(trained.parents[1] / "run.yaml"), "training.global_batch=16"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("coe-dist: training.global_batch: 16 is not allowed; the run in ")
    assert len(message.splitlines()) == 1


def test_experts_may_learn_from_a_share_of_the_images(small_data: Path, tmp_path: Path) -> None:
    """Losses are means over the images that experts see, so that they are about as large as those of all images."""
    losses = {}
    for share in (1.0, 0.3):
        content = small_config(small_data, tmp_path / str(share), experts={"share": share}, training={"epochs": 1})
        done = torchrun(2, str(write_config(tmp_path / "run.yaml", content)))
        assert done.returncode == 0, done.stderr[-4000:]
        run = tmp_path / str(share) / "run"
        assert [line["experts_per_sample"] for line in lines_of(run, "start")] == [2 if share == 1.0 else 0.6]
        metrics = lines_of(run, "train")[0]["metrics"]
        losses[share] = [metrics[f"train/loss_{part}"] for part in ("experts", "delegator")]
        assert sum(metrics[f"expert/{expert:02d}/load"] for expert in range(EXPERTS)) == pytest.approx(1)
    assert losses[0.3] != losses[1.0]
    assert losses[0.3] == pytest.approx(losses[1.0], rel=0.3)


def test_a_single_network_is_trained_by_the_same_recipe(small_data: Path, tmp_path: Path) -> None:
    network = NetworkConfig(network="small_cnn", options={"width": 0.1})
    config = load_config(write_config(tmp_path / "run.yaml", small_config(small_data, tmp_path / "runs")))
    job = Job(task="baseline", config=config, run_dir=str(config.run_dir), network=network)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    done = torchrun(2, str(tmp_path / "job.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    run = config.run_dir
    (start,) = lines_of(run, "start")
    assert (start["task"], start["experts"], start["experts_per_sample"]) == ("baseline", 1, 1)
    assert [line["step"] for line in lines_of(run, "train")] == [2, 4, 6, 8]
    assert all(set(line["metrics"]) == VALUES for line in lines_of(run, "train"))
    assert [set(line["metrics"]) for line in lines_of(run, "evaluation")] == [{"val/top1"}] * 2
    for split in ("validation", "test"):
        result = json.loads((run / f"evaluation-{split}.json").read_text())
        assert set(result) == {"split", "images", "top1", "macs", "step"}
        assert (result["images"], type(result["macs"])) == (IMAGES, int)
        assert 0 <= result["top1"] <= 1
    newest = run / "checkpoints" / "step-00000008"
    assert sorted(path.name for path in newest.iterdir()) == ["manifest.json", "single.optim.pt", "single.safetensors"]


def test_what_a_kill_after_a_save_left_undone_is_made_up_for(small_data: Path, tmp_path: Path) -> None:
    """The save is there; its evaluation is not recorded, or it is and the save was not yet named the best."""
    config = str(write_config(tmp_path / "run.yaml", small_config(small_data, tmp_path / "runs", workers={"count": 1})))
    run = tmp_path / "runs" / "run"
    assert main([config, "training.epochs=1"]) == 0
    (first,) = lines_of(run, "evaluation")
    best = (run / "checkpoints" / "best").read_text()
    before = [line for line in lines_of(run) if line["kind"] not in ("evaluation", "end")]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in before))
    (run / "checkpoints" / "best").unlink()
    assert main([config, "training.epochs=2"]) == 0
    again, second = lines_of(run, "evaluation")
    assert (again["step"], again["epoch"], second["step"]) == (STEPS, 0, 2 * STEPS)
    assert again["metrics"]["val/top1"] == first["metrics"]["val/top1"]

    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / f"step-{STEPS:08d}").rename(tmp_path / "gone")
    assert main([config, "training.epochs=3"]) == 0
    assert [line["step"] for line in lines_of(run, "evaluation")] == [STEPS, 2 * STEPS, 3 * STEPS]
    named = json.loads((run / "checkpoints" / "best").read_text())
    values = {line["step"]: line["metrics"]["val/top1"] for line in lines_of(run, "evaluation")}
    assert json.loads(best)["save"] == f"step-{STEPS:08d}"
    assert named["top1"] == max(values[2 * STEPS], values[3 * STEPS])
