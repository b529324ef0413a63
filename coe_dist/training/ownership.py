"""Which start of a run may write to its run folder: the newest one (our own rule).

A machine that is cut off from the others and still sees the shared folder may go on with a worker group that its
cluster has given up for dead and replaced. RUN/owner names the newest start; an earlier one that finds another name
there ends before it records or saves anything more.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from coe_dist.errors import TrainingError
from coe_dist.tracking.store import write_bytes


class Owner:
    """Makes this start the one that may write. Rank 0 only."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "owner"
        self._name = uuid.uuid4().hex.encode()
        write_bytes(self._path, self._name)

    def check(self) -> None:
        """Raises TrainingError when a later start has taken over. A file that cannot be read is no reason to end."""
        try:
            found = self._path.read_bytes()
        except OSError:
            return
        if found != self._name:
            raise TrainingError(
                f"{self._path.parent}: a later start of this run has taken over; this one ends without writing more"
            )
