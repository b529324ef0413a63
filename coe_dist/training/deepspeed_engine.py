"""Several DeepSpeed engines in one process, made safe.

DeepSpeed keeps the process groups in a module global (`deepspeed.utils.groups.mpu`). At ZeRO stage 0 an engine reads
that global when it reduces, not its own group: with several engines, gradients of one network would silently be
averaged over the ranks of another. So every engine has an mpu of its own, and the global is set to it around each call
that may communicate. Clipping in fp32 at stage 0 averages per-rank norms (DeepSpeed#8475), so we clip there ourselves;
the ZeRO stages clip on the true norm.

At stage 2 an engine reduces gradients while they come, in buckets filled by the order in which they come. That order is
not the same on all ranks: one without images has no backward pass through the network, and an empty batch takes other
operations. A rank would add one parameter's gradient to another's, without an error. So gradients are computed first
and then given to DeepSpeed in the parameters' order.

A collaboration has many small networks, so what DeepSpeed does per network and step counts. Left out where nothing
needs it: averaging a lone rank's gradients with itself (0.25 ms per network and step on one CPU core), walking the
module tree for the list of parameters (0.04 ms), timers and the hooks that start them (0.02 ms), dividing the loss by
one micro-batch (0.01 ms), nn.Module's bookkeeping for each flag and counter that is set (0.1 ms).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from coe_dist.config import TrainingConfig
from coe_dist.errors import InputError
from coe_dist.parallel.groups import Group
from coe_dist.training.engines import (
    State,
    autocast,
    clip_gradients,
    fill_gradients,
    forget_state,
    full_state,
    gradients_of,
    named_trainable,
    set_full_state,
    total_norm,
    zero_loss,
)
from coe_dist.training.in_order import in_order


def prepare_deepspeed() -> Any:
    """Imports DeepSpeed quietly and without compiling anything on a CPU machine; call before any engine is built.

    On CPU the first init would compile `deepspeed_shm_comm` for minutes, and a killed build leaves a lock that hangs
    every later start (pytorch#189245).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class NetworkGroups:
    """The mpu object of one engine: data-parallel over the network's group, no model parallelism."""

    def __init__(self, data: dist.ProcessGroup, ranks: tuple[int, ...], alone: dist.ProcessGroup) -> None:
        self._data, self._ranks, self._alone = data, ranks, alone

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._ranks)

    def get_data_parallel_world_size(self) -> int:
        return len(self._ranks)

    def get_data_parallel_rank(self) -> int:
        return self._ranks.index(dist.get_rank())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone  # a singleton: DeepSpeed reduces the gradient norm over it

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


class ListedNetwork(nn.Module):
    """A network as DeepSpeed gets it: at stage 0 it asks for all parameters in every step, and finds them listed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._listed = list(super().named_parameters())

    def forward(self, images: torch.Tensor) -> Any:
        return self.network(images)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if prefix or not recurse or not remove_duplicate:
            return super().named_parameters(prefix, recurse, remove_duplicate)
        return iter(self._listed)


def _without_bookkeeping(kind: type[nn.Module]) -> type[nn.Module]:
    """DeepSpeed's engine is an nn.Module and sets 17 attributes a step; those that are only numbers and flags need not
    be searched for among its parameters, buffers and modules."""

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if value is None or type(value) in (bool, int, float):
            object.__setattr__(self, name, value)
        else:
            nn.Module.__setattr__(self, name, value)

    return type(kind.__name__, (kind,), {"__setattr__": set_attribute})


class DeepSpeedEngine:
    """One network under DeepSpeed at ZeRO stage 0, 1 or 2."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        group: Group,
        alone: dist.ProcessGroup | None,
    ) -> None:
        deepspeed = prepare_deepspeed()
        from deepspeed.utils import groups as deepspeed_groups

        if alone is None:
            raise InputError(
                "training.engine: deepspeed needs torch.distributed to be initialised, also for one process"
            )
        self.name, self.network, self.group, self.stage = name, network, group, config.zero_stage
        self.grad_norm = 0.0
        self.clip_norm, self._precision = config.clip_norm, config.precision
        self._groups = deepspeed_groups
        self._mpu = NetworkGroups(group.handle or alone, group.ranks, alone)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the caller scales by 1/G and says which micro-batch is the last
            "train_batch_size": group.size,
            "zero_optimization": {"stage": self.stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": config.clip_norm or 0.0 if self.stage > 0 else 0.0,
            "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
            "steps_per_print": 2**31,
            "timers": {"throughput": {"enabled": False}},  # on a GPU it waits for the device twice a step
        }
        self._activate()
        self.engine, _, _, _ = deepspeed.initialize(
            model=ListedNetwork(network), optimizer=optimizer, config=settings, mpu=self._mpu
        )
        assert self.engine.dp_world_size == group.size, "DeepSpeed took another group's size"
        self._parameters = [parameter for _, parameter in named_trainable(network)]
        self._device = self._parameters[0].device
        self._in_order = self.stage == 2 and group.handle is not None
        if self.stage == 0 and group.handle is None:
            self.engine.enable_backward_allreduce = False  # nothing to average
        # they start and stop timers and profilers that are off (and cast for fp16 and ZeRO 3, which are not offered)
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        self.engine.__class__ = _without_bookkeeping(type(self.engine))

    def _activate(self) -> None:
        self._groups.mpu = self._mpu

    def __call__(self, images: torch.Tensor) -> Any:
        self._activate()
        if self._in_order:  # DeepSpeed would take the pass that computes the gradients for one that reduces them
            with autocast(self._precision, self._device):
                return self.network(images)
        return self.engine(images)

    def backward(self, loss: torch.Tensor | None, *, last: bool) -> None:
        self._activate()
        self.engine.set_gradient_accumulation_boundary(last)
        loss = zero_loss(self.network) if loss is None else loss
        if self._in_order:
            loss = in_order(loss, self._parameters)
        with self.group.naming_failures("gradient reduction"):
            self.engine.backward(loss, scale_wrt_gas=False)
        if last and self.stage == 0:
            fill_gradients(self._parameters)

    def step(self) -> bool:
        self._activate()
        if self.stage == 0:
            gradients = gradients_of(self._parameters)
            self.grad_norm = float(total_norm(gradients))
            if not math.isfinite(self.grad_norm):
                self.zero_grad()
                return False
            if self.clip_norm is not None:
                clip_gradients(gradients, self.grad_norm, self.clip_norm)
        with self.group.naming_failures("optimizer step"):
            self.engine.step()
        if self.stage > 0:
            self.grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
            return not bool(self.engine.optimizer.overflow)
        return True

    def zero_grad(self) -> None:
        self._activate()
        if self.stage == 0:
            self.engine.zero_grad()
            return
        self.engine.optimizer.zero_grad(set_to_none=True)
        for index in self.engine.optimizer.averaged_gradients:
            self.engine.optimizer.averaged_gradients[index] = None

    def set_learning_rate(self, learning_rate: float) -> None:
        for param_group in self.engine.optimizer.param_groups:
            param_group["lr"] = learning_rate

    def optimizer_state(self, *, wanted: bool = True) -> State:
        self._activate()
        if self.stage == 0:
            return full_state(self.network, self.engine.optimizer) if wanted else {}
        from deepspeed.utils import safe_get_full_optimizer_state

        names = {parameter: name for name, parameter in named_trainable(self.network)}
        state: State = {}
        for parameters, entries in self._linked_groups():
            scalars = {key: value for key, value in entries.items() if value.ndim == 0}
            for parameter in parameters:
                full = {key: safe_get_full_optimizer_state(parameter, key) for key in entries if key not in scalars}
                if wanted:
                    state[names[parameter]] = {
                        key: value.detach().cpu().clone() for key, value in {**full, **scalars}.items()
                    }
        return state

    def _linked_groups(self) -> list[tuple[list[nn.Parameter], dict[str, torch.Tensor]]]:
        """Per parameter group of the ZeRO optimizer: its parameters, and the state of this rank's flat partition.

        DeepSpeed links parameters to the state once, before SGD has its momentum; here they are linked anew.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.engine.optimizer
        groups = []
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)
            entries = {key: value for key, value in zero.optimizer.state[flat].items() if torch.is_tensor(value)}
            groups.append((parameters, entries))
        return groups

    def load_optimizer_state(self, state: State) -> None:
        """Must follow the loading of the weights: ZeRO steps from copies of its own, which are renewed here."""
        self._activate()
        if self.stage == 0:
            set_full_state(self.network, self.engine.optimizer, state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.engine.optimizer
        zero.refresh_fp32_params()
        if not state:
            return
        names = {parameter: name for name, parameter in named_trainable(self.network)}
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for key, value in state.get(names[parameters[0]], {}).items():
                zero.optimizer.state[flat][key] = value.clone() if value.ndim == 0 else torch.zeros_like(flat)
        for parameters, _ in self._linked_groups():
            for parameter in parameters:
                for key, value in state.get(names[parameter], {}).items():
                    if value.ndim > 0:
                        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def restart(self, parameters: list[nn.Parameter]) -> None:
        if self.stage == 0:
            forget_state(self.engine.optimizer, parameters)
            return
        zero, given = self.engine.optimizer, {id(parameter) for parameter in parameters}
        zero.refresh_fp32_params()
        for members, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            found = [id(parameter) in given for parameter in members]
            assert all(found) or not any(found), "a parameter group restarts as a whole"
            if found[0]:
                forget_state(zero.optimizer, [flat])
