"""Where a worker's output goes: everything to <run_dir>/logs/rank-0000.log, our own warnings also to the driver."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from coe_dist.orchestration.tail import FileTail

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
    _log_own_warnings()


def _log_own_warnings() -> None:
    """Sends warnings.warn of this package's files to its loggers; those of libraries only reach the log file."""
    package, show = str(Path(__file__).resolve().parents[1]), warnings.showwarning

    def log_or_show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if filename.startswith(package):
            logging.getLogger("coe_dist").warning("%s", message)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = log_or_show


@contextmanager
def relaying_warnings(run_dir: Path, *, every_seconds: float = 0.5) -> Iterator[None]:
    """While the block runs, the workers' new warnings reach the driver's logger `coe_dist.worker`."""
    tail, ended = FileTail(warnings_log(run_dir)), threading.Event()
    logger = logging.getLogger("coe_dist.worker")

    def relay() -> None:
        while not ended.wait(every_seconds):
            pass_on()

    def pass_on() -> None:
        for line in tail.new_lines():
            logger.warning("%s", line)

    thread = threading.Thread(target=relay, name="worker warnings", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        pass_on()
