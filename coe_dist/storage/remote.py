"""A folder of a store, by its URL. Whatever a store's library raises becomes one kind of error of one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from coe_dist.config import holds_secret
from coe_dist.errors import InputError
from coe_dist.tracking.store import redact

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_OPTIONS: dict[str, dict[str, Any]] = {
    # without these a store that does not answer keeps its caller waiting for minutes
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}},
    "file": {"auto_mkdir": True},
}


class StoreError(Exception):
    """A store did not do what it was asked: one line without credentials. It may do it later."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/coe_dist, where XDG_CACHE_HOME defaults to ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coe_dist"


@dataclass(frozen=True)
class Stored:
    """A file of a store: its bytes, and a text that changes when its content does."""

    size: int
    version: str


class Remote:
    """Files below a URL, by their names relative to it. Raises InputError, beginning with `field`, for a URL that no
    installed library serves."""

    def __init__(self, url: str, field: str = "URL") -> None:
        self.url = url.rstrip("/")
        self.shown = redact(self.url)
        scheme = url.split("://")[0]
        if holds_secret(url):
            raise InputError(f"{field}: {scheme}://... is not allowed; an address has no password, '?' or '#' here")
        try:
            self._fs, root = fsspec.core.url_to_fs(
                self.url, use_listings_cache=False, **_OPTIONS.get(_EXTRAS.get(scheme, scheme), {})
            )
        except ImportError as error:
            if scheme in _EXTRAS:
                extra = f"'.[{_EXTRAS[scheme]}]'"
                advice = f"it needs a package that is not here: pip install -e {extra} in the project's folder"
            else:
                advice = f"it needs a package that is not here ({error})"
            raise InputError(f"{field}: {self.shown} is not allowed; {advice}") from None
        except Exception as error:
            raise InputError(f"{field}: {self.shown} is not allowed; {_line(error)}") from None
        self._root = str(root).rstrip("/")

    def place(self, name: str) -> str:
        """The URL of a file, as it may be shown."""
        return f"{self.shown}/{name}"

    def files(self) -> dict[str, Stored]:
        """All files by name; empty where nothing is there."""
        with self._asking():
            found = self._fs.find(self._root, detail=True)
        prefix = f"{self._root}/"
        names = {path.removeprefix(prefix): info for path, info in found.items() if path.startswith(prefix)}
        return {
            name: Stored(int(info.get("size") or 0), _version(info))
            for name, info in names.items()
            if not name.endswith("/")
        }

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        with self._asking(missing=True):
            return int(self._fs.info(self._path(name))["size"])

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or the bytes from `start` to before `end`. Raises FileNotFoundError where there is none."""
        with self._asking(missing=True):
            return bytes(self._fs.cat_file(self._path(name), start=start, end=end))

    def write(self, name: str, content: bytes) -> None:
        with self._asking():
            self._fs.pipe_file(self._path(name), content)

    def send(self, file: Path, name: str, moved: Callable[[], None]) -> None:
        """Writes a file of this machine; `moved` is called whenever a part of it has gone."""
        with self._asking():
            self._fs.put_file(str(file), self._path(name), callback=_Moving(moved))

    def remove(self, name: str) -> None:
        """Also of a file that is gone already."""
        with suppress(FileNotFoundError), self._asking(missing=True):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _asking(self, *, missing: bool = False) -> Iterator[None]:
        """missing: what is asked for may not be there, and FileNotFoundError says so."""
        try:
            yield
        except Exception as error:
            if missing and isinstance(error, FileNotFoundError):
                raise
            raise StoreError(_line(error)) from error


class _Moving(Callback):  # type: ignore[misc]
    def __init__(self, moved: Callable[[], None]) -> None:
        super().__init__()
        self._moved = moved

    def call(self, *arguments: Any, **named: Any) -> None:
        self._moved()


def _version(info: dict[str, Any]) -> str:
    keys = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime", "created")  # those of the content first
    return f"{info.get('size')} {next((info[key] for key in keys if info.get(key) is not None), '')}"


def _line(error: BaseException) -> str:
    text = re.sub(r"\?[^\s\"']+", "", " ".join(str(error).split()))  # what an address was asked
    return redact(text or type(error).__name__)[:300]
