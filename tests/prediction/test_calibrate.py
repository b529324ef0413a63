"""`coe-dist calibrate` on a real run: what is chosen on validation is stored, and used by whoever comes later."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from namespaces import clean_environment, in_private_network
from small_data import batches_of
from trained_run import real_run

from coe_dist.coe.calibration import ece
from coe_dist.coe.early_exit import confidence
from coe_dist.errors import InputError
from coe_dist.inference import CollaborationOfExperts
from coe_dist.orchestration.calibrate import calibrate, show_calibration
from coe_dist.prediction.model import open_model
from coe_dist.training.export import export_weights
from coe_dist.training.job import Job
from coe_dist.training.run_folder import load_run_config

Images = list[tuple[float, bool, float, bool, int]]  # rough confidence and right, final confidence and right, MACs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, for its stored threshold changes here."""
    original = real_run(tmp_path_factory.getbasetemp())
    copy = tmp_path_factory.mktemp("calibrate") / "run"
    shutil.copytree(original, copy)
    return copy


@pytest.fixture(scope="module")
def images(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The validation split through the exported model, every image to the end."""
    weights = tmp_path_factory.mktemp("exported") / "weights"
    export_weights(run, weights)
    model = CollaborationOfExperts.from_pretrained(weights)
    model.threshold = None
    beton = real_run(tmp_path_factory.getbasetemp()).parent / "data" / "validation.beton"
    found: Images = []
    for batch in batches_of(beton, 28, 50):
        with torch.no_grad():
            rough_NC, _ = model.delegator(batch.images_BCHW)
        answer = model(batch.images_BCHW)
        found += zip(
            confidence(rough_NC).tolist(),
            (rough_NC.argmax(1) == batch.labels_B).tolist(),
            answer.probabilities_NC.amax(1).tolist(),
            (answer.probabilities_NC.argmax(1) == batch.labels_B).tolist(),
            answer.macs_N.tolist(),
            strict=True,
        )
    return found


def outcome(images: Images, exits: int, delegator_macs: int) -> tuple[float, float, list[tuple[float, bool]]]:
    """(top-1, average MACs, confidence and right of each answer) when the `exits` most confident exit."""
    ordered = sorted(images, key=lambda image: -image[0])
    answers = [image[:2] if place < exits else image[2:4] for place, image in enumerate(ordered)]
    macs = [delegator_macs if place < exits else image[4] for place, image in enumerate(ordered)]
    return sum(right for _, right in answers) / len(images), sum(macs) / len(images), answers


def python_with(*arguments: str, state: Path) -> Any:
    return in_private_network(
        [sys.executable, *arguments], env=clean_environment(XDG_STATE_HOME=str(state)), timeout=300
    )


def ask_one_worker(run: Path, folder: Path, **asked: float) -> Any:
    """What calibrate asks of its workers, of a single process without Ray: that takes a fifth of the time."""
    job = Job(task="evaluate", config=load_run_config(run), run_dir=str(run), split="validation", **asked)
    (folder / "job.json").write_text(job.model_dump_json())
    return python_with("-m", "coe_dist.training.worker", str(folder / "job.json"), state=folder)


def test_the_cheapest_accurate_threshold_is_stored_and_used(run: Path, images: Images, tmp_path: Path) -> None:
    delegator_macs = open_model(run).model.delegator_macs
    outcomes = [outcome(images, exits, delegator_macs) for exits in range(len(images) + 1)]
    best = max(top1 for top1, _, _ in outcomes)
    target = sorted({top1 for top1, _, _ in outcomes})[-2]
    top1, macs, answers = min((o for o in outcomes if o[0] >= target), key=lambda o: o[1])
    before = (run / "evaluation-validation.json").read_bytes()
    refused = ask_one_worker(run, tmp_path, min_accuracy=0.9999)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-1] == (
        f"coe-dist: --min-accuracy: 0.9999 is not allowed; the best that a threshold reaches is {best}, "
        f"of these {len(images)} images"
    )
    assert (run / "evaluation-validation.json").read_bytes() == before

    command = ["calibrate", str(run), "--min-accuracy", repr(target), "--json"]
    done = python_with("-c", "from coe_dist.cli import main; main()", *command, state=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((run / "evaluation-validation.json").read_text())
    assert (result["top1"]["coe"], result["average_macs"], result["split"]) == (top1, round(macs), "validation")
    assert result["ece"]["coe"] == pytest.approx(ece(*zip(*answers, strict=True)), abs=1e-4)
    rough = [image[:2] for image in images]
    assert result["ece"]["delegator"] == pytest.approx(ece(*zip(*rough, strict=True)), abs=1e-4)
    export_weights(run, tmp_path / "weights")
    stored = json.loads((tmp_path / "weights" / "config.json").read_text())["threshold"]
    assert stored == open_model(run).model.threshold == result["threshold"]

    budget = delegator_macs + 0.5 * (outcomes[0][1] - delegator_macs)
    done = ask_one_worker(run, tmp_path, macs_budget=budget)
    assert done.returncode == 0, done.stderr
    kept = json.loads((run / "evaluation-validation.json").read_text())
    assert kept["average_macs"] <= budget
    assert kept["exit_rate"] == min(
        exits / len(images) for exits, (_, average, _) in enumerate(outcomes) if average <= budget
    )


def test_the_table_names_both_calibration_errors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads((run / "evaluation-validation.json").read_text())
    show_calibration({**stored, "ece": {"coe": 0.0123, "delegator": 0.25}}, run)
    told = " ".join(capsys.readouterr().out.split())
    assert "calibration error (15 bins): collaboration 1.23%, delegator 25.00%" in told
    assert "validation split, 101 images" in told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--macs-budget, --min-accuracy: neither of them is given; give one of them"),
        ({"macs_budget": 1e5, "min_accuracy": 0.5}, "--macs-budget, --min-accuracy: both are given; give one of them"),
        ({"min_accuracy": 85.0}, "--min-accuracy: 85 is not allowed; give a fraction from 0 to 1"),
        ({"min_accuracy": float("nan")}, "--min-accuracy: nan is not allowed"),
        ({"macs_budget": 10.0}, "--macs-budget: 10 is not allowed; the delegator alone needs"),
    ],
)
def test_refused(options: dict[str, float], words: str, run: Path) -> None:
    with pytest.raises(InputError, match=f"^{words}"):
        calibrate(run, **options)  # type: ignore[arg-type]
