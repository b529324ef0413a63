"""Reports and model cards, on the disk and among the artifacts of the runs in MLflow."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from pathlib import Path

from coe_dist import tracking
from coe_dist.errors import InputError
from coe_dist.report.build import write_report
from coe_dist.report.card import CARD, write_card
from coe_dist.training.run_folder import load_run_config

_log = logging.getLogger("coe_dist.report")


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of these run folders (see report.build) and each one's model-card.md; MLflow gets both, for
    each run that it knows. Returns the report's path. Raises InputError for folders that are no run folders.

    A run folder of somebody else's, which cannot be written, keeps the card that it has.
    """
    page = write_report(runs, out)
    for run in map(Path, runs):
        try:
            write_card(run)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            _log.warning("%s is not written: %s", run / CARD, error.strerror)
        run_id = tracking.run_id_of(run)
        try:
            config = load_run_config(run) if run_id else None
        except InputError:  # a copy of its records alone: there is nothing that says where MLflow is
            config = None
        if config is not None:
            tracking.log_artifacts(config, run_id, [page, run / CARD])
    return page
