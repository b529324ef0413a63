"""Image files of odd kinds and sizes get the answers of evaluation, from the run and from everything exported of it."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import batches_of
from trained_run import small_run

from coe_dist import preparation
from coe_dist.data.beton import write_dataset
from coe_dist.data.samples import read_samples
from coe_dist.data.sidecar import read_sidecar
from coe_dist.exports.mlflow_model import export_mlflow
from coe_dist.exports.onnx_graphs import convert
from coe_dist.exports.onnx_runner import OnnxCollaboration
from coe_dist.inference import CollaborationOfExperts
from coe_dist.orchestration.predict import predict
from coe_dist.prediction.decode import _resize
from coe_dist.preparation import Preparation, prepare_files, recorded_preparation
from coe_dist.training.export import export_weights

SIZES = [(40, 71), (71, 40), (28, 28), (9, 200), (200, 150), (12, 12), (37, 36), (61, 60)]
CLASSES = ["ant", "bee"]


Row = tuple[str, int, float]  # class, expert, probability


class Exported(NamedTuple):
    run: Path
    weights: Path
    mlflow: Path
    onnx: Path
    files: list[str]  # of the test split
    answers: list[Row]  # of each, through the evaluation loader


def draw(path: Path, height: int, width: int, seed: int) -> None:
    """Smooth noise: in colour, gray with 16 bits, with a palette, transparent, rotated by EXIF."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if seed % 5 == 1:
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif seed % 5 in (2, 3):
        image = image.convert("P" if seed % 5 == 2 else "RGBA")
    elif seed % 5 == 4:
        exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", exif=exif)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The data set is gone when the run is exported."""
    folder = tmp_path_factory.mktemp("prepared")
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            for i, size in enumerate(SIZES):
                draw(folder / "tree" / split / name / f"{i}.png", *size, seed=20 * label + i + (split == "val"))
    data = folder / "data"
    write_dataset("imagefolder", data, root=folder / "tree", max_resolution=60)
    info = read_sidecar(data / "test.beton")
    run = small_run(folder, 3, info=info, data={"folder": str(data)}, early_exit={"threshold": 0.55})
    shutil.copy(run / "checkpoints" / "step-00000003" / "manifest.json", folder / "manifest.json")
    content = json.loads((folder / "manifest.json").read_text())["config"]
    (run / "config.yaml").write_text(json.dumps(content))
    (run / "details-test.json").write_text(json.dumps({"classes": CLASSES}))
    samples = read_samples(data / "test.beton", info.count)
    assert samples is not None
    [batch] = batches_of(data / "test.beton", 28)
    shutil.rmtree(data)
    assert export_weights(run, folder / "weights") == []
    assert export_mlflow(run, out=folder / "mlflow").warnings == []
    convert(folder / "weights", folder / "onnx")
    model = CollaborationOfExperts.from_pretrained(folder / "weights")
    answers = told(CLASSES, *(part.numpy() for part in model(batch.images_BCHW)))
    assert len({expert for _, expert, _ in answers}) > 2
    files = [str(folder / "tree" / sample.file) for sample in samples]
    return Exported(run, folder / "weights", folder / "mlflow", folder / "onnx", files, answers)


def told(classes: Sequence[str], probabilities_NC: Any, expert_N: Any, _: Any) -> list[Row]:
    columns = (probabilities_NC.argmax(1), expert_N.tolist(), probabilities_NC.max(1).tolist())
    return [(classes[label], expert, value) for label, expert, value in zip(*columns, strict=True)]


def check(found: list[Row], exported: Exported) -> None:
    assert [row[:2] for row in found] == [row[:2] for row in exported.answers]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in exported.answers], abs=1e-5)


@pytest.mark.parametrize("source", ["run", "weights"])
def test_predictions_are_the_evaluations(source: str, exported: Exported) -> None:
    rows = predict(getattr(exported, source), exported.files)["predictions"]
    assert [row["file"] for row in rows] == exported.files
    experts = [-1 if row["expert"] == "early exit" else row["expert"] for row in rows]
    check([(row["class"], expert, row["probability"]) for row, expert in zip(rows, experts, strict=True)], exported)


def test_a_loaded_model_prepares_files(exported: Exported) -> None:
    model = CollaborationOfExperts.from_pretrained(exported.weights)
    answer = model(model.prepare(exported.files))
    check(told(model.classes, *(part.numpy() for part in answer)), exported)


def test_what_prepare_writes_is_what_the_mlflow_model_takes(exported: Exported, tmp_path: Path) -> None:
    import mlflow

    command = [sys.executable, "-I", str(exported.mlflow / "prepare.py"), *exported.files]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    images_NCHW = np.array(json.loads(done.stdout)["inputs"], dtype=np.uint8)
    table = mlflow.pyfunc.load_model(str(exported.mlflow)).predict(images_NCHW)
    check(list(zip(table["class"], table["expert"], table["probability"], strict=True)), exported)
    (tmp_path / "broken.png").write_bytes(b"x")
    done = subprocess.run([*command[:3], "broken.png"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "prepare.py: cannot identify image file 'broken.png'\n"


def test_what_prepare_reads_is_what_the_graphs_take(exported: Exported) -> None:
    assert (exported.onnx / "prepare.py").read_bytes() == Path(preparation.__file__).read_bytes()
    images_NCHW = prepare_files(exported.files, recorded_preparation(exported.onnx))
    runner = OnnxCollaboration(exported.onnx, threads=1)
    check(told(runner.classes, *runner(images_NCHW)), exported)


def test_the_file_that_travels_needs_numpy_and_pillow_alone() -> None:
    parts = list(ast.walk(ast.parse(Path(preparation.__file__).read_text())))
    names = {alias.name for part in parts if isinstance(part, ast.Import) for alias in part.names}
    names |= {str(part.module) for part in parts if isinstance(part, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"numpy", "PIL"}


def test_folders_without_a_usable_record_are_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record of how images are prepared"):
        recorded_preparation(tmp_path)
    content: dict[str, Any] = json.loads((exported.onnx / "manifest.json").read_text())
    content["preparation"]["rule"] = "squeeze"
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"preparation.rule: give 'centre 224/256"):
        recorded_preparation(tmp_path)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 50), st.sampled_from([1, 3]), st.booleans())
def test_plain_numpy_gives_the_bytes_of_the_compiled_kernel(
    height: int, width: int, side: int, channels: int, crop_all: bool
) -> None:
    pixels_HW3 = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(pixels_HW3)
    asked = Preparation(channels, side, crop_all)
    assert np.array_equal(preparation.prepare(image, asked), preparation.prepare(image, asked, _resize))
