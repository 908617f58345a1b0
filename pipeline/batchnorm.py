"""BatchNorm by the images of all ranks, from moments of parts of a batch that can be merged."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.ranks import gather_over_ranks, sum_over_ranks, world_size

Module = TypeVar("Module", bound=nn.Module)


def moments(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations from it of every channel of x (B, C, H, W), and the number of values in one:
    (2 C + 1,), float32 at least. Without images all are 0."""
    count = x.numel() // max(1, x.shape[1])
    if x.is_cuda and count:
        mean, invstd = torch.batch_norm_stats(packed(x), 0.0)  # 0 for the standard deviation 0
        deviations = torch.where(invstd > 0, count / invstd.square(), 0)
        return torch.cat([mean, deviations, mean.new_full((1,), count)])
    x = x if x.dtype == torch.float64 else x.float()
    # Two passes: the mean of the squares less the square of the mean loses the digits of a variance that is small beside it.
    mean = x.sum(dim=(0, 2, 3)) / max(1, count)
    deviations = (x - mean.view(1, -1, 1, 1)).square().sum(dim=(0, 2, 3))
    return torch.cat([mean, deviations, mean.new_full((1,), count)])


def merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), variance (C,) and number of the values that the parts (P, 2 C + 1) are the moments of (Chan, Golub & LeVeque
    1979); the variance is that of the values at hand, not an estimate."""
    counts = parts[:, -1:]
    means, deviations = parts[:, :-1].chunk(2, dim=1)
    total = counts.sum()
    mean = (counts * means).sum(dim=0) / total
    return mean, (deviations + counts * (means - mean).square()).sum(dim=0) / total, total


def batch_norm(norm: nn.BatchNorm2d, x: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, C, H, W) by its mean and variance over the images of all ranks and those of which `others` (P, 2 C + 1) are the
    moments; and that mean (C,), variance (C,) and number of values. Gradients flow through the statistics of x; `others` are
    constants."""
    y, mean, var, count = OverParts.apply(x, *scale_and_shift(norm, x), others, norm.eps)
    return y, mean, var, count


def scale_and_shift(norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias (C,) of norm, ones and zeros where it has none."""
    if norm.affine:
        return norm.weight, norm.bias
    ones = torch.ones(norm.num_features, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return ones, torch.zeros_like(ones)


class OverParts(torch.autograd.Function):
    """`batch_norm`. On a GPU by the kernels that PyTorch's SyncBatchNorm uses, which read x twice and write it once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, others: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = packed(x)
        parts = gather_over_ranks(moments(x))
        mean, var, count = merge(parts if others is None else torch.cat([parts, others]))
        invstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.mark_non_differentiable(mean, var, count)
        if x.is_cuda and len(x):
            return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps), mean, var, count
        y = torch.addcmul(per_channel(bias), x - per_channel(mean), per_channel(weight * invstd)).to(x.dtype)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        grad = packed(grads[0], like=x)
        on_gpu = x.is_cuda and len(x) > 0
        if on_gpu:
            total, along, for_weight, for_bias = torch.batch_norm_backward_reduce(
                grad, x, mean, invstd, weight, True, True, True
            )  # fmt: skip
        else:
            deviation = x - per_channel(mean)
            total, along = grad.to(mean.dtype).sum(dim=(0, 2, 3)), (grad * deviation).sum(dim=(0, 2, 3))
            for_weight, for_bias = along * invstd, total
        total, along = sum_over_ranks(torch.stack([total, along])).unbind()
        if on_gpu:
            whole = count.view(1).to(torch.int32)
            back = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, along, whole)
        else:
            back = grad - per_channel(total / count) - deviation * per_channel(along / count * invstd.square())
            back = (back * per_channel(weight * invstd)).to(x.dtype)
        return back, for_weight, for_bias, None, None


def packed(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x without gaps in its memory, in the order of `like` or else its own; the kernels want that."""
    last = (x if like is None else like).is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def per_channel(values: Tensor) -> Tensor:
    """values (C,) to compute with images: (1, C, 1, 1)."""
    return values.view(1, -1, 1, 1)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all ranks, however many each has (none is fine). PyTorch's SyncBatchNorm does not run
    on CPUs; weights and buffers are those of BatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        y, mean, var, count = batch_norm(self, x)
        if self.track_running_stats:
            with torch.no_grad():
                momentum = 0.1 if self.momentum is None else self.momentum
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.num_batches_tracked is not None
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * count / (count - 1), momentum)
                self.num_batches_tracked += 1
        return y


def share_batchnorm(model: Module) -> Module:
    """Let every BatchNorm2d of model, in place, see the images of all ranks; a single rank is left alone."""
    if world_size() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = GlobalBatchNorm2d
    return model
