"""BatchNorm by the images of all ranks, from sums that ranks and parts of a batch can add up."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.ranks import sum_over_ranks, world_size

Module = TypeVar("Module", bound=nn.Module)


def moments(x: Tensor) -> Tensor:
    """Sum and sum of squares of every channel of x (B, C, ...) and their number: (2 C + 1,), float32 at least."""
    x = x if x.dtype == torch.float64 else x.float()
    axes = [0, *range(2, x.ndim)]
    count = x.numel() / max(1, x.shape[1])
    return torch.cat([x.sum(dim=axes), x.square().sum(dim=axes), x.new_tensor([count])])


def mean_and_variance(total: Tensor) -> tuple[Tensor, Tensor]:
    """Of every channel (C,), from moments; the variance is that of the values at hand, not an estimate."""
    sums, squares = total[:-1].chunk(2)
    mean = sums / total[-1]
    return mean, squares / total[-1] - mean.square()


def normalise(norm: nn.BatchNorm2d, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """x (B, C, H, W) by the given mean and variance (C,), with gradients through both, and the weights of norm."""
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    shift = norm.bias - mean * scale
    return x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all ranks, however many each has (none is fine). PyTorch's SyncBatchNorm does not run
    on CPUs; weights and buffers are those of BatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        total = sum_over_ranks(moments(x))
        mean, var = mean_and_variance(total)
        if self.track_running_stats:
            with torch.no_grad():
                momentum = 0.1 if self.momentum is None else self.momentum
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.num_batches_tracked is not None
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * total[-1] / (total[-1] - 1), momentum)
                self.num_batches_tracked += 1
        return normalise(self, x, mean, var)


def share_batchnorm(model: Module) -> Module:
    """Let every BatchNorm2d of model, in place, see the images of all ranks; a single rank is left alone."""
    if world_size() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = GlobalBatchNorm2d
    return model
