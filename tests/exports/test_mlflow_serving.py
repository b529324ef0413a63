"""`mlflow models serve` with an exported model, over HTTP: right answers, bad input refused with a reason, a load of 16
clients. The server runs where this package cannot be imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_environment import bare_environment
from exported_run import Tracked
from namespaces import in_private_network, python
from trained_run import images_of

from coe_dist.inference import CollaborationOfExperts

IMAGES_NCHW = images_of(120, seed=6)
REQUESTS = [IMAGES_NCHW[start : start + 1 + start % 5] for start in range(48)]  # of 1 to 5 images
JSON = "application/json"


def body(images: Any, key: str = "inputs") -> str:
    return json.dumps({key: images.tolist() if isinstance(images, torch.Tensor) else images})


def numbers(count: int, height: int = 28, width: int = 28) -> list[Any]:
    return [[[[0] * width] * height]] * count


FLAT = IMAGES_NCHW[:3].flatten(1).tolist()
GOOD = {
    "good": [body(IMAGES_NCHW), JSON],
    "instances": [body(IMAGES_NCHW[:3], "instances"), JSON],
    "table": [json.dumps({"dataframe_records": [{"image": row} for row in FLAT]}), JSON],
}
BAD: dict[str, tuple[str, str, str]] = {
    "no batch": (
        body(IMAGES_NCHW[0]),
        JSON,
        "Shape of input (1, 28, 28) does not match expected",
    ),
    "colours": (body(IMAGES_NCHW[:1].repeat(1, 3, 1, 1)), JSON, "Shape of input (1, 3, 28, 28) does not match"),
    "huge image": (body(numbers(1, 600, 600)), JSON, "Shape of input (1, 1, 600, 600) does not match"),
    "huge batch": (body(numbers(1025)), JSON, "images: 1025 in one call are not allowed; give at most 1024"),
    "ragged": (body([[[[0] * 28] * 27 + [[0] * 27]]]), JSON, "images: rows of different lengths are not allowed"),
    "fractions": (body(IMAGES_NCHW[:1] / 255), JSON, "images: fractions are not allowed; give whole numbers"),
    "fractions in a table": (
        json.dumps({"dataframe_records": [{"image": [0.5] * 784}]}),
        JSON,
        "images: fractions are not allowed; give whole numbers from 0 to 255",
    ),
    "too bright": (body([[[[256] * 28] * 28]]), JSON, "images: 256 is not allowed; give whole numbers from 0 to 255"),
    "negative": (body([[[[-1] * 28] * 28]]), JSON, "images: -1 is not allowed; give whole numbers from 0 to 255"),
    "too bright in a table": (
        json.dumps({"dataframe_records": [{"image": [300] * 784}]}),
        JSON,
        "images: 300 is not allowed",
    ),
    "digits as text": (body([[[["7"] * 28] * 28]]), JSON, "images: text is not allowed; give whole numbers"),
    "true": (body([[[[True] * 28] * 28]]), JSON, "images: true and false are not allowed"),
    "null": (body([[[[None] * 28] * 28]]), JSON, "images: other values are not allowed"),
    "not a number": ('{"inputs": [[[[NaN]]]]}', JSON, "images: fractions are not allowed"),
    "absurd number": (body([[[[10**30] * 28] * 28]]), JSON, "images: other values are not allowed"),
    "a word": (body("image"), JSON, "Failed to convert data `image` to type `Tensor"),
    "no image": (body([]), JSON, "Failed to enforce schema of data"),
    "empty": ("{}", JSON, "must be a JSON dictionary with exactly one of the input fields"),
    "nothing": ("", JSON, "valid JSON"),
    "text": ("hello", JSON, "valid JSON"),
    "a list": ("[1, 2]", JSON, "Received a list"),
    "csv": ("a,b\n1,2\n", "text/csv", "Failed to parse input as a Pandas DataFrame"),
    "a picture": ("GIF89a", "image/gif", "only supports the following content types"),
}


@pytest.fixture(scope="module")
def served(tracked: Tracked, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """[status, text] of every request."""
    folder = tmp_path_factory.mktemp("served")
    programs = bare_environment(folder / "env", (tracked.out / "requirements.txt").read_text().splitlines())
    cases = GOOD | {name: [text, kind] for name, (text, kind, _) in BAD.items()}
    (folder / "requests.json").write_text(json.dumps({"cases": cases, "load": [body(images) for images in REQUESTS]}))
    scenario = Path(__file__).with_name("scenario_serving.py")
    done = in_private_network(python(scenario, str(programs), str(tracked.out), str(folder)))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "answers.json").read_text())


def check(answer: list[Any], images_NCHW: torch.Tensor, model: CollaborationOfExperts) -> None:
    status, text = answer
    assert status == 200, text
    rows = json.loads(text)["predictions"]
    wanted = model(images_NCHW)
    probability_N, class_N = wanted.probabilities_NC.max(dim=1)
    assert [row["class"] for row in rows] == [model.classes[number] for number in class_N]
    assert [row["expert"] for row in rows] == wanted.expert_N.tolist()
    assert [row["macs"] for row in rows] == wanted.macs_N.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(probability_N.tolist(), abs=1e-6)


def test_answers_are_those_of_the_weights(served: dict[str, Any], model: CollaborationOfExperts) -> None:
    assert set(model(IMAGES_NCHW).expert_N.tolist()) == {-1, 0, 1, 2}
    check(served["cases"]["good"], IMAGES_NCHW, model)
    check(served["cases"]["instances"], IMAGES_NCHW[:3], model)
    check(served["cases"]["table"], IMAGES_NCHW[:3], model)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_reason(served: dict[str, Any], name: str) -> None:
    status, text = served["cases"][name]
    assert status == (415 if name == "a picture" else 400), text[:300]
    assert BAD[name][2] in text


def test_sixteen_clients_at_once_get_right_answers(served: dict[str, Any], model: CollaborationOfExperts) -> None:
    assert len(served["load"]) == len(REQUESTS)
    for answer, images_NCHW in zip(served["load"], REQUESTS, strict=True):
        check(answer, images_NCHW, model)
    check(served["cases"]["afterwards"], IMAGES_NCHW, model)
