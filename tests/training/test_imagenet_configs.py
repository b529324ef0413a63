"""The ImageNet configurations: what they cost, how they differ, and that they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.noise_images import save_noise
from training.test_training_job import lines_of, torchrun

from coe_dist.config import RunConfig, load_config
from coe_dist.data.beton import write_dataset
from coe_dist.training.macs_table import macs_table

CONFIGS = Path(__file__).parents[2] / "configs"
# a variant may differ in these alone, and in its name
FEWER = {"experts.count", "experts.per_sample", "training.optimizer.expert_learning_rate", "workers.count"}
SMALLER = FEWER | {
    *("data.folder", "data.limit", "data.resolution", "data.progressive", "data.loader_threads", "delegator.options"),
    *("training.epochs", "training.global_batch", "training.precision", "training.pwlu_statistics_epochs"),
    *("training.optimizer.warmup_epochs", "early_exit.macs_budget", "workers.device"),
}


def config_of(name: str) -> RunConfig:
    return load_config(CONFIGS / f"imagenet_coe_{name}.yaml")


@pytest.mark.parametrize(
    ("name", "budget", "delegator", "expert", "exit_rate"),
    [("small", 100e6, 24.4e6, 110e6, 0.31), ("large", 194e6, 56.5e6, 230e6, 0.40)],
)
def test_budgets_networks_and_exit_rates(
    name: str, budget: float, delegator: float, expert: float, exit_rate: float
) -> None:
    for variant, count in ((name, 16), (f"{name}_4", 4)):
        table = macs_table(config_of(variant))
        assert (table["budget_macs"], table["channels"], table["classes"]) == (budget, 3, 1000)
        assert table["delegator_macs"] == pytest.approx(delegator, rel=0.01)
        assert table["expert_macs"] == [pytest.approx(expert, rel=0.01)] * count
        assert table["exit_rate_needed"] == pytest.approx(exit_rate, abs=0.01)
        assert (table["pwlu_macs"]["expert"] > 0) == (name == "small")
    assert config_of("small").experts.options["condconv"] == 4


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in content.items():
        nested = isinstance(value, dict) and key not in ("options", "progressive")
        result |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result


@pytest.mark.parametrize("size", ["small", "large"])
def test_variants_keep_to_the_recipe(size: str) -> None:
    whole = flat(config_of(size).model_dump())
    for variant, allowed in ((f"{size}_4", FEWER), (f"{size}_debug", SMALLER)):
        other = flat(config_of(variant).model_dump())
        assert {key for key in whole if whole[key] != other[key]} - allowed == {"name"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of twelve images for training, some of which become validation, and of four for the test."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 4)):
        for label in range(3):
            for i in range(count):
                save_noise(
                    root / "tree" / split / f"class {label}" / f"{i}.png", 60 + 2 * i, 90 - 3 * i, 50 * label + i
                )
    write_dataset("imagefolder", root / "data", root=root / "tree")
    return root / "data"


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_debug_variants_train_two_steps(size: str, images: Path, tmp_path: Path) -> None:
    path = CONFIGS / f"imagenet_coe_{size}_debug.yaml"
    done = torchrun(2, str(path), f"data.folder={images}", f"runs_dir={tmp_path}", "tracking.every_steps=1")
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / f"imagenet-coe-{size}-debug"
    assert [(line["step"], line["metrics"]["train/resolution"]) for line in lines_of(run, "train")] == [
        (1, 48),
        (2, 64),
    ]
    assert len(lines_of(run, "pwlu")) == (size == "small")
    assert json.loads((run / "evaluation-test.json").read_text())["images"] == 12
