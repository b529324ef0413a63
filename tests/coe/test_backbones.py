"""Names become networks: shapes, seeds, normalisation, MACs and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from coe_dist.coe.activations import replace_activations
from coe_dist.coe.backbones import Normalise, Resize, build_classifier, build_delegator, classifier_with_macs
from coe_dist.coe.macs import count_macs
from coe_dist.coe.pwlu import realign, take_sums, track, units
from coe_dist.parallel.batchnorm import split_batchnorm
from coe_dist.parallel.groups import Group


def arguments(channels: int = 1, classes: int = 10, seed: int = 0) -> dict[str, Any]:
    return {"channels": channels, "classes": classes, "mean": [0.4] * channels, "std": [0.3] * channels, "seed": seed}


def images(count: int, channels: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


NETWORKS = [
    ("small_cnn", {}, 1, 28),
    ("small_cnn", {"width": 0.3, "depth": 3}, 3, 8),
    ("small_cnn", {"width": 2}, 2, 33),
    ("timm/tinynet_e", {}, 3, 64),
    ("mobilenetv3_small_050", {"drop_rate": 0.2}, 1, 64),  # has a layer between pooling and classifier
    ("torchvision/shufflenet_v2_x0_5", {}, 3, 64),
    ("torchvision/mobilenet_v3_small", {"dropout": 0.1}, 1, 64),  # grey images into three channels
    ("small_cnn", {"condconv": 3, "depth": 2, "width": 0.4}, 1, 28),
    ("tinynet_e", {"condconv": 2}, 3, 64),
    ("ofa_mobilenetv3", {"depth": 2, "expand": 3, "kernel": 3, "resolution": 32}, 3, 40),
]


@pytest.mark.parametrize(("network", "options", "channels", "side"), NETWORKS)
def test_shapes_and_gradients(network: str, options: dict[str, Any], channels: int, side: int) -> None:
    classifier = build_classifier(network, options, **arguments(channels))
    delegator = build_delegator(network, options, experts=5, **arguments(channels))
    batch = images(4, channels, side)
    logits_NC = classifier(batch)
    class_logits_NC, selection_NE = delegator(batch)
    assert logits_NC.shape == class_logits_NC.shape == (4, 10)
    assert selection_NE.shape == (4, 5)
    logits_NC.sum().backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
    (class_logits_NC.sum() + selection_NE.sum()).backward()
    assert all(parameter.grad is not None for parameter in delegator.parameters())


@pytest.mark.parametrize("network", ["small_cnn", "tinynet_e", "torchvision/shufflenet_v2_x0_5"])
def test_weights_are_a_function_of_the_seed(network: str) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        return build_delegator(network, {}, experts=3, **arguments(3, seed=seed)).state_dict()

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = weights(2**62)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = weights(2**62), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() > 1 and not name.startswith("normalise.")]
    assert matrices
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_state_dict_names_are_stable() -> None:
    names = [
        *("normalise.mean", "normalise.std"),
        *(
            f"trunk.{place}.{layer}"
            for place in ("stages.0.0", "stages.1.0", "stages.2.0", "widen")
            for layer in LAYERS
        ),
        *("class_head.weight", "class_head.bias"),
    ]
    assert list(build_classifier("small_cnn", {}, **arguments()).state_dict()) == names
    names += ["selection_head.weight", "selection_head.bias"]
    assert list(build_delegator("small_cnn", {}, experts=3, **arguments()).state_dict()) == names


LAYERS = [
    "conv.weight",
    *(f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
    "norm.num_batches_tracked",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_normalised_inside(dtype: torch.dtype) -> None:
    normalise = Normalise(2, [0.5, 0.25], [0.5, 0.125]).to(dtype)  # exact in float32
    batch = images(3, 2, 4)
    exact = batch.double() / 255
    expected = torch.stack([(exact[:, 0] - 0.5) / 0.5, (exact[:, 1] - 0.25) / 0.125], 1).to(dtype)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(normalise(batch), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(normalise(batch), normalise(batch.float()))
    classifier = build_classifier("small_cnn", {}, **arguments(2)).to(dtype)
    assert classifier(batch.repeat(1, 1, 3, 3)).dtype == dtype


def test_selection_starts_without_preference_but_not_tied() -> None:
    delegator = build_delegator("small_cnn", {"width": 0.385}, experts=8, **arguments()).eval()
    _, selection_NE = delegator(images(64, 1, 28))
    spread_N = selection_NE.max(1).values - selection_NE.min(1).values
    assert float(spread_N.detach().min()) > 1e-5  # far above the transportation's unit, 2^-20
    assert float(torch.softmax(selection_NE.detach(), 1).max()) < 0.2


@pytest.mark.parametrize("selection", ["shared", "detached", "separate"])
def test_what_the_selection_loss_trains(selection: str) -> None:
    delegator = build_delegator("small_cnn", {"selection": selection}, experts=3, **arguments())
    _, selection_NE = delegator(images(8, 1, 28))
    selection_NE.square().sum().backward()
    trained = {name.partition(".")[0] for name, one in delegator.named_parameters() if one.grad is not None}
    trunks = {"shared": {"trunk"}, "detached": set(), "separate": {"selection_trunk"}}[selection]
    assert trained == {"selection_head", *trunks}


def test_selection_with_a_trunk_of_its_own() -> None:
    shared = build_delegator("small_cnn", {}, experts=3, **arguments())
    separate = build_delegator("small_cnn", {"selection": "separate"}, experts=3, **arguments())
    assert all(torch.equal(value, separate.state_dict()[name]) for name, value in shared.state_dict().items())
    assert not torch.equal(
        *(separate.state_dict()[f"{name}.stages.0.0.conv.weight"] for name in ("trunk", "selection_trunk"))
    )
    of_one, of_two = (count_macs(one, channels=1, resolution=28) for one in (shared, separate))
    assert of_two == pytest.approx(2 * of_one, rel=0.05)  # but for the heads
    with pytest.raises(ValueError, match=r"^options\.selection: 'own' is not allowed; give one of shared, detached"):
        build_delegator("small_cnn", {"selection": "own"}, experts=3, **arguments())
    with pytest.raises(ValueError, match=r"^options\.selection: unknown"):
        build_classifier("small_cnn", {"selection": "shared"}, **arguments())


def test_small_cnn_reaches_the_sizes_of_the_default_configuration() -> None:
    expert = build_classifier("small_cnn", {"width": 1.0}, **arguments())
    assert count_macs(expert, channels=1, resolution=28) == pytest.approx(240e3, rel=0.02)
    delegator = build_delegator("small_cnn", {"width": 0.385}, experts=4, **arguments())
    assert count_macs(delegator, channels=1, resolution=28) == pytest.approx(42e3, rel=0.02)


@pytest.mark.parametrize("target", [60_000, 282_000])
@pytest.mark.parametrize("options", [{}, {"depth": 2, "width": 9.0}])
def test_a_classifier_of_given_macs(target: int, options: dict[str, Any]) -> None:
    shape = {"channels": 1, "resolution": 28}
    found = classifier_with_macs("small_cnn", options, classes=10, target_macs=target, **shape)
    assert found == {**options, "width": found["width"]}

    def macs_at(width: float) -> int:
        network = build_classifier("small_cnn", {**options, "width": width}, **arguments())
        return count_macs(network, **shape)

    assert macs_at(found["width"]) >= target
    assert macs_at(found["width"] - 0.001) < target


@pytest.mark.parametrize(
    ("network", "target", "field"),
    [("small_cnn", 1e12, "target_macs"), ("tinynet_e", 1e6, "network")],
)
def test_macs_out_of_reach(network: str, target: float, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        classifier_with_macs(network, {}, channels=1, classes=10, resolution=28, target_macs=target)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("smal_cnn", {}, r"^network: 'smal_cnn' is not allowed.* small_cnn"),
        ("timm/tinynet_f", {}, r"^network: 'timm/tinynet_f' is not allowed.* tinynet_e"),
        ("torchvision/resnet19", {}, r"^network: 'torchvision/resnet19' .* torchvision/resnet18"),
        ("torchvision/squeezenet1_0", {}, r"^network: .* does not end in a linear layer"),
        ("torchvision/fcn_resnet50", {}, r"^network: 'torchvision/fcn_resnet50' is not allowed"),
        ("hf-hub:timm/tinynet_e.in1k", {}, r"^network: 'hf-hub:timm/tinynet_e\.in1k' is not allowed"),
        ("tinynet_e.in1k", {}, r"^network: 'tinynet_e\.in1k' is not allowed.* tinynet_e"),
        ("small_cnn", {"widht": 1}, r"^options\.widht: unknown; small_cnn has width, depth$"),
        ("small_cnn", {"width": 0}, r"^options\.width: 0 is not allowed"),
        ("small_cnn", {"width": "wide"}, r"^options\.width: 'wide' is not allowed"),
        ("small_cnn", {"width": float("nan")}, r"^options\.width: nan is not allowed"),
        ("small_cnn", {"depth": 1.5}, r"^options\.depth: 1\.5 is not allowed"),
        ("tinynet_e", {"widht": 1}, r"^options\.widht: unknown; tinynet_e has no such option$"),
        ("tinynet_e", {"act_layer": "nope"}, r"^options: .*act_layer.*nope"),
        ("tinynet_e", {"pretrained": True}, r"^options\.pretrained: not allowed"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, r"^options\.weights: not allowed"),
        ("torchvision/resnet18", {"widht": 1}, r"^options\.widht: unknown"),
        ("small_cnn", {"activation": "relu"}, r"^options\.activation: 'relu' is not allowed; give pwlu"),
        ("small_cnn", {"pwlu_mode": "layer"}, r"^options\.pwlu_mode: 'layer' is not allowed without activation"),
        ("small_cnn", {"activation": "pwlu", "pwlu_mode": "both"}, r"^options\.pwlu_mode: 'both' is not allowed"),
        ("torchvision/densenet121", {"condconv": 4}, r"^options\.condconv: 4 is not allowed; torchvision/densenet121"),
        (
            "torchvision/resnet50",
            {"activation": "pwlu"},
            r"^options\.pwlu_mode: 'channel' .*resnet50 has .* layer$",
        ),
        ("torchvision/vit_b_32", {"activation": "pwlu"}, r"^options\.pwlu_mode: 'channel' is not allowed"),
        ("resnet18", {"condconv": 4}, r"^options\.condconv: 4 is not allowed; resnet18 has no such form"),
        ("small_cnn", {"condconv": 1}, r"^options\.condconv: 1 is not allowed"),
        ("small_cnn", {"resolution": 4}, r"^options\.resolution: 4 is not allowed"),
    ],
)
def test_refused(network: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_classifier(network, options, **arguments(3))
    assert "\n" not in str(caught.value)


ALONE = Group("world", (0,), None)
PWLU_NETWORKS = [
    ("small_cnn", {"depth": 2, "width": 0.4}, 1, 28),
    ("tinynet_e", {"condconv": 2}, 3, 64),
    ("mobilenetv3_small_050", {}, 3, 64),
    ("torchvision/resnet18", {}, 1, 32),
    ("ofa_mobilenetv3", {"depth": 2, "expand": 3, "kernel": 3}, 3, 32),
]


@pytest.mark.parametrize("mode", ["channel", "layer"])
@pytest.mark.parametrize(("network", "options", "channels", "side"), PWLU_NETWORKS)
def test_pwlu_in_place_of_activations(
    network: str, options: dict[str, Any], channels: int, side: int, mode: str
) -> None:
    plain = build_classifier(network, options, **arguments(channels))
    learned = build_classifier(network, {**options, "activation": "pwlu", "pwlu_mode": mode}, **arguments(channels))
    assert not {"ReLU", "SiLU", "Hardswish"} & {
        type(layer).__name__ for name, layer in learned.named_modules() if ".se." not in name
    }
    weights, others = learned.state_dict(), plain.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in others)  # the other weights are as without it
    found = units(learned)
    assert all(unit.channels is None for unit in found) == (mode == "layer")
    batch = images(4, channels, side)
    learned(batch)
    track(learned, take_sums(learned))
    realign(learned)
    learned(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in learned.parameters())
    split = split_batchnorm(copy.deepcopy(learned), "local", ALONE)  # it wraps timm's BatchNorm with activation
    assert list(split.state_dict()) == list(learned.state_dict())
    assert len(units(split)) == len(found)


def test_squeeze_and_excite_keeps_its_activations() -> None:
    plain = build_classifier("mobilenetv3_small_050", {}, **arguments(3))
    learned = build_classifier("mobilenetv3_small_050", {"activation": "pwlu"}, **arguments(3))

    def squeezes(network: nn.Module) -> list[str]:
        return [str(module) for module in network.modules() if type(module).__name__ == "SqueezeExcite"]

    assert squeezes(learned) == squeezes(plain) != []


@pytest.mark.parametrize("network", ["tinynet_e", "efficientnet_b0"])
def test_condconv_is_what_timms_block_strings_build(network: str) -> None:
    """timm's CondConv block, loaded with ours' weights, computes the same."""
    from timm.models._efficientnet_blocks import CondConvResidual

    trunk = build_classifier(network, {"condconv": 3}, **arguments(3)).trunk.eval()
    stages = [[type(block) is CondConvResidual for block in stage] for stage in trunk.blocks]
    assert [any(stage) for stage in stages] == [False] * (len(stages) - 3) + [True] * 3
    assert all(all(stage) for stage in stages[-3:])
    block = trunk.blocks[-1][0]
    timms = CondConvResidual(
        block.conv_pw.in_channels,
        block.conv_pwl.out_channels,
        dw_kernel_size=block.conv_dw.kernel_size[0],
        exp_ratio=block.conv_pw.out_channels / block.conv_pw.in_channels,
        noskip=not block.has_skip,
        act_layer=nn.SiLU,
        num_experts=3,
    ).eval()
    timms.se = block.se
    timms.load_state_dict(block.state_dict())
    features = torch.randn(2, block.conv_pw.in_channels, 5, 5)
    torch.testing.assert_close(block(features), timms(features))
    spread = block.conv_pw.weight.std(1) / (2.0 / block.conv_pw.out_channels) ** 0.5
    torch.testing.assert_close(spread, torch.ones(3), rtol=0.1, atol=0.0)  # as the convolution it replaces


def test_condconv_mixes_a_kernel_for_each_sample() -> None:
    network = build_classifier("small_cnn", {"condconv": 3}, **arguments(2)).eval()
    block = network.trunk.stages[0][0]
    features = torch.randn(3, 2, 9, 9)
    shares_NK = torch.sigmoid(block.routing(features.mean((2, 3))))
    mixed = [torch.einsum("k,k...->...", shares, block.conv.weight.view(3, -1, 2, 3, 3)) for shares in shares_NK]
    rows = [
        nn.functional.conv2d(row[None], kernel, stride=2, padding=1)
        for row, kernel in zip(features, mixed, strict=True)
    ]
    torch.testing.assert_close(block(features), block.activation(block.norm(torch.cat(rows))), rtol=1e-4, atol=1e-5)


def test_a_network_sees_images_at_its_own_resolution() -> None:
    own = build_delegator("small_cnn", {"resolution": 12}, experts=3, **arguments(3))
    plain = build_delegator("small_cnn", {}, experts=3, **arguments(3))
    assert list(own.state_dict()) == list(plain.state_dict())
    batch = images(2, 3, 30)
    small = nn.functional.interpolate(batch.float(), (12, 12), mode="bilinear", antialias=True)
    for network in (own.eval(), plain.eval()):
        network.load_state_dict(plain.state_dict())
    assert torch.equal(own(batch)[0], plain(small)[0])
    assert torch.equal(own(batch[..., :12, :12])[1], plain(batch[..., :12, :12])[1])  # nothing to resize
    flat = torch.full((1, 3, 30, 30), 200, dtype=torch.uint8)
    torch.testing.assert_close(Resize(12)(flat), torch.full((1, 3, 12, 12), 200.0))
    macs = {name: count_macs(network, channels=3, resolution=30) for name, network in (("own", own), ("plain", plain))}
    assert macs["own"] == count_macs(plain, channels=3, resolution=12) < macs["plain"]


def test_channels_and_means_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^network: .* for 2 channels"):
        build_classifier("torchvision/resnet18", {}, **arguments(2))
    with pytest.raises(ValueError, match=r"^mean: 1 values"):
        build_classifier("small_cnn", {}, **{**arguments(3), "mean": [0.5]})
    with pytest.raises(ValueError, match=r"^std: 0 "):
        build_classifier("small_cnn", {}, **{**arguments(1), "std": [0]})


def test_deep_networks_are_residual() -> None:
    network = build_classifier("small_cnn", {"depth": 4}, **arguments()).eval()
    batch = images(2, 1, 28)
    before = network(batch)
    for place in ("stages.0.2", "stages.1.1", "stages.2.3"):
        nn.init.zeros_(network.trunk.get_submodule(place).norm.weight)  # such a block passes its input on
    skipped = network(batch)
    assert not torch.equal(before, skipped)
    for stage, block in ((0, 2), (1, 1), (2, 3)):
        stages = network.trunk.stages
        stages[stage] = nn.Sequential(*(layer for index, layer in enumerate(stages[stage]) if index != block))
    torch.testing.assert_close(network(batch), skipped)


def test_a_network_without_activation_layers_cannot_have_pwlu() -> None:
    with pytest.raises(
        ValueError, match=r"^options\.activation: 'pwlu' .*; linear has no activation layers to replace$"
    ):
        replace_activations("linear", nn.Sequential(nn.Conv2d(1, 4, 3)), 1, "channel")
