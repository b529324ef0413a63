"""A wish to stop, from whoever holds the run folder, and the answer of the workers.

RUN/stop-requested asks the workers to save and end; any process that sees the folder may create it. SIGTERM asks the
same of a worker that main() of worker.py started (torchrun passes it on). RUN/preempted ({"step": N}) is the answer:
the run is saved and can be resumed.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from coe_dist.tracking.store import write_json

REQUEST, ANSWER = "stop-requested", "preempted"
_POLL_SECONDS = 0.5
_received = threading.Event()  # SIGTERM


def listen_to_sigterm() -> None:
    """Makes SIGTERM a wish to stop in this process; main thread only. A second SIGTERM ends it."""

    def request(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _received.set()

    _received.clear()
    signal.signal(signal.SIGTERM, request)


def request_stop(run_dir: Path) -> None:
    (run_dir / REQUEST).touch()


def clear_stop(run_dir: Path) -> None:
    """Forgets the wishes and answers of earlier starts. Before any worker starts."""
    for name in (REQUEST, ANSWER):
        (run_dir / name).unlink(missing_ok=True)


def preempted_at(run_dir: Path) -> int | None:
    """The step at which the workers have saved and ended because of a wish to stop; None where they have not."""
    path = run_dir / ANSWER
    return int(json.loads(path.read_text())["step"]) if path.is_file() else None


def stop_wished(run_dir: Path) -> bool:
    """Also when an answer was given already: whoever is started after it has nothing to do."""
    return (run_dir / REQUEST).exists() or (run_dir / ANSWER).exists()


class StopRequest:
    """Looks for the wish, at most twice a second; cheap enough to ask in every step."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._asked = 0.0
        self._wished = False

    def __bool__(self) -> bool:
        if not self._wished and time.monotonic() - self._asked >= _POLL_SECONDS:
            self._asked = time.monotonic()
            self._wished = stop_wished(self._run_dir)
        return self._wished or _received.is_set()

    def answer(self, step: int) -> None:
        """Says that the run is saved at `step`. One rank only, when the save exists."""
        write_json(self._run_dir / ANSWER, {"step": step})
        (self._run_dir / REQUEST).unlink(missing_ok=True)
