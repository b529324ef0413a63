"""Small pieces of work at the same time: one piece alone does not fill the processor or the GPU.

On the processor the pieces go to as many threads as PyTorch would use for one operation, and each thread computes its
piece alone: an operation on few images is too short to be split. On a GPU the pieces go to streams.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

Work = Callable[[torch.Tensor], torch.Tensor]

SMALL_GROUP = 32
"""Images; on a GPU pieces up to this size run side by side (our own choice)."""
_STREAMS = 4


def run_pieces(pieces: Sequence[tuple[Work, torch.Tensor]]) -> list[torch.Tensor]:
    """[work(rows) for work, rows in pieces], side by side where that is faster; all rows on one device.

    Processor: where no piece is longer than a thread's fair share of all rows, so that no thread has to wait for
    another. Autograd is off in the pieces (inference mode); autocast must be entered by the work itself.
    """
    if len(pieces) > 1 and pieces[0][1].is_cuda:
        return _on_streams(pieces)
    threads = torch.get_num_threads()
    sizes = [len(rows) for _, rows in pieces]
    openmp = torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]
    if threads == 1 or max(sizes, default=0) * threads > sum(sizes) or not openmp:
        return [work(rows) for work, rows in pieces]
    longest_first = sorted(range(len(pieces)), key=lambda index: -sizes[index])
    pool = _pool(threads)
    futures = {index: pool.submit(_without_autograd, *pieces[index]) for index in longest_first}
    return [futures[index].result() for index in range(len(pieces))]


def _without_autograd(work: Work, rows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return work(rows)


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread takes over the process's setting when it first needs it: now, not afterwards
    torch.set_num_threads(1)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch computes without helpers of its own."""
    pool = ThreadPoolExecutor(threads, "expert", initializer=_compute_alone)
    all_started = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(threads)  # the pool's setting holds in its threads, but would also be the next new thread's
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads but its own


def _on_streams(pieces: Sequence[tuple[Work, torch.Tensor]]) -> list[torch.Tensor]:
    """Written to CUDA's rules for streams, but not yet run on a GPU by us."""
    device = pieces[0][1].device
    main = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in range(_STREAMS)]  # type: ignore[no-untyped-call]
    for stream in streams:
        stream.wait_stream(main)
    answers = []
    for number, (work, rows) in enumerate(pieces):
        stream = streams[number % _STREAMS] if len(rows) <= SMALL_GROUP else main
        with torch.cuda.stream(stream):
            answer = work(rows)
        if stream is not main:  # memory goes back to its allocator only when both streams are done with it
            rows.record_stream(stream)
            answer.record_stream(main)
        answers.append(answer)
    for stream in streams:
        main.wait_stream(stream)
    return answers
