"""Starts the processes of a distributed benchmark on the loopback device, and brings their figures back in a file.

A benchmark's module for the processes ends in `if __name__ == "__main__": serve(measure)`; every rank calls
`measure(request)` inside a gloo group of all ranks with one thread each, and what rank 0 returns is the answer.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

from coe_dist.bench.record import Record
from coe_dist.children import search_path
from coe_dist.errors import TrainingError
from coe_dist.leaving import leave

Seconds = tuple[float, float]  # wall seconds of the slowest rank, CPU seconds of all ranks together


def measure_in_ranks(module: str, world_size: int, request: Record, *, timeout_seconds: float) -> Record:
    """Runs `python -m module` on `world_size` ranks and returns rank 0's answer to the request (both as JSON).

    Raises TrainingError with the last line of a rank's output when one fails or time is out; all are then ended.
    """
    with tempfile.TemporaryDirectory(prefix="coe-dist-bench-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        processes = _start(module, world_size, folder)
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes) or time.monotonic() > deadline:
                    break  # the others would wait for a lost rank in vain
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        for rank, process in sorted(enumerate(processes), key=lambda pair: (pair[1].returncode or 0) <= 0):
            if process.returncode:  # a rank that failed by itself comes before those we ended
                lines = (folder / f"rank{rank}.log").read_text().strip().splitlines() or ["no output"]
                raise TrainingError(f"{module}: rank {rank} ended with {process.returncode}: {lines[-1]}")
        answer: Record = json.loads((folder / "answer.json").read_text())
        return answer


def _start(module: str, world_size: int, folder: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": search_path(),
        }
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(folder)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return processes


def serve(measure: Callable[[Record], Record]) -> None:
    """What a process of the benchmark runs."""
    import torch
    import torch.distributed as dist

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    answer = measure(json.loads((folder / "request.json").read_text()))
    if dist.get_rank() == 0:
        (folder / "answer.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()
    leave()


def alternate(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Seconds]]:
    """Times every work in turn, `repeats` rounds, so that what else the machine does meets all of them alike.

    Collective: the ranks start each work together.
    """
    import torch
    import torch.distributed as dist

    taken: dict[str, list[Seconds]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            mine = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64)
            every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(every, mine)
            taken[name].append((max(float(one[0]) for one in every), sum(float(one[1]) for one in every)))
    return taken


def summary(taken: list[Seconds]) -> Record:
    """Medians {"seconds", "cpu_seconds"}, "spread" = (slowest - fastest) / median, and "fastest_seconds", which tells
    more than the median where the machine has other work."""
    wall = [one[0] for one in taken]
    median = statistics.median(wall)
    return {
        "seconds": median,
        "spread": (max(wall) - min(wall)) / median if median else 0.0,
        "fastest_seconds": min(wall),
        "cpu_seconds": statistics.median(one[1] for one in taken),
    }


def slowest_seconds(
    work: Callable[[], object],
    *,
    prepare: Callable[[], object] = lambda: None,
    wait: Callable[[], object] = lambda: None,
    at_least: int = 5,
    budget: float = 0.15,
) -> float:
    """Seconds of one call on the slowest rank: median of `at_least` calls, or of up to 100 within `budget` seconds.

    prepare: before each call, not timed. wait: for a device to finish. A first call is not counted. Collective.
    """
    import torch
    import torch.distributed as dist

    taken: list[float] = []
    repeats = at_least
    began = time.perf_counter()
    while len(taken) <= repeats:
        prepare()
        wait()
        dist.barrier()
        start = time.perf_counter()
        work()
        wait()
        slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        taken.append(float(slowest))
        if len(taken) == 2:  # the first call allocates, or compiles
            elapsed = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)  # all ranks repeat as often
            repeats = min(100, max(at_least, int(2 * budget / float(elapsed))))
    return statistics.median(taken[1:])
