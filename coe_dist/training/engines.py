"""One engine per network: forward, backward with gradient averaging over the network's group, clipping, step.

Two kinds behind one interface: DeepSpeed (ZeRO stages 0, 1, 2) and plain torch. In both:

- `backward` gets a loss that the caller has scaled by R/N (R ranks in the group): engines average over their group.
- `step` clips on the true global norm of this one network, after reduction, and skips a non-finite gradient.
- A group of one rank issues no collective of ours.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from coe_dist.allocator import keep_freed_memory
from coe_dist.parallel.groups import Group

if TYPE_CHECKING:
    from coe_dist.config import TrainingConfig

State = dict[str, dict[str, torch.Tensor]]  # parameter name -> optimizer entry -> tensor


class NetworkEngine(Protocol):
    name: str
    network: nn.Module
    group: Group
    grad_norm: float  # of the last step, before clipping

    def __call__(self, images: torch.Tensor) -> Any: ...
    def backward(self, loss: torch.Tensor | None, *, last: bool) -> None:
        """Adds gradients. None stands for zero rows: the engine still takes part in every collective. `last` ends the
        accumulation: gradients are averaged over the group."""

    def step(self) -> bool:
        """Clips, updates the parameters and clears the gradients; False when the gradient was not finite (then nothing
        changes). Must follow a backward with last=True."""

    def zero_grad(self) -> None: ...
    def set_learning_rate(self, learning_rate: float) -> None: ...
    def optimizer_state(self, *, wanted: bool = True) -> State:
        """Full optimizer state by parameter name, copied to the CPU; {} where it is not `wanted`. Collective."""

    def load_optimizer_state(self, state: State) -> None: ...
    def restart(self, parameters: list[nn.Parameter]) -> None:
        """These have been given new values: copies of them are renewed, and what the optimizer remembers of them is
        forgotten. They must be whole parameter groups. Communicates nothing."""


def build_engine(
    name: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    group: Group,
    alone: dist.ProcessGroup | None,
) -> NetworkEngine:
    """The engine that `config.engine` names. `alone` is this rank's own group (see Groups)."""
    keep_freed_memory()
    if config.engine == "torch":
        return TorchEngine(name, network, optimizer, config, group)
    from coe_dist.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(name, network, optimizer, config, group, alone)


def zero_loss(network: nn.Module) -> torch.Tensor:
    """0 times the sum of all parameters: gives every parameter a zero gradient without calling the network."""
    return torch.stack([parameter.sum() for parameter in network.parameters() if parameter.requires_grad]).sum() * 0.0


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where the precision asks for it (BatchNorm statistics stay fp32)."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def wide(logits: torch.Tensor) -> torch.Tensor:
    """Losses are computed in at least float32, whatever autocast produced."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def fill_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros for parameters that the loss did not reach, so that the size of the group makes no difference to them."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """2-norm over all elements of tensors of one device, a scalar; a third of the time of torch's function of this
    name, which first groups them by device."""
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm


def clip_gradients(gradients: list[torch.Tensor], norm: float, limit: float) -> None:
    """Scales gradients of this norm to at most `limit`, with torch's rule limit / (norm + 1e-6)."""
    factor = limit / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(gradients, factor)


class TorchEngine:
    """Plain torch: one flat all-reduce per network and step."""

    def __init__(
        self, name: str, network: nn.Module, optimizer: torch.optim.Optimizer, config: TrainingConfig, group: Group
    ) -> None:
        self.name, self.network, self.group = name, network, group
        self.optimizer, self.clip_norm, self.precision = optimizer, config.clip_norm, config.precision
        self.grad_norm = 0.0
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._device = self._parameters[0].device

    def __call__(self, images: torch.Tensor) -> Any:
        with autocast(self.precision, self._device):
            return self.network(images)

    def backward(self, loss: torch.Tensor | None, *, last: bool) -> None:
        (zero_loss(self.network) if loss is None else loss).backward()  # type: ignore[no-untyped-call]
        if not last:
            return
        fill_gradients(self._parameters)
        if self.group.handle is not None:
            flat = torch.cat([grad.reshape(-1) for grad in gradients_of(self._parameters)])
            self.group.all_reduce_sum(flat).div_(self.group.size)
            for parameter, part in zip(
                self._parameters, torch.split(flat, [parameter.numel() for parameter in self._parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter)

    def step(self) -> bool:
        gradients = gradients_of(self._parameters)
        self.grad_norm = float(total_norm(gradients))
        finite = math.isfinite(self.grad_norm)
        if finite:
            if self.clip_norm is not None:
                clip_gradients(gradients, self.grad_norm, self.clip_norm)
            self.optimizer.step()
        self.zero_grad()
        return finite

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def set_learning_rate(self, learning_rate: float) -> None:
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = learning_rate

    def optimizer_state(self, *, wanted: bool = True) -> State:
        return full_state(self.network, self.optimizer) if wanted else {}

    def load_optimizer_state(self, state: State) -> None:
        set_full_state(self.network, self.optimizer, state)

    def restart(self, parameters: list[nn.Parameter]) -> None:
        forget_state(self.optimizer, parameters)


def named_trainable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in network.named_parameters() if p.requires_grad)


def forget_state(optimizer: torch.optim.Optimizer, keys: Iterable[torch.Tensor]) -> None:
    """Sets the state of some parameters to zero, which is what all our optimizers begin with."""
    for key in keys:
        for value in optimizer.state.get(key, {}).values():
            if torch.is_tensor(value):
                value.zero_()


def full_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Optimizer state of an unpartitioned optimizer, by parameter name, cloned to the CPU."""
    return {
        name: {
            key: torch.as_tensor(value).detach().cpu().clone()
            for key, value in optimizer.state[parameter].items()
            if value is not None
        }
        for name, parameter in named_trainable(network)
        if parameter in optimizer.state
    }


def set_full_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    for name, parameter in named_trainable(network):
        if name in state:
            # torch keeps `step` counters on the CPU, everything else beside the parameter
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in state[name].items()
            }
