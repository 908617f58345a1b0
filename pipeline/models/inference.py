"""A copy of a classifier that computes the same function in less time, and alike in batches of any size: frozen, BatchNorm
folded, channels last, bf16."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

UNSURE = 0.02  # of 2,000 CIFAR-10 images bfloat16 changed 11 predictions, all within 0.003
FEW_CLASSES = 8  # their logits may all be close: with 4 classes 1 of 23 changes was not within UNSURE, with 2 classes 15 of 18


class Affine(nn.Module):
    """What BatchNorm does in eval mode: scale and shift (C, 1, 1) per channel, fixed."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.affine:
            scale = scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        if norm.affine:
            shift = shift + norm.bias.detach()
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class RowByRow(nn.Module):
    """A linear layer that multiplies each row of a batch (B, D) by itself: the product for all of them together is rounded in
    another way for another B, on some CPUs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            return self.linear(x)
        found = torch.bmm(x[:, None, :], self.linear.weight.t().expand(len(x), -1, -1)).squeeze(1)
        return found if self.linear.bias is None else found + self.linear.bias


def inference_copy(model: nn.Module, *, bf16: bool = False) -> nn.Module:
    """The same function, in eval mode and without gradients of its weights, faster: channels last, and BatchNorm as part
    of the convolution before it where torch.fx finds one, else as a scale and a shift. With `bf16` a `MixedPrecision`
    that computes the gradients in bfloat16. The model is not changed."""
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    fast = fold_batchnorm(fast).to(memory_format=torch.channels_last)
    replace(fast, lambda child: RowByRow(child) if type(child) is nn.Linear else child)
    if bf16:
        return MixedPrecision(FewSizes(fast), FewSizes(copy.deepcopy(fast).to(torch.bfloat16))).eval()
    return FewSizes(fast).eval()


class FewSizes(nn.Module):
    """The model, which sees batches of fewer sizes, filled up with black images. On a CPU a single image gets one beside it:
    the kernels round a batch of one otherwise than larger ones, so that the logits of an image would depend on the batch that
    it is in. On a GPU batches are multiples of `multiple`, for cuDNN plans every convolution anew for every size."""

    def __init__(self, model: nn.Module, multiple: int = 16) -> None:
        super().__init__()
        self.model, self.multiple = model, multiple

    def forward(self, x: Tensor) -> Tensor:
        missing = self.missing(len(x), x.is_cuda)
        return self.model(F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)))[: len(x)] if missing else self.model(x)

    def missing(self, count: int, on_gpu: bool) -> int:
        return -count % self.multiple if on_gpu else int(count == 1)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    with suppress(TraceError, TypeError, RuntimeError):  # torch.fx cannot follow a forward pass that asks about its input
        model = fuse(model, inplace=True)
    replace(model, lambda child: Affine(child) if isinstance(child, nn.BatchNorm2d) and child.track_running_stats else child)
    return model


def replace(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> None:
    """Put in the place of every module inside model what change makes of it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            setattr(module, name, change(child))


class MixedPrecision(nn.Module):
    """Logits of the float32 model, or `rough` ones, and gradients of its bfloat16 copy."""

    def __init__(self, exact: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.exact, self.low = exact, low

    def forward(self, x: Tensor, known: Tensor | None = None, *, rough: bool = False) -> Tensor:
        """Where gradients are wanted, `known` logits save the pass in float32, and so does `rough`, which takes those of the
        bfloat16 copy but for images where rounding could change the prediction."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.exact(x)
        low = self.low(x.to(torch.bfloat16)).to(x.dtype)
        with torch.no_grad():
            logits = known
            if logits is None:
                logits = self.settled(low, x) if rough else self.exact(x)
        return low + (logits - low).detach()

    def settled(self, low: Tensor, x: Tensor) -> Tensor:
        """Logits low (B, K) of x, those of float32 where they are `unsure`."""
        rows = unsure(low).nonzero().squeeze(1)
        return low.index_copy(0, rows, self.exact(x[rows])) if len(rows) else low


def unsure(logits: Tensor) -> Tensor:
    """Whether the two highest of logits (B, K) are within the share `UNSURE` of their range, so that rounding could swap them;
    with few classes, whose range says little of the rounding, always."""
    if logits.shape[1] < FEW_CLASSES:
        return torch.ones_like(logits[:, 0], dtype=torch.bool)
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    return first - second <= UNSURE * (first - logits.amin(dim=1))


@contextmanager
def convolutions(*, tf32: bool) -> Iterator[None]:
    """In it the convolutions of a GPU compute float32 in TensorFloat-32 (10 bits of mantissa), or not."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=tf32):
        yield
