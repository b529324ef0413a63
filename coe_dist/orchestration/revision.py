"""The version of the code that a record belongs to."""

from __future__ import annotations

import subprocess


def git_revision() -> str | None:
    """The git revision of the working directory, where there is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
