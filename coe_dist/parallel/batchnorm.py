"""Batch normalisation of a network whose rows are split over ranks (our own rules).

local: each rank normalises with its own rows; `average_statistics` averages the running statistics by row count before
       they are used (evaluation, saving).
group: one statistic over all rows of the network's group. Works on CPU and GPU and with zero rows on some ranks
       (torch's SyncBatchNorm refuses CPU). Every rank of the group must call the layer together.

In both modes a batch with a single value per channel uses the running statistics and leaves them unchanged: its own
variance is zero, so normalising with it would erase the input.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from coe_dist.parallel.groups import Group


class SplitBatchNorm(nn.BatchNorm2d):
    """Takes over the parameters and buffers of a BatchNorm layer; `drop` and `act` are those of timm's
    BatchNormAct2d. images [N,C,H,W], any floating type, N from 0 -> the same shape and type.

    group: whose rows are normalised together; None: this rank's alone. Raises ValueError for a layer with
    momentum: None, and TrainingError when the group's collective fails.
    """

    def __init__(self, original: nn.BatchNorm2d, group: Group | None) -> None:
        if original.momentum is None:
            raise ValueError("BatchNorm momentum: None is not allowed; give a number from 0 to 1")
        super().__init__(
            original.num_features, original.eps, original.momentum, original.affine, original.track_running_stats
        )
        self.load_state_dict(
            {name: value for name, value in original.state_dict().items() if not name.startswith(("act.", "drop."))}
        )
        self.to(device=next(iter(original.state_dict().values())).device)
        self.weight, self.bias = original.weight, original.bias  # the optimizer may hold them already
        self.running_mean, self.running_var = original.running_mean, original.running_var
        self.train(original.training)
        self.group = group if group is not None and group.handle is not None else None
        self.rows = 0  # seen since the statistics were last averaged
        self.drop: nn.Module = getattr(original, "drop", None) or nn.Identity()
        self.act: nn.Module = getattr(original, "act", None) or nn.Identity()

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        normalised: torch.Tensor
        if not self.training:
            normalised = self._with_running_statistics(images_NCHW)
        elif self.group is not None:
            normalised = self._over_group(images_NCHW)
        elif images_NCHW.numel() == images_NCHW.shape[1]:
            normalised = self._with_running_statistics(images_NCHW)
        else:
            self.rows += images_NCHW.shape[0]
            normalised = super().forward(images_NCHW)
        result: torch.Tensor = self.act(self.drop(normalised))
        return result

    def _with_running_statistics(self, images: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(images, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _over_group(self, images: torch.Tensor) -> torch.Tensor:
        assert self.group is not None
        count, mean, variance = _group_statistics(images, self.group)
        if count <= 1:
            return self._with_running_statistics(images)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        inverse = torch.rsqrt(variance + self.eps)
        centred: torch.Tensor = _GroupNormalise.apply(images, mean, inverse, count, self.group)
        if self.weight is None:
            return centred
        shape = (1, -1, 1, 1)
        scaled: torch.Tensor = centred * self.weight.view(shape).to(centred.dtype)
        return scaled + self.bias.view(shape).to(centred.dtype)


def _group_statistics(images: torch.Tensor, group: Group) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Values per channel over the group, and float64 mean [C] and population variance [C] of them; one all-reduce."""
    channels = images.shape[1]
    local = images.numel() // channels
    sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=images.device)
    if local:
        # float32 moments are stable around their own mean; the sums are then formed in float64
        wide = images.detach().to(torch.promote_types(images.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        mean64, variance64 = mean.double(), variance.double()
        sums[0] = local
        sums[1 : channels + 1] = local * mean64
        sums[channels + 1 :] = local * (variance64 + mean64.square())
    group.all_reduce_sum(sums)
    count = float(sums[0])
    mean = sums[1 : channels + 1] / max(count, 1.0)
    return count, mean, (sums[channels + 1 :] / max(count, 1.0) - mean.square()).clamp_min(0.0)


class _GroupNormalise(torch.autograd.Function):
    """(x - mean) / std with statistics over the group; backward all-reduces sum(dy) and sum(dy * xhat)."""

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor, count: float, group: Group
    ) -> torch.Tensor:
        wide = torch.promote_types(images.dtype, torch.float32)
        shape = (1, -1, 1, 1)
        normalised = (images.to(wide) - mean.to(wide).view(shape)) * inverse.to(wide).view(shape)
        ctx.save_for_backward(normalised, inverse)
        ctx.count, ctx.group = count, group
        return normalised.to(images.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        normalised, inverse = ctx.saved_tensors
        grad = grads[0].to(normalised.dtype)
        sums = torch.stack([grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))]).double()
        ctx.group.all_reduce_sum(sums)
        shape = (1, -1, 1, 1)
        mean_grad, mean_product = (sums / ctx.count).to(normalised.dtype).unbind(0)
        result = (grad - mean_grad.view(shape) - normalised * mean_product.view(shape)) * inverse.to(
            normalised.dtype
        ).view(shape)
        return result.to(grads[0].dtype), None, None, None, None


def split_batchnorm(network: nn.Module, mode: Literal["local", "group"], group: Group) -> nn.Module:
    """Replaces every BatchNorm2d of `network` in place (state-dict names stay); returns the network. group: of the
    ranks that hold the network. Raises ValueError as SplitBatchNorm does."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, SplitBatchNorm):
                setattr(module, name, SplitBatchNorm(child, group if mode == "group" else None))
    return network


def average_statistics(network: nn.Module, group: Group) -> None:
    """Sets the running statistics of local BatchNorm layers to their average over the group, weighted by the rows each
    rank has seen since the last call. Collective over the group; one all-reduce."""
    layers = [
        m for m in network.modules() if isinstance(m, SplitBatchNorm) and m.group is None and m.running_mean is not None
    ]
    if group.handle is None or not layers:
        return
    flat = torch.cat([torch.cat([layer.running_mean, layer.running_var]).double() for layer in layers])  # type: ignore[list-item]
    rows = float(layers[0].rows)
    total = group.all_reduce_sum(torch.cat([flat * rows, flat.new_tensor([rows])]))
    count = float(total[-1])
    if count == 0:
        return
    position = 0
    for layer in layers:
        width = layer.num_features
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(total[position : position + width] / count)
        layer.running_var.copy_(total[position + width : position + 2 * width] / count)
        position += 2 * width
        layer.rows = 0
