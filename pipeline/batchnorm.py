"""BatchNorm by the images of all ranks, from moments of parts of a batch that can be merged."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.ranks import gather_over_ranks, world_size

Module = TypeVar("Module", bound=nn.Module)


def moments(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations from it of every channel of x (B, C, H, W), and the number of values in one:
    (2 C + 1,), float32 at least. Without images all are 0."""
    x = x if x.dtype == torch.float64 else x.float()
    count = x.numel() // max(1, x.shape[1])
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


def normalise(norm: nn.BatchNorm2d, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """x (B, C, H, W) by the given mean and variance (C,), with gradients through both, and the weights of norm. Computed in
    the precision of the variance, and returned in that of x."""
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    shift, scale, mean = (values.view(1, -1, 1, 1) for values in (norm.bias, scale, mean))
    return torch.addcmul(shift, x - mean, scale).to(x.dtype)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all ranks, however many each has (none is fine). PyTorch's SyncBatchNorm does not run
    on CPUs; weights and buffers are those of BatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        mean, var, count = merge(gather_over_ranks(moments(x)))
        if self.track_running_stats:
            with torch.no_grad():
                momentum = 0.1 if self.momentum is None else self.momentum
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.num_batches_tracked is not None
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * count / (count - 1), momentum)
                self.num_batches_tracked += 1
        return normalise(self, x, mean, var)


def share_batchnorm(model: Module) -> Module:
    """Let every BatchNorm2d of model, in place, see the images of all ranks; a single rank is left alone."""
    if world_size() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = GlobalBatchNorm2d
    return model
