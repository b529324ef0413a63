"""`coe-dist predict` in one process: its rows are the model's own answers, in the files' order."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_run import CLASSES, images_of

from coe_dist.data.beton import write_dataset
from coe_dist.data.sidecar import WriteOptions, read_sidecar, write_sidecar
from coe_dist.errors import InputError
from coe_dist.inference import CollaborationOfExperts
from coe_dist.orchestration.predict import predict
from coe_dist.prediction.model import open_model
from coe_dist.preparation import Preparation

BROKEN = ["20-broken.png", "broken-a.png"]


def wanted(folder: Path, threshold: float | None = None) -> list[tuple[Any, ...]]:
    """(classes, probabilities, expert, macs) of the 45 pictures, from one batch of the loaded model."""
    model = CollaborationOfExperts.from_pretrained(folder)
    model.threshold = model.threshold if threshold is None else threshold
    answer = model(images_of(45, seed=4))
    rows = []
    for probabilities, expert, macs in zip(*(part.tolist() for part in answer), strict=True):
        order = sorted(range(10), key=lambda c: -probabilities[c])
        rows.append(
            (
                [CLASSES[c] for c in order],
                [probabilities[c] for c in order],
                "early exit" if expert < 0 else expert,
                macs,
            )
        )
    return rows


@pytest.mark.parametrize("batch", [1, 7, 256])
@pytest.mark.parametrize("source", ["run", "export"])
def test_rows_are_the_models_answers(
    source: str, batch: int, small_predictor: tuple[Path, Path], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, weights = small_predictor
    result = predict(run if source == "run" else weights, [str(pictures)], top=3, batch=batch)
    expected = wanted(weights)
    assert {row[2] for row in expected} == {"early exit", 0, 1, 2}
    rows = result["predictions"]
    assert [row["file"] for row in rows] == [str(pictures / f"{number:02d}.png") for number in range(45)]
    for row, (classes, probabilities, expert, macs) in zip(rows, expected, strict=True):
        assert [entry["class"] for entry in row["top"]] == classes[:3]
        assert [entry["probability"] for entry in row["top"]] == pytest.approx(probabilities[:3], abs=1e-5)
        assert (row["class"], row["probability"]) == (classes[0], row["top"][0]["probability"])
        assert (row["expert"], row["macs"]) == (expert, macs)
    assert (result["images"], result["top"], result["csv"]) == (45, 3, None)
    assert result["exit_rate"] == sum(row[2] == "early exit" for row in expected) / 45
    assert result["average_macs"] == round(sum(row[3] for row in expected) / 45)
    assert [Path(problem["file"]).name for problem in result["broken"]] == BROKEN
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert [line.split(": ")[1].rpartition("/")[2] for line in lines] == BROKEN
    assert all(line.startswith("coe-dist: ") and "cannot be read (" in line for line in lines)


def test_csv_table_and_json(
    small_predictor: tuple[Path, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Any],
) -> None:
    """Through the command line, in this process."""
    run, weights = small_predictor
    monkeypatch.chdir(pictures)
    out = tmp_path / "answers.csv"

    code, output, errors = command("predict", str(run), ".", "--csv", str(out), "--top", "2")
    assert code == 0
    assert f"{out!s}" in output.splitlines()
    assert "; 2 could not be read" in output
    assert len(errors.splitlines()) == 2
    with out.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "class", "probability", "expert", "macs", "class_2", "probability_2"]
    expected = wanted(weights)
    for number, (row, (classes, probabilities, expert, macs)) in enumerate(zip(rows[1:], expected, strict=True)):
        assert row[0] == f"./{number:02d}.png"
        assert [row[1], row[3], row[4], row[5]] == [classes[0], str(expert), str(macs), classes[1]]
        assert [float(row[2]), float(row[6])] == pytest.approx(probabilities[:2], abs=2e-6)
    assert os.listdir(tmp_path) == ["answers.csv"]

    before = out.read_bytes()
    code, _, errors = command("predict", str(run), "00.png", "--csv", str(out))
    assert (code, out.read_bytes()) == (2, before)
    assert errors == f"coe-dist: --csv: {out} is not allowed; it exists; give another name, or --overwrite\n"
    code, output, _ = command("predict", str(run), "00.png", "0[0-3].png", "--csv", str(out), "--overwrite", "--json")
    assert code == 0
    assert [row["file"] for row in json.loads(output)["predictions"]] == ["00.png", "01.png", "02.png", "03.png"]
    assert len(out.read_text().splitlines()) == 5

    code, output, _ = command("predict", str(weights), "03.png", "--top", "2")
    assert code == 0
    assert "03.png" in output
    assert f"{expected[3][1][0]:.4f}" in output
    assert f"{expected[3][0][1]} {expected[3][1][1]:.4f}" in output
    code, _, errors = command("predict", str(weights), *BROKEN, "--csv", str(tmp_path / "none.csv"))
    assert code == 2
    assert errors.splitlines()[-1].startswith("coe-dist: IMAGES: none of 2 files could be read; the first: 20-broken")
    assert os.listdir(tmp_path) == ["answers.csv"]


def test_names_that_are_not_text_keep_their_bytes(
    small_predictor: tuple[Path, Path], pictures: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    from coe_dist.prediction.table import show_predictions

    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    names = [b'a\n,".png', b"b\xff.png", "c\u00e9.png".encode()]
    for name in names:
        shutil.copy(os.fsencode(pictures) + b"/00.png", folder + b"/" + name)
    (tmp_path / "broken\udcff.png").write_bytes(b"")
    out = tmp_path / "answers.csv"
    listed = [os.fsdecode(folder), str(tmp_path / "broken\udcff.png")]
    result = predict(small_predictor[1], listed, csv=out)
    with out.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        files = [row[0] for row in csv.reader(file)]
    assert [os.fsencode(name) for name in files[1:]] == [folder + b"/" + name for name in names]
    show_predictions({**result, "csv": None})
    show_predictions(result)
    told = capsysbinary.readouterr()
    assert b"b\\xff.png" in told.out
    assert b"broken\\xff.png" in told.err
    assert json.loads(json.dumps(result))["predictions"][1]["file"] == files[2]


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_a_threshold_replaces_the_stored_one(
    threshold: float, small_predictor: tuple[Path, Path], pictures: Path
) -> None:
    run, weights = small_predictor
    result = predict(run, [str(pictures)], threshold=threshold)
    expected = wanted(weights, threshold)
    assert [row["expert"] for row in result["predictions"]] == [row[2] for row in expected]
    assert result["exit_rate"] == (1.0 if threshold == 0.0 else 0.0)
    assert result["threshold"] == threshold


def test_a_budget_takes_the_largest_affordable_threshold_of_the_curve(
    small_predictor: tuple[Path, Path],
) -> None:
    run, _ = small_predictor
    points = json.loads((run / "evaluation-validation.json").read_text())["curve"]
    prices = sorted({point["average_macs"] for point in points})
    assert len(prices) > 4
    for budget in (*prices, prices[0] + 0.5, prices[-1] * 2):
        threshold = open_model(run, macs_budget=budget).model.threshold
        assert threshold == max(point["threshold"] for point in points if point["average_macs"] <= budget)


def test_the_save_says_how_images_are_prepared_and_of_older_ones_the_data_set(
    small_predictor: tuple[Path, Path], tmp_path: Path
) -> None:
    run, weights = small_predictor
    assert open_model(run).model.preparation == open_model(weights).model.preparation == Preparation(1, 28)
    copy, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run, copy)
    path = copy / "checkpoints" / "step-00000003" / "manifest.json"
    manifest = json.loads(path.read_text().replace(_data_of(run), str(data)))

    def opened(**record: Any) -> tuple[Preparation, list[str]]:
        path.write_text(json.dumps(manifest | record))
        found = open_model(copy)
        return found.model.preparation, found.warnings

    cropped = Preparation(1, 28, crop_all=True, max_resolution=60)
    assert opened(preparation=cropped.record()) == (cropped, [])
    with pytest.raises(InputError, match=r"manifest.json: preparation: Input should be 'centre 224/256"):
        opened(preparation=cropped.record() | {"rule": "squeeze"})
    del manifest["preparation"]
    preparation, [warning] = opened()
    assert preparation == Preparation(1, 28)
    assert "it does not say how validation prepared its images, and " in warning
    write_dataset("fashion-mnist", data, limit=4)
    assert opened() == (Preparation(1, 28), [])
    info = read_sidecar(data / "validation.beton")
    changed = info.model_copy(update={"shape": None, "written": WriteOptions(max_resolution=60)})
    write_sidecar(data / "validation.beton", changed)
    assert opened() == (cropped, [])


def _data_of(run: Path) -> str:
    from coe_dist.training.run_folder import load_run_config

    return load_run_config(run).data.folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top": 0}, "--top: 0 is not allowed; the model has 10 classes"),
        ({"top": 11}, "--top: 11 is not allowed"),
        ({"batch": 0}, "--batch: 0 is not allowed"),
        ({"workers": 0}, "--workers: 0 is not allowed"),
        ({"address": "10.0.0.1:6379"}, "--address: 10.0.0.1:6379 is not allowed without --workers"),
        ({"threshold": float("nan")}, "--threshold: nan is not allowed"),
        ({"threshold": 0.5, "macs_budget": 1e6}, "--threshold: 0.5 is not allowed; --macs-budget is given too"),
        ({"macs_budget": 10}, "--macs-budget: 10 is not allowed; the delegator alone needs"),
        ({"weights": "ema"}, "--weights: ema is not allowed"),
        ({"csv": Path("/nowhere/a.csv")}, "--csv: /nowhere/a.csv is not allowed; /nowhere is not a folder"),
        ({"csv": Path("/dev/null"), "overwrite": True}, "--csv: /dev/null is not allowed; it is not a file"),
    ],
)
def test_refused(options: dict[str, Any], words: str, small_predictor: tuple[Path, Path], pictures: Path) -> None:
    with pytest.raises(InputError, match=f"^{words}"):
        predict(small_predictor[0], [str(pictures)], **options)


def test_folders_that_hold_no_usable_model(small_predictor: tuple[Path, Path], tmp_path: Path) -> None:
    run, weights = small_predictor
    with pytest.raises(InputError, match=r": neither a run folder \(no config.yaml\) nor one of exported weights"):
        open_model(tmp_path)
    with pytest.raises(InputError, match=r"^--macs-budget: 50000 is not allowed; .* have no curve"):
        open_model(weights, macs_budget=50_000)
    with pytest.raises(InputError, match=r"^--weights: raw is not allowed; .* of one kind only"):
        open_model(weights, weights="raw")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation-validation.json").write_text('{"threshold": null, "curve": [{"threshold": 1}]}')
    with pytest.raises(InputError, match=r"evaluation-validation.json: not an evaluation with a usable curve"):
        open_model(tmp_path / "run", macs_budget=1e9)
    (tmp_path / "run" / "evaluation-validation.json").unlink()
    with pytest.raises(InputError, match=r"`coe-dist calibrate .* --macs-budget 1e\+09` evaluates on validation"):
        open_model(tmp_path / "run", macs_budget=1e9)
    assert open_model(run).model.threshold == open_model(weights).model.threshold
    assert torch.equal(
        open_model(run).model.delegator.class_head.weight, open_model(weights).model.delegator.class_head.weight
    )


def test_a_full_disk_leaves_no_csv(small_predictor: tuple[Path, Path], pictures: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    out = tmp_path / "answers.csv"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(InputError, match=r"^--csv: .* cannot be written \(File too large\)$"):
            predict(small_predictor[1], [str(pictures)], csv=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []
