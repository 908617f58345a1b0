"""A classifier as a file that runs without this project: TorchScript or ONNX, normalisation inside, any batch size."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.models import Classifier
from pipeline.params import InputError

Runner = Callable[[Tensor], Tensor]
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write_torchscript(path: Path, model: Classifier, shape: tuple[int, int, int]) -> None:
    """Trace the model for images of shape (H, W, C) and save it for `torch.jit.load`. Gradients of the input pass through
    the file, so that it can be attacked.

    Raises:
        InputError: the file does not compute what the model does.
    """
    example = images_of(shape, 2)
    with warnings.catch_warnings():
        # TorchScript is on its way out, and the tracer warns of every constant; what counts is checked below.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        with torch.enable_grad():  # else a transformer is traced as one fused operation, which has no gradient
            traced = torch.jit.trace(model, example, check_trace=False)
        torch.jit.save(traced, path)
        loaded = torch.jit.load(path)
    check_logits("torchscript", loaded, model, shape)


def write_onnx(path: Path, model: Classifier, shape: tuple[int, int, int]) -> None:
    """Save the model with the input `images` (batch, C, H, W) in [0, 1] and the output `logits` (batch, num_classes).

    Raises:
        InputError: the packages of the extra `export` are missing, or the model cannot be written for every batch size.
    """
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"--format onnx wants {', '.join(missing)}; install them with the extra: `pip install -e .[export]`")
    import onnxruntime

    try:
        torch.onnx.export(
            model, (images_of(shape, 2),), path, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, dynamo=True, verbose=False,
        )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(f"onnx: this model cannot be written for every batch size ({str(error).splitlines()[0]})") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check_logits("onnx", lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model, shape)


def images_of(shape: tuple[int, int, int], count: int) -> Tensor:
    """Random images (count, C, H, W) in [0, 1]."""
    height, width, channels = shape
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_logits(what: str, exported: Runner, model: Classifier, shape: tuple[int, int, int]) -> None:
    """Raise an InputError where a file gives other logits than the model, for one image or for several."""
    for count in (1, 5):
        x = images_of(shape, count)
        expected, found = model(x), exported(x)
        close = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        if not close:
            raise InputError(
                f"{what}: the file gives other logits than the model for a batch of {count}; a forward pass that depends on "
                "its input or on the size of the batch cannot be exported"
            )
