"""MLflow's runs, for the process that starts the workers: create or reopen, finish, artifacts, sync."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from coe_dist.config import RunConfig
from coe_dist.errors import InputError
from coe_dist.tracking.sending import Sender
from coe_dist.tracking.store import (
    RUN_FILE,
    TAG_LIMIT,
    connect,
    cut,
    flatten,
    legal_name,
    read_json,
    redact,
    tracking_uri,
    uri_of_run,
    write_json,
)

Status = Literal["FINISHED", "FAILED", "KILLED"]
ITEMS_A_REQUEST = 100  # parameters or tags; MLflow refuses more
FINISH_SECONDS = 10.0  # how long finish_run sends what the workers left
_log = logging.getLogger("coe_dist.tracking")


def start_run(
    config: RunConfig,
    *,
    run_name: str,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    run_id: str | None = None,
) -> str | None:
    """Creates the experiment and a run in MLflow, or reopens `run_id`, and stores its id in <run>/mlflow-run.json.

    The resolved configuration and `params` become MLflow parameters, without secrets. Never raises: where MLflow does
    not answer, one warning, and the answer is `run_id` as given, so that metrics can be sent later.
    Returns None where tracking is off or no run could be made.
    """
    if not config.tracking.enabled:
        return None
    try:
        return _open(config.run_dir, config, run_name, tags or {}, params or {}, run_id)
    except Exception as error:
        _log.warning("MLflow at %s is not used now: %s", redact(tracking_uri(config)), _line(error))
        return run_id


def finish_run(config: RunConfig, run_id: str | None, status: Status) -> None:
    """Sets the run's final status, then sends for up to 10 s what the workers could not. Never raises.

    Where MLflow does not answer, the status is kept in mlflow-run.json and sync() delivers it.
    """
    if run_id is None or not config.tracking.enabled:
        return
    end = {"status": status, "end_time": int(time.time() * 1000)}
    try:
        sender = Sender(config.run_dir, uri_of_run(config.run_dir, config), run_id)
        _terminate(sender.client(), config.run_dir, run_id, end)
        sender.send(time.monotonic() + FINISH_SECONDS)
    except Exception as error:
        _log.warning("MLflow was not told the end of run %s (%s); it can be sent later", run_id, _line(error))
        _store(config.run_dir, run_id, pending=end)


def log_artifacts(config: RunConfig, run_id: str | None, paths: Iterable[Path]) -> None:
    """Copies files and folders to the run's artifacts; missing ones are passed over, and so is a store that is gone
    (a run folder that was moved to another machine). Never raises."""
    if run_id is None or not config.tracking.enabled:
        return
    try:
        uri = uri_of_run(config.run_dir, config)
        if uri.startswith("sqlite:////") and not Path(uri.removeprefix("sqlite:///")).is_file():
            raise FileNotFoundError(f"{redact(uri)} is not there")
        client = connect(uri)
        for path in map(Path, paths):
            if path.is_dir():
                client.log_artifacts(run_id, str(path), path.name)
            elif path.is_file():
                client.log_artifact(run_id, str(path))
    except Exception as error:
        _log.warning("MLflow did not take the files of run %s: %s", run_id, _line(error))


def sync(run_dir: Path, config: RunConfig, run_id: str | None = None) -> int:
    """Sends to MLflow what it does not have yet: values of metrics.jsonl and the final status.

    `run_id` defaults to the folder's run; where there is none (the server was down at the start) a run is created.
    Returns the number of values sent. Raises InputError where MLflow cannot be reached or refuses.
    """
    run_dir = Path(run_dir)
    run_id = run_id or run_id_of(run_dir)
    uri = uri_of_run(run_dir, config)
    try:
        if run_id is None:
            run_id = _open(run_dir, config, config.name, {}, {}, None)
        sender = Sender(run_dir, uri, run_id)
        sent = sender.send()
        pending = read_json(run_dir / RUN_FILE).get("pending")
        if pending:
            _terminate(sender.client(), run_dir, run_id, pending)
        return sent
    except Exception as error:
        raise InputError(
            f"tracking.uri: {redact(uri)} did not take the metrics of {run_dir}: {_line(error)}"
        ) from error


def run_id_of(run_dir: str | Path) -> str | None:
    """The id of the MLflow run that a run folder belongs to, if there is one."""
    run_id = read_json(Path(run_dir) / RUN_FILE).get("run_id")
    return str(run_id) if run_id else None


def _open(
    run_dir: Path,
    config: RunConfig,
    run_name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    run_id: str | None,
) -> str:
    uri = tracking_uri(config)
    client = connect(uri)
    run = None if run_id is None else _existing(client, run_id)
    if run is None:
        run = client.create_run(_experiment(client, uri, config), run_name=run_name)
    else:
        client.update_run(run_id, status="RUNNING")
    run_id = str(run.info.run_id)
    _store(run_dir, run_id, uri=redact(uri), experiment=config.tracking.experiment, pending=None)
    try:
        _describe(client, run_id, flatten(config.model_dump(mode="json")) | flatten(params), tags, run.data.params)
    except Exception as error:  # the run exists: metrics are worth more than its parameters
        _log.warning("MLflow did not take all parameters of run %s: %s", run_id, _line(error))
    return run_id


def _existing(client: Any, run_id: str) -> Any:
    """The run to reopen, or None where the store has no such run (it was made in another one)."""
    try:
        return client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _describe(
    client: Any, run_id: str, params: Mapping[str, str], tags: Mapping[str, str], known: Mapping[str, str]
) -> None:
    """Logs parameters and tags. MLflow refuses another value for a parameter it has.

    What a resumed run changes (epochs, workers) becomes the tag `resumed.<parameter>`.
    """
    from mlflow.entities import Param, RunTag

    changed = {f"resumed.{name}": value for name, value in params.items() if known.get(name, value) != value}
    labels = {legal_name(n): cut(redact(str(v)), TAG_LIMIT) for n, v in {**tags, **changed}.items()}
    items = [Param(name, value) for name, value in params.items() if name not in known]
    for start in range(0, len(items), ITEMS_A_REQUEST):
        client.log_batch(run_id, params=items[start : start + ITEMS_A_REQUEST], synchronous=True)
    marks = [RunTag(name, value) for name, value in labels.items()]
    for start in range(0, len(marks), ITEMS_A_REQUEST):
        client.log_batch(run_id, tags=marks[start : start + ITEMS_A_REQUEST], synchronous=True)


def _experiment(client: Any, uri: str, config: RunConfig) -> str:
    existing = client.get_experiment_by_name(config.tracking.experiment)
    if existing is not None:
        return str(existing.experiment_id)
    # A server chooses its own place for artifacts; with a file of ours they lie beside the run folders.
    place = (Path(config.runs_dir).absolute() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    return str(client.create_experiment(config.tracking.experiment, artifact_location=place))


def _terminate(client: Any, run_dir: Path, run_id: str, end: Mapping[str, Any]) -> None:
    client.set_terminated(run_id, str(end["status"]), int(end["end_time"]))
    _store(run_dir, run_id, pending=None)


def _store(run_dir: Path, run_id: str, **fields: Any) -> None:
    """Updates mlflow-run.json: {"run_id", "uri", "experiment"} and, while undelivered, "pending" (the final status)."""
    path = run_dir / RUN_FILE
    content = {**read_json(path), "run_id": run_id, **fields}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, {name: value for name, value in content.items() if value is not None})
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error)


def _line(error: BaseException) -> str:
    return redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
