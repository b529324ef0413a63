"""The jobs of a Ray cluster, reached through the dashboard of its head (Ray's own JobSubmissionClient).

Job submission is remote code execution: whoever reaches the dashboard of a Ray without token authentication can run
anything on the cluster. The first request therefore asks which authentication the head has, and a head without one is
named in a warning.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from coe_dist.errors import InputError, TrainingError
from coe_dist.orchestration.environment import environment
from coe_dist.orchestration.ray_token import client_environment, read_authentication_afresh
from coe_dist.tracking.store import redact

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
REQUEST_SECONDS = 30.0
_FIRST_REQUEST_SECONDS = 10.0
_log = logging.getLogger("coe_dist.jobs")


@dataclass(frozen=True)
class JobCluster:
    """`client` is Ray's JobSubmissionClient for the dashboard at `address`; `token` says whether the head asks for
    one."""

    address: str
    token: bool
    client: Any

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Turns what a request in the block raises into a TrainingError of one line."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise TrainingError(f"the Ray head at {self.address} refused the token: {_line(error)}") from error
        except (requests.RequestException, OSError, RuntimeError, ValueError) as error:
            raise TrainingError(f"the Ray head at {self.address} did not answer as expected: {_line(error)}") from error


def job_cluster(address: str | None) -> JobCluster:
    """Connects to the dashboard at `address` (http://HOST:8265), by default RAY_API_SERVER_ADDRESS's or this machine's.

    The token is found as for any cluster (ray_token.client_environment). Raises InputError where the address is
    malformed, nobody answers within 10 s, who answers is not Ray's dashboard, or the token is missing or refused.
    """
    address = _checked(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    shown, mode = redact(address), _authentication_of(address)
    if mode == "disabled":
        _log.warning("the Ray head at %s has no token authentication: whoever reaches it can run code there", shown)
    import requests
    from ray.exceptions import AuthenticationError

    chosen = client_environment() | ({"RAY_AUTH_MODE": "disabled"} if mode == "disabled" else {})
    # Ray's client prefers these two variables to the address it is given
    with environment({**chosen, "RAY_API_SERVER_ADDRESS": address, "RAY_ADDRESS": None}):
        read_authentication_afresh()
        try:
            return JobCluster(shown, mode != "disabled", _client(address))
        except AuthenticationError:
            raise InputError(
                f"address: {shown} asks for a token and {_token_in(chosen)}; set RAY_AUTH_TOKEN_PATH to a file with "
                "the cluster's token"
            ) from None
        except (requests.RequestException, OSError, RuntimeError, ValueError) as error:
            raise InputError(f"address: {shown} is not usable; {_line(error)}") from error


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's client, whose requests have no time limit of their own."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **options)

    logging.getLogger("ray.dashboard").setLevel(logging.ERROR)
    logging.getLogger("ray._private").setLevel(logging.ERROR)
    return Client(address)


def _checked(address: str) -> str:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        usable = False
    if not usable or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise InputError(
            f"address: {redact(address)!r} is not allowed; give the dashboard of a Ray head, for instance "
            f"http://10.0.0.1:8265"
        )
    return address.rstrip("/")


def _authentication_of(address: str) -> str:
    """token or disabled, as the head says to anybody."""
    shown = redact(address)
    try:
        with urllib.request.urlopen(f"{address}/api/authentication_mode", timeout=_FIRST_REQUEST_SECONDS) as answer:
            return str(json.loads(answer.read(10_000))["authentication_mode"])
    except urllib.error.HTTPError as error:
        raise InputError(
            f"address: {shown} is not a dashboard of this Ray (status {error.code}); give that of a Ray head"
        ) from error
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"address: {shown} is not reachable ({_line(reason)}); is a Ray head's dashboard there?"
        ) from error
    except Exception as error:  # not HTTP, not JSON, not an object: somebody else's port
        raise InputError(f"address: {shown} is not Ray's dashboard; give that of a Ray head") from error


def _token_in(chosen: dict[str, str]) -> str:
    if "RAY_AUTH_TOKEN" in os.environ:
        return "refused that of RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or chosen.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return f"refused that of {path}"
    return "refused that of ~/.ray/auth_token, or there is none"


def _line(error: object) -> str:
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__
