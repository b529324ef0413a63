"""ONNX graphs answer as the weights do, in a process with numpy and onnxruntime alone; folders that do not fit are
refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from bare_environment import bare_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from trained_run import CLASSES, images_of, small_run

from coe_dist.coe.early_exit import probabilities
from coe_dist.coe.pwlu import realign, units
from coe_dist.errors import InputError
from coe_dist.exports import onnx_runner
from coe_dist.exports.onnx_graphs import convert, export_onnx
from coe_dist.exports.onnx_runner import OnnxCollaboration
from coe_dist.inference import CollaborationOfExperts, PretrainedConfig, read_config
from coe_dist.preparation import Preparation
from coe_dist.training.export import export_weights

MARGIN = 1e-4  # answers may differ where selection, or confidence and threshold, are nearer than this
IMAGES = images_of(300, seed=4)


@pytest.fixture(scope="module")
def graphs(run: Path) -> Path:
    out = run.parent / "graphs"
    assert export_onnx(run, out) == []
    return out


@pytest.fixture
def folder(graphs: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(graphs, tmp_path / "graphs")
    return tmp_path / "graphs"


def clear_rows(model: CollaborationOfExperts, images_NCHW: torch.Tensor) -> Any:
    """bool [N]: the rows whose path through the collaboration rounding cannot change."""
    with torch.no_grad():
        class_logits_NC, selection_NE = model.delegator(images_NCHW)
    best_N2 = selection_NE.topk(2, dim=1).values
    confidence_N = probabilities(class_logits_NC).amax(dim=1).double()
    threshold = np.inf if model.threshold is None else model.threshold
    return ((best_N2[:, 0] - best_N2[:, 1] > MARGIN) & ((confidence_N - threshold).abs() > MARGIN)).numpy()


def check(answer: Sequence[Any], model: CollaborationOfExperts, images_NCHW: torch.Tensor) -> Any:
    """Compares with the model's answer where that is clear; returns those rows."""
    wanted, clear_N = model(images_NCHW), clear_rows(model, images_NCHW)
    found_NC, expert_N, macs_N = answer
    np.testing.assert_allclose(found_NC[clear_N], wanted.probabilities_NC.numpy()[clear_N], atol=1e-4)
    assert (expert_N[clear_N] == wanted.expert_N.numpy()[clear_N]).all()
    assert (macs_N[clear_N] == wanted.macs_N.numpy()[clear_N]).all()
    return clear_N


def test_graphs_answer_as_the_weights_do(graphs: Path, model: CollaborationOfExperts) -> None:
    answer = OnnxCollaboration(graphs, threads=1)(IMAGES.numpy())
    clear_N = check(answer, model, IMAGES)
    assert clear_N.mean() > 0.9
    assert set(answer.expert_N[clear_N].tolist()) == {-1, 0, 1, 2}
    assert (answer.probabilities_NC.dtype, answer.expert_N.dtype, answer.macs_N.dtype) == (
        np.float32,
        np.int64,
        np.int64,
    )


def test_any_batch_in_any_order_gets_the_same_answers(graphs: Path, model: CollaborationOfExperts) -> None:
    runner = OnnxCollaboration(graphs, threads=1)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, len(IMAGES) - 1), max_size=40))
    def any_batch(rows: list[int]) -> None:
        images_NCHW = IMAGES[torch.tensor(rows, dtype=torch.int64)]
        check(runner(images_NCHW.numpy()), model, images_NCHW)

    any_batch()


def test_average_of_float64_networks(tmp_path: Path) -> None:
    """No threshold; the graphs are float32 all the same."""
    training = {"epochs": 2, "global_batch": 32, "engine": "torch", "precision": "fp64"}
    run = small_run(tmp_path, 3, training=training, early_exit={"final": "average"})
    (run / "details-test.json").write_text(json.dumps({"classes": CLASSES}))
    export_weights(run, tmp_path / "weights")
    convert(tmp_path / "weights", tmp_path / "graphs")
    model = CollaborationOfExperts.from_pretrained(tmp_path / "weights")
    assert (model.threshold, model.final) == (None, "average")
    answer = OnnxCollaboration(tmp_path / "graphs", threads=1)(IMAGES.numpy())
    assert check(answer, model, IMAGES).mean() > 0.9
    assert set(answer.expert_N.tolist()) == {0, 1, 2}


def colour_weights(
    folder: Path, delegator: str, experts: str, options: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
) -> Path:
    """Networks with random weights, two experts, 3x48x48; the options are those of the delegator and of the experts."""
    content: dict[str, Any] = {
        "delegator": {"network": delegator, "options": options[0]},
        "experts": {"network": experts, "options": options[1]},
        "count": 2,
        "channels": 3,
        "classes": list(CLASSES),
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "resolution": 48,
        "preparation": Preparation(3, 48).record(),
        "threshold": None,
        "final": "expert",
        "delegator_macs": 1,
        "expert_macs": [2, 3],
        "files": {},
        "run": "run",
        "step": 1,
        "epoch": 1,
    }
    built = PretrainedConfig(**content)
    folder.mkdir()
    for seed, (name, kind) in enumerate(
        [("delegator", "delegator"), ("expert-0000", "expert"), ("expert-0001", "expert")]
    ):
        network = built.build(kind)
        realign(network)
        generator = torch.Generator().manual_seed(seed)
        for weight in network.parameters():
            scale = 0.1 * weight.std(correction=0).data if weight.numel() > 1 else 0.1
            weight.data += scale * torch.randn(weight.shape, generator=generator)
        path = folder / f"{name}.safetensors"
        save_file(network.state_dict(), path)
        file = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        content["files"][path.name] = file
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("delegator", "experts"),
    [
        ("timm/test_efficientnet", "torchvision/shufflenet_v2_x0_5"),
        pytest.param("torchvision/mobilenet_v3_small", "timm/test_convnext", marks=pytest.mark.full),
    ],
)
def test_networks_of_the_libraries(delegator: str, experts: str, tmp_path: Path) -> None:
    """In colour; the experts share one trace and keep their own weights."""
    check_conversion(colour_weights(tmp_path / "weights", delegator, experts), tmp_path)


def test_learned_activations_and_sizes_of_their_own(tmp_path: Path) -> None:
    """Piecewise linear units in their second phase, by channel and by layer; each network resizes the images inside."""
    options = (
        {"width": 0.2, "activation": "pwlu", "pwlu_mode": "layer", "resolution": 20},
        {"width": 0.2, "activation": "pwlu", "resolution": 32},
    )
    weights = colour_weights(tmp_path / "weights", "small_cnn", "small_cnn", options)
    model = CollaborationOfExperts.from_pretrained(weights)
    for network in (model.delegator, *model.experts):
        assert {unit.learned for unit in units(network)} == {True}
    check_conversion(weights, tmp_path)


def check_conversion(weights: Path, tmp_path: Path) -> None:
    convert(weights, tmp_path / "graphs")
    model = CollaborationOfExperts.from_pretrained(weights)
    images_NCHW = torch.randint(0, 256, (9, 3, 48, 48), dtype=torch.uint8)
    check(OnnxCollaboration(tmp_path / "graphs", threads=1)(images_NCHW.numpy()), model, images_NCHW)
    for number, expert in enumerate(model.experts):
        with torch.no_grad():
            wanted_NC = expert(images_NCHW).numpy()
        session = onnxruntime.InferenceSession(tmp_path / "graphs" / f"expert-{number:04d}.onnx")
        [found_NC] = session.run(None, {"images": images_NCHW.numpy()})
        np.testing.assert_allclose(found_NC, wanted_NC, atol=1e-4)


def test_a_network_that_onnx_cannot_express_is_named(tmp_path: Path) -> None:
    """CondConv makes groups of as many kernels as there are images; ONNX fixes the number of groups."""
    options = ({"width": 0.2}, {"width": 0.2, "condconv": 2})
    weights = colour_weights(tmp_path / "weights", "small_cnn", "small_cnn", options)
    with pytest.raises(InputError) as caught:
        convert(weights, tmp_path / "graphs")
    named = "experts.network: 'small_cnn' with {'width': 0.2, 'condconv': 2} cannot be exported to ONNX ("
    assert str(caught.value).startswith(named)
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_the_manifest_says_what_must_be_known(run: Path, graphs: Path, model: CollaborationOfExperts) -> None:
    manifest = json.loads((graphs / "manifest.json").read_text())
    config = read_config(run.parent / "weights")
    assert (manifest["classes"], manifest["resolution"], manifest["channels"]) == (list(CLASSES), 28, 1)
    assert (manifest["threshold"], manifest["final"]) == (model.threshold, "expert")
    assert (manifest["mean"], manifest["std"]) == (config.mean, config.std)
    assert manifest["delegator"]["macs"] == model.delegator_macs
    assert [entry["macs"] for entry in manifest["experts"]] == list(model.expert_macs)
    assert manifest["preparation"] == Preparation(1, 28).record()
    names = {"manifest.json", "prepare.py", "delegator.onnx", *(f"expert-{number:04d}.onnx" for number in range(3))}
    assert {path.name for path in graphs.iterdir()} == names
    hashes = {entry["sha256"] for entry in manifest["experts"]}
    assert len(hashes) == 3  # experts have their own weights
    for path in graphs.glob("*.onnx"):
        assert b"/coe_dist/" not in path.read_bytes()  # no stack traces with somebody's folders


def test_the_runner_needs_numpy_and_onnxruntime_alone(
    graphs: Path, model: CollaborationOfExperts, tmp_path: Path
) -> None:
    programs = bare_environment(tmp_path / "env", ["numpy", "onnxruntime"])
    shutil.copy(onnx_runner.__file__, tmp_path / "runner.py")
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    program = (
        "import numpy, sys\n"
        "from runner import OnnxCollaboration\n"
        f"answer = OnnxCollaboration({str(graphs)!r}, threads=1)(numpy.load('images.npy'))\n"
        "numpy.savez('answer.npz', *answer)\n"
        "assert not {'torch', 'onnx', 'coe_dist'} & set(sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([programs / "python", "-c", program], check=True, cwd=tmp_path, env=environment, timeout=60)
    found = np.load(tmp_path / "answer.npz")
    assert check([found[name] for name in ("arr_0", "arr_1", "arr_2")], model, IMAGES).mean() > 0.9


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: not a manifest of"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: not a manifest of"),
    "other format": (lambda f: edit(f, lambda c: c.update(format=2)), "format 2 is not known"),
    "no threshold": (lambda f: edit(f, lambda c: c.pop("threshold")), "not a manifest of"),
    "lost file": (lambda f: (f / "expert-0001.onnx").unlink(), "expert-0001.onnx: no such file"),
    "damaged": (lambda f: os.truncate(f / "expert-0001.onnx", 99), "expert-0001.onnx: its content does not match"),
    "elsewhere": (
        lambda f: edit(f, lambda c: c["experts"][0].update(file="../expert-0000.onnx")),
        "file '../expert-0000.onnx' is not allowed; give a name inside the folder",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_folder_that_does_not_fit_is_refused(kind: str, folder: Path) -> None:
    damage, words = HOSTILE[kind]
    damage(folder)
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words are compared below
        OnnxCollaboration(folder)
    assert words in str(caught.value)


def test_images_that_would_be_answered_wrongly_are_refused(graphs: Path) -> None:
    runner, good = OnnxCollaboration(graphs, threads=1), IMAGES[:2].numpy()
    for images in (good / np.float32(255), good[0], good.repeat(3, axis=1), good[..., :20]):
        with pytest.raises(ValueError, match=r"images: .* is not allowed; give uint8 \[N, 1, 28, 28\]"):
            runner(images)


def test_what_cannot_be_exported(
    run: Path, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    def export(*arguments: object) -> tuple[object, str]:
        code, *told = command("export", "onnx", *arguments)
        return code, "".join(told)

    assert export(run, "--out", tmp_path / "graphs") == (0, f"{tmp_path / 'graphs'}\n")
    code, text = export(run, "--out", graphs)
    assert (code, text) == (2, f"coe-dist: --out: {graphs} is not allowed; it exists already, give a new folder\n")
    assert export(tmp_path, "--out", tmp_path / "x") == (2, f"coe-dist: {tmp_path}: it holds no valid checkpoint\n")
    assert export(run, "--out", tmp_path / "x", "--weights", "ema")[0] == 2

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
    )
    code, text = export(run, "--out", tmp_path / "x")
    assert code == 2
    assert (
        text
        == "coe-dist: export onnx needs the package onnxscript; run: pip install -e '.[onnx]' in the project's folder\n"
    )
    assert not (tmp_path / "x").exists()


def test_a_network_that_answers_otherwise_in_onnxruntime_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coe_dist.exports.onnx_graphs.TOLERANCE", -1.0)  # nothing is equal enough
    with pytest.raises(InputError, match=r"delegator\.onnx: onnxruntime answers otherwise than the network"):
        export_onnx(run, tmp_path / "graphs")
    assert list(tmp_path.iterdir()) == []
