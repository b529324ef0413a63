"""Progressive resolution: training begins with smaller images, which cost less, and ends with those of evaluation
(the idea of Howard, 2018, as in the FFCV authors' ImageNet recipe; this ramp is our own rule)."""

from __future__ import annotations

from typing import Protocol

MULTIPLE = 16  # pixels; few sizes, so that little is tuned or compiled anew


class Progressive(Protocol):
    """What the loader needs to know; config.ProgressiveConfig has these fields."""

    @property
    def start(self) -> int: ...
    @property
    def from_epoch(self) -> int: ...
    @property
    def until_epoch(self) -> int: ...


def resolution_of(epoch: int, final: int, schedule: Progressive | None) -> int:
    """Side in pixels of an epoch's training images: `start` until from_epoch, then linear in the epoch, rounded to a
    multiple of 16 but within start..final, and `final` from until_epoch on. A function of its arguments alone."""
    if schedule is None or epoch >= schedule.until_epoch:
        return final
    done = max(0.0, (epoch - schedule.from_epoch) / (schedule.until_epoch - schedule.from_epoch))
    side = schedule.start + (final - schedule.start) * done
    rounded = MULTIPLE * int(side / MULTIPLE + 0.5)
    return schedule.start if done == 0.0 else min(max(rounded, schedule.start), final)
