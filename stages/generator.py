"""generator: train an EDM diffusion model on the real training images, or record that there is none."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from pipeline.artifacts import publish
from pipeline.edm import save_generator, save_no_generator
from pipeline.edm.network import NetworkParams, build_unet
from pipeline.edm.training import GeneratorTrainingParams, start, train_generator
from pipeline.execution import device, progress
from pipeline.images import ImageStore
from pipeline.params import Section, StageParams
from pipeline.stage import run


class EdmGeneratorSection(Section):
    """`sigma_data` is the standard deviation that pixels in [-1, 1] are taken to have (the paper: 0.5)."""

    kind: Literal["edm"]
    network: NetworkParams
    sigma_data: PositiveFloat = 0.5
    training: GeneratorTrainingParams


class NoGeneratorSection(Section):
    """For synthetic images that come from files, or for none at all."""

    kind: Literal["none"]


class GeneratorParams(StageParams):
    generator: Annotated[EdmGeneratorSection | NoGeneratorSection, Field(discriminator="kind")]


def main(train_path: Path, generator_path: Path) -> None:
    section = GeneratorParams.load().generator
    with publish(generator_path) as work, progress("generator") as report:
        if isinstance(section, NoGeneratorSection):
            save_no_generator(work)
            return
        store = ImageStore.open(train_path)
        net = build_unet(section.network, store.shape, len(store.classes), section.training.seed).to(device())
        state = start(net, section.training.ema_decay)
        arguments = section.training.model_dump(exclude={"ema_decay"})
        train_generator(state, store, sigma_data=section.sigma_data, **arguments, progress=report)
        save_generator(
            work, state.ema.model, network=section.network, classes=store.classes, shape=store.shape,
            sigma_data=section.sigma_data, origin={"train": store.digest}, curve=state.curve,
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
