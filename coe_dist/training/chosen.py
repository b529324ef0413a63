"""Which networks of a run are meant: the save that `--checkpoint` names, and which of its weights `--weights` names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from coe_dist.errors import InputError
from coe_dist.training.checkpoint import best_save, complete_saves, damage, latest_valid, save_name

LATEST, BEST = "latest", "best"

Weights = Literal["ema", "raw"]  # the moving averages of the weights, or those of the last step


class Networks(NamedTuple):
    """The networks of one run: those that it had after `step` optimizer steps, and which of their weights."""

    step: int
    weights: Weights

    def __str__(self) -> str:
        return f"the {self.weights} weights of step {self.step}"


def find_save(run_dir: Path, checkpoint: str) -> Path:
    """The complete save that `checkpoint` names: a number of optimizer steps, "best" (on validation) or "latest". Its
    files are not verified.

    Raises InputError naming the steps that there are when it names none of them, and for a run without a save.
    """
    folder = run_dir / "checkpoints"
    saves = {save.name: save for save in complete_saves(folder)}  # newest first
    if not saves:
        raise InputError(f"{run_dir}: it holds no complete checkpoint")
    if checkpoint == LATEST:
        return next(iter(saves.values()))
    best = best_save(folder)
    if checkpoint == BEST and best is not None:
        return best[0]
    if checkpoint.isdecimal() and (name := save_name(int(checkpoint))) in saves:
        return saves[name]
    steps = ", ".join(str(int(name.removeprefix("step-"))) for name in reversed(saves))
    others = f"{BEST} or {LATEST}" if best is not None else f"or {LATEST} (no {BEST} one is recorded)"
    raise InputError(
        f"--checkpoint: {checkpoint} is not allowed; {run_dir} holds the steps {steps}; give one of them, {others}"
    )


def valid_save(run_dir: Path, checkpoint: str = LATEST) -> tuple[Path, list[str]]:
    """The same, and every file of it verifies. "latest" falls back to the save before a damaged one; returns a warning
    for each that is passed over. Raises InputError as find_save does, and when the save asked for, or every one, is
    damaged."""
    if checkpoint != LATEST:
        save = find_save(run_dir, checkpoint)
        if problem := damage(save):
            raise InputError(f"--checkpoint: {checkpoint} is not allowed; {save} is damaged ({problem})")
        return save, []
    newest, warnings = latest_valid(run_dir / "checkpoints")
    if newest is None:
        reason = f" ({warnings[0].split('; falling back')[0]})" if warnings else ""
        raise InputError(f"{run_dir}: it holds no valid checkpoint{reason}")
    return newest, warnings


def chosen_weights(run_dir: Path, asked: Weights | None, *, averaged: bool) -> Weights:
    """The weights asked for, else the averages where the run holds some (`averaged`). Raises InputError for averages
    that it does not hold."""
    if asked == "ema" and not averaged:
        raise InputError(f"--weights: ema is not allowed; {run_dir} holds no averages of its weights, give raw")
    return asked or ("ema" if averaged else "raw")
