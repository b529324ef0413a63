"""The problems of a step, solved by a router process of its own: `router.where: process`.

1. Rank 0 holds a Channel to the router process: a child process (router_process.py), or whatever an orchestrator opens
   instead. It submits logits (and later losses) and goes on; the other ranks have no channel.
2. When an answer is needed, rank 0 waits for it and broadcasts one row of numbers: a status, then the answer. Labels
   are submitted before the experts' backward pass and needed after it, so that they are solved meanwhile.
3. A status other than 0 is the length of an error message, which a second broadcast carries: the death of the router
   process ends the step on every rank with the same named TrainingError, and never leaves a rank waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from coe_dist.errors import TrainingError
from coe_dist.parallel.groups import Group
from coe_dist.parallel.solvers import Problems

Array = NDArray[Any]


class Channel(Protocol):
    """Rank 0's line to a router process, which solves the requests in the order of their submission."""

    def submit(self, kind: str, arrays: tuple[Array, ...]) -> Any:
        """Sends a request of answer() and returns its ticket at once; never raises because the process is gone."""

    def result(self, ticket: Any, timeout_seconds: float) -> Array:
        """Waits for the answer. Raises TrainingError `router process (pid N) ended: ...` when the process is gone,
        `... failed: ...` when it could not solve the request, `... gave no answer in ... s` after the timeout."""

    def close(self) -> None:
        """Ends the router process; may be called again."""


OpenChannel = Callable[[Problems], Channel]


def answer(problems: Problems, kind: str, arrays: tuple[Array, ...]) -> Array:
    """What the router process does with a request.

    assign: selection float [N,E], ids int64 [N] -> assignment int64 [N].
    labels: losses float [N,k], experts int64 [N,k], ids int64 [N] -> labels float [N,k]. ValueError for another kind.
    """
    tensors = [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays]
    if kind == "assign":
        return problems.assign(*tensors).numpy()
    if kind == "labels":
        return problems.labels(*tensors).numpy()
    raise ValueError(f"router request: {kind!r} is not allowed; give assign or labels")


class ProcessSolver:
    """A Solver (see solvers.py). `channel` is rank 0's, none on every other rank; it is closed with the solver."""

    def __init__(self, channel: Channel | None, world: Group, *, timeout_seconds: float) -> None:
        self.channel, self.world = channel, world
        # rank 0 must tell of a router process that is stuck before the others' broadcast times out
        self.patience_seconds = timeout_seconds / 2

    def assign(self, selection_NE: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return self._share(self._submit("assign", selection_NE, ids_N), ids_N)

    def start_labels(
        self, losses_Nk: torch.Tensor, experts_Nk: torch.Tensor, ids_N: torch.Tensor, sizes: list[int]
    ) -> Callable[[], torch.Tensor]:
        ticket = self._submit("labels", losses_Nk, experts_Nk, ids_N)
        return lambda: self._share(ticket, losses_Nk)

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()

    def _submit(self, kind: str, *tensors: torch.Tensor) -> Any:
        if self.channel is None:
            return None
        return self.channel.submit(kind, tuple(tensor.detach().cpu().numpy() for tensor in tensors))

    def _share(self, ticket: Any, like: torch.Tensor) -> torch.Tensor:
        """The answer to rank 0's ticket on every rank, in the shape, dtype and place of `like`. Raises TrainingError
        on every rank together. Collective."""
        row, message = like.new_zeros(1 + like.numel()), b""
        if self.channel is not None:
            try:
                solved = torch.tensor(self.channel.result(ticket, self.patience_seconds))  # a copy: Ray's is read-only
                row[1:] = solved.flatten().to(row)
            except TrainingError as error:
                message = str(error).encode()
                row[0] = len(message)
        self._broadcast(row)
        length = int(row[0])
        if length:
            letters = torch.tensor(list(message) or [0] * length, dtype=torch.uint8, device=like.device)
            self._broadcast(letters)
            raise TrainingError(bytes(letters.tolist()).decode())
        return row[1:].view(like.shape)

    def _broadcast(self, tensor: torch.Tensor) -> None:
        if self.world.handle is not None:
            with self.world.naming_failures("broadcast of the router process's answer"):
                dist.broadcast(tensor, src=0, group=self.world.handle)
