"""Exported weights answer as the run does, in a plain Python process; folders that do not fit are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_run import CLASSES, answers_of, early_exiting_run, images_of, real_run, small_run, write_loads

from coe_dist.coe.macs import count_macs
from coe_dist.data.sidecar import read_sidecar
from coe_dist.errors import InputError
from coe_dist.inference import CollaborationOfExperts
from coe_dist.training.export import export_weights

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of three experts and its exported folder; class names from the run's own evaluation."""
    folder = tmp_path_factory.mktemp("export")
    run = early_exiting_run(folder)
    assert export_weights(run, folder / "weights") == []
    return run, folder / "weights"


@pytest.fixture
def folder(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(exported[1], tmp_path / "weights")
    return tmp_path / "weights"


def test_a_real_run_answers_as_its_evaluation_says(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    run = real_run(tmp_path_factory.getbasetemp())
    data = run.parent / "data"
    export_weights(run, tmp_path / "weights")
    model = CollaborationOfExperts.from_pretrained(tmp_path / "weights")
    stored = json.loads((run / "evaluation-test.json").read_text())
    images, top1, load = answers_of(model, data)
    assert (images, top1) == (stored["images"], stored["top1"]["coe"])
    assert load == pytest.approx(stored["load"])
    assert model.delegator_macs == stored["macs"]["delegator"]
    assert list(model.expert_macs) == stored["macs"]["experts"]
    assert model.classes == read_sidecar(data / "train.beton").classes
    assert not model.training


def test_a_plain_process_gives_the_same_predictions(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, weights = exported
    images = images_of(300, seed=4)
    model = CollaborationOfExperts.from_pretrained(weights)
    answer = model(images)
    assert set(answer.expert_N.tolist()) == {-1, 0, 1, 2}
    threshold = json.loads((run / "evaluation-validation.json").read_text())["threshold"]
    assert (model.threshold, model.classes, model.channels, model.resolution) == (threshold, CLASSES, 1, 28)
    assert count_macs(model.experts[0], channels=1, resolution=28) == model.expert_macs[0]
    save = run / "checkpoints" / "step-00000003"
    for name, network in [("delegator", model.delegator)] + [(f"expert-{e:04d}", model.experts[e]) for e in range(3)]:
        for key, value in load_file(save / f"{name}.safetensors").items():
            assert torch.equal(network.state_dict()[key], value)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "from coe_dist.inference import CollaborationOfExperts\n"
        "torch.set_num_threads(1)\n"
        f"model = CollaborationOfExperts.from_pretrained({str(weights)!r})\n"
        f"answer = model(torch.load({str(tmp_path / 'images.pt')!r}))\n"
        f"torch.save(list(answer), {str(tmp_path / 'answer.pt')!r})\n"
        "unwanted = ('ray', 'deepspeed', 'ffcv', 'mlflow', 'timm', 'coe_dist.training', 'coe_dist.parallel')\n"
        "assert not [name for name in unwanted if name in sys.modules], sys.modules\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    shutil.move(run, run.with_name("moved"))  # the folder must not need the run
    try:
        subprocess.run(
            [sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    finally:
        shutil.move(run.with_name("moved"), run)
    for mine, theirs in zip(answer, torch.load(tmp_path / "answer.pt"), strict=True):
        assert torch.equal(mine, theirs)


def test_faster_forms_of_a_loaded_model_know_their_classes(exported: tuple[Path, Path]) -> None:
    model = CollaborationOfExperts.from_pretrained(exported[1])
    fused = model.fused()
    assert (fused.classes, fused.channels, fused.resolution) == (model.classes, model.channels, model.resolution)
    images = images_of(100)
    torch.testing.assert_close(fused(images).probabilities_NC, model(images).probabilities_NC, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="images: float32"):
        fused(images.float())
    coarse = CollaborationOfExperts.from_pretrained(exported[1], precision="bf16")(images)
    assert coarse.probabilities_NC.dtype == torch.float32
    assert (coarse.probabilities_NC.argmax(1) == model(images).probabilities_NC.argmax(1)).double().mean() > 0.9


def test_float64_and_average_survive(tmp_path: Path) -> None:
    training = {"epochs": 2, "global_batch": 32, "engine": "torch", "precision": "fp64"}
    run = small_run(tmp_path, 4, training=training, early_exit={"final": "average", "threshold": 0.5})
    (run / "details-validation.json").write_text(json.dumps({"classes": CLASSES}))
    export_weights(run, tmp_path / "weights")
    model = CollaborationOfExperts.from_pretrained(tmp_path / "weights")
    assert (model.final, model.threshold) == ("average", 0.5)
    assert model(images_of(3)).probabilities_NC.dtype == torch.float64


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object] | bytes) -> None:
    """Other tensors (or bytes) in a file, with a config.json that fits them."""
    path = folder / name
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        weights = load_file(path)
        change(weights)
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    content = path.read_bytes()
    fits = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit(folder, lambda config: config["files"].__setitem__(name, fits))


EXPERT = "expert-0001.safetensors"
HEAD = "class_head.weight"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: content: Invalid JSON"),
    "huge config": (lambda f: (f / "config.json").write_bytes(b" " * (2**24 + 1)), "16777217 bytes are not allowed"),
    "unknown key": (lambda f: edit(f, lambda c: c.update(code="x")), "config.json: code: Extra inputs"),
    "earlier format": (
        lambda f: edit(f, lambda c: (c.update(format=1), c.pop("preparation"))),
        "config.json: format: 1 is not allowed; this version reads format 2, which says how images are prepared",
    ),
    "other format": (lambda f: edit(f, lambda c: c.update(format="x")), "config.json: format: 'x' is not allowed; "),
    "other preparation": (
        lambda f: edit(f, lambda c: c["preparation"].update(rule="squeeze")),
        "config.json: preparation.rule: Input should be 'centre 224/256, antialiased bilinear'",
    ),
    "lost file": (lambda f: (f / EXPERT).unlink(), f"weights: {EXPERT} is missing; 3 experts are expected"),
    "more files": (
        lambda f: shutil.copy(f / EXPERT, f / "expert-0003.safetensors"),
        "'expert-0003.safetensors' is not",
    ),
    "fewer entries": (lambda f: edit(f, lambda c: c["files"].pop(EXPERT)), f"config.json: {EXPERT} is missing"),
    "more experts": (lambda f: edit(f, lambda c: c.update(count=4, expert_macs=[1] * 4)), "expert-0003.safetensors is"),
    "fewer experts": (
        lambda f: edit(f, lambda c: c.update(count=2, expert_macs=[1] * 2)),
        "'expert-0002.safetensors' is",
    ),
    "absurd count": (lambda f: edit(f, lambda c: c.update(count=10**12)), "count: Input should be less than or equal"),
    "MACs": (lambda f: edit(f, lambda c: c.update(expert_macs=[1])), "expert_macs must have 3 values"),
    "path traversal": (
        lambda f: edit(f, lambda c: c["files"].update({"../../x.safetensors": c["files"].pop(EXPERT)})),
        f"config.json: {EXPERT} is missing",
    ),
    "path traversal beside": (
        lambda f: edit(f, lambda c: c["files"].update({"../x.safetensors": c["files"][EXPERT]})),
        "config.json: '../x.safetensors' is not expected",
    ),
    "absurd size": (
        lambda f: edit(f, lambda c: c["files"][EXPERT].update(bytes=10**18)),
        f"{EXPERT}: ",
    ),
    "damaged": (lambda f: os.truncate(f / EXPERT, 99), f"{EXPERT}: 99 bytes are not allowed"),
    "flipped": (
        lambda f: (f / EXPERT).write_bytes((f / EXPERT).read_bytes()[:-1] + b"\x55"),
        f"{EXPERT}: its content does not match its sha256",
    ),
    "no file": (lambda f: ((f / EXPERT).unlink(), (f / EXPERT).mkdir()), f"{EXPERT}: not a file"),
    "no tensors": (lambda f: rewrite(f, EXPERT, b"\xff" * 64), f"{EXPERT}: not a safetensors file"),
    "lost tensor": (lambda f: rewrite(f, EXPERT, lambda w: w.pop(HEAD)), f"{EXPERT}: the tensor {HEAD} is missing"),
    "one tensor more": (
        lambda f: rewrite(f, EXPERT, lambda w: w.update(more=torch.zeros(1))),
        f"{EXPERT}: the tensor more is not expected",
    ),
    "other shape": (
        lambda f: rewrite(f, EXPERT, lambda w: w.update({HEAD: w[HEAD][:3]})),
        f"{EXPERT}: {HEAD}: [3, 32] torch.float32 is not allowed; the network has [10, 32] torch.float32",
    ),
    "other dtype": (lambda f: rewrite(f, EXPERT, lambda w: w.update({HEAD: w[HEAD].half()})), "torch.float16 is not"),
    "fewer rows": (
        lambda f: rewrite(f, "delegator.safetensors", lambda w: w.update({"selection_head.bias": torch.zeros(2)})),
        "delegator.safetensors: selection_head.bias: [2] torch.float32 is not allowed; the network has [3]",
    ),
    "unknown network": (
        lambda f: edit(f, lambda c: c["experts"].update(network="small_cn")),
        "config.json: experts.network: 'small_cn' is not allowed",
    ),
    "pretrained": (
        lambda f: edit(f, lambda c: c["experts"].update(network="resnet18", options={"checkpoint_path": "x"})),
        "config.json: experts.options.checkpoint_path: not allowed",
    ),
    # 20 GB of weights, were it built
    "absurd network": (
        lambda f: edit(f, lambda c: c["experts"].update(options={"width": 64.0, "depth": 64})),
        "expert-0000.safetensors: the tensor trunk.stages.0.1.conv.weight is missing",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_folder_that_does_not_fit_is_refused(kind: str, folder: Path) -> None:
    damage, words = HOSTILE[kind]
    damage(folder)
    with pytest.raises(InputError) as caught:
        CollaborationOfExperts.from_pretrained(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_exported(exported: tuple[Path, Path], tmp_path: Path, command: Callable[..., Any]) -> None:
    def export(run: Path, out: Path) -> tuple[object, str]:
        code, *told = command("export", "weights", run, "--out", out)
        return code, "".join(told)

    run, weights = exported
    assert export(run, tmp_path / "again") == (0, f"{tmp_path / 'again'}\n")
    assert (tmp_path / "again" / "config.json").read_bytes() == (weights / "config.json").read_bytes()
    assert export(run, weights) == (
        2,
        f"coe-dist: --out: {weights} is not allowed; it exists already, give a new folder\n",
    )
    assert export(tmp_path, tmp_path / "x") == (2, f"coe-dist: {tmp_path}: it holds no valid checkpoint\n")
    other = small_run(tmp_path, 3, early_exit={"macs_budget": 9e9})
    code, text = export(other, tmp_path / "x")
    assert code == 2
    assert "no threshold is calibrated yet for early_exit.macs_budget = 9e+09; run `coe-dist calibrate" in text
    write_loads(other, [1, 0, 0], threshold=0.5)
    code, text = export(other, tmp_path / "x")
    assert code == 2
    assert "train.beton: no such file" in text
    (other / "details-test.json").write_text('{"classes": ["a", "b"]}')
    code, text = export(other, tmp_path / "x")
    assert code == 2
    assert "2 classes are not allowed; the networks answer with 10" in text
    assert not (tmp_path / "x").exists()


def test_images_that_would_be_answered_wrongly_are_refused(folder: Path) -> None:
    model = CollaborationOfExperts.from_pretrained(folder)
    good = images_of(2)
    model(good)
    for images in (good.float() / 255, good[0], good.repeat(1, 3, 1, 1)):
        with pytest.raises(InputError, match=r"images: .* is not allowed; give uint8 \[N, 1, "):
            model(images)
