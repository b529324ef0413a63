"""Our piecewise linear unit against SiLU: forward and backward together on the CPU, float32, one thread.

seconds: the processor time of the calling thread, the least of many repetitions that take turns with the peer's; so a
busy machine changes little. One thread is what a worker has by default; with more, what else runs decides both times.
Our backward includes the gradients of all parameters, SiLU has none. The peer's "ratio" is its time / ours, as
everywhere; "times_silu" of ours is the inverse.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from coe_dist.bench.record import Record, case, machine, versions
from coe_dist.coe.pwlu import PWLU, realign, take_sums, track

SHAPES = [(64, 16, 56, 56), (64, 96, 14, 14), (64, 64, 7, 7)]


def run_pwlu_bench(*, quick: bool = False) -> Record:
    """Measures all cases; quick: the smallest shape, few repetitions. record.py has the answer's form."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = [
            _measure(shape, mode, 3 if quick else 30)
            for shape in (SHAPES[-1:] if quick else SHAPES)
            for mode in ("channel", "layer")
        ]
    finally:
        torch.set_num_threads(before)
    return {
        "name": "pwlu",
        "machine": machine(),
        "versions": versions("coe-dist", "torch", "numba"),
        "cases": cases,
    }


def _measure(shape: tuple[int, ...], mode: str, repeats: int) -> Record:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).requires_grad_()
    gradient = torch.randn(shape, generator=generator)
    unit = PWLU(shape[1] if mode == "channel" else None)
    unit(images)
    track(unit, take_sums(unit))
    realign(unit)

    def ours() -> None:
        images.grad = None
        unit.zero_grad()
        torch.autograd.backward(unit(images), gradient)

    def silu() -> None:
        images.grad = None
        torch.autograd.backward(F.silu(images), gradient)

    seconds, peer = _least(ours, silu, repeats)
    return case(
        {"shape": list(shape), "mode": mode},
        {"seconds": seconds, "times_silu": seconds / peer},
        {"silu": {"seconds": peer}},
    )


def _least(ours: Callable[[], None], peer: Callable[[], None], repeats: int) -> tuple[float, float]:
    least = [float("inf"), float("inf")]
    for repeat in range(-2, repeats):  # the first two warm up
        for place, work in enumerate((ours, peer)):
            start = time.thread_time()
            work()
            if repeat >= 0:
                least[place] = min(least[place], time.thread_time() - start)
    return least[0], least[1]
