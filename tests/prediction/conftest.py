"""A run of three experts that answers with all of them and exits early, the folder it exports, and image files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from trained_run import early_exiting_run, images_of

from coe_dist.coe.early_exit import confidence, curve
from coe_dist.inference import CollaborationOfExperts
from coe_dist.training.export import export_weights
from coe_dist.training.inspection import open_collaboration


@pytest.fixture(scope="session")
def small_predictor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, exported folder). The run's evaluation on validation has a curve of 200 images and its threshold."""
    folder = tmp_path_factory.mktemp("predictor")
    run = early_exiting_run(folder)
    (run / "config.yaml").write_text(open_collaboration(run).config.to_yaml())
    model = CollaborationOfExperts.from_pretrained(folder / "first")
    with torch.no_grad():
        logits_NC, _ = model.delegator(images_of(200))
    flags, macs = [1] * 200, [model.expert_macs[0]] * 200
    thresholds = [0.0, *confidence(logits_NC).quantile(torch.linspace(0.1, 0.9, 5)).tolist(), 2.0]
    points = curve(confidence(logits_NC), flags, flags, macs, model.delegator_macs, thresholds)
    stored = json.loads((run / "evaluation-validation.json").read_text())
    stored |= {"step": 3, "weights": "raw"}
    stored["curve"] = [{**point._asdict(), "average_macs": round(point.average_macs)} for point in points]
    (run / "evaluation-validation.json").write_text(json.dumps(stored))
    export_weights(run, folder / "weights")
    return run, folder / "weights"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images_of(45, seed=4) as 00.png ... 44.png of 28 x 28 pixels; among them, broken-a.png and 20-broken.png."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(images_of(45, seed=4)):
        Image.fromarray(image[0].numpy()).save(folder / f"{number:02d}.png")
    (folder / "20-broken.png").write_bytes((folder / "20.png").read_bytes()[:100])
    (folder / "broken-a.png").write_bytes(b"")
    return folder
