"""What travels to a cluster with a job: the current folder without data, runs and caches, and not too much of it.

Which files these are is decided by Ray's own packaging code, so that what is counted here is what Ray uploads; it also
heeds .gitignore and .rayignore.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coe_dist.config import RunConfig, is_url
from coe_dist.errors import InputError

# patterns as in .gitignore; a leading / means the folder itself
EXCLUDED = [
    ".git",
    ".venv",
    "/venv",
    "/data",
    "/runs",
    "/build",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
    "*.beton",
    "mlflow.db",
    "mlartifacts",
]
_SHOWN = 3
_MIB = 2**20


def upload_limit() -> int:
    """Bytes that Ray's dashboard takes in one request (100 MiB)."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    return int(DASHBOARD_CLIENT_MAX_SIZE)


def package_settings(folder: Path, config: RunConfig) -> dict[str, Any]:
    """`working_dir` and `excludes` of the job's runtime environment.

    Raises InputError naming the largest files when they hold more bytes than upload_limit() (Ray does not compress).
    """
    own = {p for p in (config.runs_dir, config.data.folder) if not (is_url(p) or Path(p).is_absolute())}
    excludes = EXCLUDED + [f"/{Path(place)}" for place in sorted(own) if Path(place) != Path(".")]
    check_size(uploaded_files(folder, excludes), folder, upload_limit())
    return {"working_dir": str(folder), "excludes": excludes}


def uploaded_files(folder: Path, excludes: list[str]) -> list[tuple[int, Path]]:
    """(bytes, path) of every file that Ray would pack, by Ray's own walk over `folder`."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: list[tuple[int, Path]] = []

    def note(path: Path) -> None:
        if path.is_file():
            found.append((path.stat().st_size, path))

    try:
        _dir_travel(folder, [_get_excludes(folder, excludes)], note, include_gitignore=True)
    except (OSError, RecursionError) as error:
        raise InputError(
            f"{folder}: it cannot be read for upload ({error}); name what is in the way in .rayignore"
        ) from error
    return found


def check_size(files: Iterable[tuple[int, Path]], folder: Path, limit: int) -> None:
    """Raises InputError when the files have more than `limit` bytes together, naming the largest."""
    by_size = sorted(files, key=lambda file: file[0], reverse=True)
    total = sum(size for size, _ in by_size)
    if total <= limit:
        return
    largest = ", ".join(f"{path.relative_to(folder)} ({size / _MIB:.0f} MiB)" for size, path in by_size[:_SHOWN])
    raise InputError(
        f"{folder}: {total / _MIB:.0f} MiB in {len(by_size)} files are too much to send with a job; at most "
        f"{limit / _MIB:.0f} MiB are allowed; the largest are {largest}; name what the job does not need in .rayignore"
    )
