"""Starting from one pretrained network: names, classifiers of other classes, noise, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_data import small_config, write_small
from torch import nn
from trained_run import INFO, job_of, run_on_two_ranks, small_run

from coe_dist.config import load_config, parse_config
from coe_dist.errors import InputError
from coe_dist.tracking import read_metrics
from coe_dist.training.networks import NetworkBuilder, starting_networks

TIMM = "test_efficientnet"


def started(
    tmp_path: Path, file: Path | None, *, delegator: Path | None = None, network: str = TIMM, **experts: Any
) -> tuple[nn.Module, dict[int, nn.Module], list[str]]:
    """The delegator, three experts, and the warnings."""
    content = small_config(tmp_path, tmp_path / "runs")
    plain = {"network": network, "options": {} if network == TIMM else {"width": 0.1}}
    content["delegator"] = {**plain, "initial_weights": None if delegator is None else str(delegator)}
    content["experts"] = {"count": 3, **plain, "initial_weights": None if file is None else str(file), **experts}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own, networks = starting_networks(NetworkBuilder(parse_config(content), INFO), range(3))
    return own, networks, [str(warning.message) for warning in caught if "initial_weights" in str(warning.message)]


def pretrained(path: Path, classes: int = 10) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    weights: dict[str, torch.Tensor] = timm.create_model(TIMM, num_classes=classes, in_chans=1).state_dict()
    for name, value in weights.items():
        if "running_mean" in name:
            value.normal_()
    torch.save({"state_dict": weights}, path)
    return weights


def test_experts_start_from_the_file_and_differ_by_a_little_noise(tmp_path: Path) -> None:
    weights = pretrained(tmp_path / "net.pth")
    _, experts, skipped = started(tmp_path, tmp_path / "net.pth")
    assert not skipped
    states = [experts[expert].state_dict() for expert in range(3)]
    for name, value in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = name.replace("classifier", "class_head") if name.startswith("classifier") else f"trunk.{name}"
        found = [state[ours] for state in states]
        if "running" in name:
            assert all(torch.equal(one, value) for one in found)
            continue
        size = float(value.square().mean().sqrt())
        for one in found:
            assert float((one - value).square().mean().sqrt()) == pytest.approx(0.01 * size, rel=0.5)
        if size > 0:
            assert not torch.equal(found[0], found[1])
    again = started(tmp_path, tmp_path / "net.pth")[1]
    assert all(torch.equal(value, again[2].state_dict()[name]) for name, value in states[2].items())
    exact = started(tmp_path, tmp_path / "net.pth", initial_noise=0.0)[1]
    assert torch.equal(exact[0].trunk.conv_stem.weight, weights["conv_stem.weight"])
    assert torch.equal(exact[1].trunk.conv_stem.weight, weights["conv_stem.weight"])


def test_selection_with_a_trunk_of_its_own_starts_as_the_other_does(tmp_path: Path) -> None:
    pretrained(tmp_path / "net.pth")
    content = small_config(tmp_path, tmp_path)
    weights = str(tmp_path / "net.pth")
    content["delegator"] = {"network": TIMM, "options": {"selection": "separate"}, "initial_weights": weights}
    delegator, _ = starting_networks(NetworkBuilder(parse_config(content), INFO), range(0))
    state = delegator.state_dict()
    trunk = [name for name in state if name.startswith("trunk.") and not name.endswith("num_batches_tracked")]
    assert trunk
    assert all(torch.equal(state[name], state[f"selection_{name}"]) for name in trunk)


def test_without_a_file_nothing_changes(tmp_path: Path) -> None:
    _, experts, _ = started(tmp_path, None)
    content = small_config(tmp_path, tmp_path, experts={"network": TIMM, "options": {}})
    plain = NetworkBuilder(parse_config(content), INFO).expert(1).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in experts[1].state_dict().items())


def test_a_classifier_of_other_classes_is_skipped_and_told_once(tmp_path: Path) -> None:
    weights = pretrained(tmp_path / "net.pth", classes=9)
    _, experts, skipped = started(tmp_path, tmp_path / "net.pth", initial_noise=0.0)
    assert len(skipped) == 1
    assert skipped[0].startswith(f"experts.initial_weights: {tmp_path / 'net.pth'}: class_head.weight, class_head.bias")
    assert torch.equal(experts[2].trunk.conv_stem.weight, weights["conv_stem.weight"])
    assert not torch.equal(experts[0].class_head.weight, experts[1].class_head.weight)


def test_files_of_our_own_networks_fit_too(tmp_path: Path) -> None:
    """An expert's file of a checkpoint for experts and delegator; a delegator's for as many experts and for others."""
    run = small_run(tmp_path / "three", 3)
    (save,) = (run / "checkpoints").glob("step-*")
    expert, own = save / "expert-0001.safetensors", save / "delegator.safetensors"
    weights, of_delegator = load_file(expert), load_file(own)
    delegator, experts, skipped = started(tmp_path, expert, delegator=own, network="small_cnn", initial_noise=0.0)
    assert not skipped
    for network, source in ((experts[2], weights), (delegator, of_delegator)):
        state = network.state_dict()
        assert all(torch.equal(state[name], source[name]) for name in source if "num_batches" not in name)
    delegator, _, skipped = started(tmp_path, expert, delegator=expert, network="small_cnn")
    assert not skipped
    assert torch.equal(delegator.class_head.weight, weights["class_head.weight"])
    assert float(delegator.selection_head.weight.detach().abs().max()) < 0.1  # as it starts without a file
    four = small_run(tmp_path / "four", 4)
    other = next((four / "checkpoints").glob("step-*")) / "delegator.safetensors"
    delegator, _, skipped = started(tmp_path, None, delegator=other, network="small_cnn")
    assert [line.split(": ")[2] for line in skipped] == [
        "selection_head.bias, selection_head.weight skipped, their shapes are others; they start at random"
    ]
    assert torch.equal(delegator.class_head.weight, load_file(other)["class_head.weight"])


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    weights = pretrained(tmp_path / "net.pth")
    torch.save({name: value for name, value in weights.items() if name != "conv_stem.weight"}, tmp_path / "less.pth")
    torch.save({**weights, "conv_stem.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    torch.save({**weights, "other.block.weight": torch.zeros(3)}, tmp_path / "more.pth")
    for file, message in (
        ("gone.pth", "there is no such file"),
        ("less.pth", "does not fit the network: trunk.conv_stem.weight is missing$"),
        ("shape.pth", r"does not fit the network: trunk.conv_stem.weight is \[3\], not"),
        ("more.pth", "are not its own, nor one classifier"),
    ):
        with pytest.raises(InputError, match=rf"^experts\.initial_weights: .*{message}"):
            started(tmp_path, tmp_path / file)
    with pytest.raises(InputError, match=r"^delegator\.initial_weights: .*no such file"):
        started(tmp_path, None, delegator=tmp_path / "gone.pth")


def test_a_training_starts_from_the_file_and_goes_on_without_it(tmp_path: Path) -> None:
    """On two ranks, replicas of an expert start alike; the file may be gone once there is a save. After no epochs
    the networks are the file's, evaluated and saved."""
    source = small_run(tmp_path / "source", 3)
    (save,) = (source / "checkpoints").glob("step-*")
    file = tmp_path / "start.safetensors"
    save_file(load_file(save / "expert-0000.safetensors"), file)
    write_small(tmp_path / "data")
    content = small_config(
        tmp_path / "data",
        tmp_path / "runs",
        experts={"initial_weights": str(file), "initial_noise": 0.0},
        training={"epochs": 0, "optimizer": {"learning_rate": 1e-9, "weight_decay": 0.0}},
    )
    config = parse_config(content)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    run_on_two_ranks(tmp_path, [job_of(config.run_dir, "train"), job_of(config.run_dir, "train", "training.epochs=1")])
    untrained, trained = (
        load_file(save / "expert-0002.safetensors") for save in sorted((config.run_dir / "checkpoints").glob("step-*"))
    )
    different = [name for name, value in load_file(file).items() if not torch.equal(untrained[name], value)]
    assert all(name.startswith("normalise.") or name.endswith("num_batches_tracked") for name in different)
    first, second = (record for record in read_metrics(config.run_dir) if record["kind"] == "end")
    assert (first["step"], first["epoch"], second["step"]) == (0, 0, 4)
    for name, value in load_file(file).items():
        if not name.startswith("normalise.") and "running" not in name and "num_batches" not in name:
            assert torch.allclose(trained[name], value, atol=1e-6), name
    file.unlink()
    assert load_config(config.run_dir / "config.yaml").experts.initial_weights == str(file)
    jobs = [job_of(config.run_dir, "train", "training.epochs=2"), job_of(config.run_dir, "evaluate")]
    run_on_two_ranks(tmp_path, jobs)
    saves = {save.name for save in (config.run_dir / "checkpoints").glob("step-*")}
    assert {"step-00000004", "step-00000008"} <= saves <= {"step-00000000", "step-00000004", "step-00000008"}
