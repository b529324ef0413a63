"""Where MLflow's store is, how to reach it without long waits, and its rules for names and values."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coe_dist.config import RunConfig
from coe_dist.errors import InputError

NAME_LIMIT = 250  # characters of a metric's, parameter's or tag's name in MLflow
VALUE_LIMIT = 500  # characters of a parameter's value that every MLflow server takes
TAG_LIMIT = 5000  # the same for a tag's value
RUN_FILE = "mlflow-run.json"

# With MLflow's own defaults one call to a dead server blocks for about four minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",  # seconds
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
_READABLE = {
    "@": "_at_",
    "%": "_percent_",
    "#": "_number_",
    "+": "_plus_",
    "=": "_is_",
    "<": "_lt_",
    ">": "_gt_",
    "&": "_and_",
}
_SECRET_NAME = re.compile(r"passw|secret|token|credential|api_?key|access_?key", re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(r"([?&;](?:\w*passw\w*|pwd|\w*token|\w*secret|\w*key)=)[^&;\s'\"]+", re.IGNORECASE)


def tracking_uri(config: RunConfig) -> str:
    """MLflow's address: config.tracking.uri, else MLFLOW_TRACKING_URI, else sqlite:///<runs_dir>/mlflow.db (absolute).

    A relative sqlite path is made absolute, because worker processes run in folders of their own.
    """
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return _default_uri(Path(config.runs_dir))
    path = uri.removeprefix("sqlite:///")
    if path != uri and not path.startswith("/") and path != ":memory:":
        return f"sqlite:///{Path(path).absolute()}"
    return uri


def uri_of_run(run_dir: Path, config: RunConfig) -> str:
    """The address for an existing run: as configured now, else where the run was created.

    The second serves workers that did not inherit the driver's MLFLOW_TRACKING_URI; addresses with credentials are
    stored without them and so cannot be used.
    """
    if not config.tracking.uri and not os.environ.get("MLFLOW_TRACKING_URI"):
        stored = str(read_json(run_dir / RUN_FILE).get("uri", ""))
        if stored and "***" not in stored:
            return stored
    return tracking_uri(config)


def connect(uri: str) -> Any:
    """An MlflowClient with short retries, no telemetry and quiet loggers. The first call imports MLflow (2-10 s).

    Raises whatever MLflow raises for an address it cannot use.
    """
    settle_mlflow()
    if uri.startswith("sqlite:////"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow.tracking.client import MlflowClient

    return MlflowClient(tracking_uri=uri)


def settle_mlflow() -> None:
    """Sets for MLflow, which must not be imported yet, what the user's environment does not say: short waits, no
    telemetry, few words."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # One warning of ours says it; urllib3 would repeat it for every retry, alembic lists every table it makes.
    for name in ("urllib3.connectionpool", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def legal_name(name: str) -> str:
    """A name MLflow takes: letters, digits and `_ - . : /` and space; other characters are spelled out (`@` -> `_at_`).

    Different names stay different as long as they differ within the first 250 characters.
    """
    name = re.sub(r"[^/\w.\- :]", lambda match: _READABLE.get(match[0], f"_x{ord(match[0]):x}_"), name)
    name = posixpath.normpath(name[:NAME_LIMIT]).lstrip("/") if name.strip() else "unnamed"
    while name.startswith("../"):
        name = name[3:]
    return name if name not in ("", ".", "..") else "unnamed"


def redact(text: str) -> str:
    """The text without the credentials in its addresses: `scheme://***@host`, `?password=***`."""
    return _SECRET_IN_TEXT.sub(r"\1***", re.sub(r"://[^/\s]*@", "://***@", text))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted legal names, values cut to 500 characters, secrets as `***`."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif _SECRET_NAME.search(str(key)) and value is not None:
            flat[legal_name(name)] = "***"
        else:
            text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, default=str)
            flat[legal_name(name)] = cut(redact(text), VALUE_LIMIT)
    return flat


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def ui_command(runs: RunConfig | str | Path, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """Command and environment of MLflow's own web page over the store of a configuration or of a folder of runs.

    One worker on 127.0.0.1, without its job queue (16 processes otherwise); it is ready when GET /health answers 200.
    The address of the store travels in the environment, because it may hold a password and `ps` shows commands.
    Raises InputError where the store is a server already or the folder has no mlflow.db.
    """
    if isinstance(runs, RunConfig):
        uri, runs_dir = tracking_uri(runs), Path(runs.runs_dir).absolute()
    else:
        runs_dir = Path(runs).absolute()
        uri = _default_uri(runs_dir)
    if uri.startswith(("http://", "https://")):
        raise InputError(f"tracking.uri: {redact(uri)} is a server already; open it in a browser")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(f"{uri.removeprefix('sqlite:///')}: no such file; train with tracking.enabled: true first")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", (runs_dir / "mlartifacts").as_uri()]
    environment = {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
    environment |= {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return command, {**os.environ, **environment}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one where the file is missing or torn."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes by atomic rename. Raises OSError."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes by atomic rename. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _default_uri(runs_dir: Path) -> str:
    return f"sqlite:///{(runs_dir / 'mlflow.db').absolute()}"
