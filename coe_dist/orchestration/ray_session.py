"""A local Ray of our own, or a connection to a running cluster; both end completely whatever happens.

Ray listens on every interface of the machine, also for a local session. What protects it is the token: without it
nobody can connect, submit work or read logs (Ray's token authentication). torch.distributed's own traffic knows no such
protection, therefore local sessions keep it on the loopback interface.
"""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe_dist.config import RunConfig
from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.environment import environment
from coe_dist.orchestration.processes import end_marked, marking, new_mark
from coe_dist.orchestration.ray_token import (
    client_environment,
    ensure_token_file,
    read_authentication_afresh,
    token_given,
)
from coe_dist.orchestration.signals import own_signals, undisturbed
from coe_dist.resources import usable_cores, usable_gpus

_log = logging.getLogger("coe_dist.ray")
_LONGEST_TEMP_FOLDER = 30  # Ray puts unix sockets about 70 characters below it, and their paths may have 107 characters
_OBJECT_STORE_BYTES = 128 * 2**20  # tensors travel by torch.distributed; Ray's own store only carries the job


@dataclass(frozen=True)
class RaySession:
    """A Ray this process is connected to."""

    address: str  # host:port of the head's control store
    local: bool  # started by us: one machine, so torch.distributed stays on the loopback interface
    cpus: float
    gpus: float


@contextmanager
def local_ray(config: RunConfig, *, node_ip: str | None = None) -> Iterator[RaySession]:
    """Starts a Ray on this machine with the cores and GPUs this process may use, and ends all of it afterwards.

    Every process of it is gone when the block is left: at its end, by an exception, Ctrl-C or SIGTERM (which raises
    signals.Terminated in the main thread). `node_ip` is the address other machines would use; none lets Ray choose.
    Raises InputError when the token file is not private or a Ray is running in this process already, and TrainingError
    when Ray does not come up at a second try either (it gives a busy machine 30 seconds).
    """
    settings = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    if not token_given():
        settings["RAY_AUTH_TOKEN_PATH"] = str(ensure_token_file())
    gpus = usable_gpus() if config.workers.device != "cpu" else 0
    folder = _short_private_folder()
    try:
        with environment(settings), own_signals() as install_handler:
            mark = new_mark()
            options = {
                "address": "local",
                "num_cpus": usable_cores(),
                "num_gpus": gpus,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "include_dashboard": False,
                "_temp_dir": str(folder / "r"),  # Ray opens it to everybody (mode 0777); its parent stays private
                "_node_ip_address": node_ip,
            }
            try:
                with marking(mark):
                    try:
                        _init(**options)
                    except TrainingError as error:  # on a busy machine, where the second finds its files in memory
                        _log.warning("%s; once more", error)
                        _end(mark)
                        _init(**options)
                install_handler()
                yield _session(local=True)
            finally:
                _end(mark)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def connect(address: str, *, timeout_seconds: float = 10.0) -> Iterator[RaySession]:
    """Connects to a running cluster: `host:port` of its head, or `auto` for the one this machine belongs to.

    The token is taken from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, else from ~/.ray/auth_token, else from our own file.
    RAY_AUTH_MODE=disabled connects to a cluster without authentication.
    Raises InputError when the address is malformed or not reachable in time, or the token is missing or refused.
    """
    _refuse_unreachable(address, timeout_seconds)
    with environment(client_environment()), own_signals() as install_handler:
        try:
            _init(address=address)
            install_handler()
            yield _session(local=False)
        finally:
            with undisturbed():
                _disconnect()


def session_for(config: RunConfig, address: str | None) -> Any:
    """The context manager of the cluster at `address`, or of a local Ray when it is none."""
    return local_ray(config) if address is None else connect(address)


def _init(**options: Any) -> None:
    import ray

    if ray.is_initialized():
        raise InputError("ray: already running in this process; leave the earlier session first")
    read_authentication_afresh()
    try:
        # Workers write to files of the run folder (see worker_output.py); Ray's chatter stays in its session folder.
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises bare ones too: a raylet that is not up after 30 seconds
        reason = " ".join(str(error).split())
        if options["address"] == "local":
            raise TrainingError(f"ray: it did not start on this machine; {reason}") from error
        raise InputError(f"address: {options['address']} is not usable; {reason}") from error


def _session(*, local: bool) -> RaySession:
    import ray

    resources = ray.cluster_resources()
    address = ray.get_runtime_context().gcs_address
    return RaySession(address, local, resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _end(mark: str) -> None:
    with undisturbed():
        _disconnect()
        end_marked(mark)


def _short_private_folder() -> Path:
    """A fresh private folder under the user's temporary folder, or under /tmp where that one's path is too long."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="coe-", dir=parent if len(parent) <= _LONGEST_TEMP_FOLDER else "/tmp"))


def _refuse_unreachable(address: str, timeout_seconds: float) -> None:
    """Ray itself would retry for minutes before it says that nobody listens."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or "/" in host:
        raise InputError(
            f"address: {address!r} is not allowed; give host:port of a Ray head, for instance 10.0.0.1:6379, or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_seconds).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"address: {address} is not reachable ({error}); is a Ray head running there?") from error
