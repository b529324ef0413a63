"""The errors a user can cause, and the exit codes of `coe-dist`."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class InputError(ValueError):
    """Bad input: one line that names the field or file, its value and what is allowed. The command line exits with
    2."""


class Preempted(Exception):  # noqa: N818  the run ended as it was asked to
    """A run was asked to stop, has saved, and can be resumed: one line that says so. The command line exits with 75."""


class TrainingError(RuntimeError):
    """A run cannot go on (non-finite loss, lost worker, ...): one line that names the step and the cause."""
