"""Piecewise linear units in training: tracked, then learned, the same on all replicas and after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from safetensors.torch import load_file
from small_data import small_config, write_config
from torch import nn
from trained_run import answers_of
from training import pwlu_cases
from training.pwlu_cases import LEARNED, NETWORKS, OPTIMIZERS, TRACKED, batch_of, network_of
from training.test_training_job import lines_of

from coe_dist.coe.pwlu import units
from coe_dist.config import parse_config
from coe_dist.errors import InputError
from coe_dist.inference import CollaborationOfExperts
from coe_dist.parallel.batchnorm import split_batchnorm
from coe_dist.parallel.groups import Group
from coe_dist.training.export import export_weights
from coe_dist.training.inspection import inspect_run, show_inspection

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pwlu")
    run_ranks(2, "training.pwlu_cases:run", folder)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(2)]


CASES = list(pwlu_cases.cases())


@pytest.mark.parametrize("case", CASES)
def test_replicas_are_equal_after_the_switch_and_at_the_end(case: str, two_ranks: list[dict[str, Any]]) -> None:
    one, other = (result[case] for result in two_ranks)
    for moment in ("switched", "end"):
        assert set(one[moment]["hashes"]) == set(NETWORKS)
        for network, hashes in one[moment]["hashes"].items():
            theirs = other[moment]["hashes"][network]
            assert len([name for name in hashes if name.endswith("values")]) >= 4
            # between two averages, local BatchNorm's statistics are each rank's own
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            own = {name for name in hashes if "norm." in name and name.endswith(statistics)}
            own = own if case.endswith("local") else set()
            assert {name: hashes[name] for name in hashes if name not in own} == {
                name: theirs[name] for name in theirs if name not in own
            }
    assert len(one["averages"]) == 8
    assert all(one["averages"])


@pytest.mark.parametrize("case", CASES)
def test_learning_goes_on_from_the_new_values(case: str, two_ranks: list[dict[str, Any]]) -> None:
    """Under ZeRO a step from old copies would undo the switch; AdamW with an old count would make steps of 3 times the
    learning rate at once."""
    result = two_ranks[0][case]
    kind = case.split()[1]
    rate = OPTIMIZERS[kind].learning_rate
    assert result["moved"] > 0
    if kind == "adamw":
        assert result["moved"] <= rate * 1.001
        for counts in result["steps"].values():
            of_units = {name for name in counts if "activation" in name}
            assert {counts[name] for name in of_units} == {LEARNED}
            assert {counts[name] for name in set(counts) - of_units} == {TRACKED + LEARNED}
            assert len(of_units) == 20
    for network in NETWORKS:
        before, after = (result[moment]["weights"][network] for moment in ("switched", "end"))
        for name in before:
            assert bool(torch.isfinite(after[name]).all())
            if name.endswith((".left", ".right", ".values")):  # not all slopes: hardly a value lies outside
                assert not torch.equal(before[name], after[name]), f"{name} rests"


def reference(name: str) -> tuple[Weights, Weights]:
    """The network in one process on the images of all ranks, with plain ReLUs whose inputs are written down; bounds
    from the definition. What it holds after the switch and at the end."""
    seen: dict[int, list[torch.Tensor]] = {}
    network = split_batchnorm(network_of(name), "local", Group("alone", (0,), None))
    handles = []
    for place, unit in enumerate(units(network)):
        seen[place] = []
        handles.append(unit.register_forward_pre_hook(lambda _, inputs, place=place: seen[place].append(inputs[0])))
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.05,
        momentum=0.9,
        nesterov=True,
    )
    switched: Weights = {}
    for step in range(TRACKED + LEARNED):
        if step == TRACKED:
            for handle in handles:
                handle.remove()
            for place, unit in enumerate(units(network)):
                by_definition(unit, seen[place])
            switched = {key: value.clone() for key, value in network.state_dict().items()}
        images, labels = batch_of(step)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return switched, network.state_dict()


@torch.no_grad()
def by_definition(unit: Any, inputs: list[torch.Tensor]) -> None:
    mean = std = torch.zeros(())
    assert len(inputs) == TRACKED
    for step, values in enumerate(inputs):
        rows = values.double().reshape(1, -1) if unit.channels is None else values.double().transpose(0, 1).flatten(1)
        weight = 1.0 if step == 0 else 0.1
        mean = (1 - weight) * mean + weight * rows.mean(1)
        std = (1 - weight) * std + weight * rows.std(1, correction=0)
    for function in range(unit.left.numel()):
        left, right = mean[function] - 3 * std[function], mean[function] + 3 * std[function]
        unit.left[function], unit.right[function] = left, right
        for point in range(17):
            unit.values[17 * function + point] = max(0.0, float(left + (right - left) * point / 16))
    unit.running_mean.copy_(mean)
    unit.running_std.copy_(std)
    unit.seen += sum(values.numel() for values in inputs) // unit.left.numel()
    unit.realigned.fill_(True)
    unit.learned = True


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[Weights, Weights]]:
    return {name: reference(name) for name in NETWORKS}


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("sgd group")])
def test_two_ranks_are_one_process_on_all_images(
    case: str, two_ranks: list[dict[str, Any]], expected: dict[str, tuple[Weights, Weights]]
) -> None:
    for network in NETWORKS:
        for moment, wanted in zip(("switched", "end"), expected[network], strict=True):
            found = two_ranks[0][case][moment]["weights"][network]
            assert set(found) == set(wanted)
            for name in set(wanted) - {key for key in wanted if key.endswith("num_batches_tracked")}:
                error = float((found[name].double() - wanted[name].double()).abs().max())
                assert error <= 1e-4 * (1e-3 + float(wanted[name].double().abs().max())), f"{network} {name} {moment}"
                if name.endswith("seen"):
                    assert int(found[name]) == int(wanted[name]) > 0


# whole runs: three experts, PWLU and conditional convolutions; each epoch ends with a step of one image, for which a
# rank, and an expert, have none

EPOCHS, PER_EPOCH, STATISTICS = 3, 5, 1
COPIES = (3, PER_EPOCH, 9)  # within the first phase, at its end, after it
ENDINGS = {
    "torch": {"engine": "torch", "deterministic": True, "accumulation": 1},
    "deepspeed": {"engine": "deepspeed", "zero_stage": 1, "optimizer": {"name": "adamw", "learning_rate": 0.003}},
}


@pytest.fixture(scope="module", params=list(ENDINGS))
def runs(request: pytest.FixtureRequest, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    network = {"network": "small_cnn", "options": {"width": 0.1, "activation": "pwlu", "condconv": 2}}
    content = small_config(
        small_data,
        folder / "runs",
        name="whole",
        delegator=network,
        experts=network,
        training={
            "global_batch": 25,
            "epochs": EPOCHS,
            "pwlu_statistics_epochs": STATISTICS,
            "checkpoint_every_steps": 3,
            "keep_checkpoints": 100,
            "ema_decay": 0.9,
            **ENDINGS[request.param],
        },
        tracking={"every_steps": 1},
    )
    write_config(folder / "whole.yaml", content)
    (folder / "copies.json").write_text(json.dumps(COPIES))
    run_ranks(2, "training.pwlu_cases:run_jobs", folder)
    return folder / "runs"


def last_save(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    save = run / "checkpoints" / f"step-{EPOCHS * PER_EPOCH:08d}"
    found = {path.name: load_file(path) for path in save.glob("*.safetensors")}
    for path in save.glob("*.optim.pt"):
        state = torch.load(path, weights_only=True)
        found[path.name] = {f"{name} {key}": value for name, part in state.items() for key, value in part.items()}
    return found


@pytest.mark.parametrize("step", COPIES)
def test_a_run_goes_on_in_its_phase_to_the_last_bit(step: int, runs: Path) -> None:
    whole, part = last_save(runs / "whole"), last_save(runs / f"from-{step}")
    assert set(whole) == set(part)
    assert len(whole) == 12
    for file, tensors in whole.items():
        for name, value in tensors.items():
            if "norm.running" not in name:  # a save averages local BatchNorm's; no weight depends on them
                assert torch.equal(value, part[file][name]), f"{file} {name}"
    (start,) = lines_of(runs / f"from-{step}", "start")
    assert (start["step"], start["resumed_from"]) == (step, f"step-{step:08d}")
    switches = lines_of(runs / f"from-{step}", "pwlu")
    assert [line["step"] for line in switches] == ([PER_EPOCH] if step <= PER_EPOCH else [])
    assert [line["step"] for line in lines_of(runs / "whole", "pwlu")] == [PER_EPOCH]
    losses = [line["metrics"]["train/loss"] for line in lines_of(runs / "whole", "train")]
    assert len(losses) == EPOCHS * PER_EPOCH
    assert all(loss == loss and abs(loss) < 100 for loss in losses)


def test_saves_show_their_phase(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {network["pwlu"] for network in inspect_run(runs / "cut")["networks"]} == {"statistics"}
    result = inspect_run(runs / "whole")
    assert {network["pwlu"] for network in result["networks"]} == {"learned"}
    show_inspection(result)
    assert "learned" in capsys.readouterr().out
    early, late = (
        load_file(runs / "whole" / "checkpoints" / f"step-{step:08d}" / "expert-0002.safetensors") for step in (3, 9)
    )
    resting = [name for name in early if name.endswith(".left")]
    assert len(resting) == 4
    for name in resting:
        assert set(early[name].tolist()) == {-3.0}
        assert not set(late[name].tolist()) & {-3.0}


def test_an_export_answers_as_the_run_does(runs: Path, small_data: Path, tmp_path: Path) -> None:
    export_weights(runs / "whole", tmp_path / "out")
    model = CollaborationOfExperts.from_pretrained(tmp_path / "out")
    stored = json.loads((runs / "whole" / "evaluation-test.json").read_text())
    assert all(unit.learned for unit in units(model))
    assert answers_of(model, small_data) == (
        stored["images"], stored["top1"]["coe"], pytest.approx(stored["load"])
    )  # fmt: skip
    (runs / "cut" / "evaluation-validation.json").unlink(missing_ok=True)
    export_weights(runs / "cut", tmp_path / "early")
    early = CollaborationOfExperts.from_pretrained(tmp_path / "early")
    assert units(early)
    assert not any(unit.learned for unit in units(early))


def test_a_scaled_run_goes_through_its_phases(runs: Path) -> None:
    (start,) = lines_of(runs / "scaled", "start")
    assert (start["step"], start["experts"]) == (COPIES[0], 4)
    assert [line["step"] for line in lines_of(runs / "scaled", "pwlu")] == [PER_EPOCH]
    result = inspect_run(runs / "scaled")
    assert (result["valid"], result["step"]) == (True, EPOCHS * PER_EPOCH)
    assert [network["pwlu"] for network in result["networks"]] == ["learned"] * 5


def test_a_run_that_would_never_learn_them_is_refused() -> None:
    network = {"network": "small_cnn", "options": {"activation": "pwlu"}}
    for section in ("delegator", "experts"):
        with pytest.raises(InputError, match=r"^training\.pwlu_statistics_epochs: 5 is not allowed; training\.epochs"):
            parse_config({"name": "short", section: network, "training": {"epochs": 5}})
        parse_config({"name": "enough", section: network, "training": {"epochs": 6}})
    parse_config({"name": "without", "training": {"epochs": 1}})


def test_no_unit_is_decayed_or_shares_its_group() -> None:
    from coe_dist.training.optim import build_optimizer

    network = network_of("delegator")
    groups = build_optimizer(network, OPTIMIZERS["sgd"], 0.1).param_groups
    own = {id(parameter) for unit in units(network) for parameter in unit.parameters()}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert {id(parameter) for parameter in groups[2]["params"]} == own
    assert len(build_optimizer(nn.Linear(2, 2), OPTIMIZERS["sgd"], 0.1).param_groups) == 2
