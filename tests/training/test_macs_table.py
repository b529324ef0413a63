"""`coe-dist macs`: what a configuration costs, with and without its data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coe_dist.coe.macs import average_macs
from coe_dist.config import parse_config
from coe_dist.errors import InputError
from coe_dist.training.macs_table import macs_table, show_macs

IMAGENET = {
    "name": "macs",
    "data": {"source": "imagefolder", "folder": "no-such-folder", "resolution": 176},
    "delegator": {"network": "tinynet_e", "options": {"resolution": 106, "activation": "pwlu", "condconv": 4}},
    "experts": {
        "count": 16,
        "network": "ofa_mobilenetv3",
        "options": {"depth": 3, "expand": 3, "kernel": 3, "activation": "pwlu", "condconv": 4},
    },
    "early_exit": {"macs_budget": 1e8},
}


def changed(**sections: Any) -> dict[str, Any]:
    return {**IMAGENET, **sections}


def test_a_configuration_whose_data_do_not_exist() -> None:
    table = macs_table(parse_config(IMAGENET))
    assert (table["channels"], table["classes"], table["shape_from"]) == (3, 1000, "data.source imagefolder")
    assert table["delegator_macs"] == pytest.approx(24.4e6, rel=0.08)  # CondConv's mixing comes on top
    assert len(table["expert_macs"]) == 16
    assert table["expert_macs"][0] == pytest.approx(111e6, rel=0.08)
    spent = average_macs(table["delegator_macs"], table["expert_macs"][0], table["exit_rate_needed"])
    assert spent == pytest.approx(table["budget_macs"]) == table["average_macs"]
    parameters = table["parameters"]
    assert parameters["total"] == parameters["delegator"] + 16 * parameters["per_expert"]
    assert min(table["pwlu_macs"].values()) > 0
    smaller = macs_table(parse_config(IMAGENET), classes=10)
    assert table["expert_macs"][0] - smaller["expert_macs"][0] == 990 * 1280
    assert smaller["shape_from"] == "data.source imagefolder"


def test_without_a_budget_and_without_pwlu() -> None:
    table = macs_table(parse_config({"name": "m", "data": {"folder": "no-such-folder"}}))
    assert (table["channels"], table["classes"]) == (1, 10)
    assert table["budget_macs"] is table["exit_rate_needed"] is None
    assert table["average_macs"] == table["delegator_macs"] + table["expert_macs"][0]
    assert table["pwlu_macs"] == {"delegator": 0, "expert": 0}


def test_the_data_sets_own_shape_comes_first(small_data: Path) -> None:
    table = macs_table(parse_config({"name": "m", "data": {"source": "imagefolder", "folder": str(small_data)}}))
    assert (table["channels"], table["classes"], table["shape_from"]) == (1, 10, str(small_data / "train.beton"))
    assert macs_table(parse_config(changed(data={"folder": str(small_data)})), channels=3, classes=7)["classes"] == 7


def test_a_broken_side_car_is_no_reason_to_guess(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(InputError, match=r"train\.beton: no such file"):
        macs_table(parse_config(changed(data={"folder": str(tmp_path)})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(early_exit={"macs_budget": 1e6}), r"^early_exit\.macs_budget: 1000000\.0 MACs is not allowed"),
        (changed(experts={"network": "tinynet_z"}), r"^experts\.network: 'tinynet_z' is not allowed"),
        (
            changed(delegator={"network": "tinynet_e", "options": {"condconv": 1}}),
            r"^delegator\.options\.condconv: 1 is not allowed",
        ),
        (
            changed(experts={"network": "timm/vit_tiny_patch16_224"}),
            r"^data\.resolution: 176 is not allowed; experts\.network refuses it: ",
        ),
    ],
)
def test_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        macs_table(parse_config(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("shape", "message"), [({"channels": 2}, "--channels: 2"), ({"classes": 0}, "--classes: 0")])
def test_options_that_are_no_shape(shape: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        macs_table(parse_config(IMAGENET), **shape)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "imagenet.yaml"
    path.write_text(json.dumps(IMAGENET))
    command = [sys.executable, "-c", "from coe_dist.cli import main; main()", "macs", str(path), "experts.count=4"]
    answer = subprocess.run([*command, "--classes", "100", "--json"], capture_output=True, text=True, check=True)
    table = json.loads(answer.stdout)
    assert (len(table["expert_macs"]), table["classes"]) == (4, 100)
    show_macs(table)
    shown = capsys.readouterr().out
    assert "each of 4 experts" in shown
    assert "have to exit early" in shown
    assert "classes 100" in shown
