"""A router whose experts learn from a share of the images; what comes of it on many ranks is in test_parity.py."""

from __future__ import annotations

import pytest
import torch

from coe_dist.parallel.groups import create_groups
from coe_dist.parallel.router import NonFiniteError, Router
from coe_dist.parallel.solvers import LocalSolver, Problems, ReplicatedSolver

EXPERTS, IMAGES = 4, 30


def router(share: float, *, local: bool = False) -> Router:
    groups, problems = create_groups(EXPERTS, timeout_seconds=60), Problems(EXPERTS, "balanced", 1.0)
    solver = LocalSolver(problems, groups.world, groups.rank) if local else ReplicatedSolver(problems)
    return Router(
        groups, solver, experts=EXPERTS, per_sample=2, generalist_weight=0.1, variance=True, seed=0, share=share
    )


@pytest.mark.parametrize("local", [False, True])
def test_the_least_sure_are_sent_in_equal_portions(local: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    selection_BE, confidence_B = (
        torch.randn(IMAGES, EXPERTS, generator=generator),
        torch.rand(IMAGES, generator=generator),
    )
    routing = router(0.4, local=local).route(selection_BE, 7 * torch.arange(IMAGES), 0, confidence_B)
    assert routing.chosen_S is not None
    assert routing.chosen_S.tolist() == sorted(confidence_B.argsort()[:12].tolist())
    assert routing.ids_N.tolist() == (7 * routing.chosen_S).tolist()
    assert (routing.samples, routing.batch_images, routing.sizes) == (12, IMAGES, [12])
    assert routing.load_E(EXPERTS).tolist() == [3] * EXPERTS


@pytest.mark.parametrize("kind", ["class", "selection"])
def test_logits_that_are_not_finite_are_named(kind: str) -> None:
    selection_BE, confidence_B = torch.zeros(IMAGES, EXPERTS), torch.ones(IMAGES)
    (confidence_B if kind == "class" else selection_BE)[3] = float("nan")
    with pytest.raises(NonFiniteError, match=f"the delegator's {kind} logits are not finite"):
        router(0.5).route(selection_BE, torch.arange(IMAGES), 0, confidence_B)


def test_a_confidence_goes_with_a_share_and_only_with_one() -> None:
    for share, confidence_B in ((0.5, None), (1.0, torch.ones(IMAGES))):
        with pytest.raises(AssertionError):
            router(share).route(torch.zeros(IMAGES, EXPERTS), torch.arange(IMAGES), 0, confidence_B)
