"""The token without which nobody can use the Ray clusters we start.

One token per user, kept in a private file (mode 0600) of a private folder (0700), and used by every local session of
that user (our own rule). Ray's background threads read the file again at any time and abort the process when it is
gone, so the file must outlive every session; a token per session would not.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from coe_dist.errors import InputError


def default_token_file() -> Path:
    """$XDG_STATE_HOME/coe_dist/ray-token, where XDG_STATE_HOME defaults to ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "coe_dist" / "ray-token"


def ensure_token_file(path: Path | None = None) -> Path:
    """Returns the token file, creating it with a fresh random token (256 bits, hexadecimal) if it does not exist.

    Creation is atomic: processes that start at the same time agree on one token and nobody reads half of one.
    Raises InputError when the file or its folder belongs to somebody else or others may read it.
    """
    path = default_token_file() if path is None else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_unless_private(path.parent, 0o700)
        if not os.path.lexists(path):
            _create(path)
    except OSError as error:
        raise InputError(
            f"{path}: the Ray token cannot be created ({error.strerror}); set XDG_STATE_HOME to a folder you own"
        ) from error
    _refuse_unless_private(path, 0o600)
    return path


def token_given() -> bool:
    """Whether the user's environment says which token Ray is to use."""
    return "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ


def client_environment() -> dict[str, str]:
    """What a client of somebody's cluster sets for Ray: token authentication, unless the environment says otherwise, by
    the environment's token, else Ray's own (~/.ray/auth_token), which somebody made for a cluster, else our own file,
    which every local session of this user makes."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    if "RAY_AUTH_MODE" not in os.environ:
        settings["RAY_AUTH_MODE"] = "token"
    own, rays = default_token_file(), Path.home() / ".ray" / "auth_token"
    if not token_given() and own.exists() and not rays.exists():
        settings["RAY_AUTH_TOKEN_PATH"] = str(ensure_token_file(own))
    return settings


def read_authentication_afresh() -> None:
    """Ray reads RAY_AUTH_MODE when it is imported and keeps the token it read first, both in its C++ part."""
    compiled: Any = importlib.import_module("ray._raylet")
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


def _create(path: Path) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # unlike a rename it never replaces the token of a process that was faster
    finally:
        draft.unlink()


def _refuse_unless_private(path: Path, mode: int) -> None:
    status = os.lstat(path)
    kind_is_right = stat.S_ISDIR(status.st_mode) if mode == 0o700 else stat.S_ISREG(status.st_mode)
    if not kind_is_right:
        raise InputError(f"{path}: a {'folder' if mode == 0o700 else 'regular file'} is needed here for the Ray token")
    if status.st_uid != os.geteuid():
        raise InputError(f"{path}: owner {status.st_uid} is not allowed; give the Ray token to user {os.geteuid()}")
    found = stat.S_IMODE(status.st_mode)
    if found & 0o077:
        raise InputError(
            f"{path}: mode {found:04o} is not allowed; others could read the Ray token; run chmod {mode:04o} on it"
        )
