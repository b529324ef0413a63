"""The transportation solver against brute force, scipy and POT; it is a function of scores and sample ids alone."""

from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coe_dist.coe.transport import SCORE_UNIT, Assignment, balanced_assignment, balanced_assignment_sparse
from coe_dist.coe.transport_core import certify


def whole(scores: NDArray) -> NDArray[np.int64]:
    return np.rint(np.clip(scores.astype(np.float64), -128, 128) / SCORE_UNIT).astype(np.int64)


def check(answer: Assignment, scores_NE: NDArray) -> None:
    """Loads, the reported objective, and dual = primal recomputed from the returned prices alone."""
    values_NE = whole(scores_NE)
    samples, experts = values_NE.shape
    loads_E = np.bincount(answer.expert_N, minlength=experts)
    low, high = samples // experts, -(-samples // experts)
    assert answer.expert_N.shape == (samples,)
    assert answer.expert_N.dtype == answer.prices_E.dtype == np.int64
    assert loads_E.min() >= low
    assert loads_E.max() <= high
    assert answer.objective == values_NE[np.arange(samples), answer.expert_N].sum()
    prices_E = answer.prices_E
    dual = (values_NE - prices_E).max(1).sum() if samples else 0
    dual += (high * np.maximum(prices_E, 0) - low * np.maximum(-prices_E, 0)).sum()
    assert answer.objective == answer.dual_objective == dual


def mixed(word: int) -> int:
    """splitmix64."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def tie_value(sample_id: int, expert: int) -> int:
    """The secondary value of an edge: 44 bits of a hash of (sample id, expert)."""
    return mixed(mixed(sample_id % 2**64) ^ expert * 0xD6E8FEB86659FD93 % 2**64) >> 20


def brute_force(values_NE: NDArray[np.int64], ids_N: NDArray, allowed_NE: NDArray[np.bool_] | None = None) -> list[int]:
    """The lexicographically best of ALL assignments within the loads: (sum of values, sum of tie values)."""
    samples, experts = values_NE.shape
    low, high = samples // experts, -(-samples // experts)
    ties = [[tie_value(int(i), j) for j in range(experts)] for i in ids_N]
    best: tuple[int, int] | None = None
    choice: list[int] = []
    for homes in itertools.product(range(experts), repeat=samples):
        if any(not low <= homes.count(j) <= high for j in range(experts)):
            continue
        if allowed_NE is not None and not all(allowed_NE[i, j] for i, j in enumerate(homes)):
            continue
        key = (sum(int(values_NE[i, j]) for i, j in enumerate(homes)), sum(ties[i][j] for i, j in enumerate(homes)))
        if best is None or key > best:
            best, choice = key, list(homes)
    return choice


@st.composite
def problems(draw: st.DrawFn, largest: int = 6) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Few distinct values (ties, clipped extremes, one unit apart) so that optima are rarely unique."""
    samples, experts = draw(st.integers(1, largest)), draw(st.integers(1, 4))
    value = st.sampled_from([0.0, 1.0, -1.0, 0.25, SCORE_UNIT, 1e9, -1e9]) | st.floats(-4, 4)
    pool = draw(st.lists(value, min_size=1, max_size=5))
    cells = st.lists(st.sampled_from(pool), min_size=samples * experts, max_size=samples * experts)
    scores_NE = np.array(draw(cells)).reshape(samples, experts)
    ids = draw(st.lists(st.integers(-(2**40), 2**40), min_size=samples, max_size=samples, unique=True))
    return scores_NE, np.array(ids, np.int64)


@given(problems())
@settings(max_examples=150)
def test_equals_brute_force_with_the_lexicographic_tie_break(problem: tuple[NDArray, NDArray]) -> None:
    scores_NE, ids_N = problem
    answer = balanced_assignment(scores_NE, ids_N)
    check(answer, scores_NE)
    assert answer.expert_N.tolist() == brute_force(whole(scores_NE), ids_N)


@given(problems(largest=5), st.data())
@settings(max_examples=150)
def test_sparse_equals_brute_force_on_its_edges(problem: tuple[NDArray, NDArray], data: st.DataObject) -> None:
    scores_NE, ids_N = problem
    samples, experts = scores_NE.shape
    k = data.draw(st.integers(1, experts))
    shift = data.draw(st.integers(0, experts - 1))
    feasible_N = (np.arange(samples) + shift) % experts
    others = [data.draw(st.permutations([j for j in range(experts) if j != a])) for a in feasible_N.tolist()]
    edges_Nk = np.array([[a, *rest][:k] for a, rest in zip(feasible_N.tolist(), others, strict=True)], np.int64)
    allowed_NE = np.zeros((samples, experts), bool)
    np.put_along_axis(allowed_NE, edges_Nk, True, 1)
    scores_Nk = np.take_along_axis(scores_NE, edges_Nk, 1)
    answer = balanced_assignment_sparse(scores_Nk, edges_Nk, experts, ids_N, feasible_N=feasible_N)
    assert answer.expert_N.tolist() == brute_force(whole(scores_NE), ids_N, allowed_NE)
    assert answer.objective == answer.dual_objective


def score_set(kind: str, samples: int, experts: int, seed: int) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    noise_NE = generator.standard_normal((samples, experts))
    if kind == "tied":
        noise_NE = generator.integers(0, 3, (samples, experts)).astype(float)
    elif kind == "equal":
        noise_NE[:] = 0.5
    elif kind == "one":
        noise_NE[:, 0] += 100.0
    elif kind == "trained":
        noise_NE += 3 * generator.standard_normal((20, experts))[generator.integers(0, 20, samples) // 2]
        noise_NE -= np.log(np.exp(noise_NE).sum(1, keepdims=True))
    elif kind == "identical":
        noise_NE[:] = noise_NE[0]
    return noise_NE.astype(np.float32)


KINDS = ["random", "tied", "equal", "one", "trained", "identical"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("samples", "experts"), [(40, 7), (64, 16), (5, 9), (301, 3), (700, 11), (60, 60)])
def test_objective_equals_scipy_on_repeated_columns(samples: int, experts: int, kind: str) -> None:
    scores_NE = score_set(kind, samples, experts, samples)
    answer = balanced_assignment(scores_NE, np.arange(samples))
    check(answer, scores_NE)
    low, high = samples // experts, -(-samples // experts)
    values_NE = whole(scores_NE).astype(np.float64)
    # Columns: `low` copies of every expert that must be filled, then one optional copy each (if high > low). Slack rows
    # take the optional columns that stay free, and nothing else.
    square = np.full((experts * high, experts * high), -1e15)
    square[:samples] = np.concatenate([np.repeat(values_NE, low, 1), np.repeat(values_NE, high - low, 1)], 1)
    square[samples:, experts * low :] = 0
    rows, columns = linear_sum_assignment(square, maximize=True)
    assert answer.objective == int(square[rows, columns][rows < samples].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_objective_equals_pot_on_many_rows(kind: str) -> None:
    scores_NE = score_set(kind, 2048, 16, 3)
    answer = balanced_assignment(scores_NE, np.arange(2048))
    check(answer, scores_NE)
    values_NE = whole(scores_NE).astype(np.float64)
    plan_NE = ot.emd(np.ones(2048), np.full(16, 128.0), values_NE.max() - values_NE, numItermax=10**7)
    assert answer.objective == int(np.rint((plan_NE * values_NE).sum()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("samples", "experts"), [(300, 8), (2500, 12), (7, 20)])
def test_answer_is_a_function_of_scores_and_ids_only(samples: int, experts: int, kind: str) -> None:
    scores_NE = score_set(kind, samples, experts, 5)
    generator = np.random.default_rng(6)
    ids_N = generator.permutation(10 * samples)[:samples]
    answer = balanced_assignment(scores_NE, ids_N)
    order = generator.permutation(samples)
    permuted = balanced_assignment(scores_NE[order], ids_N[order])
    assert (permuted.expert_N == answer.expert_N[order]).all()
    assert permuted.objective == answer.objective
    warm_starts = [
        answer.prices_E,
        -answer.prices_E,
        generator.integers(-(2**62), 2**62, experts),
        np.arange(experts) << 20,
    ]
    for prices_E in warm_starts:
        warm = balanced_assignment(scores_NE, ids_N, warm_prices_E=prices_E)
        check(warm, scores_NE)
        assert (warm.expert_N == answer.expert_N).all()


@pytest.mark.parametrize("kind", ["random", "tied", "equal"])
@pytest.mark.parametrize(("samples", "experts", "k"), [(150, 6, 2), (1500, 12, 3), (90, 7, 7), (5, 8, 2)])
def test_sparse_equals_dense_with_forbidden_edges_at_a_very_low_score(
    samples: int, experts: int, k: int, kind: str
) -> None:
    scores_NE = score_set(kind, samples, experts, 8).clip(-2, 2) / 100  # N * 4/100 < 127: no forbidden edge ever pays
    generator = np.random.default_rng(9)
    feasible_N = generator.permutation(np.arange(samples) % experts)
    others = [generator.permutation(experts - 1)[: k - 1] for _ in range(samples)]
    edges_Nk = np.stack([np.r_[a, (a + 1 + rest) % experts] for a, rest in zip(feasible_N, others, strict=True)])
    forbidden_NE = np.full_like(scores_NE, -128)
    np.put_along_axis(forbidden_NE, edges_Nk, np.take_along_axis(scores_NE, edges_Nk, 1), 1)
    dense = balanced_assignment(forbidden_NE, np.arange(samples))
    scores_Nk = np.take_along_axis(scores_NE, edges_Nk, 1)
    for warm in (None, dense.prices_E):
        sparse = balanced_assignment_sparse(
            scores_Nk, edges_Nk, experts, np.arange(samples), feasible_N=feasible_N, warm_prices_E=warm
        )
        assert (sparse.expert_N == dense.expert_N).all()
        assert sparse.objective == dense.objective == sparse.dual_objective


def test_no_rows_one_row_one_expert() -> None:
    empty = balanced_assignment(np.empty((0, 3)), np.empty(0, np.int64))
    assert (empty.expert_N.shape, empty.objective, empty.dual_objective) == ((0,), 0, 0)
    one = balanced_assignment(np.array([[0.0, 2.0, 1.0]]), np.array([7]))
    assert one.expert_N.tolist() == [1]
    assert one.objective == 2 * 2**20
    lonely = balanced_assignment(np.array([[1.0], [-3.0]], np.float32), np.array([1, 2]))
    assert lonely.expert_N.tolist() == [0, 0]
    assert lonely.objective == -2 * 2**20


def test_more_experts_than_samples_gives_each_its_own() -> None:
    answer = balanced_assignment(np.tile([3.0, 2.0, 1.0, 0.0], (2, 1)), np.array([10, 11]))
    assert sorted(answer.expert_N.tolist()) == [0, 1]


def test_thousands_of_experts() -> None:
    scores_NE = score_set("random", 300, 4096, 0)
    answer = balanced_assignment(scores_NE, np.arange(300))
    check(answer, scores_NE)


def test_scores_are_clipped_and_rounded() -> None:
    clipped = balanced_assignment(np.array([[1e9, 0.0], [128.0, 0.0]]), np.array([0, 1]))
    assert clipped.objective == 128 * 2**20
    below_half_a_unit = balanced_assignment(np.array([[0.3 * SCORE_UNIT, 0.0], [0.0, 0.0]]), np.array([0, 1]))
    assert below_half_a_unit.objective == 0


def test_read_only_strided_and_short_inputs_are_taken() -> None:
    scores_NE = score_set("random", 20, 8, 1)
    scores_NE.setflags(write=False)
    ids_N = np.arange(40)[::2]
    every_other = balanced_assignment(scores_NE[:, ::2], ids_N.astype(np.int32))
    assert (every_other.expert_N == balanced_assignment(scores_NE[:, ::2].copy(), ids_N).expert_N).all()


def test_certificate_refuses_every_worse_assignment() -> None:
    scores_NE = score_set("random", 4, 2, 4)
    answer = balanced_assignment(scores_NE, np.arange(4))
    bounds = np.full(2, 2)
    prices = np.append(answer.prices_E, 0)
    dense = np.empty((0, 0), np.int64)
    accepted = [
        homes
        for homes in itertools.product(range(2), repeat=4)
        if certify(whole(scores_NE), dense, bounds, bounds, prices, np.array(homes))[0]
    ]
    assert accepted == [tuple(answer.expert_N)]
    assert not certify(whole(scores_NE), dense, bounds, bounds, prices + np.array([9 << 20, 0, 0]), answer.expert_N)[0]


@pytest.mark.parametrize(
    ("scores", "ids", "warm", "message"),
    [
        (
            np.array([[0.0, 1.0], [0.0, -np.inf], [np.nan, 0.0]]),
            np.arange(3),
            None,
            "scores_NE: row 1 holds -inf in column 1",
        ),
        (np.array([[0, 1]]), np.arange(1), None, "scores_NE: int64 of shape"),
        (np.zeros((3, 0)), np.arange(3), None, "scores_NE: float64 of shape"),
        (np.zeros((3, 4097)), np.arange(3), None, "experts: 4097 is not allowed"),
        (np.zeros((3, 2)), np.arange(2), None, "sample_ids_N: int64 of shape"),
        (np.zeros((3, 2)), np.zeros(3), None, "sample_ids_N: float64 of shape"),
        (np.zeros((3, 2)), np.arange(3), np.zeros(3, np.int64), "warm_prices_E: int64 of shape"),
        (np.zeros((3, 2)), np.arange(3), np.zeros(2), "warm_prices_E: float64 of shape"),
    ],
)
def test_bad_input_is_named_in_one_line(scores: NDArray, ids: NDArray, warm: NDArray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as caught:
        balanced_assignment(scores, ids, warm_prices_E=warm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edges", "feasible", "message"),
    [
        ([[0, 0], [1, 0]], [0, 1], "twice in one row"),
        ([[0, 2], [1, 0]], [0, 1], "experts from 0 to 2"),
        ([[0], [1]], [0, 1], "experts_Nk: shape"),
        ([[0, 1], [1, 0]], [0, 0], "loads from 0 to 2"),
        ([[0, 1], [1, 0]], [0, 5], "give one of experts_Nk"),
        ([[0, 1], [1, 0]], [0], "feasible_N: shape"),
    ],
)
def test_bad_edges_are_named_in_one_line(edges: list[list[int]], feasible: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        balanced_assignment_sparse(np.zeros((2, 2)), np.array(edges), 2, np.arange(2), feasible_N=np.array(feasible))
    assert "\n" not in str(caught.value)
