"""Networks that start from one pretrained network (our own rule).

All experts start from the same file, and the delegator from one of its own. What makes experts part is a little noise
on each one's parameters, by seed and expert, and then the different images that they are assigned. The file is a state
dict as timm or torchvision know this network, or of a network of ours (an expert's file in a checkpoint or an export).
Everything must fit but the classifier, which is skipped when its shapes differ: other classes. Selection starts
at random unless the file is a delegator's for as many experts; where it has a trunk of its own, that starts like the
other. Means and deviations of the pixels stay those of the data at hand.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from coe_dist.config import PretrainableConfig, RunConfig
from coe_dist.errors import InputError
from coe_dist.seeds import derive_seed
from coe_dist.training.checkpoint import complete_saves
from coe_dist.training.noise import noise_for, with_noise
from coe_dist.training.optim import activation_parameters
from coe_dist.training.weights_file import Weights, check_fit, read_weights

_HEADS = ("class_head.", "selection_head.")
_COUNTER = ".num_batches_tracked"  # some files have it, some do not, and nothing of ours reads it


def start_from_file(network: nn.Module, field: str, section: PretrainableConfig, config: RunConfig) -> str:
    """Loads section.initial_weights, where it is given, into a network that no engine owns yet.

    Returns a line about what was skipped, or ''. A run that has a save goes on without the file. Raises InputError
    naming the field when the file is missing, unreadable or does not fit.
    """
    path, field = Path(section.initial_weights or ""), f"{field}.initial_weights"
    if section.initial_weights is None or (not path.is_file() and complete_saves(config.run_dir / "checkpoints")):
        return ""
    weights = _in_our_names(field, path, network, read_weights(field, path))
    own = network.state_dict()
    twins = {name: name.removeprefix("selection_") for name in own if name.startswith("selection_trunk.")}
    weights |= {name: weights[twin] for name, twin in twins.items() if name not in weights and twin in weights}
    skipped = [
        name
        for name in weights
        if name.startswith(_HEADS) and (name not in own or own[name].shape != weights[name].shape)
    ]
    fitting = {name: value for name, value in weights.items() if name not in skipped}
    needed = {name for name in own if not name.startswith((*_HEADS, "normalise.")) and not name.endswith(_COUNTER)}
    check_fit(field, path, fitting, own, needed)
    network.load_state_dict(fitting, strict=False)
    if not skipped:
        return ""
    return f"{field}: {path}: {', '.join(skipped)} skipped, their shapes are others; they start at random"


def add_noise(network: nn.Module, noise: float, seed: int, expert: int) -> None:
    """Noise of `noise` times the root mean square of each tensor on what is trained, but for activations' own
    parameters, which are tuned to each other."""
    if noise == 0.0:
        return
    apart = {id(parameter) for parameter in activation_parameters(network)}
    names = [name for name, parameter in network.named_parameters() if id(parameter) not in apart]
    weights = dict(network.state_dict())
    added = noise_for(weights, names, noise, derive_seed(seed, "initial weights", expert))
    network.load_state_dict(with_noise(weights, added))


def _in_our_names(field: str, path: Path, network: nn.Module, weights: Weights) -> Weights:
    weights = {name: value for name, value in weights.items() if not name.endswith(_COUNTER)}
    if any(name.startswith("trunk.") for name in weights):
        return {name: value for name, value in weights.items() if not name.startswith("normalise.")}
    trunk = {name.removeprefix("trunk.") for name in network.state_dict() if name.startswith("trunk.")}
    others = [name for name in weights if name not in trunk]
    heads = {name.rpartition(".")[0] for name in others}
    if len(heads) > 1 or any(name.rpartition(".")[2] not in ("weight", "bias") for name in others):
        raise InputError(
            f"{field}: {path} does not fit the network: {', '.join(others[:3])} are not its own, nor one classifier"
        )
    ours = {name: f"trunk.{name}" for name in trunk}
    ours |= {name: f"class_head.{name.rpartition('.')[2]}" for name in others}
    return {ours[name]: value for name, value in weights.items()}
