"""What a run's checkpoint holds, read from its files alone: no process group, no data set, no network is built."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from coe_dist.config import RunConfig, parse_config
from coe_dist.data.sidecar import sha256_of
from coe_dist.errors import InputError
from coe_dist.tracking.journal import METRICS_FILE, read_metrics
from coe_dist.training.checkpoint import (
    AVERAGE,
    FORMAT,
    OPTIMIZER,
    WEIGHTS,
    Position,
    complete_saves,
    damage,
    latest_valid,
    network_file,
    stems,
)
from coe_dist.training.chosen import LATEST, find_save, valid_save

SHORT = 12  # hex digits of a sha256 that a table shows


@dataclass(frozen=True)
class Collaboration:
    """A valid save of a collaboration's run."""

    save: Path
    manifest: dict[str, Any]
    config: RunConfig  # the one it was trained with
    warnings: list[str]  # one for each newer save that is damaged


def open_collaboration(run_dir: Path, checkpoint: str = LATEST) -> Collaboration:
    """The save that `checkpoint` names (see chosen.py), verified.

    Raises InputError as valid_save does, and when the save is not that of a collaboration.
    """
    save, warnings = valid_save(run_dir, checkpoint)
    manifest = json.loads((save / "manifest.json").read_text())
    if "delegator.safetensors" not in manifest["files"]:
        raise InputError(f"{run_dir}: it is the run of a single network; give the run of a collaboration")
    config = parse_config(manifest.get("config"))
    ends = (WEIGHTS, AVERAGE) if manifest.get("ema") else (WEIGHTS,)
    wanted = [f"{network_file(name)}.{end}" for end in ends for name in stems(config.experts.count)]
    missing = [name for name in wanted if name not in manifest["files"]]
    if missing or manifest["experts"] != config.experts.count:
        raise InputError(
            f"{save}: its manifest names {manifest['experts']} experts, its configuration {config.experts.count}"
            + (f"; {missing[0]} is missing" if missing else "")
        )
    return Collaboration(save, manifest, config, warnings)


@dataclass(frozen=True)
class Loads:
    """The fraction of images for which each expert was selected."""

    shares: list[float]
    file: str  # that says so
    step: int | None  # of the networks that selected; None: the file does not say


def other_step(recorded: int | None, step: int) -> list[str]:
    """A sentence where loads were not recorded at this step."""
    if recorded == step:
        return []
    other = "a step that is not recorded" if recorded is None else f"step {recorded}"
    return [f"how often each expert is chosen is that of {other}, none is recorded for step {step}"]


def recorded_loads(run_dir: Path, experts: int, step: int) -> Loads | None:
    """The loads recorded at this step, else at the nearest one; None: not recorded.

    Those of validation (evaluation-validation.json before metrics.jsonl) come before the portions of training, which
    say little because training balances them.
    """
    found = _evaluated(run_dir / "evaluation-validation.json", experts) + _measured(run_dir, experts, "val_load")
    found = found or _measured(run_dir, experts, "load")
    return min(found, key=lambda loads: (loads.step is None, abs((loads.step or 0) - step)), default=None)


def _evaluated(path: Path, experts: int) -> list[Loads]:
    try:
        evaluation = json.loads(path.read_text())
        shares, step = [float(share) for share in evaluation["load"]], evaluation.get("step")
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [Loads(shares, path.name, step if isinstance(step, int) else None)] if len(shares) == experts else []


def _measured(run_dir: Path, experts: int, field: str) -> list[Loads]:
    """Of every record of metrics.jsonl that has this field of so many experts, the newest first."""
    names, found = [f"expert/{expert:02d}/{field}" for expert in range(experts)], []
    for record in read_metrics(run_dir):
        metrics, step = record.get("metrics") or {}, record.get("step")
        if sorted(name for name in metrics if name.endswith(f"/{field}")) == sorted(names):
            shares = [float(metrics[name]) for name in names]
            found.append(Loads(shares, METRICS_FILE, step if isinstance(step, int) else None))
    return found[::-1]


def described(weights: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """channels, classes (their number), mean and std of a network of ours, from its weights alone."""
    try:
        mean, std = (weights[f"normalise.{name}"].flatten().tolist() for name in ("mean", "std"))
        return {"channels": len(mean), "classes": len(weights["class_head.weight"]), "mean": mean, "std": std}
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]} is missing; it is not a network of this project") from None


def inspect_run(run_dir: Path, checkpoint: str = LATEST) -> dict[str, Any]:
    """Describes the save that `checkpoint` names (see chosen.py; of the newest, one that has a readable manifest), also
    when files of it are damaged.

    Keys: run, checkpoint, step, epoch, step_in_epoch, micro_step, experts, valid, resumes_from (the save that training
    would go on from, or null), networks, loads_from and loads_step (the file with the loads and the step they are of;
    null), scaled (see coe_dist.training.scaling; null), ema (decay and updates of the weights' moving averages; null),
    warnings. Each network: name, sha256 (of its weights' file as it is on the disk; null when there is none), bytes,
    load (fraction of images; null when not recorded), weights, optimizer and average ("ok", or what is wrong with the
    file; average: null without moving averages), pwlu (see _pwlu).
    Raises InputError when there is no such save, or none with a readable manifest.
    """
    folder, warnings = run_dir / "checkpoints", []
    for save in complete_saves(folder) if checkpoint == LATEST else [find_save(run_dir, checkpoint)]:
        manifest = _manifest(save)
        if manifest is not None:
            break
        warnings.append(f"{save}: {damage(save)}")
    else:
        reason = f" ({warnings[0]})" if warnings else ""
        raise InputError(f"{run_dir}: it holds no checkpoint with a readable manifest{reason}")
    experts, files = manifest["experts"], manifest["files"]
    collaboration = any(name.startswith(("delegator", "expert")) for name in files)
    names = list(stems(experts)) if collaboration else sorted({name.split(".")[0] for name in files})
    loads = recorded_loads(run_dir, experts, manifest["step"]) if collaboration else None
    averaged = bool(manifest.get("ema"))
    networks = [_network(save, files, name, averaged) for name in names]
    for network in networks:
        number = network["name"].removeprefix("expert ")
        network["load"] = loads.shares[int(number)] if loads and number.isdigit() else None
    ends = (WEIGHTS, OPTIMIZER, AVERAGE) if averaged else (WEIGHTS, OPTIMIZER)
    known = {f"{network_file(name)}.{end}" for name in names for end in ends}
    warnings += [f"{name}: {_state(save, files, name)}" for name in sorted(set(files) - known)]
    valid = not damage(save)
    return {
        "run": str(run_dir),
        "checkpoint": save.name,
        **{key: manifest[key] for key in vars(Position())},
        "experts": experts,
        "valid": valid,
        "resumes_from": save.name if valid else _name(latest_valid(folder)[0]),
        "networks": networks,
        "loads_from": loads.file if loads else None,
        "loads_step": loads.step if loads else None,
        "scaled": manifest.get("scaled"),
        "ema": manifest.get("ema"),
        "warnings": warnings,
    }


def show_inspection(result: dict[str, Any]) -> None:
    """Prints what inspect_run found."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table(title=f"{result['run']}: {result['checkpoint']}, step {result['step']}, epoch {result['epoch']}")
    averages = [
        column
        for column, shown in (
            ("average", result["ema"]),
            ("pwlu", any(network["pwlu"] for network in result["networks"])),
        )
        if shown
    ]
    for heading in ("network", "sha256", "bytes", "chosen for", "weights", "optimizer", *averages):
        table.add_column(heading, justify="right" if heading in ("bytes", "chosen for") else "left")
    for network in result["networks"]:
        table.add_row(
            network["name"],
            (network["sha256"] or "")[:SHORT],
            f"{network['bytes']:,}",
            "" if network["load"] is None else f"{100 * network['load']:.2f}%",
            network["weights"],
            network["optimizer"],
            *(network[column] for column in averages),
        )
    console.print(table)
    notes = other_step(result["loads_step"], result["step"]) if result["loads_from"] else []
    for warning in [*notes, *result["warnings"]]:
        console.print(warning, markup=False)
    if result["valid"]:
        console.print("every file verifies")
    else:
        console.print(f"damaged; training would go on from {result['resumes_from'] or 'the beginning'}")
    if result["ema"]:
        console.print(f"averages of the weights: decay {result['ema']['decay']}, {result['ema']['updates']} updates")
    if result["scaled"]:
        console.print(f"scaled from {result['scaled']['run']}; experts come from {result['scaled']['parents']}")


def _name(save: Path | None) -> str | None:
    return None if save is None else save.name


def _manifest(save: Path) -> dict[str, Any] | None:
    """The manifest, or None when it is not readable. Raises InputError for another format version."""
    try:
        manifest = json.loads((save / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return None
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        damage(save)  # refuses it
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    return None if any(type(manifest.get(key)) is not int for key in ("experts", *vars(Position()))) else manifest


def _network(save: Path, files: dict[str, str], name: str, averaged: bool) -> dict[str, Any]:
    weights, optimizer, average = (f"{network_file(name)}.{end}" for end in (WEIGHTS, OPTIMIZER, AVERAGE))
    path = save / weights
    return {
        "name": name,
        "sha256": sha256_of(path) if path.is_file() else None,
        "bytes": path.stat().st_size if path.is_file() else 0,
        "weights": _state(save, files, weights),
        "optimizer": _state(save, files, optimizer),
        "average": _state(save, files, average) if averaged else None,
        "pwlu": _pwlu(path),
    }


def _pwlu(path: Path) -> str | None:
    """The phase of a network's piecewise linear units, "statistics" or "learned" (see coe/pwlu.py); None where it has
    none, or the file cannot be read."""
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            flags = [bool(file.get_tensor(name)) for name in file.keys() if name.endswith(".realigned")]  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return None if not flags else "learned" if all(flags) else "statistics"


def _state(save: Path, files: dict[str, str], name: str) -> str:
    if name not in files:
        return "not in the manifest"
    if Path(name).name != name or not (save / name).is_file():
        return "missing"
    return "ok" if sha256_of(save / name) == files[name] else "does not match its sha256"
