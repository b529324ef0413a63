"""When Ray Train starts the workers again, and with how many: our rules in place of its defaults.

Both objects live in Ray Train's controller, a process of its own on the driver's machine. What they have to say goes to
the file of the workers' warnings, which the driver relays (see worker_output.py).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray._private.state import available_resources_per_node
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from coe_dist.orchestration.failures import restartable, root_cause, tells_of_a_loss, write_account
from coe_dist.orchestration.worker_output import warnings_log
from coe_dist.training.stopping import preempted_at, stop_wished

_STARTUP_ATTEMPTS = 3  # in a row; a machine that dies can take a start or two with it before Ray knows
_ASK_SECONDS = 1.0
_NEW_WAIT_SECONDS = 30.0  # later than that the workers have run in between


class NoRoomError(Exception):
    """The workers found no free cores (or GPUs) in time."""


class Patience:
    """How long the workers of a job may wait for room: less before they have run for the first time.

    Ray Train's controller gets both policies as pickles of their own; the waits they see are one all the same.
    """

    _of_jobs: ClassVar[dict[str, Patience]] = {}  # of this process

    def __init__(self, job: str, first_seconds: float, again_seconds: float) -> None:
        self._arguments = (job, first_seconds, again_seconds)
        self.seconds, self._again = first_seconds, again_seconds
        self._since = self._asked = float("-inf")

    def __reduce__(self) -> tuple[Any, ...]:
        return Patience._shared, self._arguments

    @staticmethod
    def _shared(job: str, first_seconds: float, again_seconds: float) -> Patience:
        return Patience._of_jobs.setdefault(job, Patience(job, first_seconds, again_seconds))

    def more(self) -> None:
        """The workers have run: the wait is over, and the next one may be longer."""
        self.seconds = self._again
        self._since = self._asked = float("-inf")

    def begins(self, spent: float) -> bool:
        """There was no room for the last `spent` seconds. Returns whether that is the beginning of a wait."""
        now = time.monotonic()
        begins = now - self._asked > spent + _NEW_WAIT_SECONDS
        if begins:
            self._since = now - spent
        self._asked = now
        return begins

    @property
    def exhausted(self) -> bool:
        return self._asked - self._since >= self.seconds


class RestartPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Restarts after the death of a process or node, `max_failures` times, and for nothing else (our own rule).

    Bad input, a loss that is not finite, a full disk or a bug would only happen again. A node that Ray is told of
    before it goes (a drain) costs nothing, nor does waiting for room.
    """

    def __init__(self, failure_config: FailureConfig, run_dir: Path, patience: Patience) -> None:
        super().__init__(failure_config)
        self._run_dir, self._patience = run_dir, patience
        self._failures = self._failed_starts = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error = training_failed_error
        if isinstance(error, PreemptionError):
            self._patience.more()
            self._failed_starts = 0
            return self._after_drain()
        if isinstance(error, WorkerGroupError):
            self._patience.more()
            self._failed_starts = 0
            if _is_preemption_failure(error):
                return self._after_drain()
            return self._after_failures(error.worker_failures)
        cause = error.controller_failure if isinstance(error, ControllerError) else None
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return self._without_room(cause.num_workers)
        if _died_while_starting(cause):
            return self._after_failed_start()
        return FailureDecision.RAISE

    def _after_drain(self) -> FailureDecision:
        _say(self._run_dir, "a machine is taken away; restarting from the newest checkpoint")
        return FailureDecision.RETRY

    def _after_failures(self, failures: dict[int, Exception]) -> FailureDecision:
        allowed = self.failure_config.max_failures
        saved_to_end = preempted_at(self._run_dir) is not None  # nobody is missed any more
        if saved_to_end or not restartable(failures) or self._failures >= allowed:
            return FailureDecision.RAISE
        self._failures += 1
        write_account(self._run_dir, failures)
        _say(
            self._run_dir,
            f"a worker died ({root_cause(failures)}); restarting from the newest checkpoint, "
            f"failure {self._failures} of {allowed}",
        )
        return FailureDecision.RETRY

    def _after_failed_start(self) -> FailureDecision:
        self._failed_starts += 1
        if self.failure_config.max_failures == 0 or self._failed_starts >= _STARTUP_ATTEMPTS:
            return FailureDecision.RAISE
        _say(self._run_dir, f"a worker died while starting; attempt {self._failed_starts + 1} of {_STARTUP_ATTEMPTS}")
        return FailureDecision.RETRY

    def _without_room(self, workers: int) -> FailureDecision:
        if self._patience.begins(float(os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR])):
            _say(self._run_dir, f"waiting for room for {_workers(workers)}")
        return FailureDecision.RAISE if self._patience.exhausted else FailureDecision.RETRY


class GrowAfterSave(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's elastic number of workers, by our own rules.

    1. Growing restarts all workers from the newest checkpoint, so they grow only just after one was saved, at most
       every `elastic_resize_monitor_interval_s`, and neither when only the last evaluation is left nor when they are to
       stop.
    2. Fewer than the configured minimum wait for machines, but not for ever.
    3. What is counted is fresh, and after a start that found no room it is what is really free.
    """

    def __init__(self, scaling_config: ScalingConfig, run_dir: Path, patience: Patience, *, epochs: int) -> None:
        super().__init__(scaling_config)
        self._run_dir, self._patience, self._epochs = run_dir, patience, epochs
        self._latest = run_dir / "checkpoints" / "latest"
        self._seen = ""
        self._failed_starts = 0

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ReschedulingState):
            self._failed_starts += 1
        elif isinstance(current_state, RunningState) and not isinstance(previous_state, RunningState):
            self._failed_starts, self._seen = 0, self._newest()
            self._patience.more()

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            fewest = _workers(self.scaling_config.min_workers)
            if self._patience.begins(0.0):
                _say(self._run_dir, f"waiting for room for {fewest}")
            if self._patience.exhausted:
                raise NoRoomError(f"no room for {fewest}")
            time.sleep(_ASK_SECONDS)  # Ray Train's controller would ask again at once
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._maybe_send_resource_request()
        seen, newest = self._seen, self._newest()
        self._seen = newest
        running = time.monotonic() - worker_group_state.start_time
        if newest == seen or running < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        if stop_wished(self._run_dir) or self._complete(newest):
            return NoopDecision()
        now, reserved = worker_group_state.num_workers, self._get_reserved_resources()
        possible = now if reserved is None else self._count_possible_workers(reserved)
        possible = min(possible, now + self._count_possible_workers(available_resources_per_node()))
        if possible <= now:
            return NoopDecision()
        _say(
            self._run_dir, f"room for {_workers(possible)} instead of {now}; restarting from the checkpoint just saved"
        )
        return self._get_resize_decision(possible)

    def _get_reserved_resources(self) -> Any:
        """Of the machines that Ray believes alive now; its coordinator looks by itself only every 20 s."""
        try:
            return ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True),
                timeout=5,
            )
        except ray.exceptions.RayError:
            return None

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        count = int(super()._count_possible_workers(reserved_resources))
        if self._failed_starts:
            count = min(count, int(super()._count_possible_workers(available_resources_per_node())))
        return count

    def _complete(self, save: str) -> bool:
        try:
            manifest = json.loads((self._latest.parent / save / "manifest.json").read_text())
        except (OSError, ValueError):
            return False
        return int(manifest["epoch"]) >= self._epochs

    def _newest(self) -> str:
        try:
            return self._latest.read_text()
        except OSError:
            return ""


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _died_while_starting(cause: BaseException | None) -> bool:
    if isinstance(cause, ray.exceptions.RayTaskError):  # raised by what a worker does to join the others
        return tells_of_a_loss(cause.cause)
    return isinstance(cause, WorkerGroupStartupFailedError | ray.exceptions.RayActorError)


def _say(run_dir: Path, line: str) -> None:
    path = warnings_log(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{line}\n")
