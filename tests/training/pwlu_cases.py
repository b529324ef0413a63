"""Runs on every rank: piecewise linear units through both phases, on replicated networks and in whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training.checkpoint_cases import ENGINES, digests

from coe_dist.coe.backbones import build_classifier
from coe_dist.coe.pwlu import units
from coe_dist.config import OptimizerConfig, TrainingConfig, load_config
from coe_dist.data.order import share
from coe_dist.parallel.batchnorm import split_batchnorm
from coe_dist.parallel.groups import Groups, create_groups
from coe_dist.training.ema import WeightAverage
from coe_dist.training.engines import NetworkEngine, build_engine
from coe_dist.training.job import Job
from coe_dist.training.optim import activation_parameters, build_optimizer
from coe_dist.training.pwlu_phases import PwluPhases
from coe_dist.training.scaling import scale
from coe_dist.training.worker import run_worker

TRACKED, LEARNED = 3, 3  # steps in each phase
NETWORKS = {"delegator": "channel", "expert 0": "layer"}  # both on all ranks
OPTIMIZERS = {
    "sgd": OptimizerConfig(name="sgd", learning_rate=0.05, weight_decay=0.1),
    "adamw": OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.1),
}
DECAY = 0.5


def network_of(name: str) -> torch.nn.Module:
    options = {"width": 0.2, "activation": "pwlu", "pwlu_mode": NETWORKS[name]}
    seed = list(NETWORKS).index(name)
    return build_classifier("small_cnn", options, channels=1, classes=10, mean=[0.3], std=[0.3], seed=seed).train()


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of all ranks; in step 1 a single one, so that a rank has none."""
    generator = torch.Generator().manual_seed(step)
    count = 1 if step == 1 else 11
    images = torch.randint(0, 256, (count, 1, 12, 12), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (count,), generator=generator)


def one_step(engine: NetworkEngine, groups: Groups, step: int, *, call_empty: bool) -> None:
    images, labels = batch_of(step)
    rows = slice(*share(len(labels), groups.rank, groups.world.size))
    loss = None
    if len(labels[rows]) or call_empty:
        summed = torch.nn.functional.cross_entropy(engine(images[rows]), labels[rows], reduction="sum")
        loss = summed * (groups.world.size / len(labels))
    engine.backward(loss, last=True)
    assert engine.step()


def through_both_phases(groups: Groups, training: TrainingConfig) -> dict[str, Any]:
    """Hashes of all that two replicated networks hold right after the switch and at the end, what they hold then, how
    far the first learned step moved the units, and whether the averages' units are those of their networks."""
    engines = []
    for name in NETWORKS:
        network = split_batchnorm(network_of(name), training.batchnorm, groups.world)
        optimizer = build_optimizer(network, training.optimizer, training.optimizer.learning_rate)
        engines.append(build_engine(name, network, optimizer, training, groups.world, groups.alone))
    averages = {engine.name: WeightAverage(engine.network, DECAY) for engine in engines}
    phases = PwluPhases(engines, averages, statistics_epochs=1)
    result: dict[str, Any] = {}
    moved = 0.0
    for step in range(TRACKED + LEARNED):
        assert phases.begin_epoch(step // TRACKED) == (step == TRACKED)
        if step == TRACKED:
            result["switched"] = {"hashes": digests(engines), "weights": weights_of(engines)}
            result["averages"] = [
                all(torch.equal(value, source.state_dict()[name]) for name, value in unit.state_dict().items())
                and unit.learned
                for engine in engines
                for unit, source in zip(units(averages[engine.name].network), units(engine.network), strict=True)
            ]
        before = [parameter.clone() for engine in engines for parameter in activation_parameters(engine.network)]
        for engine in engines:
            one_step(engine, groups, step, call_empty=training.batchnorm == "group")
            averages[engine.name].update(engine.network)
        phases.end_step(done=True)
        now = [parameter for engine in engines for parameter in activation_parameters(engine.network)]
        distance = max(float((new - old).detach().abs().max()) for new, old in zip(now, before, strict=True))
        if step < TRACKED:
            assert distance == 0.0, "parameters rest in the first phase"
        elif step == TRACKED:
            moved = distance
    result["end"] = {"hashes": digests(engines), "weights": weights_of(engines)}
    result["moved"] = moved
    result["steps"] = {
        engine.name: {name: float(entries["step"]) for name, entries in engine.optimizer_state().items()}
        for engine in engines
        if training.optimizer.name == "adamw"
    }
    return result


def weights_of(engines: list[NetworkEngine]) -> dict[str, dict[str, torch.Tensor]]:
    return {
        engine.name: {name: value.detach().clone() for name, value in engine.network.state_dict().items()}
        for engine in engines
    }


def cases() -> dict[str, TrainingConfig]:
    return {
        f"{engine}-{stage} {optimizer} {batchnorm}": TrainingConfig(
            engine=engine,  # type: ignore[arg-type]
            zero_stage=stage,
            batchnorm=batchnorm,  # type: ignore[arg-type]
            optimizer=OPTIMIZERS[optimizer],
        )
        for engine, stage in ENGINES
        for optimizer, batchnorm in (("sgd", "group"), ("adamw", "local"))
    }


def run(folder: Path) -> None:
    groups = create_groups(1, timeout_seconds=300)
    assert groups.experts[0].size == groups.world.size == 2, "the expert has replicas"
    result = {name: through_both_phases(groups, training) for name, training in cases().items()}
    torch.save(result, folder / f"result-{groups.rank}.pt")


# whole runs


def run_jobs(folder: Path) -> None:
    """<folder>/whole.yaml from the beginning, and again from each save that copies.json names, as if it had been
    stopped there; then the first of them with more experts."""
    config = load_config(folder / "whole.yaml")
    _train(folder / "whole.yaml")
    for step in json.loads((folder / "copies.json").read_text()):
        if dist.get_rank() == 0:
            _cut(config.run_dir, config.run_dir.with_name(f"from-{step}"), step)
        dist.barrier()
        _train(config.run_dir.with_name(f"from-{step}") / "config.yaml", f"name=from-{step}")
    first = json.loads((folder / "copies.json").read_text())[0]
    cut, scaled = config.run_dir.with_name("cut"), config.run_dir.with_name("scaled")
    if dist.get_rank() == 0:
        _cut(config.run_dir, cut, first)
        scale(cut, experts=4, out=scaled, named=[1])
    dist.barrier()
    _train(scaled / "config.yaml")


def _train(path: Path, *overrides: str) -> None:
    config = load_config(path, overrides)
    if dist.get_rank() == 0:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.yaml").write_text(config.to_yaml())
    dist.barrier()
    assert run_worker(Job(task="train", config=config, run_dir=str(config.run_dir.absolute())))
    dist.barrier()


def _cut(run: Path, copy: Path, step: int) -> None:
    """A copy of the run as it was after its save of `step`."""
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").unlink()
    for save in (copy / "checkpoints").glob("step-*"):
        if save.name > f"step-{step:08d}":
            shutil.rmtree(save)
    (copy / "checkpoints" / "best").unlink(missing_ok=True)
