"""generator: train an EDM diffusion model on the real training images, take an imported one, or record that there is none."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from pipeline.artifacts import place_all
from pipeline.edm import save_generator, save_no_generator
from pipeline.edm.importing import place_imported
from pipeline.edm.network import NetworkParams, build_unet
from pipeline.edm.training import GeneratorTrainingParams, start, train_generator
from pipeline.execution import Task, device, guarded_publish, stage_run
from pipeline.images import ImageStore
from pipeline.params import Section, StageParams
from pipeline.stage import run


class EdmGeneratorSection(Section):
    """`sigma_data` is the standard deviation that pixels in [-1, 1] are taken to have (the paper: 0.5)."""

    kind: Literal["edm"]
    network: NetworkParams
    sigma_data: PositiveFloat = 0.5
    training: GeneratorTrainingParams


class ImportedGeneratorSection(Section):
    """A folder that `python -m pipeline import-edm` wrote, and the SHA-256 of its weights, which that command prints."""

    kind: Literal["imported"]
    path: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class NoGeneratorSection(Section):
    """For synthetic images that come from files, or for none at all."""

    kind: Literal["none"]


class GeneratorParams(StageParams):
    generator: Annotated[EdmGeneratorSection | ImportedGeneratorSection | NoGeneratorSection, Field(discriminator="kind")]


def fit(task: Task, train_path: Path) -> None:
    """The whole training."""
    section = GeneratorParams.model_validate_json(task.params).generator
    assert isinstance(section, EdmGeneratorSection)
    store = ImageStore.open(train_path)
    net = build_unet(section.network, store.shape, len(store.classes), section.training.seed).to(device())
    state = start(net, section.training.ema_decay)
    arguments = section.training.model_dump(exclude={"ema_decay"}) | {"sigma_data": section.sigma_data}
    train_generator(state, store, **arguments, progress=task.report, checkpoint=task.checkpoint)
    save_generator(
        task.output, state.ema.model, network=section.network, classes=store.classes, shape=store.shape,
        sigma_data=section.sigma_data, origin={"train": store.digest, "flip": section.training.flip}, curve=state.curve,
    )  # fmt: skip


def main(train_path: Path, generator_path: Path) -> None:
    params = GeneratorParams.load()
    section = params.generator
    if not isinstance(section, EdmGeneratorSection):
        with guarded_publish("generator", params, [train_path], generator_path) as work:
            if isinstance(section, ImportedGeneratorSection):
                place_imported(Path(section.path), work, ImageStore.open(train_path), section.digest)
            else:
                save_no_generator(work)
        return
    with stage_run("generator", params, [train_path], generator_path) as this:
        (trained,) = this.run(fit, {"train": {}})
        with this.publish() as work:
            place_all(trained, work)


if __name__ == "__main__":
    run(main)
