"""The piecewise linear unit against its formulas written out, in every layout and on both paths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coe_dist.coe import pwlu_kernels
from coe_dist.coe.pwlu import PWLU, realign, take_sums, track, tracking, units


def naive(x: torch.Tensor, unit: PWLU) -> torch.Tensor:
    """The three lines of the definition, one channel at a time; autograd makes the gradients."""
    if unit.channels is not None:
        parts = [_function(x[:, c], unit, c) for c in range(unit.channels)]
        return torch.stack(parts, 1)
    return _function(x, unit, 0)


def _function(x: torch.Tensor, unit: PWLU, c: int) -> torch.Tensor:
    left, right, intervals = unit.left[c], unit.right[c], unit.intervals
    values = unit.values.view(-1, intervals + 1)[c]
    d = (right - left) / intervals
    index = torch.floor((x.detach() - left.detach()) / d.detach()).clamp(0, intervals - 1).long()
    inside = (x - (left + index * d)) * ((values[index + 1] - values[index]) / d) + values[index]
    below = (x - left) * unit.left_slope[c] + values[0]
    above = (x - right) * unit.right_slope[c] + values[-1]
    return torch.where(x < left, below, torch.where(x >= right, above, inside))


def learned(channels: int | None, intervals: int = 16, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PWLU:
    generator = torch.Generator().manual_seed(seed)
    unit = PWLU(channels, intervals)
    track(unit, torch.tensor([[1.0], [0.2], [0.7]], dtype=torch.float64).expand(3, channels or 1))
    realign(unit)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return unit.to(dtype)


def gradients(unit: PWLU, x: torch.Tensor, g: torch.Tensor, function: Any) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *unit.parameters()], g.to(out.dtype))]


def assert_like_naive(unit: PWLU, x: torch.Tensor, g: torch.Tensor) -> None:
    found = gradients(unit, x, g, unit)
    double = copy.deepcopy(unit).double()
    exact = gradients(double, x.double(), g.double(), lambda x: naive(x, double))
    for mine, right in zip(found, exact, strict=True):
        assert mine.shape == right.shape
        scale = 1.0 + float(right.abs().max()) if right.numel() else 1.0
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("channels", [3, None])
@pytest.mark.parametrize("shape", [(2, 3, 4, 3), (5, 3)])
@pytest.mark.parametrize("intervals", [2, 16])
def test_gradcheck(channels: int | None, shape: tuple[int, ...], intervals: int) -> None:
    unit = learned(channels, intervals, dtype=torch.float64)
    x = 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = [x.requires_grad_(), *unit.parameters()]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(unit, dict(zip(dict(unit.named_parameters()), parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 7),
    st.sampled_from([(), (1, 1), (3, 5), (12, 12), (30, 20)]),
    st.sampled_from([2, 6, 16]),
    st.booleans(),
    st.sampled_from(["contiguous", "channels_last", "strided"]),
    st.integers(0, 3),
)
def test_compiled_loops_are_the_naive_function(
    rows: int, channels: int, sides: tuple[int, ...], intervals: int, layer: bool, layout: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(rows, channels, *sides, generator=generator) for _ in range(2))
    x = 2 * x
    if layout == "channels_last" and sides:
        x, g = (tensor.to(memory_format=torch.channels_last) for tensor in (x, g))
    if layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
        g = torch.ones(()).expand(x.shape)
    assert_like_naive(learned(None if layer else channels, intervals, seed=seed), x, g)


@pytest.mark.parametrize("channels", [300, 3, None])
def test_wide_layers_and_long_sums(channels: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (20, channels or 2, 3, 3) if channels == 300 else (8, channels or 2, 60, 60)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    assert_like_naive(learned(channels), x, g)


def test_several_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwlu_kernels, "_PER_THREAD", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        generator = torch.Generator().manual_seed(0)
        for channels in (5, None):
            x, g = (torch.randn(7, 5, 6, 6, generator=generator) for _ in range(2))
            assert_like_naive(learned(channels), x, g)
    finally:
        torch.set_num_threads(before)


def test_channels_last_stays() -> None:
    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    for channels in (3, None):
        unit = learned(channels)
        out, gradient, *_ = gradients(unit, x, torch.ones_like(x), unit)
        assert out.stride() == gradient.stride() == x.stride()


def test_only_the_input_and_the_parameters_are_kept_for_backward() -> None:
    unit = learned(4)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        unit(x)
    known = {x.data_ptr(), *(parameter.data_ptr() for parameter in unit.parameters())}
    assert kept
    assert {tensor.data_ptr() for tensor in kept} == known


@pytest.mark.parametrize("phase", ["learned", "first"])
def test_torch_compile_without_graph_breaks(phase: str) -> None:
    unit = learned(3) if phase == "learned" else PWLU(3)
    twin = copy.deepcopy(unit)
    x, g = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    if phase == "first":
        torch.testing.assert_close(compiled(x), unit(x))
        torch.testing.assert_close(take_sums(twin), take_sums(unit))
        return
    for mine, right in zip(gradients(twin, x, g, compiled), gradients(unit, x, g, unit), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_torch_export_keeps_the_function() -> None:
    unit = learned(3).eval()
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        exported = torch.export.export(unit, (x,)).module()
        torch.testing.assert_close(exported(x), unit(x), rtol=1e-5, atol=1e-5)


def test_narrow_types_are_computed_wide() -> None:
    unit = learned(3)
    x = torch.randn(4, 3, 5, 5).bfloat16()
    g = torch.randn(4, 3, 5, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(unit, x, g, unit)
    exact = gradients(unit, x.float(), g.float(), unit)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in found[2:])
    assert torch.equal(found[0], exact[0].bfloat16())
    assert torch.equal(found[1], exact[1].bfloat16())
    for mine, right in zip(found[2:], exact[2:], strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_shows(dtype: torch.dtype) -> None:
    unit = learned(1, dtype=dtype)
    x = torch.tensor([[float("nan")], [float("inf")], [0.0]], dtype=dtype)
    out = unit(x)
    assert out.isnan().flatten().tolist() == [True, False, False]
    assert out[1].item() == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_that_have_crossed_divide_by_no_zero(dtype: torch.dtype) -> None:
    unit = learned(2, dtype=dtype)
    with torch.no_grad():
        unit.right.copy_(unit.left - torch.tensor([0.0, 1.0]))
    x, g = torch.randn(50, 2, dtype=dtype), torch.randn(50, 2, dtype=dtype)
    assert all(tensor.isfinite().all() for tensor in gradients(unit, x, g, unit))


# the two phases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_phase_is_relu_with_parameters_at_rest(dtype: torch.dtype) -> None:
    unit = PWLU(3)
    x = torch.randn(4, 3, 5, 5, dtype=dtype, requires_grad=True)
    x.data[0, 0, 0, 0] = 0.0
    twin = x.detach().clone().requires_grad_()
    g = torch.randn(4, 3, 5, 5).to(dtype)
    out = unit(x)
    assert torch.equal(out, F.relu(twin))
    out.backward(g)
    F.relu(twin).backward(g)
    assert torch.equal(x.grad, twin.grad)
    for parameter in unit.parameters():  # reached, so that all replicas of a network reduce the same gradients
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    empty = unit(x[:0])
    assert empty.shape == (0, 3, 5, 5)
    empty.sum().backward()


@pytest.mark.parametrize("channels", [3, None])
def test_running_statistics(channels: int | None) -> None:
    """They move once for all that has been seen since the last time, and not at all for nothing."""
    unit = PWLU(channels)
    steps = [[torch.randn(4, 3, 5, 5) * scale + scale, torch.randn(2, 3, 5, 5)] for scale in (1.0, 2.0, 3.0)]
    mean, std = torch.zeros(channels or 1), torch.zeros(channels or 1)
    for step, batches in enumerate(steps):
        flat = torch.cat(batches).transpose(0, 1).reshape(channels or 1, -1)
        weight = 1.0 if step == 0 else 0.1
        mean = (1 - weight) * mean + weight * flat.mean(1)
        std = (1 - weight) * std + weight * flat.std(1, correction=0)
        for batch in batches:
            unit(batch)
        track(unit, take_sums(unit))
        unit.eval()(100 + batches[0])  # evaluation and empty batches leave no trace
        unit.train()(batches[0][:0])
        sums = take_sums(unit)
        assert not sums.any()
        track(unit, sums)
    torch.testing.assert_close(unit.running_mean, mean)
    torch.testing.assert_close(unit.running_std, std)
    assert int(unit.seen) == 3 * 6 * 25 * (1 if channels else 3)


def test_statistics_far_from_zero() -> None:
    """A mean a thousand times the deviation costs the deviation no more than float32 costs the mean."""
    unit = PWLU(2)
    x = 1000 + torch.randn(64, 2, 8, 8)
    for rows in x.split(16):
        unit(rows)
    track(unit, take_sums(unit))
    exact = x.double().transpose(0, 1).reshape(2, -1).std(1, correction=0)
    torch.testing.assert_close(unit.running_std.double(), exact, rtol=1e-4, atol=0)


def test_realignment() -> None:
    network = nn.Sequential(PWLU(2), nn.Flatten(), PWLU(None))
    assert tracking(network)
    for _ in range(2):
        network(torch.randn(6, 2, 3, 3) * 2 + 1)
        track(network, take_sums(network))
    tracked = [(unit.running_mean.clone(), unit.running_std.clone()) for unit in units(network)]
    realign(network)
    assert not tracking(network)
    for unit, (mean, std) in zip(units(network), tracked, strict=True):
        torch.testing.assert_close(unit.left, mean - 3 * std)
        torch.testing.assert_close(unit.right, mean + 3 * std)
        share = torch.linspace(0, 1, 17)
        points = unit.left[:, None] + share * (unit.right - unit.left)[:, None]
        torch.testing.assert_close(unit.values.view(-1, 17), points.relu())
        assert unit.left_slope.tolist() == [0.0] * unit.left.numel()
        assert unit.right_slope.tolist() == [1.0] * unit.left.numel()
    x = torch.randn(6, 2, 3, 3) * 2 + 1
    out = network[0](x)
    interval = ((network[0].right - network[0].left) / 16).max()
    # off only in the interval with the kink
    assert float((out - F.relu(x)).detach().abs().max()) <= float(interval.detach()) / 4 + 1e-6
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in network[0].parameters())
    with torch.no_grad():
        network[0].values += 1.0
    before = network[0].values.clone()
    realign(network)  # a second time changes nothing
    assert torch.equal(network[0].values, before)


def test_sums_of_replicas_add_up_to_those_of_their_union() -> None:
    whole, parts = PWLU(3), [PWLU(3) for _ in range(3)]
    x = torch.randn(12, 3, 4, 4) * 5 - 2
    whole(x)
    for unit, rows in zip(parts, (x[:7], x[7:12], x[:0]), strict=True):
        unit(rows)
    total = torch.stack([take_sums(unit) for unit in parts]).sum(0)
    own = take_sums(whole)
    torch.testing.assert_close(total, own, rtol=1e-6, atol=1e-3)
    for unit, sums in ((whole, own), *((unit, total) for unit in parts)):
        track(unit, sums)
        realign(unit)
    for unit in parts:
        for name, value in unit.state_dict().items():
            assert torch.equal(value, parts[0].state_dict()[name])
    torch.testing.assert_close(parts[0].left, whole.left)
    torch.testing.assert_close(parts[0].values, whole.values)


def test_a_unit_that_saw_nothing_keeps_its_bounds() -> None:
    unit = PWLU(2)
    track(unit, take_sums(unit))
    realign(unit)
    assert unit.learned
    assert unit.left.tolist() == [-3.0, -3.0]
    x = torch.randn(5, 2)
    torch.testing.assert_close(unit(x), F.relu(x))  # a point of the grid is at zero


def test_the_phase_travels_with_the_state() -> None:
    unit = learned(3)
    other = PWLU(3)
    other.load_state_dict(unit.state_dict())
    assert other.learned
    x = torch.randn(4, 3)
    assert torch.equal(other(x), unit(x))
    other.load_state_dict(PWLU(3).state_dict())
    assert not other.learned
    assert copy.deepcopy(unit).learned


def test_no_parameter_is_a_matrix_that_an_optimizer_would_decay() -> None:
    for unit in (PWLU(5), PWLU(None)):
        assert {parameter.ndim for parameter in unit.parameters()} == {1}


def test_refused() -> None:
    for intervals in (3, 0, True, 2.0):
        with pytest.raises(ValueError, match=r"^intervals: .* is not allowed"):
            PWLU(3, intervals)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^x: 4 channels are not allowed"):
        learned(3)(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"^sums: \(3, 2\) is not allowed; .* need \(3, 3\)"):
        track(PWLU(3), torch.zeros(3, 2))
