"""The early-exit threshold that a run keeps, in evaluation-validation.json, and the networks it was calibrated for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from coe_dist.coe.early_exit import NO_EXIT
from coe_dist.errors import InputError
from coe_dist.training.chosen import Networks
from coe_dist.training.run_folder import evaluation_file


class Threshold(NamedTuple):
    value: float | None  # confidence from which images exit early; None: nobody does
    calibrated_for: Networks | None = None  # None: nobody calibrated it, it was given

    def doubts(self, networks: Networks) -> list[str]:
        """A warning where it was calibrated for other networks than these."""
        if self.value is None or self.calibrated_for in (None, networks):
            return []
        return [f"the early-exit threshold {self.value:g} was calibrated for {self.calibrated_for}, not for {networks}"]


def threshold_of(evaluation: Mapping[str, Any]) -> Threshold:
    """The one that an evaluation's figures were made with. Raises KeyError, TypeError and ValueError for other
    content."""
    value, origin = evaluation["threshold"], evaluation.get("calibrated_for")
    return Threshold(None if value is None else float(value), None if origin is None else Networks(**origin))


def stored_threshold(run_dir: Path) -> Threshold | None:
    """The run's own, which evaluation, export and prediction use; None where validation has not been evaluated.

    Raises InputError for a file that is no evaluation.
    """
    path = run_dir / evaluation_file("validation", stored=True)
    try:
        return threshold_of(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable evaluation ({error})") from None


def check_threshold(threshold: float | None, macs_budget: float | None) -> None:
    """Raises InputError for a threshold no confidence can be compared with, and for one beside a budget."""
    if threshold is None:
        return
    if macs_budget is not None:
        raise InputError(f"--threshold: {threshold} is not allowed; --macs-budget is given too, give only one of them")
    if not (0 <= threshold <= 1 or threshold == NO_EXIT):
        raise InputError(
            f"--threshold: {threshold} is not allowed; give a number from 0 to 1, or {NO_EXIT:g} for no early exit"
        )
