"""The inference benchmark runs, its systems agree and cost the same; nothing here looks at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from coe_dist.bench.inference_checks import Reference, batches_of, check_ours, check_peers, one_by_one
from coe_dist.bench.inference_condconv import FORMS, CondConv, condconv_trunk, set_form
from coe_dist.bench.inference_families import EXPERTS, FAMILIES
from coe_dist.bench.inference_networks import MACS_TOLERANCE, Networks, build_networks, macs_of
from coe_dist.bench.inference_systems import Batch, soft_mixture, systems
from coe_dist.bench.inference_work import count_work
from coe_dist.bench.run import run_bench


@pytest.fixture(scope="module")
def networks() -> Networks:
    return build_networks(FAMILIES["light"], images=40)


def test_quick_run_has_every_peer_at_equal_macs() -> None:
    record = run_bench("inference", quick=True)
    assert record["name"] == "inference"
    always = {"condconv_batched", "condconv_loop", "plain", "soft_mixture"}
    settings = [(measured["case"]["setting"], measured["case"]["batch"]) for measured in record["cases"]]
    by_setting = [(setting, batch) for setting in ("supplied", "kept", "tuned") for batch in (1, 8)]
    assert settings == [*by_setting, ("options", 8)]
    for measured in record["cases"]:
        ours, peers = measured["ours"], measured["peers"]
        for figure in (ours, *peers.values()):
            assert 0 < figure["p50"] <= figure["p95"]
            assert figure["rounds"] == 2
            assert figure["images_per_second"] == measured["case"]["batch"] / figure["seconds"]
        for peer in peers.values():
            assert peer["ratio"] == peer["seconds"] / ours["seconds"]
        if measured["case"]["setting"] == "options":
            assert set(peers) == {"as_it_is", "fused", "fused_channels_last", "bf16"}
            assert peers["as_it_is"]["same_class"] == peers["fused"]["same_expert"] == 1.0
            continue
        hand = {"by_hand"} if measured["case"]["batch"] == 1 else set()
        best = {"plain_best", "condconv_best"} if measured["case"]["setting"] == "tuned" else set()
        assert set(peers) == always | hand | best
        assert ours["exempt"] <= 1
        assert all(peers[name]["operations"] > 0 and peers[name]["bytes"] > 0 for name in set(peers) - {"soft_mixture"})
        assert ours["operations"] > peers["plain"]["operations"]  # a delegator's and those of several experts
        assert measured["case"]["exit_rate"] == 5 / 16
        assert sum(measured["case"]["loads"]) == 11
        for name in always - {"soft_mixture"} | best:
            assert peers[name]["macs"] == pytest.approx(ours["macs"], rel=MACS_TOLERANCE)
        assert peers["soft_mixture"]["macs"] > EXPERTS * ours["macs"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_equal_macs(family: str) -> None:
    macs = macs_of(FAMILIES[family])
    assert macs["coe"] == pytest.approx(macs["delegator"] + 0.7 * macs["expert"], abs=1)
    for peer in ("plain", "condconv"):
        assert macs[peer] == pytest.approx(macs["coe"], rel=MACS_TOLERANCE)


def test_condconv_of_b0_is_timms_published_network() -> None:
    with torch.device("meta"):
        ours = FAMILIES["b0"].classifier("condconv").trunk
        timms = timm.create_model("tf_efficientnet_cc_b0_8e", pad_type="", num_classes=0)
    assert [(name, tensor.shape) for name, tensor in ours.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in timms.state_dict().items()
    ]


def test_selection_and_exits_are_spread(networks: Networks) -> None:
    answer = networks.collaboration(networks.images_NCHW)
    assert sum(load > 0 for load in torch.bincount(answer.expert_N + 1)[1:].tolist()) >= 6
    exited = (answer.expert_N < 0).tolist()
    assert all(sum(exited[first : first + 10]) == 3 for first in range(0, 40, 10))
    assert answer.macs_N.double().mean() == pytest.approx(networks.macs["coe"], abs=1)


@torch.inference_mode()
def test_every_form_of_condconv_is_timms_network(networks: Networks) -> None:
    timms = networks.condconv.trunk.double()
    ours = condconv_trunk(timms)
    layers = [layer for layer in ours.modules() if isinstance(layer, CondConv)]
    assert {form for layer in layers for form in layer.forms()} == set(FORMS)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in ours.modules())
    images = torch.rand(5, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = timms(images)
    for layout in (torch.contiguous_format, torch.channels_last):
        for form in (*FORMS, "fastest"):
            for layer in layers:
                layer.form = form if form == "fastest" or form in layer.forms() else "batched"
            torch.testing.assert_close(ours(images.contiguous(memory_format=layout)), expected, rtol=1e-8, atol=1e-8)
    assert all(layer.form in FORMS for layer in layers)
    set_form(ours, "loop")
    assert {layer.form for layer in layers} == {"loop"}
    timms.float()


@torch.inference_mode()
def test_a_soft_mixture_of_hard_choices_is_ours_without_exits(networks: Networks) -> None:
    model = networks.collaboration
    before = model.threshold
    images = networks.images_NCHW[:6]
    head = model.delegator.selection_head
    model.threshold = None
    try:
        expected = model(images).probabilities_NC
        head.weight *= 1e4
        head.bias *= 1e4
        torch.testing.assert_close(soft_mixture(model, Batch(images, 0)), expected, rtol=0, atol=1e-5)
    finally:
        head.weight /= 1e4
        head.bias /= 1e4
        model.threshold = before


def test_checks_find_what_does_not_agree(networks: Networks) -> None:
    few = replace(networks, images_NCHW=networks.images_NCHW[:8])
    reference = one_by_one(few)
    assert reference.clear_N.all()
    runs = systems(few, 8, tuned=True)
    batch = batches_of(few, 8, reference)[0]
    check_peers(runs, batch)
    for run in runs["ours"].values():
        assert check_ours(run, few, 8, reference) == 0
    answer = reference.answer
    wrong = Reference(answer._replace(probabilities_NC=answer.probabilities_NC + 1e-4), reference.clear_N)
    with pytest.raises(AssertionError, match="8 answers depend on the batch"):
        check_ours(runs["ours"]["packed"], few, 8, wrong)
    loop = runs["condconv_loop"]["contiguous"]
    with pytest.raises(AssertionError, match="condconv_loop"):
        check_peers({**runs, "condconv_loop": {"contiguous": lambda batch: loop(batch) * 1.001}}, batch)


def test_work_is_counted_by_hand() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 4, 5))
    images = torch.zeros(2, 3, 4, 4)
    convolution = 2 * 3 * 4 * 4 + 4 * 3 * 3 * 3 + 2 * 4 * 2 * 2
    linear = 2 * 16 + 16 * 5 + 5 + 2 * 5
    found = count_work(lambda batch: layers(batch.images_NCHW), Batch(images, 0))
    assert found == {"operations": 2, "bytes": 4 * (convolution + linear)}
    in_place = count_work(lambda batch: batch.images_NCHW.view(-1).add_(1), Batch(images, 0))
    assert in_place == {"operations": 1, "bytes": 2 * 4 * images.numel()}


@torch.inference_mode()
def test_grouped_experts_are_counted_whatever_the_threads(networks: Networks) -> None:
    runs = systems(networks, 8, tuned=True)
    batch = Batch(networks.images_NCHW[:8], 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ours = count_work(runs["ours"]["packed"], batch)
        torch.set_num_threads(2)
        assert count_work(runs["ours"]["packed"], batch) == ours
    finally:
        torch.set_num_threads(threads)
