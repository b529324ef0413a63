"""Run folders as training, evaluation and the comparison leave them, made up."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from coe_dist.data.stored import StoredImages
from coe_dist.tracking.per_image import PerImage

CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "<b>Boot</b> & $co"]


def write_run(folder: Path, experts: int = 4, classes: list[str] = CLASSES, epochs: int = 16) -> Path:
    """A run folder as training, evaluation and the comparison leave it."""
    folder.mkdir(parents=True)
    per_epoch, lines = 215, []
    lines.append({"kind": "start", "time": 1.0, "task": "train", "epochs": epochs, "world_size": 2,
                  "steps_per_epoch": per_epoch, "experts": experts, "experts_per_sample": 2,
                  "images": 55000, "step": 0})  # fmt: skip
    for step in range(20, per_epoch * epochs + 1, 20):
        decay, wave = math.exp(-step / 900), math.sin(step / 37) / 40
        loads = [1 + 0.5 * math.sin(step / 500 + j) * decay for j in range(experts)]
        metrics: dict[str, Any] = {
            "train/loss": 0.9 + 3 * decay + wave, "train/loss_experts": 0.3 + 2 * decay + wave,
            "train/loss_delegator": 0.6 + 1.4 * decay, "train/loss_selection": 1.0 + 0.4 * decay - wave,
            "train/learning_rate": 0.1, "train/images_per_second": 4100.0,
        }  # fmt: skip
        metrics |= {f"expert/{j:02d}/load": load / sum(loads) for j, load in enumerate(loads)}
        lines.append(
            {"kind": "train", "time": 1.0 + step, "step": step, "epoch": step // per_epoch, "metrics": metrics}
        )
    for epoch in range(epochs):
        rise = 1 - math.exp(-(epoch + 1) / 3)
        metrics = {"val/top1": 0.868 * rise, "val/top1_delegator": 0.754 * rise, "val/top1_oracle": 0.938 * rise}
        metrics |= {f"expert/{j:02d}/val_load": 1 / experts for j in range(experts)}
        metrics |= {f"expert/{j:02d}/accuracy": 0.8 * rise for j in range(1, experts)}  # the first is never chosen
        lines.append({"kind": "evaluation", "time": 1.0, "step": (epoch + 1) * per_epoch, "epoch": epoch,
                      "split": "validation", "metrics": metrics})  # fmt: skip
    lines.append({"kind": "end", "time": 9.0, "step": per_epoch * epochs, "seconds": 412.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    delegator, cost = 42_000, 240_000
    curve = []
    for i in range(41):
        threshold = 0.3 + 0.7 * i / 40
        rate = max(0.0, 1 - threshold**1.5)
        average = delegator + (1 - rate) * cost
        top1 = 0.869 - 0.1 * rate**3
        curve.append({"threshold": threshold, "exit_rate": rate, "average_macs": average, "top1": top1})
    top = {
        "coe": 0.8671,
        "delegator": 0.7543,
        "oracle": 0.9382,
        "experts": [0.71 + 0.01 * (j % 5) for j in range(experts)],
    }
    evaluation = {
        "split": "test", "images": 10000, "top1": top, "exit_rate": 0.2512, "average_macs": 221_712.0, "threshold": 0.9,
        "load": [1 / experts] * experts, "curve": curve, "macs": {"delegator": delegator, "experts": [cost] * experts},
        "expert_accuracy": [0.84, None, *[0.88] * (experts - 2)],
    }  # fmt: skip
    (folder / "evaluation-test.json").write_text(json.dumps(evaluation))
    selected = [[int(1000 * (0.85 if (c + j) % experts == 0 else 0.15 / (experts - 1))) for j in range(experts)]
                for c in range(len(classes))]  # fmt: skip
    selected[0][1] = 0
    details = {"classes": classes, "selected": selected, "correct": [[int(0.9 * n) for n in row] for row in selected],
               "images_per_class": [1000] * len(classes)}  # fmt: skip
    (folder / "details-test.json").write_text(json.dumps(details))
    (folder / "config.yaml").write_text("name: demo\ntracking:\n  uri: https://me:hunter2@tracker.example/x\n")
    return folder


def write_summary(folder: Path) -> None:
    summary = {
        "coe": {"top1": 0.8671, "average_macs": 221_712}, "single": {"top1": 0.8563, "macs": 240_000},
        "single_same_macs": {"top1": 0.8602, "macs": 278_000}, "seed": 0,
        "seconds": {"data": 12.0, "train_coe": 412.5, "train_single": 131.0, "evaluate": 9.0},
        "expert_samples_per_image": {"coe": 2, "single": 1, "single_same_macs": 1},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def rows_of(images: int = 60, experts: int = 4, classes: int = 10) -> PerImage:
    """Rows of made-up answers to `images` images: the delegator is sure and wrong about the last one."""
    generator = np.random.default_rng(5)
    labels = np.arange(images, dtype=np.int32) % classes
    final = np.where(generator.random(images) < 0.7, labels, (labels + 1) % classes).astype(np.int32)
    rough = labels.copy()
    rough[-1] = (labels[-1] + 3) % classes
    confidence = np.linspace(0.2, 0.99, images)
    selected = generator.integers(0, experts, images, dtype=np.int32)
    right = generator.random((images, experts)) < 0.6
    sure = generator.random(images, dtype=np.float32)
    return PerImage(np.arange(images), labels, rough, confidence, selected, sure, final, sure, right)


def with_rows(folder: Path, data: Path) -> Path:
    """A run whose evaluations are of the data set in `data`."""
    write_run(folder)
    labels = StoredImages(data / "validation.beton").labels_N[:60].astype(np.int32)
    rows = dataclasses.replace(rows_of(), labels_N=labels)
    evaluation = json.loads((folder / "evaluation-test.json").read_text()) | {"images": 60}
    (folder / "evaluation-test.json").write_text(json.dumps(evaluation))
    for split in ("test", "validation"):
        (folder / f"images-{split}.npz").write_bytes(rows.to_bytes())
    (folder / "config.yaml").write_text(f"data:\n  folder: {data}\n")
    return folder
