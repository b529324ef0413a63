"""The training modules: weight generation (WGM), label generation (LGM), variance calculation (VCM), k-of-E dispatch.

Their roles, and that a balanced transportation problem stands behind weight generation, are the paper's; every formula
here is our own rule. All functions act on the GLOBAL batch and are deterministic, so that any number of ranks gives the
same answer. Row order is the global batch's. Floating dtypes are kept (float32 or float64).

0. least_sure:         where experts learn from a part of the batch only, which images these are.
1. route:              selection logits -> one assigned expert per image, every expert N/E images (WGM's assignment).
2. step_permutation, dispatch_sets: the k-1 further experts that also see the image, spread evenly.
3. dispatch_weights:   the weight of each of the k losses (WGM's weights; unbiased for any k).
4. selection_labels:   losses of those k experts -> the label that selection learns (LGM).
5. variance_weights:   how much the choice matters for an image (VCM).
6. selection_losses:   what the delegator minimises; the one function that is differentiated.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from coe_dist.coe.transport import Assignment, balanced_assignment, balanced_assignment_sparse

LABEL_RULES = ("balanced", "best", "soft", "competence")
_GOLDEN = -7_046_029_254_386_353_131  # 2^64 over the golden ratio as int64; odd, so that ids stay distinct


def sent_count(images: int, share: float) -> int:
    """How many of so many images go to experts: the share of them, above 0 to 1, rounded up."""
    return math.ceil(round(share * images, 6))  # 0.07 * 100 is above 7


def least_sure(confidence_N: torch.Tensor, sample_ids_N: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` rows of smallest confidence, ascending, int64 [count]; equal ones, such as saturated ones, go by a
    hash of the sample id.

    Our own rule: in use the delegator answers what it is surest of, so that experts need not learn it.
    confidence_N: the delegator's largest class probability, float [N]; sample_ids_N int64 [N]; count from 0 to N.
    """
    by_id_N = torch.argsort(sample_ids_N * _GOLDEN)
    order_N = by_id_N[torch.argsort(confidence_N[by_id_N], stable=True)]
    return order_N[:count].sort().values


def route(
    selection_NE: torch.Tensor, sample_ids_N: torch.Tensor, *, warm_prices_E: np.ndarray | None = None
) -> Assignment:
    """The balanced assignment of largest sum of log softmax of the selection logits (role: the paper; exact and
    global: our own rule).

    selection_NE float [N,E], sample_ids_N int64 [N] (they break ties). warm_prices_E: prices_E of an earlier answer;
    they save time and never change the answer. Raises ValueError as balanced_assignment does.
    """
    scores_NE = F.log_softmax(selection_NE.detach(), dim=1)
    return balanced_assignment(_numpy(scores_NE), _numpy(sample_ids_N), warm_prices_E=warm_prices_E)


def step_permutation(seed: int, step: int, experts: int) -> torch.Tensor:
    """The step's permutation of 1..E-1, int64 [E-1]: a function of (seed, step, E) alone (our own rule).

    Sorted Philox words instead of a library's `permutation`, whose stream may change between versions. seed and step
    from 0 to 2^64 - 1.
    """
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(experts - 1)
    return torch.from_numpy(np.argsort(words, kind="stable").astype(np.int64) + 1)


def dispatch_sets(
    assignment_N: torch.Tensor, permutation: torch.Tensor, *, experts: int, per_sample: int
) -> torch.Tensor:
    """The k distinct experts that see each image, int64 [N,k]; column 0 is the assigned one (our own rule).
    assignment_N int64 [N]; permutation int64 [E-1], of 1..E-1.

    The p-th image of expert a's portion, in row order and with p from 0, also goes to the experts

        (a + permutation[(p(k-1)+u) mod (E-1)]) mod E,   u = 0..k-2.

    For a balanced assignment loads are kN/E where E divides N, else within k of each other. Raises ValueError for a k
    outside 1..E.
    """
    _check_per_sample(experts, per_sample)
    assigned_N1 = assignment_N.to(torch.int64)[:, None]
    if per_sample == 1:
        return assigned_N1
    device, others = assigned_N1.device, per_sample - 1
    # position in the portion: position among the rows sorted by expert, less where the expert's rows begin
    order_N = torch.argsort(assigned_N1[:, 0], stable=True)
    counts_E = torch.bincount(assigned_N1[:, 0], minlength=experts)
    starts_E = counts_E.cumsum(0) - counts_E
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(len(order_N), device=device)
    position_N -= starts_E[assigned_N1[:, 0]]
    turn_Nu = (position_N[:, None] * others + torch.arange(others, device=device)) % (experts - 1)
    return torch.cat([assigned_N1, (assigned_N1 + permutation.to(device)[turn_Nu]) % experts], dim=1)


def dispatch_weights(
    experts: int, per_sample: int, generalist_weight: float, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Loss weights of the k columns of the dispatch sets, [k] on the CPU (our own rule).

    With lambda the generalist weight: E - (E-1) lambda for the assigned expert, lambda (E-1)/(k-1) for the others, so
    that over the dispatch permutations the expected weight of every (image, expert) is that of dense training, lambda
    off the assignment; a row sums to E. Raises ValueError for a k outside 1..E, a lambda outside 0..1, or k = 1 with
    lambda > 0.
    """
    _check_per_sample(experts, per_sample)
    if not 0.0 <= generalist_weight <= 1.0:
        raise ValueError(f"generalist_weight: {generalist_weight} is not allowed; give a fraction from 0 to 1")
    if per_sample == 1 and generalist_weight > 0:
        raise ValueError(f"per_sample: 1 is not allowed; generalist_weight = {generalist_weight} > 0 needs at least 2")
    weights_k = torch.full((per_sample,), generalist_weight * (experts - 1) / max(per_sample - 1, 1), dtype=dtype)
    weights_k[0] = experts - (experts - 1) * generalist_weight
    return weights_k


@torch.no_grad()
def selection_labels(
    losses_Nk: torch.Tensor,
    experts_Nk: torch.Tensor,
    *,
    experts: int,
    rule: str,
    temperature: float,
    sample_ids_N: torch.Tensor,
) -> torch.Tensor:
    """What selection should have answered: labels [N,k] over the dispatch sets, no gradient (role: the paper; rules:
    ours). Rows sum to 1, except for "competence".

    losses_Nk: plain cross-entropy of each dispatched pair, finite. "balanced": one-hot, balanced transportation with
    scores -loss over the dispatched pairs, capacities N/E; ties by sample id. "best": one-hot at the smallest loss;
    ties go to the lowest expert id. "soft": softmax(-loss / temperature). "competence": the true-class probability
    exp(-loss) of each dispatched expert, which selection then predicts one by one. Raises ValueError for another rule
    or a temperature that is not above 0.
    """
    if rule == "competence":
        return torch.exp(-losses_Nk)
    if rule == "soft":
        if not temperature > 0:
            raise ValueError(f"label_temperature: {temperature} is not allowed; give a number above 0")
        return F.softmax(-losses_Nk / temperature, dim=1)
    if rule == "best":
        is_best_Nk = losses_Nk == losses_Nk.amin(dim=1, keepdim=True)
        chosen_N = experts_Nk.masked_fill(~is_best_Nk, experts).amin(dim=1)
    elif rule == "balanced":
        chosen_N = _balanced_choice(losses_Nk, experts_Nk, experts, sample_ids_N)
    else:
        raise ValueError(f"labels: {rule!r} is not allowed; give one of {', '.join(LABEL_RULES)}")
    return (experts_Nk == chosen_N[:, None]).to(losses_Nk.dtype)


def _balanced_choice(
    losses_Nk: torch.Tensor, experts_Nk: torch.Tensor, experts: int, sample_ids_N: torch.Tensor
) -> torch.Tensor:
    if losses_Nk.shape[1] == experts:
        scores_NE = torch.empty_like(losses_Nk).scatter_(1, experts_Nk, -losses_Nk)
        solved = balanced_assignment(_numpy(scores_NE), _numpy(sample_ids_N))
    else:  # the WGM assignment (column 0) keeps the capacities, so the restricted problem has an answer
        solved = balanced_assignment_sparse(
            _numpy(-losses_Nk), _numpy(experts_Nk), experts, _numpy(sample_ids_N), feasible_N=_numpy(experts_Nk[:, 0])
        )
    return torch.from_numpy(solved.expert_N).to(experts_Nk)


@torch.no_grad()
def variance_weights(losses_Nk: torch.Tensor) -> torch.Tensor:
    """How much each image's choice of expert matters, [N], no gradient: min(v / (mean v + 1e-8), 10), where v is the
    population variance over the dispatch set of the true-class probability exp(-loss) and the mean is over the global
    batch (role: the paper's first version; formula: our own rule). losses_Nk: cross-entropy, float [N,k]."""
    probabilities_Nk = torch.exp(-losses_Nk)
    variance_N = (probabilities_Nk - probabilities_Nk.mean(dim=1, keepdim=True)).square().mean(dim=1)
    return (variance_N / (variance_N.mean() + 1e-8)).clamp(max=10.0)


def selection_losses(
    selection_NE: torch.Tensor, experts_Nk: torch.Tensor, labels_Nk: torch.Tensor, *, rule: str = "balanced"
) -> torch.Tensor:
    """What selection learns from each image, [N] (our own rules). Differentiable in selection_NE only: no gradient
    reaches the labels, hence none the experts. Rows are independent, so a rank may give its own rows alone.
    selection_NE float [N,E], experts_Nk int64 [N,k], labels_Nk float [N,k], rule: as in selection_labels.

    Cross-entropy between the labels and the softmax of the selection logits restricted to the dispatch set. For the
    rule "competence" the mean over the dispatch set of the binary cross-entropy between each label and the logit's
    sigmoid: with k < E every expert's logit is then learned on its own scale, not only against the others of one set.
    """
    chosen_Nk = selection_NE.gather(1, experts_Nk)
    labels_Nk = labels_Nk.detach().to(chosen_Nk.dtype)
    if rule == "competence":
        return F.binary_cross_entropy_with_logits(chosen_Nk, labels_Nk, reduction="none").mean(dim=1)
    return -(labels_Nk * F.log_softmax(chosen_Nk, dim=1)).sum(dim=1)


def _check_per_sample(experts: int, per_sample: int) -> None:
    if not 1 <= per_sample <= experts:
        raise ValueError(f"per_sample: {per_sample} is not allowed; give a whole number from 1 to experts = {experts}")


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """Half precisions, which numpy lacks, become float32; float64 stays."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return np.asarray(tensor.numpy())
