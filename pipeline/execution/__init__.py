"""Where work runs and how it is watched. Nothing here may change a result, so no stage lists it in its dependencies."""

from pipeline.execution.progress import Report, progress
from pipeline.execution.settings import ExecutionParams, device, placement
from pipeline.execution.stage_run import guarded_publish, stage_run
from pipeline.execution.worker import Task

__all__ = ["ExecutionParams", "Report", "Task", "device", "guarded_publish", "placement", "progress", "stage_run"]
