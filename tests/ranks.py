"""Real processes for tests: runs one function on every rank of a gloo group and fails when any rank fails.

run_ranks(2, "parallel.parity_cases:run", folder)     # tests/parallel/parity_cases.py, def run(folder: Path) -> None
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from coe_dist.leaving import leave

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(world_size: int, target: str, folder: Path) -> list[subprocess.Popen[str]]:
    port = free_port()
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
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("COE_TEST_PATH", "")]),
        }
        log = (folder / f"rank{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, target, str(folder)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def run_ranks(world_size: int, target: str, folder: Path, timeout: float = 500) -> None:
    processes = start_ranks(world_size, target, folder)
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    logs = [(folder / f"rank{rank}.log").read_text()[-4000:] for rank in range(world_size)]
    failed = [
        f"rank {rank} ended with {p.returncode}:\n{logs[rank]}" for rank, p in enumerate(processes) if p.returncode
    ]
    assert not failed, "\n".join(failed)


def _main(target: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(os.environ.get("COE_TEST_BACKEND", "gloo"), timeout=timedelta(seconds=120))
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
    leave()
