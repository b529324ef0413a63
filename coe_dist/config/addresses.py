"""Places that are addresses of a store, such as s3://bucket/runs, and not paths."""

from __future__ import annotations

import re


def is_url(place: str) -> bool:
    """Whether a place is the address of a store (any scheme that fsspec knows) and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def holds_secret(url: str) -> bool:
    """Whether an address has a password, or a query that may be one."""
    return re.search(r"://[^/]*:(?!\d+(/|$))|[?#]", url) is not None


def scheme_of(url: str) -> str:
    """What of an address may be shown where the rest may hold a password."""
    return f"{url.split('://')[0]}://..."
