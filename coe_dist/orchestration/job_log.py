"""Follows the log of a job to its end, over a connection that may break in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from coe_dist.errors import TrainingError
from coe_dist.orchestration.job_cluster import JobCluster

PATIENCE_SECONDS = 120.0  # how long a head may be silent
_CHECK_SECONDS = 15.0  # between two questions whether the head still lives
_PAUSE_SECONDS = 1.0


def follow(cluster: JobCluster, submission_id: str, write: Callable[[str], object]) -> Any:
    """Writes what the job prints as it comes, from its beginning, and returns Ray's JobDetails when it has ended.

    A broken connection is made again and what was written is not repeated; after 120 s without one TrainingError says
    so (the job itself does not notice).
    """
    reader = _Reader(cluster.client, submission_id, write)
    since = time.monotonic()
    while True:
        try:
            asyncio.run(reader.tail())
            details = cluster.client.get_job_info(submission_id)
            if details.status.is_terminal():
                reader.rest()
                return details
            since = time.monotonic()
        except Exception as error:  # aiohttp's, requests' and Ray's own
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise TrainingError(
                    f"no answer from the Ray head at {cluster.address} for {PATIENCE_SECONDS:g} s ({error}); the job "
                    f"may still run: coe-dist jobs --address {cluster.address}"
                ) from error
        time.sleep(_PAUSE_SECONDS)


class _Reader:
    def __init__(self, client: Any, submission_id: str, write: Callable[[str], object]) -> None:
        self._client, self._id, self._write = client, submission_id, write
        self._written = 0  # characters

    async def tail(self) -> None:
        """Until the connection ends; raises when the head does not answer any more."""
        reading = asyncio.ensure_future(self._read())
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=_CHECK_SECONDS)
                if not reading.done():
                    await asyncio.to_thread(self._client.get_job_info, self._id)
        finally:
            reading.cancel()
        reading.result()

    async def _read(self) -> None:
        seen = 0  # each connection begins with the whole log
        async for text in self._client.tail_job_logs(self._id):
            new = text[max(0, self._written - seen) :]
            seen += len(text)
            if new:
                self._write(new)
                self._written += len(new)

    def rest(self) -> None:
        """What was printed last, after the connection had ended."""
        text = self._client.get_job_logs(self._id)
        self._write(text[self._written :])
        self._written = max(self._written, len(text))
