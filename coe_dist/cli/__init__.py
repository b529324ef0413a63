"""`coe-dist`: one thin command per user job. Each parses, calls one function, prints."""

from __future__ import annotations

import errno
import os
import signal
import sys

import typer

from coe_dist.cli import data, export, running, storage, trained, viewing
from coe_dist.cli.app import app
from coe_dist.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    InputError,
    Preempted,
    TrainingError,
)

__all__ = ["app", "data", "export", "main", "running", "storage", "trained", "viewing"]


def main() -> None:
    """Maps errors to one line and exit codes: 2 bad input, 1 failed, 75 stopped and resumable, 130 interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this code without a word
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as error:
        _fail(str(error), EXIT_BAD_INPUT)
    except TrainingError as error:
        _fail(str(error), EXIT_FAILED)
    except Preempted as error:
        _fail(str(error), EXIT_PREEMPTED)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"{error.filename or 'a file'} could not be written: {error.strerror}", EXIT_FAILED)
        if hasattr(error, "format_message"):  # the command line itself was wrong
            _fail(error.format_message(), EXIT_BAD_INPUT)
        raise


def _fail(message: str, code: int) -> None:
    if os.environ.get("COE_DIST_DEBUG"):
        raise
    if message:  # a bare `coe-dist` has printed its help already
        print(f"coe-dist: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
