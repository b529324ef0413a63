"""What the inference benchmark runs: every system in the variants among which it may choose its fastest.

Variants differ in the memory layout and in how the batch is cut: whole, or in chunks that run side by side, as our
experts' groups do (coe/side_by_side.py). Variants of one system compute the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from coe_dist.bench.inference_condconv import condconv_trunk, set_form
from coe_dist.bench.inference_networks import Networks
from coe_dist.coe.collaboration import CollaborationOfExperts
from coe_dist.coe.early_exit import probabilities
from coe_dist.coe.fusion import fuse_batchnorm
from coe_dist.coe.packing import pack_convolutions
from coe_dist.coe.side_by_side import run_pieces

CHUNK = 32  # images, near where a network alone is fastest on the processor
PACKED_FOR = 8  # images
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Batch(NamedTuple):
    images_NCHW: torch.Tensor  # uint8
    first_expert: int  # of the first image; -1: it exits early


Run = Callable[[Batch], Any]  # class probabilities or logits [N,C], or an Answer
Variants = dict[str, Run]


def systems(networks: Networks, batch: int, *, tuned: bool) -> dict[str, Variants]:
    """ours and the peers for batches of `batch` images.

    tuned: BatchNorm folded, convolutions packed, and a choice of layouts for all alike; otherwise every network as its
    library supplies it, and no `_best` peers.
    """
    found: dict[str, Variants] = {}
    for name, variant, run in _tuned(networks, batch) if tuned else _supplied(networks, batch):
        found.setdefault(name, {})[variant] = run
    return found


def _supplied(networks: Networks, batch: int) -> Iterator[tuple[str, str, Run]]:
    model = networks.collaboration
    yield "ours", "as it is", answer_of(model)
    if batch == 1:
        yield "by_hand", "as it is", partial(by_hand, model)
    yield "soft_mixture", "as it is", partial(soft_mixture, model)
    yield "plain", "as it is", partial(_whole, networks.plain)
    yield "condconv_batched", "timm's", partial(_whole, networks.condconv)
    yield "condconv_loop", "BatchNorm folded", partial(_whole, condconv(networks, "loop", "contiguous"))


def _tuned(networks: Networks, batch: int) -> Iterator[tuple[str, str, Run]]:
    few_NCHW = networks.images_NCHW[:PACKED_FOR]
    model = networks.collaboration.packed(few_NCHW).to(memory_format=torch.channels_last)
    yield "ours", "packed", answer_of(model)
    if batch == 1:
        yield "by_hand", "packed", partial(by_hand, model)
    yield "soft_mixture", "packed", partial(soft_mixture, model)
    plain = pack_convolutions(fuse_batchnorm(networks.plain), few_NCHW).to(memory_format=torch.channels_last)
    yield "plain", "packed", partial(_whole, plain)
    for layout in LAYOUTS:
        for form in ("batched", "loop"):
            yield f"condconv_{form}", layout, partial(_whole, condconv(networks, form, layout))
    for chunk in sorted({batch, min(batch, CHUNK), -(-batch // torch.get_num_threads())}):
        cut = "whole" if chunk == batch else f"chunks of {chunk}"
        yield "plain_best", cut, partial(_chunked, plain, chunk)
        for layout in LAYOUTS:
            # a copy of its own: each of its layers keeps the form that is fastest for this chunk and layout
            fastest = condconv(networks, "fastest", layout)
            yield "condconv_best", f"{layout}, {cut}", partial(_chunked, fastest, chunk)


def condconv(networks: Networks, form: str, layout: str) -> nn.Module:
    """timm's network with BatchNorm folded and CondConv in another form; its ordinary convolutions are packed where
    channels come last, the order that packed ones give."""
    network: Any = copy.deepcopy(networks.condconv)
    network.trunk = condconv_trunk(network.trunk)
    set_form(network, "batched")
    if layout == "channels_last":
        network = pack_convolutions(network, networks.images_NCHW[:PACKED_FOR])
    set_form(network, form)
    tuned: nn.Module = network.eval().to(memory_format=LAYOUTS[layout])
    return tuned


def answer_of(model: CollaborationOfExperts) -> Run:
    return lambda batch: model(batch.images_NCHW)


def soft_mixture(model: CollaborationOfExperts, batch: Batch) -> torch.Tensor:
    """All experts on every image, their answers averaged by the softmax of the selection logits; [N,C]."""
    _, selection_NE = model.delegator(batch.images_NCHW)
    answers_ENC = torch.stack([probabilities(expert(batch.images_NCHW)) for expert in model.experts])
    return torch.einsum("ne,enc->nc", selection_NE.softmax(dim=1), answers_ENC)


def by_hand(model: CollaborationOfExperts, batch: Batch) -> torch.Tensor:
    """The least that one image can cost: two calls, the expert known beforehand, no probabilities, no decision."""
    output: torch.Tensor = model.delegator(batch.images_NCHW)[0]
    return output if batch.first_expert < 0 else model.experts[batch.first_expert](batch.images_NCHW)


def _whole(network: nn.Module, batch: Batch) -> torch.Tensor:
    output: torch.Tensor = network(batch.images_NCHW)
    return output


def _chunked(network: nn.Module, chunk: int, batch: Batch) -> torch.Tensor:
    return torch.cat(run_pieces([(network, part) for part in torch.split(batch.images_NCHW, chunk)]))
