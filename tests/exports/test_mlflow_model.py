"""An exported MLflow model: what it holds, where it is recorded, and that it loads where this package is not."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bare_environment import bare_environment
from exported_run import Tracked
from trained_run import images_of

from coe_dist.inference import CollaborationOfExperts
from coe_dist.preparation import Preparation
from coe_dist.tracking.store import connect


@pytest.fixture(scope="module")
def images_NCHW() -> Any:
    return images_of(300, seed=4).numpy()


def test_the_folder_holds_no_pickle_and_says_what_it_takes(tracked: Tracked) -> None:
    paths = (path for path in tracked.out.rglob("*") if path.is_file())
    names = {path.name for path in paths if path.parent.name != "__pycache__"}  # what Python makes of code that was run
    assert {"MLmodel", "model.py", "requirements.txt", "config.json", "delegator.safetensors", "prepare.py"} <= names
    assert {Path(name).suffix for name in names} <= {"", ".py", ".txt", ".json", ".safetensors", ".yaml"}
    described = yaml.safe_load((tracked.out / "MLmodel").read_text())
    [spec] = json.loads(described["signature"]["inputs"])
    assert spec["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 1, 28, 28]}
    assert described["metadata"] == {"preparation": Preparation(1, 28).record()}
    columns = {column["name"]: column["type"] for column in json.loads(described["signature"]["outputs"])}
    assert columns == {"class": "string", "probability": "double", "expert": "long", "macs": "long"}
    required = (tracked.out / "requirements.txt").read_text()
    assert all(name in required for name in ("torch<", "timm<", "safetensors<", "mlflow<"))
    assert not any(name in required for name in ("coe", "ray", "deepspeed", "ffcv"))
    example = json.loads((tracked.out / "serving_input_example.json").read_text())
    assert np.array(example["inputs"]).shape == (1, 1, 28, 28)


def test_the_run_keeps_its_end_and_gets_the_model(tracked: Tracked) -> None:
    assert tracked.exported.warnings == []
    assert tracked.exported.places == ["models:/small/1", str(tracked.out)]
    client = connect(tracked.uri)
    record = client.get_run(tracked.run_id)
    assert record.info.status == "FAILED"
    [output] = record.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.name, str(logged.status), logged.source_run_id) == ("collaboration", "READY", tracked.run_id)
    version = client.get_model_version("small", "1")
    assert (version.source, version.run_id, version.status) == (logged.artifact_location, tracked.run_id, "READY")
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "small", "version": 1}]


LOADER = """
import importlib.util, json, sys
import numpy as np
assert [importlib.util.find_spec(name) for name in ("coe_dist", "ray", "deepspeed", "ffcv")] == [None] * 4
import mlflow
model = mlflow.pyfunc.load_model("models:/small/1")
images = np.load("images.npy")
tables = [model.predict(images[rows]) for rows in (slice(None), slice(0, 0), slice(5, 6), slice(299, None, -1))]
refused = {}
for name, bad in {
    "fractions": images / 255,
    "no channel": images[:, 0],
    "colours": images.repeat(3, axis=1),
    "other size": images[..., :20],
    "int64": images.astype(np.int64),
    "too many": images.repeat(4, axis=0),
    "list": images[:2].tolist(),
    "text": "image",
    "nothing": None,
}.items():
    try:
        refused[name] = repr(model.predict(bad))
    except mlflow.MlflowException as error:
        refused[name] = [error.error_code, error.get_http_status_code(), str(error)]
told = {"tables": [table.to_dict("list") for table in tables], "refused": refused}
json.dump(told | {"modules": sorted(sys.modules)}, open("told.json", "w"))
"""


@pytest.fixture(scope="module")
def told(tracked: Tracked, images_NCHW: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process says that has the model's requirements and MLflow's address, and nothing of ours."""
    folder = tmp_path_factory.mktemp("bare")
    programs = bare_environment(folder / "env", (tracked.out / "requirements.txt").read_text().splitlines())
    np.save(folder / "images.npy", images_NCHW)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    environment |= {"MLFLOW_TRACKING_URI": tracked.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [programs / "python", "-c", LOADER], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


def test_it_answers_where_this_package_is_not(
    told: dict[str, Any], images_NCHW: Any, model: CollaborationOfExperts
) -> None:
    import torch

    answer = model(torch.from_numpy(images_NCHW))
    assert set(answer.expert_N.tolist()) == {-1, 0, 1, 2}
    probability_N, class_N = answer.probabilities_NC.max(dim=1)
    whole, none, one, turned = told["tables"]
    assert whole["class"] == [model.classes[number] for number in class_N]
    assert whole["expert"] == answer.expert_N.tolist()
    assert whole["macs"] == answer.macs_N.tolist()
    assert whole["probability"] == pytest.approx(probability_N.tolist(), abs=1e-6)
    assert none == {"class": [], "probability": [], "expert": [], "macs": []}
    assert (one["class"], one["expert"]) == (whole["class"][5:6], whole["expert"][5:6])
    assert turned["probability"][::-1] == pytest.approx(whole["probability"], abs=1e-6)


def test_it_loads_its_own_code_alone(told: dict[str, Any]) -> None:
    ours = [name for name in told["modules"] if name.startswith("coe_dist")]
    assert ours
    assert all(name.startswith("coe_dist_") for name in ours)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fractions", "dtype of input float64 does not match expected dtype uint8"),
        ("no channel", "Shape of input (300, 28, 28) does not match expected shape (-1, 1, 28, 28)"),
        ("colours", "Shape of input (300, 3, 28, 28) does not match"),
        ("other size", "Shape of input (300, 1, 28, 20) does not match"),
        ("int64", "dtype of input int64 does not match"),
        ("too many", "images: 1200 in one call are not allowed; give at most 1024"),
        ("list", "suggests a numpy array"),
        ("text", "suggests a numpy array"),
        ("nothing", "suggests a numpy array"),
    ],
)
def test_what_it_cannot_answer_is_refused(told: dict[str, Any], kind: str, words: str) -> None:
    code, status, message = told["refused"][kind]
    assert (code, status) == ("INVALID_PARAMETER_VALUE", 400)
    assert words in message


def test_the_command(run: Path, tracked: Tracked, tmp_path: Path, command: Callable[..., Any]) -> None:
    tell = functools.partial(command, "export", "mlflow")
    assert tell(run, "--out", tmp_path / "model") == (0, f"{tmp_path / 'model'}\n", "")
    assert (tmp_path / "model" / "MLmodel").is_file()
    code, out, _ = tell(tracked.run)
    assert (code, out.startswith("models:/m-")) == (0, True)
    assert tell(tracked.run, "--register", "it's") == (0, "models:/it's/1\n", "")
    assert tell(tracked.run, "--register", "it's") == (0, "models:/it's/2\n", "")
    refusals = {
        (run,): "--out: missing; the run has tracking.enabled: false, so give the folder to save the model in",
        (run, "--out", tmp_path / "model"): f"--out: {tmp_path / 'model'} is not allowed; it exists already",
        (run, "--register", "x", "--out", tmp_path / "y"): "--register: x is not allowed; the run has tracking.enabled",
        (tracked.run, "--register", "a/b"): "--register: 'a/b' is not allowed; give a name without '/' and ':'",
        (tmp_path,): f"{tmp_path}: it is not a run folder (no config.yaml)",
    }
    for arguments, words in refusals.items():
        code, out, error = tell(*arguments)
        assert (code, out) == (2, "")
        assert error.startswith(f"coe-dist: {words}")
    assert not (tmp_path / "y").exists()


def test_a_server_that_is_gone_costs_a_warning_where_a_folder_is_given(
    tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    code, out, error = command("export", "mlflow", tracked.run, "--out", tmp_path / "model")
    assert (code, out) == (0, f"{tmp_path / 'model'}\n")
    assert "tracking.uri: http://***@127.0.0.1:9 did not take the model" in error
    code, out, error = command("export", "mlflow", tracked.run, "--out", tmp_path / "other", "--register", "x")
    assert (code, out) == (2, "")
    assert "did not take the model" in error
    assert "secret" not in error
    assert not (tmp_path / "other").exists()
