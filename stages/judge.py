"""Judge the synthetic images: their quality beside that of held-out real images, into quality.json."""

from pathlib import Path

from pipeline.artifacts import place_all, write_json
from pipeline.execution import Task, device, stage_run
from pipeline.features import extractor
from pipeline.images import ImageStore
from pipeline.judging import JudgeSection, judge, judged_by
from pipeline.models.checkpoint import load_model
from pipeline.params import StageParams
from pipeline.stage import run


class JudgeParams(StageParams):
    judge: JudgeSection


def measure(task: Task, real_path: Path, synthetic_path: Path, model_path: Path) -> None:
    """All of it."""
    settings = JudgeParams.model_validate_json(task.params).judge
    paths = {"train": real_path / "train", "test": real_path / "test", "synthetic": synthetic_path}
    stores = {name: ImageStore.open(path) for name, path in paths.items()}
    model, description = load_model(model_path / "best", device())
    features, name = extractor(settings.features, model, description["digest"])
    found = judge(stores, model, features.to(device()).eval(), settings, device())
    write_json(task.output / "quality.json", {"features": name, "judged_by": judged_by(description), **found})


def main(real_path: Path, synthetic_path: Path, model_path: Path, judge_path: Path) -> None:
    params = JudgeParams.load()
    with stage_run("judge", params, [real_path, synthetic_path, model_path], judge_path) as this:
        (judged,) = this.run(measure, {"all": {}})
        with this.publish() as work:
            place_all(judged, work)


if __name__ == "__main__":
    run(main)
