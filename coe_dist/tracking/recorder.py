"""What rank 0 holds during training: metrics to the run folder at once, to MLflow from a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from coe_dist.config import RunConfig
from coe_dist.tracking.journal import Journal
from coe_dist.tracking.sending import Sender
from coe_dist.tracking.store import redact, uri_of_run

INTERVAL = 2.0  # seconds between two batches
LONGEST_PAUSE = 60.0  # seconds between two tries at a server that does not answer
_log = logging.getLogger("coe_dist.tracking")


class Recorder:
    """Records metrics; no method raises for what happens to the disk, the network or MLflow.

    `run_id` is MLflow's run as start_run gave it; None, or tracking.enabled: false, keeps to metrics.jsonl.
    MLflow is imported, connected and waited for only in the background thread.
    """

    def __init__(self, run_dir: Path, config: RunConfig, run_id: str | None) -> None:
        self._journal = Journal(Path(run_dir))
        self._sending: _Sending | None = None
        if run_id is not None and config.tracking.enabled:
            try:
                self._sending = _Sending(Sender(Path(run_dir), uri_of_run(Path(run_dir), config), run_id))
            except Exception as error:
                _log.warning("MLflow gets no metrics of this run: %s", redact(str(error)))

    def record(
        self, kind: str, *, step: int, epoch: int | None = None, metrics: Mapping[str, Any] | None = None, **extra: Any
    ) -> None:
        """Appends {"kind", "time", "step", "epoch", ...extra, "metrics"} to metrics.jsonl; the thread sends it.

        Values are anything float() takes, non-finite ones too; `step` counts optimizer steps and grows within a run.
        """
        self._journal.append(kind, step=step, epoch=epoch, metrics=metrics, **extra)

    def flush(self, timeout: float = 5.0) -> bool:
        """Waits up to `timeout` seconds until MLflow has everything recorded so far; True where it has.

        Returns False at once while MLflow does not answer. metrics.jsonl needs no flush.
        """
        return True if self._sending is None else self._sending.flush(self._journal.size, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Sends what is left for at most `timeout` seconds; the rest waits for sync(). May be called twice."""
        if self._sending is not None:
            self._sending.close(timeout)
            self._sending = None
        self._journal.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Sending:
    """The background thread. It reads metrics.jsonl, so it shares only flags with the training thread."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._changed = threading.Condition()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._failing = self._warned = False
        self._deadline: float | None = None
        # A daemon: an MLflow call that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._loop, name="mlflow-sender", daemon=True)
        self._thread.start()

    def flush(self, size: int, timeout: float) -> bool:
        if not self._failing:
            self._wake.set()
            with self._changed:
                self._changed.wait_for(lambda: self._sender.offset >= size or self._failing, timeout)
        return self._sender.offset >= size

    def close(self, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive() or self._sender.pending():
            self._warn(f"not everything was sent within {timeout:g} s")

    def _loop(self) -> None:
        pause = INTERVAL
        while True:
            last = self._stop.is_set()  # asked before sending: the last round sees every line
            try:
                self._sender.send(self._deadline)
                self._failing, pause = False, INTERVAL
            except Exception as error:
                self._failing, pause = True, min(LONGEST_PAUSE, 2 * pause)
                self._warn(redact(" ".join(str(error).split()))[:300])
            with self._changed:
                self._changed.notify_all()
            if last:
                return
            self._wake.wait(pause)
            self._wake.clear()

    def _warn(self, cause: str) -> None:
        if not self._warned:
            _log.warning("MLflow does not take the metrics (%s); metrics.jsonl keeps them for later", cause)
        self._warned = True
