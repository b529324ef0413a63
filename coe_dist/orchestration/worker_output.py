"""Where a worker's output goes: everything to <run_dir>/logs/rank-0000.log, our own warnings also to the driver."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

_WARNINGS = "warnings.log"


def worker_log(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank:04d}.log"


def warnings_log(run_dir: Path) -> Path:
    """Where all ranks append the warnings of the package's loggers, one a line."""
    return run_dir / "logs" / _WARNINGS


def redirect_output(run_dir: Path, rank: int) -> None:
    """Sends this process's standard output and error, those of its C libraries included, to its log file."""
    path = worker_log(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    handler = logging.FileHandler(warnings_log(run_dir))
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
    logging.getLogger("coe_dist").addHandler(handler)
