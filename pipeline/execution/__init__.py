"""Where work runs and how it is watched. Nothing here may change a result, so no stage lists it in its dependencies."""

from pipeline.execution.progress import progress
from pipeline.execution.settings import ExecutionParams, device

__all__ = ["ExecutionParams", "device", "progress"]
