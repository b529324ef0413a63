"""f(x) of pwlu.py and its gradients.

float32 on a CPU, and narrower inputs there, run in compiled loops (pwlu_kernels.py). Elsewhere, in other types, and
under torch.compile and torch.export it is a few torch operations. For backward both keep the input alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

NARROWEST = 1e-4  # B_R - B_L counts as at least this: learned bounds that meet must not divide by zero (our own rule)


def piecewise_linear(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    values: torch.Tensor,
    left_slope: torch.Tensor,
    right_slope: torch.Tensor,
) -> torch.Tensor:
    """f(x) in the type of x, computed in the wider type of x and the parameters.

    x: any floating type and shape, its channels in dimension 1 unless C is 1. left, right, left_slope and right_slope
    [C], values [C * (N + 1)]. B_R - B_L counts as at least 1e-4. Once differentiable, in x and all parameters. Raises
    ValueError for another number of channels.
    """
    if left.numel() > 1 and x.shape[1] != left.numel():
        raise ValueError(f"x: {x.shape[1]} channels are not allowed; there are functions for {left.numel()}")
    parameters = (left, right, values, left_slope, right_slope)
    compiled = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and left.dtype == torch.float32
    result: torch.Tensor
    if compiled and x.device.type == "cpu" and not torch.compiler.is_compiling():
        result = _Compiled.apply(x, *parameters)
    elif torch.is_grad_enabled():
        result = _Plain.apply(x, *parameters)
    else:
        result = _evaluate(x, parameters)[0]  # without a function of autograd, for exports
    return result


def relu_at_rest(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """ReLU of x. The parameters do not take part but get gradients of zero: engines whose ranks reduce gradients as
    they come (ZeRO) must find the same parameters reached on all of them, also on one without images."""
    if not torch.is_grad_enabled():
        return F.relu(x)
    result: torch.Tensor = _AtRest.apply(x, *parameters)
    return result


class _AtRest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        out = F.relu(x)
        ctx.save_for_backward(out, *parameters)  # the next layer keeps it too
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, *parameters = ctx.saved_tensors
        own = torch.ops.aten.threshold_backward(gradients[0], out, 0)
        return own, *map(torch.zeros_like, parameters)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        from coe_dist.coe import pwlu_kernels  # late: numba takes a second

        ctx.save_for_backward(x, *parameters)
        dense, neighbours = _dense(x.detach().float(), parameters[0].numel())
        out = torch.empty_like(dense)
        pwlu_kernels.evaluate(
            _flat(dense), _flat(out), neighbours, _arrays(parameters), threads=torch.get_num_threads()
        )
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from coe_dist.coe import pwlu_kernels

        x, *parameters = ctx.saved_tensors
        dense, neighbours = _dense(x.detach().float(), parameters[0].numel())
        gradient = gradients[0].float()
        if gradient.stride() != dense.stride():
            gradient = torch.empty_like(dense).copy_(gradient)
        out = torch.empty_like(dense)
        found = pwlu_kernels.differentiate(
            _flat(dense), _flat(gradient), _flat(out), neighbours, _arrays(parameters), threads=torch.get_num_threads()
        )
        return out.to(x.dtype), *map(torch.from_numpy, found)


def _dense(x: torch.Tensor, functions: int) -> tuple[torch.Tensor, int]:
    """x without gaps in memory, and how many neighbours in memory share a function (see pwlu_loops.py)."""
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if not channels_last:
        x = x.contiguous()
    if functions == 1:
        return x, max(1, x.numel())
    return x, 1 if channels_last else max(1, x.numel() // max(1, x.shape[0] * functions))


def _flat(dense: torch.Tensor) -> Any:
    return dense.numpy().reshape(-1) if dense.is_contiguous() else dense.as_strided((dense.numel(),), (1,)).numpy()


def _arrays(parameters: Any) -> tuple[Any, ...]:
    return tuple(parameter.detach().numpy() for parameter in parameters)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *parameters)
        return _evaluate(x, parameters)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, *parameters = ctx.saved_tensors
        _, position, piece, rise_FP, width_F = _evaluate(x, parameters)
        g = gradients[0].to(position.dtype)
        sums = torch.zeros(2, rise_FP.numel(), dtype=g.dtype, device=g.device)
        sums[0].index_add_(0, piece.reshape(-1), g.reshape(-1))
        sums[1].index_add_(0, piece.reshape(-1), (g * position).reshape(-1))
        plain, moment = sums.view(2, *rise_FP.shape)
        intervals = rise_FP.shape[1] - 2
        # of the inner pieces: sum of g * t, t from 0 to 1 across the interval, and of g * (x - B_L) / (B_R - B_L)
        inner, inner_moment = plain[:, 1:-1], moment[:, 1:-1]
        rising = inner_moment - torch.arange(intervals, dtype=g.dtype, device=g.device) * inner
        share = inner_moment / intervals
        slope_FP = rise_FP / width_F[:, None]
        values = torch.cat([plain[:, :1], rising], 1) + torch.cat([inner - rising, plain[:, -1:]], 1)
        found = (
            -slope_FP[:, 0] * plain[:, 0] - (slope_FP[:, 1:-1] * (inner - share)).sum(1),
            -slope_FP[:, -1] * plain[:, -1] - (slope_FP[:, 1:-1] * share).sum(1),
            values.reshape(-1),
            width_F * moment[:, 0],
            width_F * (moment[:, -1] - intervals * plain[:, -1]),
        )
        own = (g * slope_FP.reshape(-1)[piece]).to(x.dtype)
        return own, *(grad.to(parameter.dtype) for grad, parameter in zip(found, parameters, strict=True))


def _evaluate(x: torch.Tensor, parameters: Any) -> tuple[torch.Tensor, ...]:
    """f(x); position u and piece of each value (see pwlu_loops.py), the pieces' slopes in u [C,N+2], and d [C]."""
    left_F, right_F, values, left_slope_F, right_slope_F = parameters
    functions = left_F.numel()
    points_FP = values.view(functions, -1)
    intervals = points_FP.shape[1] - 1
    width_F = (right_F - left_F).clamp_min(NARROWEST) / intervals
    inner_FP = points_FP[:, 1:] - points_FP[:, :-1]
    rise_FP = torch.cat([(left_slope_F * width_F)[:, None], inner_FP, (right_slope_F * width_F)[:, None]], 1)
    start_P = torch.arange(-1, intervals + 1, device=x.device).clamp_min(0)  # each piece's first point
    intercept_FP = points_FP[:, start_P] - start_P * rise_FP
    shape = (-1, *([1] * (x.dim() - 2))) if functions > 1 else ()
    wide = x.to(torch.promote_types(x.dtype, left_F.dtype))
    position = (wide - left_F.view(shape)) / width_F.view(shape)
    # NaN has no piece: it takes the first and stays NaN by its position
    piece = position.nan_to_num(nan=-1.0).clamp(-1, intervals).add(1).long()
    if functions > 1:
        piece = piece + (torch.arange(functions, device=x.device) * (intervals + 2)).view(shape)
    out = intercept_FP.reshape(-1)[piece] + rise_FP.reshape(-1)[piece] * position
    return out.to(x.dtype), position, piece, rise_FP, width_F
