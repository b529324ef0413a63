"""Another number of experts from a trained run, file to file; the new run goes on training where the old one stood.

1. Parents. parents[j] is the old expert that new expert j comes from. Growing keeps the old ids 0..E-1 and appends
   copies of the named expert, or of the most loaded: again and again the largest load is split in halves. Shrinking
   keeps the named and then the most used experts, in the order of their old ids.
2. Experts. Weights and optimizer state of expert parents[j]. A second child of one parent gets noise on its parameters
   (not on running statistics): S times the root mean square of the tensor, normally distributed.
3. Delegator. Row j of the selection head, and of its optimizer state, is the old row parents[j], exactly.
4. Moving averages of the weights, where the run has them, are changed as the weights are, by the very same noise.

All of it is our own rule. About the copied row: parent and child have equal selection logits (up to a matrix product's
rounding, which decides between them), so inference chooses one of them where it chose the parent; without noise they
are the same network, hence every answer, and so the accuracy, stays. In the softmax the two together get more than the
parent had (at most twice); lowering both biases by log 2 would give its share back but let other experts overtake the
pair, which would change answers. In training the balanced assignment breaks the ties by a hash of (sample, expert), so
both copies get images from the first step on and part, also without noise.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from coe_dist.coe import backbones
from coe_dist.config import NetworkConfig, RunConfig, parse_config
from coe_dist.errors import InputError
from coe_dist.seeds import derive_seed
from coe_dist.training.checkpoint import network_file
from coe_dist.training.inspection import Collaboration, described, open_collaboration, other_step, recorded_loads
from coe_dist.training.new_folder import check_new, new_folder
from coe_dist.training.noise import noise_for, with_noise
from coe_dist.training.parents import NoLoadsError, choose_parents

DEFAULT_NOISE = 0.01
_SELECTION = ("selection_head.weight", "selection_head.bias")


@dataclass(frozen=True)
class Scaled:
    """What `scale` wrote."""

    run_dir: Path
    save: Path
    parents: list[int]  # of each new expert, the id of the old one
    loads: list[float] | None  # fraction of images of each old expert, where recorded
    notes: list[str]  # one line each: damaged saves, settings that had to change


def scale(run_dir: Path, *, experts: int, out: Path, named: Sequence[int] = (), noise: float = DEFAULT_NOISE) -> Scaled:
    """Writes the run folder `out` (config.yaml and one checkpoint) with `experts` experts made from those of run_dir.

    named: parents of the new experts (one for all, or one for each), or the experts to keep; without it loads decide.
    `out` appears whole or not at all. Raises InputError for what cannot be done, and when `out` cannot be written.
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise InputError(f"--noise: {noise} is not allowed; give a number of at least 0")
    check_new(out)
    source = open_collaboration(run_dir)
    before = source.config.experts.count
    config, notes = _scaled_config(source.config, experts, out)
    if experts == before:
        raise InputError(f"--experts: {experts} is not allowed; the run has {before} experts already")
    step = source.manifest["step"]
    recorded = recorded_loads(run_dir, before, step)
    loads = recorded.shares if recorded else None
    notes += other_step(recorded.step, step) if recorded else []
    try:
        parents = choose_parents(before, experts, named, loads)
    except NoLoadsError:
        raise InputError(
            f"{run_dir}: it records no loads of its experts; name experts with --from-expert, or evaluate the run with "
            "`coe-dist evaluate --split validation` first"
        ) from None
    with new_folder(out) as partial:
        save = partial / "checkpoints" / source.save.name
        save.mkdir(parents=True)
        files = {name: digest for part in _write_files(source, save, parents, noise) for name, digest in part.items()}
        origin = {"run": str(run_dir), "checkpoint": source.save.name, "parents": parents, "noise": noise}
        manifest = source.manifest | {
            "experts": experts,
            "config": config.model_dump(mode="json"),
            "config_digest": config.digest(),
            "scaled": origin,
            "files": files,
        }
        (save / "manifest.json").write_text(json.dumps(manifest, indent=1))
        (save.parent / "latest").write_text(save.name)
        (partial / "config.yaml").write_text(config.to_yaml())
    return Scaled(out, out / "checkpoints" / save.name, parents, loads, [*source.warnings, *notes])


def show_scaled(scaled: Scaled) -> None:
    """Prints where each expert comes from, and how to go on."""
    for note in scaled.notes:
        print(note)
    for expert, parent in enumerate(scaled.parents):
        load = "" if scaled.loads is None else f" (chosen for {100 * scaled.loads[parent]:.1f}% of the images)"
        print(f"expert {expert} {'is a copy of' if parent in scaled.parents[:expert] else 'is'} expert {parent}{load}")
    print(f"continue: coe-dist train {scaled.run_dir / 'config.yaml'} training.epochs=N")


def _scaled_config(config: RunConfig, experts: int, out: Path) -> tuple[RunConfig, list[str]]:
    content, notes, k = config.model_dump(mode="json"), [], config.experts.per_sample
    if k is not None and 2 <= experts < k:
        notes.append(f"experts.per_sample: {k} -> {experts}, there are no more experts")
        k = experts
    content |= {"name": out.name, "runs_dir": str(out.parent)}
    content["experts"] |= {"count": experts, "per_sample": k}
    try:
        return parse_config(content), notes
    except InputError as error:
        message = str(error)
        for field, option in (("name", "--out"), ("experts.count", "--experts")):
            message = option + message.removeprefix(field) if message.startswith(f"{field}:") else message
        raise InputError(message) from None


def _write_files(source: Collaboration, save: Path, parents: list[int], noise: float) -> Iterator[dict[str, str]]:
    """Writes file after file of the delegator and the experts; yields name -> sha256."""
    files, section = source.manifest["files"], source.config.experts
    if unknown := sorted(name for name in files if not name.startswith(("delegator.", "expert-"))):
        raise InputError(f"{source.save}: {unknown[0]} is a file that this version does not know how to scale")
    for name in sorted(name for name in files if name.startswith("delegator.")):
        yield _write_delegator(source.save / name, save, section.count, parents)
    trainable: set[str] | None = None
    for child, parent in enumerate(parents):
        stem, own_stem = network_file(f"expert {parent}"), network_file(f"expert {child}")
        for name in sorted(name for name in files if name.startswith(f"{stem}.")):
            path = save / f"{own_stem}{name.removeprefix(stem)}"
            if name.endswith(".safetensors") and noise > 0 and parent in parents[:child]:
                own = source.save / f"{stem}.safetensors"
                weights = load_file(own)
                trainable = trainable or _trainable(section, weights, own)
                added = noise_for(weights, trainable, noise, derive_seed(source.config.seed, "scale", child))
                yield _write(path, to_bytes(with_noise(load_file(source.save / name), added)))
            else:
                shutil.copyfile(source.save / name, path)
                yield {path.name: files[name]}


def _write_delegator(path: Path, save: Path, experts: int, parents: list[int]) -> dict[str, str]:
    rows = torch.tensor(parents)

    def chosen(name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in _SELECTION or value.ndim == 0:  # of the optimizer: a count of steps
            return value
        if len(value) != experts:
            raise InputError(f"{path}: {name} has {len(value)} rows; give one for each of {experts} experts")
        return value[rows].contiguous()

    if path.name.endswith(".safetensors"):
        weights = load_file(path)
        if missing := [name for name in _SELECTION if name not in weights]:
            raise InputError(f"{path}: {missing[0]} is missing; scaling needs the delegator's selection head")
        return _write(save / path.name, to_bytes({name: chosen(name, value) for name, value in weights.items()}))
    state: dict[str, dict[str, torch.Tensor]] = torch.load(path, weights_only=True)
    buffer = io.BytesIO()
    torch.save({n: {key: chosen(n, value) for key, value in entries.items()} for n, entries in state.items()}, buffer)
    return _write(save / path.name, buffer.getvalue())


def _write(path: Path, content: bytes) -> dict[str, str]:
    path.write_bytes(content)
    return {path.name: hashlib.sha256(content).hexdigest()}


def _trainable(section: NetworkConfig, weights: dict[str, torch.Tensor], path: Path) -> set[str]:
    """Names of the parameters in an expert's weights: only the network itself tells them from running statistics."""
    network = backbones.build_classifier(section.network, section.options, **described(weights, path), seed=0)
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if missing := sorted(names - set(weights)):
        raise InputError(f"{path}: {missing[0]} is missing; it does not fit the configured network {section.network}")
    return names
