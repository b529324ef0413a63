"""The command line: help answers at once, and bad input gets one line and exit code 2 before any worker starts."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import IMAGES, small_config, write_config, write_small

from coe_dist.cli.app import app, data_app, export_app
from coe_dist.config import load_config, parse_config
from coe_dist.data.sidecar import SPLITS, check_labels, read_sidecar, write_sidecar
from coe_dist.data.stored import StoredImages
from coe_dist.errors import InputError
from coe_dist.orchestration.runs import evaluate, train
from coe_dist.training.checks import check_run
from coe_dist.training.run_folder import prepare_folder

ROOT = Path(__file__).parents[1]
COMMANDS = [
    *(command.name or command.callback.__name__ for command in app.registered_commands if command.callback),
    *(f"data {command.name}" for command in data_app.registered_commands),
    *(f"export {command.name}" for command in export_app.registered_commands),
]
HEAVY = ("torch", "ray", "deepspeed", "mlflow", "ffcv", "timm", "numpy")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("fashion"))


def cli(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`coe-dist ARGUMENTS` in a process of its own; the last line of stdout lists the heavy modules it imported."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('imported', *(name for name in {HEAVY} if name in sys.modules)))\n"
        "from coe_dist.cli import main\n"
        "sys.argv[0] = 'coe-dist'\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )


def imported(done: subprocess.CompletedProcess[str]) -> list[str]:
    return done.stdout.splitlines()[-1].split()[1:]


def refused(*arguments: str) -> str:
    """The one line of a refusal; Ray was not even imported, so no worker can have been started."""
    done = cli(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ray" not in imported(done)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("coe-dist: ")
    return lines[0].removeprefix("coe-dist: ")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_without_heavy_imports(command: str) -> None:
    done = cli(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert imported(done) == []
    if command:
        assert f"Example: coe-dist {command}" in " ".join(done.stdout.split())
    else:
        assert all(name.split()[0] in done.stdout for name in COMMANDS)


def test_version() -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"coe-dist {metadata.version('coe-dist')}")


def test_without_a_command_the_help_is_shown() -> None:
    done = cli()
    assert done.returncode == 2
    assert "Usage" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "config"),
        (["train", "a.yaml", "--nonsense"], "--nonsense"),
        (["trian"], "trian"),
        (["evaluate", "runs", "--split", "train"], "--split"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["evaluate", "tests"], "tests: it is not a run folder (no config.yaml)"),
        (["bench", "nothing"], "bench: 'nothing' is not allowed"),
        (["study", "nothing"], "study: 'nothing' is not allowed; give a YAML file or one of ablations, frontier"),
        (["study", "frontier", "--seeds", "0,x"], "--seeds: '0,x' is not allowed; give whole numbers from 0"),
        (["study", "frontier", "--max-runs", "-1"], "--max-runs: -1 is not allowed; give a whole number from 0"),
        (["plan", "configs/smoke.yaml", "--gpu", "b300"], "--gpu: 'b300' is not allowed; give h100, h200"),
        (["plan", "configs/smoke.yaml", "--gpus", "0"], "--gpus: 0 is not allowed; give a whole number from 1"),
        (["report", "tests"], "tests: not a run folder"),
        (["watch", "tests", "--once"], "tests: not a run folder"),
        (["ui", "tests"], "tests: no mlflow.db here"),
        (["data", "write", "--out", "s3://bucket/x"], "--out: s3://... is not allowed; give a place on this machine"),
        (
            ["predict", "runs/x", "y", "--csv", "gs://b/y.csv"],
            "--csv: gs://... is not allowed; give a place",
        ),
        (["data", "write", "--out", "x", "--source", "cifar"], "source: 'cifar' is not allowed; give"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_a_python_without_the_requirements_is_told_in_one_line() -> None:
    """As on a cluster's machine where Ray runs in another environment than ours."""
    environment = {"PYTHONPATH": str(ROOT)}
    bare = [sys.executable, "-S", "-m", "coe_dist", "--help"]
    done = subprocess.run(bare, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"coe-dist: {sys.executable} has no module typer; install coe_dist's requirements there")


def test_debug_shows_the_traceback() -> None:
    done = cli("--debug", "train", "nowhere.yaml")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "InputError: nowhere.yaml" in done.stderr


def relabel(folder: Path, split: str, position: int, label: int) -> None:
    """Changes one label inside a .beton; size and header stay right."""
    path = folder / f"{split}.beton"
    with path.open("rb+") as file:
        file.seek(24 + 2 * 1041 + 24 * position + 16)
        file.write(struct.pack("<q", label))


def damage(kind: str, folder: Path) -> None:
    if kind == "missing":
        (folder / "train.beton").unlink()
    elif kind == "no side-car":
        (folder / "test.json").unlink()
    elif kind == "truncated":
        with (folder / "validation.beton").open("rb+") as file:
            file.truncate((folder / "validation.beton").stat().st_size // 2)
    elif kind == "label":
        relabel(folder, "test", 7, 10)
    elif kind == "negative label":
        relabel(folder, "train", 0, -1)
    elif kind == "other label":
        labels = StoredImages(folder / "train.beton").labels_N
        relabel(folder, "train", 5, (int(labels[5]) + 1) % 10)
    elif kind == "classes":
        info = read_sidecar(folder / "validation.beton")
        classes = tuple("Boot" if name == "Ankle boot" else name for name in info.classes)
        write_sidecar(folder / "validation.beton", info.model_copy(update={"classes": classes}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "train.beton: no such file; `coe-dist data write` makes it"),
        ("no side-car", "test.json: missing"),
        ("truncated", "damaged, write it again"),
        (
            "label",
            "test.beton: label 10 of image 7 is not allowed; the side-car names 10 classes, give 0 to 9",
        ),
        ("negative label", "train.beton: label -1 of image 0 is not allowed"),
        ("other label", "train.beton: its images per class are"),
        (
            "classes",
            "validation.beton: its classes differ from train.beton's (missing: Ankle boot; not in train: Boot)",
        ),
    ],
)
def test_damaged_data_is_refused_before_any_worker_starts(
    kind: str,
    words: str,
    small_data: Path,
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    damage(kind, data)
    content = small_config(data, tmp_path / "runs")
    if kind in ("no side-car", "negative label", "other label"):  # in this process, which is quicker
        with pytest.raises(InputError) as caught:
            check_run(parse_config(content))
        assert words in str(caught.value)
    else:
        assert words in refused("train", str(write_config(tmp_path / "run.yaml", content)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"early_exit": {"macs_budget": 10}}, "early_exit.macs_budget: 10 is not allowed; the delegator alone needs"),
        ({"workers": {"count": 999}}, "workers.count: 999 is not allowed; this machine has"),
        ({"training": {"global_batch": 128}}, "training.global_batch: 128 is not allowed; the train split has 101"),
        ({"delegator": {"network": "small_cn"}}, "delegator.network: 'small_cn' is not allowed"),
        ({"experts": {"options": {"wdth": 1}}}, "experts.options.wdth"),
    ],
)
def test_a_configuration_that_cannot_run(
    sections: dict[str, Any],
    words: str,
    small_data: Path,
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path / "run.yaml", small_config(small_data, tmp_path / "runs", **sections))
    assert words in refused("train", str(config))
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_resumed_with_another_configuration_nor_a_foreign_folder_deleted(
    small_data: Path,
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    first = write_config(tmp_path / "run.yaml", small_config(small_data, runs))
    prepare_folder(load_config(first), overwrite=False)
    stored = (runs / "run" / "config.yaml").read_text()
    with pytest.raises(InputError) as caught:
        train(load_config(first, ["training.global_batch=16", "training.epochs=9"]))
    message = str(caught.value)
    assert message.startswith("training.global_batch: 16 is not allowed; the run in ")
    assert "which would be resumed, has 32; give that, another name, or --overwrite" in message
    assert (runs / "run" / "config.yaml").read_text() == stored
    prepare_folder(load_config(first, ["training.epochs=9", "workers.count=1"]), overwrite=False)  # these may change

    (runs / "photos").mkdir()
    assert "it is not a run folder" in refused("train", str(first), "name=photos", "--overwrite")
    assert (runs / "photos").is_dir()
    (runs / "file").write_text("")
    with pytest.raises(InputError, match=r"^runs_dir: .* is not allowed; "):
        prepare_folder(load_config(first, [f"runs_dir={runs / 'file'}"]), overwrite=False)


def test_evaluate_refuses_what_it_cannot_evaluate(small_data: Path, tmp_path: Path) -> None:
    run = prepare_folder(parse_config(small_config(small_data, tmp_path)), overwrite=False)
    assert refused("evaluate", str(run)) == f"{run}: it holds no complete checkpoint"
    options: list[tuple[dict[str, Any], str]] = [
        ({"macs_budget": 10}, "^--macs-budget: 10 is not allowed"),
        ({"macs_budget": float("nan")}, "^--macs-budget: nan is not allowed"),
        ({"threshold": float("nan")}, "^--threshold: nan is not allowed"),
        ({"threshold": -0.5}, "^--threshold: -0.5 is not allowed"),
        ({"threshold": 1.5}, "^--threshold: 1.5 is not allowed; give a number from 0 to 1, or 2 for no early exit"),
        ({"threshold": 0.5, "macs_budget": 1e5}, "only one of them"),
    ]
    for given, words in options:
        with pytest.raises(InputError, match=words):
            evaluate(run, **given)
    save = run / "checkpoints" / "step-00000001"
    save.mkdir(parents=True)
    (save / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    with pytest.raises(InputError, match="it is the run of a single network"):
        evaluate(run)


def test_labels_are_read_as_ffcv_reads_them(small_data: Path, tmp_path: Path) -> None:
    from ffcv.reader import Reader

    import coe_dist.data.ffcv_binding  # noqa: F401  (undoes what importing FFCV does to torch)

    for split in SPLITS:
        beton = small_data / f"{split}.beton"
        labels = StoredImages(beton).labels_N
        np.testing.assert_array_equal(labels, Reader(str(beton)).metadata["f1"])
        assert len(labels) == IMAGES
        check_labels(beton, read_sidecar(beton), labels)
    other = tmp_path / "other.beton"
    content = bytearray((small_data / "test.beton").read_bytes())
    content[25:30] = b"photo"
    other.write_bytes(content)
    with pytest.raises(InputError, match="its fields are not image and label"):
        StoredImages(other)
