"""Every rule of the method against a loop that spells it out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coe_dist.coe import modules

quick = settings(deadline=None, max_examples=40)


@st.composite
def sizes(draw: st.DrawFn, largest_experts: int = 9) -> tuple[int, int, int, int]:
    """(N, E, k, seed)"""
    experts = draw(st.integers(2, largest_experts))
    return draw(st.integers(0, 40)), experts, draw(st.integers(1, experts)), draw(st.integers(0, 2**32))


def balanced_by_shuffle(samples: int, experts: int, seed: int) -> torch.Tensor:
    """Some assignment with loads floor(N/E) or ceil(N/E)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(experts, generator=generator)
    return order[torch.arange(samples) % experts][torch.randperm(samples, generator=generator)]


def random_losses(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp().to(dtype)


def dispatched(samples: int, experts: int, k: int, seed: int) -> torch.Tensor:
    permutation = modules.step_permutation(seed, 0, experts)
    assignment_N = balanced_by_shuffle(samples, experts, seed)
    return modules.dispatch_sets(assignment_N, permutation, experts=experts, per_sample=k)


def best_balanced_total(scores_NE: np.ndarray) -> float:
    """Largest total score over all balanced assignments, by enumeration; -inf marks forbidden edges."""
    samples, experts = scores_NE.shape
    low, high = samples // experts, -(-samples // experts)
    best = -np.inf
    for choice in itertools.product(range(experts), repeat=samples):
        loads = np.bincount(choice, minlength=experts)
        if loads.min() >= low and loads.max() <= high:
            best = max(best, scores_NE[np.arange(samples), choice].sum())
    return best


# what goes to experts


@quick
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 10**6))
def test_least_sure_are_the_smallest_and_equal_ones_go_by_a_hash_of_the_id(rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    confidence_N = torch.randint(0, 4, (rows,), generator=generator) / 4  # many are equal
    ids_N = torch.randperm(1000, generator=generator)[:rows]
    count = min(count, rows)

    def key(row: int) -> tuple[float, int]:
        word = int(ids_N[row]) * 0x9E3779B97F4A7C15 % 2**64
        return float(confidence_N[row]), word - 2**64 if word >= 2**63 else word

    assert modules.least_sure(confidence_N, ids_N, count).tolist() == sorted(sorted(range(rows), key=key)[:count])


def test_of_equally_sure_images_those_sent_are_spread_over_the_ids() -> None:
    kept = modules.least_sure(torch.ones(10_000), torch.arange(10_000), 5000)
    assert torch.bincount(kept // 1000).tolist() == pytest.approx([500] * 10, abs=25)


def test_the_share_of_the_images_is_rounded_up() -> None:
    counts = [modules.sent_count(*case) for case in ((100, 0.07), (256, 0.6), (10, 0.01), (7, 1.0), (1, 0.5), (0, 0.5))]
    assert counts == [7, 154, 1, 7, 1, 0]


# weight generation


@quick
@given(st.integers(1, 6), st.integers(2, 3), st.integers(0, 10**6))
def test_route_is_the_best_balanced_assignment_of_log_softmax(samples: int, experts: int, seed: int) -> None:
    selection_NE = random_losses(samples, experts, seed=seed)
    log_softmax = torch.log_softmax(selection_NE, 1).numpy()
    expert_N = modules.route(selection_NE, torch.arange(samples)).expert_N
    assert log_softmax[np.arange(samples), expert_N].sum() == pytest.approx(best_balanced_total(log_softmax), abs=1e-4)


def test_route_does_not_depend_on_row_order_or_warm_prices() -> None:
    generator = torch.Generator().manual_seed(0)
    # few distinct values, so that ties abound
    selection_NE = torch.randint(0, 3, (60, 5), generator=generator).float()
    ids_N = torch.randperm(1000, generator=generator)[:60]
    cold = modules.route(selection_NE, ids_N)
    order = torch.randperm(60, generator=generator)
    shuffled = modules.route(selection_NE[order], ids_N[order], warm_prices_E=cold.prices_E)
    assert (shuffled.expert_N == cold.expert_N[order.numpy()]).all()


def test_route_takes_half_precision_and_keeps_float64_differences() -> None:
    ids_N = torch.arange(2)
    assert modules.route(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16), ids_N).expert_N.tolist() == [
        1,
        0,
    ]
    # a difference of 1e-5 at logits of 1e4 is lost in float32
    close = torch.tensor([[10_000.0, 10_000.00001], [10_000.0, 10_000.0]], dtype=torch.float64)
    for ids in (torch.tensor([0, 1]), torch.tensor([5, 9]), torch.tensor([2, 77])):
        assert modules.route(close, ids).expert_N.tolist() == [1, 0]


@quick
@given(sizes(), st.integers(0, 10**9))
def test_step_permutation_is_a_permutation_named_by_seed_and_step(size: tuple[int, int, int, int], step: int) -> None:
    _, experts, _, seed = size
    permutation = modules.step_permutation(seed, step, experts)
    assert permutation.dtype == torch.int64
    assert sorted(permutation.tolist()) == list(range(1, experts))
    assert torch.equal(permutation, modules.step_permutation(seed, step, experts))


def test_step_permutation_varies_with_seed_and_step_and_never_changes_between_versions() -> None:
    assert modules.step_permutation(7, 3, 9).tolist() == [3, 6, 8, 4, 1, 7, 5, 2]
    drawn = {tuple(modules.step_permutation(seed, step, 9).tolist()) for seed in range(5) for step in range(5)}
    assert len(drawn) > 20
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    modules.step_permutation(2**63 - 1, 2**40, 9)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_first_shift_is_uniform_over_steps() -> None:
    counts = np.bincount([int(modules.step_permutation(0, step, 5)[0]) for step in range(4000)], minlength=5)[1:]
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


@quick
@given(sizes())
def test_dispatch_sets_follow_the_formula_and_stay_balanced(size: tuple[int, int, int, int]) -> None:
    samples, experts, k, seed = size
    assignment_N = balanced_by_shuffle(samples, experts, seed)
    permutation = modules.step_permutation(seed, 1, experts)
    experts_Nk = modules.dispatch_sets(assignment_N, permutation, experts=experts, per_sample=k)
    seen = [0] * experts
    for row, expert in enumerate(assignment_N.tolist()):
        p, seen[expert] = seen[expert], seen[expert] + 1
        others = [(expert + int(permutation[(p * (k - 1) + u) % (experts - 1)])) % experts for u in range(k - 1)]
        assert experts_Nk[row].tolist() == [expert, *others]
        assert len(set(experts_Nk[row].tolist())) == k
    loads = np.bincount(experts_Nk.flatten().numpy(), minlength=experts)
    assert loads.sum() == k * samples
    assert loads.max() - loads.min() <= (k if samples % experts else 0)


@pytest.mark.parametrize("experts", [2, 3, 4, 5])
@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_expected_dispatch_weights_over_all_permutations_are_the_dense_weights(experts: int, weight: float) -> None:
    assignment_N = balanced_by_shuffle(2 * experts + 1, experts, seed=experts)
    dense_NE = torch.full((len(assignment_N), experts), weight, dtype=torch.float64)
    dense_NE[torch.arange(len(assignment_N)), assignment_N] = experts - (experts - 1) * weight
    for k in range(2, experts + 1):
        weights_k = modules.dispatch_weights(experts, k, weight, dtype=torch.float64)
        assert float(weights_k.sum()) == pytest.approx(experts)
        permutations = list(itertools.permutations(range(1, experts)))
        mean_NE = torch.zeros_like(dense_NE)
        for permutation in permutations:
            experts_Nk = modules.dispatch_sets(assignment_N, torch.tensor(permutation), experts=experts, per_sample=k)
            mean_NE.scatter_add_(1, experts_Nk, weights_k.expand(len(assignment_N), -1) / len(permutations))
        torch.testing.assert_close(mean_NE, dense_NE, rtol=1e-12, atol=1e-12)


def test_one_expert_per_sample_is_a_hard_partition() -> None:
    assert modules.dispatch_weights(4, 1, 0.0).tolist() == [4.0]
    assert dispatched(8, 4, 1, seed=0).shape == (8, 1)


@pytest.mark.parametrize(
    ("experts", "k", "weight", "field"),
    [(4, 0, 0.0, "per_sample"), (4, 5, 0.2, "per_sample"), (4, 1, 0.2, "per_sample"), (4, 2, 1.1, "generalist_weight")],
)
def test_dispatch_weights_refuse(experts: int, k: int, weight: float, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        modules.dispatch_weights(experts, k, weight)


# label generation


def labels_of(
    losses_Nk: torch.Tensor, experts_Nk: torch.Tensor, experts: int, rule: str, **given: object
) -> torch.Tensor:
    ids_N = given.pop("ids_N", torch.arange(len(losses_Nk)))
    return modules.selection_labels(
        losses_Nk, experts_Nk, experts=experts, rule=rule, temperature=0.5, sample_ids_N=ids_N, **given
    )


@quick
@given(sizes(), st.sampled_from(modules.LABEL_RULES), st.sampled_from([torch.float32, torch.float64]))
def test_labels_are_distributions_or_probabilities_without_gradient(
    size: tuple[int, int, int, int], rule: str, dtype: torch.dtype
) -> None:
    samples, experts, k, seed = size
    experts_Nk = dispatched(samples, experts, k, seed)
    losses_Nk = random_losses(samples, k, seed=seed, dtype=dtype).requires_grad_()
    labels_Nk = labels_of(losses_Nk, experts_Nk, experts, rule)
    assert labels_Nk.shape == (samples, k)
    assert labels_Nk.dtype == dtype
    assert not labels_Nk.requires_grad
    if rule == "competence":
        torch.testing.assert_close(labels_Nk, torch.exp(-losses_Nk.detach()))
    else:
        torch.testing.assert_close(labels_Nk.sum(1), torch.ones(samples, dtype=dtype))
    if rule == "balanced" and samples:
        loads = np.bincount(experts_Nk[labels_Nk == 1].numpy(), minlength=experts)
        assert loads.sum() == samples
        assert loads.min() >= samples // experts
        assert loads.max() <= -(-samples // experts)


@quick
@given(st.integers(1, 6), st.integers(2, 3), st.integers(2, 3), st.integers(0, 10**6))
def test_balanced_labels_have_the_smallest_total_loss(samples: int, experts: int, k: int, seed: int) -> None:
    k = min(k, experts)
    experts_Nk = dispatched(samples, experts, k, seed)
    losses_Nk = random_losses(samples, k, seed=seed)
    labels_Nk = labels_of(losses_Nk, experts_Nk, experts, "balanced")
    scores_NE = np.full((samples, experts), -np.inf)
    np.put_along_axis(scores_NE, experts_Nk.numpy(), -losses_Nk.numpy(), axis=1)
    assert float((labels_Nk * losses_Nk).sum()) == pytest.approx(-best_balanced_total(scores_NE), abs=1e-4)


@pytest.mark.parametrize("k", [2, 4])
def test_balanced_labels_follow_the_samples_not_the_rows(k: int) -> None:
    experts_Nk = dispatched(40, 4, k, seed=3)
    losses_Nk = torch.randint(0, 3, (40, k), generator=torch.Generator().manual_seed(3)).double()  # many ties
    ids_N = torch.arange(40) * 7 + 5
    labels_Nk = labels_of(losses_Nk, experts_Nk, 4, "balanced", ids_N=ids_N)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    shuffled = labels_of(losses_Nk[order], experts_Nk[order], 4, "balanced", ids_N=ids_N[order])
    assert torch.equal(shuffled, labels_Nk[order])


def test_best_takes_the_smallest_loss_and_the_lowest_expert_of_equals() -> None:
    experts_Nk = torch.tensor([[3, 0, 2], [1, 2, 0], [2, 1, 3]])
    losses_Nk = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.25, 2.0], [0.0, 3.0, 0.0]])
    assert labels_of(losses_Nk, experts_Nk, 4, "best").tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_soft_is_a_softmax_of_minus_loss_over_temperature() -> None:
    losses_Nk, experts_Nk = random_losses(5, 3, seed=1), dispatched(5, 4, 3, seed=1)
    expected = np.exp(-losses_Nk.numpy() / 0.5)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(labels_of(losses_Nk, experts_Nk, 4, "soft").numpy(), expected, rtol=1e-12)


def test_labels_refuse_an_unknown_rule_and_a_temperature_of_zero() -> None:
    losses_Nk, experts_Nk, ids_N = random_losses(4, 2, seed=1), dispatched(4, 4, 2, seed=1), torch.arange(4)
    with pytest.raises(
        ValueError, match=r"^labels: 'worst' is not allowed; give one of balanced, best, soft, competence$"
    ):
        labels_of(losses_Nk, experts_Nk, 4, "worst")
    with pytest.raises(ValueError, match=r"^label_temperature: 0\.0 "):
        modules.selection_labels(losses_Nk, experts_Nk, experts=4, rule="soft", temperature=0.0, sample_ids_N=ids_N)


# variance calculation, selection loss


@quick
@given(sizes(), st.sampled_from([torch.float32, torch.float64]))
def test_variance_weights_by_hand(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    samples, _, k, seed = size
    losses_Nk = random_losses(samples, k, seed=seed, dtype=dtype).requires_grad_()
    weights_N = modules.variance_weights(losses_Nk)
    assert weights_N.dtype == dtype
    assert not weights_N.requires_grad
    variances = []
    for row in losses_Nk.tolist():
        probabilities = np.exp(-np.array(row))
        variances.append(float(np.mean((probabilities - probabilities.mean()) ** 2)))
    expected = [min(variance / (np.mean(variances) + 1e-8), 10.0) for variance in variances]
    np.testing.assert_allclose(weights_N.numpy(), expected, rtol=2e-4 if dtype == torch.float32 else 1e-9, atol=1e-4)


def test_variance_weights_clamp_outliers_and_vanish_where_experts_agree() -> None:
    losses_Nk = torch.full((30, 2), 0.7)
    losses_Nk[4] = torch.tensor([0.0, 20.0])
    weights_N = modules.variance_weights(losses_Nk)
    assert float(weights_N[4]) == 10.0
    assert float(weights_N.sum()) == 10.0
    assert modules.variance_weights(torch.ones(3, 2)).tolist() == [0.0, 0.0, 0.0]  # not NaN


@quick
@given(sizes())
def test_selection_losses_by_hand_and_their_gradient(size: tuple[int, int, int, int]) -> None:
    samples, experts, k, seed = size
    experts_Nk = dispatched(samples, experts, k, seed)
    selection_NE = random_losses(samples, experts, seed=seed).requires_grad_()
    labels_Nk = torch.softmax(random_losses(samples, k, seed=seed + 1), 1).requires_grad_()
    losses_N = modules.selection_losses(selection_NE, experts_Nk, labels_Nk)
    expected_grad = np.zeros((samples, experts))
    for row in range(samples):
        chosen = experts_Nk[row].tolist()
        exponentials = np.exp(selection_NE[row].detach().numpy()[chosen])
        restricted = exponentials / exponentials.sum()
        labels = labels_Nk[row].detach().numpy()
        assert float(losses_N[row].detach()) == pytest.approx(-(labels * np.log(restricted)).sum())
        expected_grad[row, chosen] = restricted - labels
    if samples:
        losses_N.sum().backward()
        np.testing.assert_allclose(selection_NE.grad, expected_grad, atol=1e-12)
        assert labels_Nk.grad is None


@quick
@given(sizes())
def test_competence_losses_by_hand_and_their_gradient(size: tuple[int, int, int, int]) -> None:
    samples, experts, k, seed = size
    experts_Nk = dispatched(samples, experts, k, seed)
    selection_NE = random_losses(samples, experts, seed=seed).log().requires_grad_()  # normal
    labels_Nk = torch.exp(-random_losses(samples, k, seed=seed + 1).abs())
    losses_N = modules.selection_losses(selection_NE, experts_Nk, labels_Nk, rule="competence")
    expected_grad = np.zeros((samples, experts))
    for row in range(samples):
        chosen, labels = experts_Nk[row].tolist(), labels_Nk[row].numpy()
        sigmoid = 1 / (1 + np.exp(-selection_NE[row].detach().numpy()[chosen]))
        terms = -(labels * np.log(sigmoid) + (1 - labels) * np.log(1 - sigmoid))
        assert float(losses_N[row].detach()) == pytest.approx(terms.mean())
        expected_grad[row, chosen] = (sigmoid - labels) / k
    if samples:
        losses_N.sum().backward()
        np.testing.assert_allclose(selection_NE.grad, expected_grad, atol=1e-12)


def test_selection_losses_survive_extreme_logits() -> None:
    selection_NE = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = modules.selection_losses(selection_NE, torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]))
    loss.sum().backward()
    assert float(loss.detach()) == 2e4
    assert selection_NE.grad.tolist() == [[1.0, -1.0, 0.0]]
