"""`coe-dist study`: what is left of a study, in turn, then its tables and plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coe_dist.errors import InputError, Preempted, TrainingError
from coe_dist.orchestration.signals import Terminated, own_signals
from coe_dist.study.cost import makespan
from coe_dist.study.study import Limits, Say, Study
from coe_dist.study.tables import write_tables
from coe_dist.study.trainings import Training
from coe_dist.training.run_folder import locked


def run_study(
    name: str,
    *,
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    limits: Limits | None = None,
    dry_run: bool = False,
    verify: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Runs what is left of a study (nothing with dry_run or verify) and writes its tables and plot.

    only, seeds: see trainings_of. Returns the summary: {study, trainings, finished, failed, baseline, points, frontier,
    files, verify}. Raises InputError before anything starts, Preempted after a SIGTERM (what is finished stays), and
    TrainingError when trainings failed, after all others have ended.
    """
    limits = limits or Limits()
    if verify and limits != Limits():
        raise InputError("--verify: not allowed with --max-runs or --max-minutes; --only and --seeds make it shorter")
    study = Study(name, only=only, seeds=seeds, say=say)
    starts, again = study.drawn() if verify else ([], [])
    if verify:
        plural = "" if len(again) == 1 else "s"
        _say_cost(study, f"{len(again)} training{plural} again{_starts(len(starts))}", [*starts, *again])
    elif (left := study.left) and limits.runs != 0:
        _say_left(study, left, limits)
    elif dry_run:
        study.say(f"study {study.settings.name}: nothing is left of {len(study.chosen)} trainings")
    if dry_run:
        return {**study.summary(), "files": [], "verify": []}
    answers: list[dict[str, Any]] = []
    with locked(study.base), own_signals():
        try:
            if verify:
                answers = study.verify(starts, again)
            else:
                study.train(limits)
        except Terminated:
            raise Preempted(f"study {study.settings.name}: stopped; the same command goes on from there") from None
        finally:
            files = _write(study)
    if study.failures:
        raise TrainingError(f"{len(study.failures)} trainings failed; {study.failures[0]}")
    return {**study.summary(), "files": [str(path) for path in files], "verify": answers}


def _say_left(study: Study, left: Sequence[Training], limits: Limits) -> None:
    own = sum(training in study.chosen for training in left)
    _say_cost(study, f"{own} of {len(study.chosen)} trainings{_starts(len(left) - own)} are left", left)
    if limits.runs is not None or limits.minutes is not None:
        parts = [f"{limits.runs} trainings"] if limits.runs is not None else []
        parts += [f"{limits.minutes:g} minutes"] if limits.minutes is not None else []
        study.say(f"this call: at most {' and '.join(parts)}")


def _starts(count: int) -> str:
    return f" and {count} to start from" if count else ""


def _say_cost(study: Study, what: str, trainings: Sequence[Training]) -> None:
    seconds_of = study.seconds()
    minutes = makespan([seconds_of(training) for training in trainings], study.slots) / 60
    measured = study.finished(study.every)
    source = f"by {measured} finished trainings" if measured else "by counted MACs"
    study.say(f"study {study.settings.name}: {what}, {study.slots} at a time, about {minutes:.0f} minutes ({source})")


def _write(study: Study) -> list[Path]:
    from coe_dist.study.plots import differences_svg, frontier_svg
    from coe_dist.study.results import write_text

    summary, folder = study.summary(), Path(study.settings.results)
    if not summary["points"]:
        return []
    paths = write_tables(folder, study.settings.name, summary)
    drawing = None
    if summary["frontier"] is not None:
        drawing = frontier_svg(summary["frontier"])
    elif any(point["difference"] for point in summary["points"]):
        drawing = differences_svg(summary["points"], str(study.settings.baseline))
    if drawing is not None:
        write_text(folder / f"{study.settings.name}.svg", drawing)
        paths.append(folder / f"{study.settings.name}.svg")
    return [study.results.rows_path, study.results.curves_path, *paths]
