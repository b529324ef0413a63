"""What a system does for one batch besides multiplying: how many operations it calls, and how many bytes they move.

On a processor a call has a fixed cost, and an operation of few multiply-adds for each byte waits for memory; at equal
MACs these two make the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coe_dist.bench.inference_systems import Batch, Run


def count_work(run: Run, batch: Batch) -> dict[str, int]:
    """operations: calls of PyTorch's operators that compute something; views and allocations do not count.
    bytes: of their inputs and outputs, each read or written once: what must move when nothing stays in a cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pieces would go to other threads, where the counter does not see them
    try:
        with torch.no_grad(), _Counter() as counter:
            run(batch)
    finally:
        torch.set_num_threads(threads)
    return {"operations": counter.operations, "bytes": counter.bytes}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(output))
        changes = func._schema.is_mutable
        if changes or (inputs and any(_memory(tensor) not in map(_memory, inputs) for tensor in outputs)):
            self.operations += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in inputs + outputs)
        return output


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _memory(tensor: torch.Tensor) -> object:
    """What two views of the same memory have in common."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
