"""Moving averages of the weights in a run's files: exports, scaled runs, inspection."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from namespaces import clean_environment, in_private_network
from safetensors.torch import load_file
from small_data import small_config
from trained_run import CLASSES, answers_of, images_of, job_of, run_on_two_ranks, small_run, write_loads

from coe_dist.config import parse_config
from coe_dist.errors import InputError
from coe_dist.inference import CollaborationOfExperts, read_config
from coe_dist.training.checkpoint import network_file
from coe_dist.training.chosen import Networks, Weights
from coe_dist.training.export import export_weights
from coe_dist.training.inspection import inspect_run, open_collaboration, show_inspection
from coe_dist.training.scaling import scale

TRAINING = {"epochs": 2, "global_batch": 32, "engine": "torch", "ema_decay": 0.3}
SAVE = Path("checkpoints") / "step-00000003"


def averaged_run(folder: Path, experts: int, **sections: Any) -> Path:
    run = small_run(folder, experts, training=TRAINING, **sections)
    write_loads(run, [1 / experts] * experts)
    return with_classes(run)


def with_classes(run: Path) -> Path:
    (run / "details-test.json").write_text(json.dumps({"classes": CLASSES}))
    return run


def same_weights(network: torch.nn.Module, file: Path) -> bool:
    weights = load_file(file)
    return all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_an_export_holds_the_averages_unless_raw_is_asked_for(tmp_path: Path, command: Callable[..., Any]) -> None:
    run = averaged_run(tmp_path, 3)
    write_loads(run, [0.2, 0.3, 0.5], threshold=0.25, calibrated_for=Networks(3, "ema"))
    export = ["export", "weights", run, "--out"]
    note = (
        "coe-dist: the early-exit threshold 0.25 was calibrated for the ema weights of step 3, "
        "not for the raw weights of step 3\n"
    )
    for name, options, kind, warning in (
        ("auto", [], "ema", ""),
        ("averages", ["--weights", "ema"], "ema", ""),
        ("last", ["--weights", "raw"], "raw", note),
    ):
        out, end = tmp_path / name, {"ema": "ema.safetensors", "raw": "safetensors"}[kind]
        assert command(*export, out, *options) == (0, f"{out}\n", warning)
        assert read_config(out).weights == kind
        assert json.loads((out / "config.json").read_text())["weights"] == kind
        model = CollaborationOfExperts.from_pretrained(out)
        assert same_weights(model.delegator, run / SAVE / f"delegator.{end}")
        for expert in range(3):
            assert same_weights(model.experts[expert], run / SAVE / f"expert-{expert:04d}.{end}")
    assert (tmp_path / "auto" / "config.json").read_bytes() == (tmp_path / "averages" / "config.json").read_bytes()
    assert not same_weights(model.delegator, run / SAVE / "delegator.ema.safetensors")


def test_a_run_without_averages(tmp_path: Path) -> None:
    run = with_classes(small_run(tmp_path, 3))
    with pytest.raises(InputError, match=r"--weights: ema is not allowed; .* holds no averages of its weights"):
        export_weights(run, tmp_path / "x", "ema")
    assert not (tmp_path / "x").exists()
    kinds: tuple[Weights | None, ...] = (None, "raw")
    for kind in kinds:
        out = tmp_path / f"out-{kind}"
        assert export_weights(run, out, kind) == []
        assert read_config(out).weights == "raw"
    assert inspect_run(run)["ema"] is None
    assert {network["average"] for network in inspect_run(run)["networks"]} == {None}


def test_inspection_verifies_the_averages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = averaged_run(tmp_path, 3)
    result = inspect_run(run)
    assert (result["valid"], result["warnings"], result["ema"]) == (True, [], {"decay": 0.3, "updates": 3})
    assert [network["average"] for network in result["networks"]] == ["ok"] * 4
    show_inspection(result)
    assert "averages of the weights: decay 0.3, 3 updates" in capsys.readouterr().out

    os.truncate(run / SAVE / "expert-0001.ema.safetensors", 100)
    (run / SAVE / "delegator.ema.safetensors").unlink()
    result = inspect_run(run)
    assert not result["valid"]
    assert [network["average"] for network in result["networks"]] == [
        "missing", "ok", "does not match its sha256", "ok"
    ]  # fmt: skip
    assert {network["weights"] for network in result["networks"]} == {"ok"}

    manifest = json.loads((run / SAVE / "manifest.json").read_text())
    for name in ("delegator", "expert-0001"):
        del manifest["files"][f"{name}.ema.safetensors"]
    (run / SAVE / "manifest.json").write_text(json.dumps(manifest))
    assert inspect_run(run)["networks"][2]["average"] == "not in the manifest"
    with pytest.raises(InputError, match=r"; delegator\.ema\.safetensors is missing"):
        open_collaboration(run)


@pytest.mark.parametrize(("after", "named"), [(6, []), (7, [2]), (3, [])])
def test_without_noise_the_averages_of_a_scaled_run_answer_alike(after: int, named: list[int], tmp_path: Path) -> None:
    run = averaged_run(tmp_path, 4)
    write_loads(run, [0.1, 0.2, 0.4, 0.3])
    scaled = scale(run, experts=after, out=tmp_path / "scaled", named=named, noise=0.0)
    assert inspect_run(scaled.run_dir)["ema"] == inspect_run(run)["ema"]
    stems = ["delegator", *(network_file(f"expert {expert}") for expert in range(after))]
    ends = ("safetensors", "optim.pt", "ema.safetensors")
    assert {path.name for path in scaled.save.iterdir()} == {
        "manifest.json", *(f"{stem}.{end}" for stem in stems for end in ends)
    }  # fmt: skip
    old, new = (load_file(save / "delegator.ema.safetensors") for save in (run / SAVE, scaled.save))
    for name, value in old.items():
        assert torch.equal(new[name], value[scaled.parents] if name.startswith("selection_head") else value)
    export_weights(run, tmp_path / "old")
    export_weights(with_classes(scaled.run_dir), tmp_path / "new")
    images = images_of(300, seed=9)
    before, now = (CollaborationOfExperts.from_pretrained(tmp_path / name)(images) for name in ("old", "new"))
    kept = torch.isin(before.expert_N, torch.tensor(scaled.parents))
    assert len(before.expert_N.unique()) == 4
    assert torch.equal(torch.tensor(scaled.parents)[now.expert_N][kept], before.expert_N[kept])
    torch.testing.assert_close(now.probabilities_NC[kept], before.probabilities_NC[kept], rtol=1e-5, atol=1e-6)
    assert bool(kept.all()) == (after > 4)


def test_noise_moves_the_average_by_the_same_step_as_the_weights(tmp_path: Path) -> None:
    run = averaged_run(tmp_path, 4)
    scaled = scale(run, experts=6, out=tmp_path / "grown", named=[1], noise=0.05)
    for child in ("0004", "0005"):
        raw, average, raw_parent, average_parent = (
            load_file(scaled.save / f"expert-{expert}.{end}")
            for expert in (child, "0001")
            for end in ("safetensors", "ema.safetensors")
        )
        moved = 0
        for name, parent in average_parent.items():
            step = raw[name].double() - raw_parent[name].double()
            torch.testing.assert_close(average[name].double() - parent.double(), step, rtol=1e-4, atol=1e-6)
            moved += bool(step.any())
            assert bool(step.any()) != ("running" in name or "tracked" in name or "normalise" in name)
        assert moved > 5


def test_a_real_run_is_evaluated_and_exported_by_its_averages(small_data: Path, tmp_path: Path) -> None:
    content = small_config(small_data, tmp_path, training=TRAINING | {"ema_decay": 0.8})
    config = parse_config(content)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    (stored,) = run_on_two_ranks(tmp_path, [job_of(config.run_dir, "train")])
    result = inspect_run(config.run_dir)
    assert (result["valid"], result["ema"]) == (True, {"decay": 0.8, "updates": 8})
    kinds: tuple[tuple[Weights, str], ...] = (("ema", "latest"), ("raw", "latest"), ("raw", "4"))
    answers = {}
    for kind, checkpoint in kinds:
        out = tmp_path / f"{kind}-{checkpoint}"
        export_weights(config.run_dir, out, kind, checkpoint)
        answers[kind, checkpoint] = answers_of(CollaborationOfExperts.from_pretrained(out), small_data)
    assert figures(stored) == answers["ema", "latest"]
    assert (stored["step"], stored["weights"], stored["stored"]) == (8, "ema", True)

    # questions about other networks, one by the command and Ray, one by the workers alone
    before = (config.run_dir / "evaluation-test.json").read_bytes()
    command = [sys.executable, "-c", "from coe_dist.cli import main; main()", "evaluate", str(config.run_dir)]
    done = in_private_network(
        [*command, "--weights", "raw", "--json"], env=clean_environment(XDG_STATE_HOME=str(tmp_path)), timeout=300
    )
    assert done.returncode == 0, done.stderr
    raw = json.loads(done.stdout)
    assert figures(raw) == answers["raw", "latest"] != answers["ema", "latest"]
    assert (raw["step"], raw["weights"], raw["stored"]) == (8, "raw", False)
    job = job_of(config.run_dir, "evaluate", "training.ema_decay=null")
    run_on_two_ranks(tmp_path, [job.model_copy(update={"save": "step-00000004", "stored": False})])
    older = json.loads((config.run_dir / "asked-test.json").read_text())
    assert figures(older) == answers["raw", "4"] != answers["raw", "latest"]
    assert (older["step"], older["weights"], older["stored"]) == (4, "raw", False)
    assert (config.run_dir / "evaluation-test.json").read_bytes() == before


def figures(evaluation: dict[str, Any]) -> tuple[int, float, Any]:
    """What answers_of gives."""
    return evaluation["images"], evaluation["top1"]["coe"], pytest.approx(evaluation["load"])
