"""Waiting for what another process brings about."""

import time

PATIENCE_SECONDS = 240  # of a busy machine; nothing is measured by it


def until(found, what, *, process=None, seconds=PATIENCE_SECONDS, every=0.05):
    """The first true answer of found(). Fails after so many seconds, or when `process`, of which it is expected, has
    ended."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode} before {what}: {process.communicate()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {seconds} s")
        time.sleep(every)
    return answer
