"""Exact balanced transportation: one expert per sample, loads within one of each other, the largest total score.

    maximise sum_i score[i, a_i]   subject to   floor(N/E) <= load_j <= ceil(N/E)

That weight generation rests on this problem is the paper's; the objective, the tie rule and the algorithm are our
own.

Scores become whole numbers, rint(clip(score, -128, 128) * 2^20), so that "optimal" and "tied" are exact notions.
Among optimal assignments the one with the largest sum of tie values, a 44-bit hash of (sample id, expert), is the
answer: it is a function of scores and sample ids alone, never of row order, warm prices or the order of our steps.
(It is unique unless two optimal assignments have the same sum of hashes, for which a slack of the tied problem must
vanish by accident: about N * E / 2^44.)

The algorithm uses that E is small: it works on a graph whose nodes are the experts, not the samples.

1. *Duality.* Give every expert a price. With prices fixed each sample wants the expert of the largest score minus
   price. An assignment is optimal exactly when all samples sit at such an expert, experts priced above the ground
   hold ceil(N/E) and experts priced below it floor(N/E). The ground is one more node whose price is the zero of
   prices: a sample slot may move between an expert and the ground, at no cost, while that keeps the expert within
   its bounds.
2. *Start.* From any prices, slots are granted to the dearest experts and samples go where they want (ties to the
   least filled expert). All conditions of 1 now hold except that loads differ from slots. Good prices make the
   excess small: they come from the caller (warm), or from solving a pseudo-random quarter of the rows, recursively,
   down to a few hundred rows. A quarter of N rows misses by a fraction near 0.4 sqrt(4E/N), so few rows remain to
   be moved.
3. *Repair.* Moving a row from j to l loses score[i,j] - score[i,l]; the exchange graph keeps the smallest such loss
   for every ordered pair (a scan of j's members when that row leaves, which stops at the first one on the lower
   bound price_j - price_l). A Dijkstra search over the E + 1 nodes with prices as potentials, from all overfull
   experts to the nearest underfull one, raises the prices of the nodes before it, which keeps the conditions of 1
   true, and makes the path free; one row then moves along each edge. Each round reduces the excess, so it ends with
   all conditions true: an optimum.
4. *Ties.* All optimal assignments are those that use only edges which maximise score minus price for the optimal
   prices of 3, with the loads that 1 asks for (complementary slackness holds between every primal and every dual
   optimum). So rows with one such edge are settled, and the others are a transportation problem of their own, with
   tie values as scores: steps 2 and 3 again. This is exactly the lexicographic optimum, without mixing two scales
   in one number.
5. *Certificate.* The conditions of 1 are checked from scratch for both problems, and that the dual objective equals
   the primal in whole numbers. A failure is our fault: AssertionError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coe_dist.coe.transport_core import (
    Ints,
    certify,
    choose_homes,
    grant_slots,
    integer_scores,
    sample_mask,
    tied_rows,
)
from coe_dist.coe.transport_exchange import repair

SCORE_UNIT = 2.0**-20
MAX_SAMPLES = 2**20  # 2^20 samples of 2^27 units each, times prices: all sums stay inside int64
MAX_EXPERTS = 4096
_PRICE_LIMIT = 2**40  # above any optimal price difference, E * 2^28; warm prices are clipped to it
_SMALL = 512  # rows below which a start is not worth improving by solving an quarter first
_DENSE: Ints = np.empty((0, 0), np.int64)


@dataclass(frozen=True)
class Assignment:
    """A certified optimum; objectives and prices are whole numbers of 2^-20 (SCORE_UNIT).

    expert_N: the expert of each row, int64. prices_E: optimal dual prices, int64 (the ground's is 0; not unique).
    objective: the sum of the integer scores. dual_objective: the upper bound that the prices prove; equal to it.
    """

    expert_N: Ints
    prices_E: Ints
    objective: int
    dual_objective: int


def balanced_assignment(
    scores_NE: NDArray[Any], sample_ids_N: NDArray[np.int64], *, warm_prices_E: NDArray[np.int64] | None = None
) -> Assignment:
    """Assigns N samples to E experts, loads floor(N/E) or ceil(N/E), maximising the sum of scores_NE [N,E] float.

    sample_ids_N int64 [N] are unique in the batch and decide ties. warm_prices_E int64 [E] (the prices of an earlier
    batch) saves time and never changes expert_N. Raises ValueError for a wrong shape or dtype, more than 2^20 samples
    or 4096 experts, or a score that is not finite (its first row is named). Scores beyond -128 and 128 are clipped.
    """
    values_NE = _integers("scores_NE", scores_NE)
    samples, experts = values_NE.shape
    _check_experts(experts)
    return _assign(values_NE, _DENSE, experts, _ids(sample_ids_N, samples), warm_prices_E)


def balanced_assignment_sparse(
    scores_Nk: NDArray[Any],
    experts_Nk: NDArray[np.int64],
    experts: int,
    sample_ids_N: NDArray[np.int64],
    *,
    feasible_N: NDArray[np.int64],
    warm_prices_E: NDArray[np.int64] | None = None,
) -> Assignment:
    """The same where row i may only go to one of experts_Nk[i] (int64 [N,k], distinct in a row), with scores_Nk [N,k].

    feasible_N int64 [N] is any assignment along these edges whose loads are floor(N/E) or ceil(N/E); it proves that an
    answer exists and does not influence it. Raises ValueError as balanced_assignment does, and for edges or a
    feasible_N that are not of this kind.
    """
    values_Nk = _integers("scores_Nk", scores_Nk)
    samples = values_Nk.shape[0]
    edges_Nk = np.require(experts_Nk, np.int64, ["C", "W"])
    if edges_Nk.shape != values_Nk.shape:
        raise ValueError(f"experts_Nk: shape {edges_Nk.shape} is not allowed; give scores_Nk's, {values_Nk.shape}")
    _check_experts(experts)
    if samples and (edges_Nk.min() < 0 or edges_Nk.max() >= experts):
        raise ValueError(
            f"experts_Nk: experts from {edges_Nk.min()} to {edges_Nk.max()} are not allowed; give 0 to {experts - 1}"
        )
    sorted_Nk = np.sort(edges_Nk, axis=1)
    if (sorted_Nk[:, 1:] == sorted_Nk[:, :-1]).any():
        raise ValueError("experts_Nk: an expert twice in one row is not allowed; give distinct experts")
    start_N = np.asarray(feasible_N, np.int64)
    if start_N.shape != (samples,) or not (edges_Nk == start_N[:, None]).any(axis=1).all():
        raise ValueError(f"feasible_N: shape {start_N.shape} or a value is not allowed; give one of experts_Nk[i] each")
    loads_E = np.bincount(start_N, minlength=experts)
    if loads_E.min() < samples // experts or loads_E.max() > -(-samples // experts):
        raise ValueError(
            f"feasible_N: loads from {loads_E.min()} to {loads_E.max()} are not allowed; "
            f"give floor or ceil of N/E = {samples}/{experts}"
        )
    return _assign(values_Nk, edges_Nk, experts, _ids(sample_ids_N, samples), warm_prices_E)


def _assign(
    values_NK: Ints, edges_NK: Ints, experts: int, ids_N: Ints, warm_prices_E: NDArray[np.int64] | None
) -> Assignment:
    samples = values_NK.shape[0]
    prices: Ints | None = None
    if warm_prices_E is not None:
        warm_E = np.asarray(warm_prices_E)
        if warm_E.shape != (experts,) or warm_E.dtype.kind != "i":
            raise ValueError(
                f"warm_prices_E: {warm_E.dtype} of shape {warm_E.shape} is not allowed; "
                f"give int64 of shape ({experts},)"
            )
        prices = np.zeros(experts + 1, np.int64)
        prices[:-1] = np.clip(warm_E, -_PRICE_LIMIT, _PRICE_LIMIT)
    if samples == 0:
        return Assignment(np.empty(0, np.int64), np.zeros(experts, np.int64), 0, 0)
    lower_E = np.full(experts, samples // experts, np.int64)
    upper_E = np.full(experts, -(-samples // experts), np.int64)

    home_N, prices = _solve(values_NK, edges_NK, lower_E, upper_E, ids_N, prices)
    rows_T, tie_values_TK, fixed_E = tied_rows(values_NK, edges_NK, prices, home_N, ids_N, experts)
    if rows_T.size:
        edges_TK = edges_NK[rows_T] if edges_NK.size else _DENSE
        signs_E = np.sign(prices[:-1] - prices[-1])
        tied_lower_E = np.maximum(np.where(signs_E > 0, upper_E, lower_E) - fixed_E, 0)
        tied_upper_E = np.where(signs_E < 0, lower_E, upper_E) - fixed_E
        home_T, tie_prices = _solve(tie_values_TK, edges_TK, tied_lower_E, tied_upper_E, ids_N[rows_T], None)
        optimal = certify(tie_values_TK, edges_TK, tied_lower_E, tied_upper_E, tie_prices, home_T)[0]
        if not optimal:
            raise AssertionError("transportation: the tied problem's answer is not optimal")
        home_N[rows_T] = home_T
    optimal, primal, dual = certify(values_NK, edges_NK, lower_E, upper_E, prices, home_N)
    if not optimal or primal != dual:  # not an assert statement: the check stays under python -O
        raise AssertionError(f"transportation: primal {primal} and dual {dual} do not certify an optimum")
    return Assignment(home_N, prices[:-1] - prices[-1], int(primal), int(dual))


def _solve(
    values_NK: Ints, edges_NK: Ints, lower_E: Ints, upper_E: Ints, ids_N: Ints, prices: Ints | None, level: int = 0
) -> tuple[Ints, Ints]:
    """Steps 2 and 3: homes [N] and prices [E+1].

    On a part of the rows (level > 0) an assignment need not exist; the prices are then only a start.
    """
    samples, experts = values_NK.shape[0], lower_E.size
    small = samples <= max(_SMALL, 4 * experts)
    start: tuple[Ints, Ints, int] | None = None
    if prices is not None:
        slots_E = grant_slots(prices, lower_E, upper_E, samples)
        start = choose_homes(values_NK, edges_NK, prices, slots_E)
        if start[2] > samples // 8 and not small:
            start = None  # far off: prices of an quarter of the rows will do better
    if start is None:
        if small:
            prices = np.zeros(experts + 1, np.int64)
        else:
            part = sample_mask(ids_N, level)
            part_edges_NK = edges_NK[part] if edges_NK.size else _DENSE
            count = int(part.sum())
            part_lower_E, part_upper_E = lower_E * count // samples, -(-upper_E * count // samples)
            prices = _solve(values_NK[part], part_edges_NK, part_lower_E, part_upper_E, ids_N[part], None, level + 1)[1]
        slots_E = grant_slots(prices, lower_E, upper_E, samples)
        start = choose_homes(values_NK, edges_NK, prices, slots_E)
    home_N, load_E, excess = start
    assert prices is not None
    if excess:
        complete = repair(values_NK, edges_NK, lower_E, upper_E, slots_E, prices, home_N, load_E)
        if not complete and level == 0:
            raise AssertionError("transportation: no assignment exists although one was given")
    return home_N, prices


def _integers(name: str, scores: NDArray[Any]) -> Ints:
    floats = np.require(scores, None, ["C", "W"])  # one layout only: every other one would be compiled anew
    shape = floats.shape
    if floats.dtype not in (np.float32, np.float64) or len(shape) != 2 or shape[0] > MAX_SAMPLES or not shape[1]:
        raise ValueError(
            f"{name}: {floats.dtype} of shape {shape} is not allowed; give float32 or float64, up to {MAX_SAMPLES} rows"
        )
    values = np.empty(shape, np.int64)
    row = integer_scores(floats, values)
    if row >= 0:
        column = int(np.flatnonzero(~np.isfinite(floats[row]))[0])
        raise ValueError(f"{name}: row {row} holds {floats[row, column]} in column {column}; give finite scores")
    return values


def _check_experts(experts: int) -> None:
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"experts: {experts} is not allowed; give a whole number from 1 to {MAX_EXPERTS}")


def _ids(sample_ids_N: NDArray[np.int64], samples: int) -> Ints:
    ids_N = np.asarray(sample_ids_N)
    if ids_N.shape != (samples,) or ids_N.dtype.kind not in "iu":
        raise ValueError(
            f"sample_ids_N: {ids_N.dtype} of shape {ids_N.shape} is not allowed; give int64 of shape ({samples},)"
        )
    return np.require(ids_N, np.int64, ["C", "W"])
