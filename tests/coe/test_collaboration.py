"""Grouped inference against one image at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coe_dist.coe.backbones import build_classifier, build_delegator
from coe_dist.coe.collaboration import Answer, CollaborationOfExperts
from coe_dist.coe.packing import PackedConvolution

SHAPE: dict[str, Any] = {"channels": 1, "classes": 4, "mean": [0.5], "std": [0.2]}


class Counted(nn.Module):
    """Passes through and keeps the batch sizes it was called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.batches = network, []

    def forward(self, images_NCHW: torch.Tensor) -> Any:
        self.batches.append(len(images_NCHW))
        return self.network(images_NCHW)


def networks(experts: int, seed: int = 0) -> tuple[Counted, list[Counted]]:
    """Untrained float64 networks whose selections and confidences nevertheless vary."""
    delegator = build_delegator("small_cnn", {"width": 0.2}, experts=experts, seed=seed, **SHAPE)
    nn.init.normal_(delegator.selection_head.weight, std=5, generator=torch.Generator().manual_seed(seed))
    nn.init.normal_(delegator.class_head.weight, std=2, generator=torch.Generator().manual_seed(seed))
    parts = [
        build_classifier("small_cnn", {"width": 0.2}, seed=seed + 1 + expert, **SHAPE) for expert in range(experts)
    ]
    for part in (delegator, *parts):
        for layer in part.modules():
            if isinstance(layer, nn.BatchNorm2d):  # as after training: not the identity
                layer.running_var.uniform_(0.01, 0.1, generator=torch.Generator().manual_seed(seed))
    return Counted(delegator.double()), [Counted(part.double()) for part in parts]


def model(experts: int, threshold: float | None, final: str = "expert", seed: int = 0) -> CollaborationOfExperts:
    delegator, parts = networks(experts, seed)
    macs = [1000 + 10 * expert for expert in range(experts)]
    return CollaborationOfExperts(
        delegator, parts, threshold=threshold, final=final, delegator_macs=40, expert_macs=macs
    ).eval()


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


def one_at_a_time(collaboration: CollaborationOfExperts, images_NCHW: torch.Tensor) -> list[tuple[Any, int, int]]:
    answers = []
    for image in images_NCHW:
        logits, selection = (output[0] for output in collaboration.delegator.network(image[None]))
        rough = torch.softmax(logits, 0)
        if collaboration.threshold is not None and float(rough.max()) >= collaboration.threshold:
            answers.append((rough, -1, 40))
            continue
        expert = max(range(len(selection)), key=lambda index: (float(selection[index]), -index))
        answer = torch.softmax(collaboration.experts[expert].network(image[None])[0], 0)
        answers.append(
            ((answer + rough) / 2 if collaboration.final == "average" else answer, expert, 1040 + 10 * expert)
        )
    return answers


@given(
    st.integers(0, 40),
    st.integers(1, 5),
    st.none() | st.sampled_from([0.0, 1.0]) | st.floats(0.3, 1.0),
    st.sampled_from(["expert", "average"]),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
@torch.no_grad()
def test_grouped_inference_equals_one_image_at_a_time(
    count: int, experts: int, threshold: float | None, final: str, seed: int
) -> None:
    collaboration = model(experts, threshold, final, seed)
    batch = images(count)
    answer = collaboration(batch)
    expected = one_at_a_time(collaboration, batch)
    assert answer.expert_N.tolist() == [expert for _, expert, _ in expected]
    assert answer.macs_N.tolist() == [macs for _, _, macs in expected]
    assert answer.probabilities_NC.shape == (count, 4)
    for row, (probabilities, _, _) in enumerate(expected):
        torch.testing.assert_close(answer.probabilities_NC[row], probabilities, rtol=1e-9, atol=1e-12)


def test_the_test_networks_use_exits_and_several_experts() -> None:
    used = set(model(4, 0.6)(images(40)).expert_N.tolist())
    assert -1 in used
    assert len(used) >= 3


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_the_delegator_runs_once_and_each_used_expert_once(threshold: float | None) -> None:
    collaboration = model(4, threshold)
    answer = collaboration(images(40))
    assert collaboration.delegator.batches == [40]
    for expert, network in enumerate(collaboration.experts):
        rows = int((answer.expert_N == expert).sum())
        assert network.batches == ([rows] if rows else [])


def test_nobody_exits_without_a_threshold_and_all_at_zero() -> None:
    assert (model(3, None)(images(20)).expert_N >= 0).all()
    answer = model(3, 0.0)(images(20))
    assert (answer.expert_N == -1).all()
    assert (answer.macs_N == 40).all()


def test_no_images() -> None:
    answer = model(3, 0.6)(images(0))
    assert isinstance(answer, Answer)
    assert answer.probabilities_NC.shape == (0, 4)
    assert answer.expert_N.shape == answer.macs_N.shape == (0,)
    assert answer.expert_N.dtype == answer.macs_N.dtype == torch.int64


def test_equal_selection_logits_go_to_the_lowest_expert() -> None:
    collaboration = model(4, None)
    nn.init.zeros_(collaboration.delegator.network.selection_head.weight)
    assert (collaboration(images(10)).expert_N == 0).all()


def test_inference_leaves_no_gradient_and_changes_nothing() -> None:
    collaboration = model(3, 0.6)
    before = {name: tensor.clone() for name, tensor in collaboration.state_dict().items()}
    answer = collaboration(images(20))
    assert not answer.probabilities_NC.requires_grad
    torch.testing.assert_close(answer.probabilities_NC.sum(1), torch.ones(20, dtype=torch.float64))
    assert all(torch.equal(collaboration.state_dict()[name], tensor) for name, tensor in before.items())


def test_training_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
        model(3, 0.6).train()(images(2))


def test_parts_that_do_not_fit() -> None:
    delegator, experts = networks(3)
    given: dict[str, Any] = {"threshold": None, "final": "expert", "delegator_macs": 40}
    with pytest.raises(ValueError, match=r"^final: 'vote' "):
        CollaborationOfExperts(delegator, experts, **{**given, "final": "vote"}, expert_macs=[1] * 3)
    with pytest.raises(ValueError, match=r"^expert_macs: 2 values"):
        CollaborationOfExperts(delegator, experts, **given, expert_macs=[1] * 2)
    with pytest.raises(ValueError, match=r"^experts: 2 "):
        CollaborationOfExperts(delegator, experts[:2], **given, expert_macs=[1] * 2).eval()(images(2))
    with pytest.raises(ValueError, match=r"^precision: 'fp16' is not allowed; give one of weights, bf16$"):
        CollaborationOfExperts(delegator, experts, **given, expert_macs=[1] * 3, precision="fp16")


def plain(experts: int, threshold: float | None) -> CollaborationOfExperts:
    """float32, without the counters, which torch.fx and torch.compile cannot look through."""
    collaboration = model(experts, threshold)
    collaboration.delegator = collaboration.delegator.network
    collaboration.experts = nn.ModuleList([expert.network for expert in collaboration.experts])
    return collaboration.float()


@torch.no_grad()
def clear_cases(collaboration: CollaborationOfExperts, batch: torch.Tensor) -> torch.Tensor:
    """bool [N]: decisions that rounding may not turn, in float64."""
    exact = copy.deepcopy(collaboration.delegator).double()
    logits_NC, selection_NE = exact(batch)
    best_N2 = selection_NE.topk(2).values
    distance_N = (logits_NC.softmax(1).amax(1) - collaboration.threshold).abs()
    return (best_N2[:, 0] - best_N2[:, 1] > 1e-4) & (distance_N > 1e-4)


FORMS: dict[str, Callable[[CollaborationOfExperts], CollaborationOfExperts]] = {
    "as it is": lambda collaboration: collaboration,
    "fused": lambda collaboration: collaboration.fused(),
    "packed": lambda collaboration: collaboration.packed(images(10)),
}


@pytest.fixture(scope="module")
def one_by_one() -> tuple[CollaborationOfExperts, torch.Tensor, Answer]:
    collaboration = plain(4, 0.6)
    single = (collaboration(image) for image in images(600).split(1))
    answer = Answer(*(torch.cat(parts) for parts in zip(*single, strict=True)))
    assert len(set(answer.expert_N.tolist())) >= 4
    return collaboration, images(600), answer


@pytest.mark.parametrize("threads", [1, 2])  # with two, experts of large batches run side by side
@pytest.mark.parametrize("form", FORMS)
def test_batch_size_and_order_do_not_matter_in_float32(
    form: str, threads: int, one_by_one: Any, record_property: Any
) -> None:
    collaboration, batch, expected = one_by_one
    exempt = ~clear_cases(collaboration, batch)
    record_property("exempt_samples", int(exempt.sum()))
    print(f"exempt: {int(exempt.sum())} of {len(batch)}")
    assert exempt.sum() <= 12
    fast = FORMS[form](collaboration)
    torch.set_num_threads(threads)
    try:
        for size in (1, 2, 7, 64, 600) if threads == 1 else (64, 600):
            order = torch.randperm(600, generator=torch.Generator().manual_seed(size))
            answers = [fast(batch[rows]) for rows in order.split(size)]
            answer = Answer(*(torch.cat(parts)[order.argsort()] for parts in zip(*answers, strict=True)))
            for mine, single in zip(answer, expected, strict=True):
                torch.testing.assert_close(mine[~exempt], single[~exempt], rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(1)


def test_packed_packs_every_convolution_and_answers_in_bf16_with_the_plain_weights() -> None:
    collaboration = plain(3, 0.6)
    packed = collaboration.packed(images(10))
    convolutions = [layer for layer in packed.modules() if isinstance(layer, nn.Conv2d)]
    assert convolutions
    assert all(isinstance(layer, PackedConvolution) for layer in convolutions)
    fused = collaboration.fused()
    packed.precision = fused.precision = "bf16"
    for mine, theirs in zip(packed(images(50)), fused(images(50)), strict=True):
        assert torch.equal(mine, theirs)


def test_fused_is_a_copy_without_batchnorm() -> None:
    collaboration = plain(3, 0.6).double()
    before = {name: tensor.clone() for name, tensor in collaboration.state_dict().items()}
    fused = collaboration.fused()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in collaboration.modules())
    for mine, theirs in zip(fused(images(50)), collaboration(images(50)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(collaboration.state_dict()[name], tensor) for name, tensor in before.items())
    fused.float()
    assert next(collaboration.parameters()).dtype == torch.float64


def test_compiled_and_bf16_agree_with_the_networks() -> None:
    """bf16 rounds the logits: a rate of agreement, not equality."""
    collaboration = plain(3, 0.6)
    batch = images(200)
    clear = clear_cases(collaboration, batch)
    expected = collaboration(batch)
    compiled = collaboration.compiled()
    packed_first = collaboration.packed(batch[:10]).compiled()
    for fast, rows in ((compiled, batch[:1]), (compiled, batch[:40]), (compiled, batch), (packed_first, batch)):
        answer = fast(rows)
        for mine, theirs in zip(answer, expected, strict=True):
            few = clear[: len(rows)]
            torch.testing.assert_close(mine[few], theirs[: len(rows)][few], rtol=0, atol=1e-5)
    assert {id(tensor) for tensor in compiled.parameters()} == {id(tensor) for tensor in collaboration.parameters()}
    collaboration.precision = "bf16"
    coarse = collaboration(batch)
    assert coarse.probabilities_NC.dtype == torch.float32
    assert not torch.equal(coarse.probabilities_NC, expected.probabilities_NC)
    agreement = float((coarse.probabilities_NC.argmax(1) == expected.probabilities_NC.argmax(1)).double().mean())
    print(f"bf16 agrees in {agreement:.1%}")
    assert agreement > 0.9
