"""Weights that a user brings along: a state dict as safetensors or as torch.save writes it, never code."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coe_dist.errors import InputError

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # what training scripts put a state dict under

Weights = dict[str, torch.Tensor]


def read_weights(field: str, path: Path) -> Weights:
    """Name -> tensor, on the CPU. Averages are preferred where a training script has stored both, and `module.` before
    every name is dropped. Raises InputError naming the configuration's field and the file."""
    if not path.is_file():
        raise InputError(f"{field}: {path} is not allowed; there is no such file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{field}: {path} is not allowed; give a state dict as safetensors or of tensors alone ({reason})"
        ) from error
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())) or not content:
        raise InputError(f"{field}: {path} is not allowed; it holds no state dict (names and tensors)")
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {str(name).removeprefix(prefix): value for name, value in content.items()}


def check_fit(field: str, path: Path, weights: Weights, own: Weights, needed: Iterable[str]) -> None:
    """Raises InputError naming tensors that are missing of those needed, unknown to the network's `own` state dict, or
    of another shape."""
    wrong = [f"{name} is missing" for name in sorted(needed) if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [
        f"{name} is {list(value.shape)}, not {list(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{field}: {path} does not fit the network: {', '.join(wrong[:3])}{more}")
