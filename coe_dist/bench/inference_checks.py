"""The inference benchmark's batches, and the checks that systems which must agree do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from coe_dist.bench.inference_networks import Networks
from coe_dist.bench.inference_systems import Batch, Run, Variants
from coe_dist.coe.collaboration import Answer
from coe_dist.coe.early_exit import NO_EXIT, probabilities

IMAGES_PER_ROUND = 16  # at least
EQUAL, CLEAR = 1e-5, 1e-4  # of probabilities; of margins beyond which a decision must not depend on the batch
FORMS_AGREE = 1e-3  # of the largest output: one function in another order of the work, behind fifty random layers


class Reference(NamedTuple):
    answer: Answer  # one image at a time, by plain calls
    clear_N: torch.Tensor  # bool [N]: selection margin and distance to the threshold are above CLEAR


def batches_of(networks: Networks, batch: int, reference: Reference) -> list[Batch]:
    """Whole batches of at least IMAGES_PER_ROUND images, fewer only where there are no more."""
    count = min(max(batch, IMAGES_PER_ROUND), len(networks.images_NCHW)) // batch * batch
    expert_N = reference.answer.expert_N
    return [
        Batch(networks.images_NCHW[first : first + batch], int(expert_N[first])) for first in range(0, count, batch)
    ]


@torch.inference_mode()
def one_by_one(networks: Networks) -> Reference:
    model = networks.collaboration
    threshold = NO_EXIT if model.threshold is None else model.threshold
    rows: list[torch.Tensor] = []
    experts, macs, clear = [], [], []
    for image_1CHW in torch.split(networks.images_NCHW, 1):
        logits, selection = model.delegator(image_1CHW)
        rough = probabilities(logits)
        best = selection[0].topk(2).values
        confidence = float(rough.max())
        experts.append(-1 if confidence >= threshold else int(selection.argmax()))
        rows.append(rough if experts[-1] < 0 else probabilities(model.experts[experts[-1]](image_1CHW)))
        macs.append(model.delegator_macs + (0 if experts[-1] < 0 else model.expert_macs[experts[-1]]))
        clear.append(float(best[0] - best[1]) > CLEAR and abs(confidence - threshold) > CLEAR)
    return Reference(Answer(torch.cat(rows), torch.tensor(experts), torch.tensor(macs)), torch.tensor(clear))


def check_ours(run: Run, networks: Networks, batch: int, reference: Reference) -> int:
    """How many of the images were exempt. Raises AssertionError when a clear one is answered otherwise."""
    expected, clear = reference
    answer = answered(run, batches_of(networks, batch, reference))
    clear = clear[: len(answer.expert_N)]
    off = (answer.probabilities_NC - expected.probabilities_NC[: len(clear)]).abs().amax(1)
    wrong = clear & ((off > EQUAL) | (answer.expert_N != expected.expert_N[: len(clear)]))
    if wrong.any():
        raise AssertionError(f"inference bench: {int(wrong.sum())} answers depend on the batch, by up to {off.max():g}")
    return int((~clear).sum())


def check_peers(found: Mapping[str, Variants], batch: Batch) -> None:
    """All variants of a peer agree, and all forms of CondConv do; also warms them up."""
    first: dict[str, torch.Tensor] = {}
    for name, variants in found.items():
        if name in ("ours", "soft_mixture"):  # checked above; alone of its kind, and the slowest
            continue
        for variant, run in variants.items():
            with torch.inference_mode():
                output_NC = run(batch)
            expected_NC = first.setdefault(name.removesuffix("_best").partition("_")[0], output_NC)
            off, largest = float((output_NC - expected_NC).abs().max()), float(expected_NC.abs().max())
            if not off <= FORMS_AGREE * largest:
                raise AssertionError(
                    f"inference bench: {name} ({variant}) computes something else for a batch of {len(output_NC)}: "
                    f"off by {off:g}, the largest output is {largest:g}"
                )


def answered(run: Run, batches: list[Batch]) -> Answer:
    return Answer(*(torch.cat(parts) for parts in zip(*(run(batch) for batch in batches), strict=True)))
