"""How the workers of Ray Train meet in torch.distributed.

Ray Train's own backend announces the machine's outward address also when all workers share one machine; ours keeps a
single-machine run on 127.0.0.1. Everything else a worker finds is what torchrun would give it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

if TYPE_CHECKING:
    from ray.train._internal.base_worker_group import BaseWorkerGroup


class MeetingBackend(Backend):  # type: ignore[misc]
    """Sets torchrun's environment variables on every worker and initialises the default process group."""

    # A worker sees all GPUs of its machine's workers and takes the one of LOCAL_RANK, as under torchrun (ray#37212).
    share_cuda_visible_devices = True

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: MeetingConfig) -> None:
        address, port = worker_group.execute_single(0, _meeting_point, backend_config.loopback)
        joining = [
            worker_group.execute_single_async(
                rank, _join, address, port, backend_config.backend, float(backend_config.timeout_s)
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joining)


@dataclass
class MeetingConfig(TorchConfig):  # type: ignore[misc]
    """`backend` gloo or nccl, `timeout_s` of every collective, `loopback`: all workers are on this machine."""

    loopback: bool = False

    @property
    def backend_cls(self) -> type[MeetingBackend]:
        return MeetingBackend


def _meeting_point(loopback: bool) -> tuple[str, int]:
    """Runs on rank 0: the address and a free port where the ranks meet."""
    address = "127.0.0.1" if loopback else str(ray.util.get_node_ip_address())
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return address, int(probe.getsockname()[1])


def _join(address: str, port: int, backend: str, timeout_seconds: float) -> None:
    """Runs on every rank: the environment of torchrun, then the default process group."""
    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        GROUP_RANK=str(context.get_node_rank()),
    )
    if backend == "nccl":
        torch.cuda.set_device(context.get_local_rank())
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
