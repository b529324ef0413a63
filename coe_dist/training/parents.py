"""Which old expert each expert of a scaled run comes from (our own rule; see coe_dist.training.scaling)."""

from __future__ import annotations

from collections.abc import Sequence

from coe_dist.errors import InputError


class NoLoadsError(Exception):
    """Loads must decide, and there are none."""


def choose_parents(before: int, after: int, named: Sequence[int], loads: Sequence[float] | None) -> list[int]:
    """The parent of each of `after` experts among `before` old ones; ties go to the lowest id.

    loads: fraction of images of each old expert. Raises InputError for a name that is unknown or one too many.
    """
    for expert in named:
        if not 0 <= expert < before:
            raise InputError(f"--from-expert: {expert} is not allowed; the run has the experts 0 to {before - 1}")
    if after < before:
        kept = set(named)
        if len(kept) > after:
            raise InputError(f"--from-expert: {len(kept)} experts are not allowed; only {after} can be kept")
        if len(kept) < after:
            shares = _known(loads)
            others = sorted(set(range(before)) - kept, key=lambda expert: (-shares[expert], expert))
            kept.update(others[: after - len(kept)])
        return sorted(kept)
    new = after - before
    if named:
        if len(named) not in (1, new):
            raise InputError(
                f"--from-expert: {len(named)} parents are not allowed; give one, or one for each of {new} new experts"
            )
        return [*range(before), *(named if len(named) == new else list(named) * new)]
    parents, shares = list(range(before)), list(_known(loads))
    for _ in range(new):
        most = max(range(len(shares)), key=lambda expert: (shares[expert], -expert))
        shares[most] /= 2
        shares.append(shares[most])
        parents.append(parents[most])
    return parents


def _known(loads: Sequence[float] | None) -> Sequence[float]:
    if loads is None:
        raise NoLoadsError
    return loads
