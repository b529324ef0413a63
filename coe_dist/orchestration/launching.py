"""`coe-dist launch`: a training as a job of a Ray cluster."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from coe_dist.config import RunConfig, load_config
from coe_dist.errors import EXIT_INTERRUPTED, EXIT_OK, InputError, TrainingError
from coe_dist.orchestration.job_cluster import JobCluster, job_cluster
from coe_dist.orchestration.job_log import follow as follow_log
from coe_dist.orchestration.job_package import package_settings
from coe_dist.orchestration.job_record import Attempt, attempts, exit_code_of, metadata, newest_attempt, submission_id
from coe_dist.orchestration.jobs import stop

FOLDER_VARIABLE = "COE_DIST_FOLDER"
_STOP_SECONDS = 90  # beyond training.timeout_seconds, which the last step and its save may take; a store takes some


def launch(
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    env: Sequence[str] = (),
    folder: str | None = None,
    wait: bool = True,
) -> int:
    """Runs `coe-dist train` with this configuration on the head of a cluster; returns the exit code of that command.

    The current folder travels with the job (job_package). Relative paths of the configuration are taken below
    `folder`, which every machine of the cluster must see; by default the head's COE_DIST_FOLDER, else ~/coe_dist.
    env: KEY=VALUE, or KEY for its value here. wait: follow the log to the job's end; Ctrl-C leaves the job running.
    A run that was launched before and has ended is resumed as a new attempt; one that still runs is followed.
    Raises InputError before anything is uploaded, TrainingError when the cluster is lost later.
    """
    config = load_config(config_path, overrides)
    project = Path.cwd()
    relative = _inside(config_path, project)
    variables = environment_of(env)
    cluster = job_cluster(address)
    settings = _digest(config, variables, folder)
    own = [attempt for attempt in attempts(cluster) if attempt.run == config.name]
    newest = max(own, key=lambda attempt: attempt.number, default=None)
    if newest is not None and newest.active:
        _refuse_other(newest, settings, cluster)
        _say(f"{config.name} is running already (attempt {newest.number})" + ("; following it" if wait else ""))
        job = newest.submission_id
    else:
        number = 1 if newest is None else newest.number + 1
        job = submission_id(config.name, number)
        runtime = package_settings(project, config)
        runtime["env_vars"] = _job_variables(cluster, config) | variables
        _submit(cluster, job, _command(relative, overrides, folder), runtime, metadata(config.name, number, settings))
        if newest is not None:
            _say(f"{config.name}: attempt {number}; attempt {newest.number} has {newest.status.lower()}, it is resumed")
        _say(f"launched {config.name} as {job} on {cluster.address}")
    if not wait:
        _say(f"follow it: coe-dist logs {config.name} --follow --address {cluster.address}")
        return EXIT_OK
    return watch(cluster, config.name, job)


def watch(cluster: JobCluster, run: str, job: str, write: Callable[[str], object] | None = None) -> int:
    """Prints the job's log to its end and returns its exit code. Ctrl-C asks whether to stop the job, and detaches."""
    try:
        details = follow_log(cluster, job, write or _print)
    except KeyboardInterrupt:
        return _detach(cluster, run)
    if str(details.status) == "STOPPED":
        _say(f"{run} was stopped; the same launch resumes it")
    elif str(details.status) == "FAILED" and details.driver_exit_code is None:
        raise TrainingError(f"{run} did not start: {' '.join(str(details.message).split())[-600:]}")
    return exit_code_of(details)


def show_log(run: str, *, address: str | None = None, to_the_end: bool = False) -> int:
    """Prints the log of the newest launch of `run`; `to_the_end` follows it and returns its exit code."""
    cluster = job_cluster(address)
    job = newest_attempt(cluster, run).submission_id
    if to_the_end:
        return watch(cluster, run, job)
    with cluster.asking():
        _print(cluster.client.get_job_logs(job))
    return EXIT_OK


def environment_of(pairs: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE as given, KEY with its value in this environment (which keeps secrets out of the shell's history)."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"--env: {name!r} is not allowed; give KEY=VALUE, or KEY to take its value from here")
        if not equals:
            if name not in os.environ:
                raise InputError(f"--env: {name} is not set here; give {name}=VALUE")
            value = os.environ[name]
        found[name] = value
    return found


def _inside(config_path: Path, project: Path) -> Path:
    path = config_path.absolute()
    if not path.resolve().is_relative_to(project.resolve()):
        raise InputError(f"{config_path}: it must lie below the current folder ({project}), which the job gets")
    return path.relative_to(project) if path.is_relative_to(project) else path.resolve().relative_to(project.resolve())


def _digest(config: RunConfig, variables: dict[str, str], folder: str | None) -> str:
    text = json.dumps([config.digest(), sorted(variables.items()), folder])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse_other(newest: Attempt, settings: str, cluster: JobCluster) -> None:
    if newest.settings != settings:
        raise InputError(
            f"name: {newest.run} is running on {cluster.address} with other settings; give another --name, or "
            f"coe-dist stop {newest.run} first"
        )


def _job_variables(cluster: JobCluster, config: RunConfig) -> dict[str, str]:
    wait = int(config.training.timeout_seconds) + _STOP_SECONDS  # after SIGTERM and before SIGKILL; Ray's own is 3
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(wait)}
    return variables if cluster.token else variables | {"RAY_AUTH_MODE": "disabled"}


def _command(config: Path, overrides: Sequence[str], folder: str | None) -> str:
    """For the head's shell. `exec`: the signal that stops a job must reach python, and once."""
    place = shlex.quote(folder) if folder else f'"${{{FOLDER_VARIABLE}:-$HOME/coe_dist}}"'
    given = " ".join(shlex.quote(word) for word in (config.as_posix(), *overrides))
    return f'exec "${{COE_DIST_PYTHON:-python}}" -m coe_dist train {given} --address auto --folder {place}'


def _submit(cluster: JobCluster, job: str, command: str, runtime: dict[str, object], marks: dict[str, str]) -> None:
    with cluster.asking():
        cluster.client.submit_job(entrypoint=command, submission_id=job, runtime_env=runtime, metadata=marks)


def _detach(cluster: JobCluster, run: str) -> int:
    if sys.stdin.isatty():
        try:
            print(file=sys.stderr)
            if input(f"Stop {run} too? [y/N] ").strip().lower() in ("y", "yes"):
                _say(stop(run, address=cluster.address, cluster=cluster))
                return EXIT_INTERRUPTED
        except (KeyboardInterrupt, EOFError):
            print(file=sys.stderr)
    _say(f"detached; {run} goes on: coe-dist logs {run} --follow, coe-dist stop {run}")
    return EXIT_INTERRUPTED


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
