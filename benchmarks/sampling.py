"""Images per second of our EDM sampler beside diffusers: the same U-Net in size, the same steps and order, in one run.

The headline is ours with bf16 over diffusers as it comes (float32, channels first); the table also compares equals, in
precision, memory layout and compilation.

python benchmarks/sampling.py
python benchmarks/sampling.py --compiled --channels 16 --blocks 1 --steps 3 --rounds 2    # compiling takes minutes on a CPU
python benchmarks/sampling.py --device cuda --compiled --channels 128 --blocks 4 --images 512 --steps 18
python benchmarks/sampling.py --data data    # with the artifacts of make repro: what bf16, compile and fewer steps cost
"""

import copy
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import HeunDiscreteScheduler, UNet2DModel
from torch import Tensor

from pipeline.edm import load_generator
from pipeline.edm.network import NetworkParams, UNet, build_unet
from pipeline.edm.sampling import SamplerParams, image_sampler, sample_images
from pipeline.features import Penultimate
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.judging import JudgeSection, judge
from pipeline.models.checkpoint import load_model

GOAL = 1.5
CLASSES = 10
Draw = Callable[[], object]


def networks(channels: int, blocks: int, device: torch.device) -> tuple[UNet, Any]:
    """DDPM++ for 32 x 32 pixels at a width, ours and diffusers', weights drawn."""
    params = NetworkParams(
        channels=channels, multipliers=(2, 2, 2), blocks=blocks, attention_resolutions=(16,), adaptive_scale=False
    )
    ours = build_unet(params, (32, 32, 3), CLASSES, 0).to(device).to(memory_format=torch.channels_last).requires_grad_(False)
    peer: Any = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=blocks, block_out_channels=(2 * channels,) * 3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), norm_num_groups=min(32, channels // 2),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=CLASSES, attention_head_dim=2 * channels,
    )  # fmt: skip
    return ours, peer.to(device).eval().requires_grad_(False)


def diffusers_draw(peer: Any, steps: int, count: int, *, bf16: bool, channels_last: bool, compiled: bool) -> Draw:
    """As the pipelines of diffusers do it with their Heun scheduler, to uint8 images."""
    device, dtype = next(peer.parameters()).device, torch.bfloat16 if bf16 else torch.float32
    scheduler: Any = HeunDiscreteScheduler(use_karras_sigmas=True)
    peer = copy.deepcopy(peer).to(dtype)
    peer = peer.to(memory_format=torch.channels_last) if channels_last else peer
    peer = torch.compile(peer) if compiled else peer
    labels = torch.arange(count, device=device) % CLASSES
    layout = torch.channels_last if channels_last else torch.contiguous_format

    @torch.inference_mode()
    def draw() -> Tensor:
        scheduler.set_timesteps(steps, device=device)
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(count, 3, 32, 32, generator=generator, device=device, dtype=dtype) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t).to(dtype).contiguous(memory_format=layout)
            x = scheduler.step(peer(scaled, t, class_labels=labels).sample, t, x).prev_sample
        return (x.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    return draw


def our_draw(net: UNet, sampler: SamplerParams, count: int) -> Draw:
    draw = image_sampler(net, 0, 0.5, sampler)
    return lambda: draw(np.arange(count), np.arange(count) % CLASSES)


def seconds(draw: Draw, device: torch.device) -> float:
    """Of processor time on a CPU, so that other work on the machine counts less; of the clock on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        draw()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    begin = time.process_time()
    draw()
    return time.process_time() - begin


def quality(data: Path, images: int) -> list[dict[str, Any]]:
    """The figures of the stage judge for samplers of one generator, and how far their images are from the first's."""
    stores = {name: ImageStore.open(data / "real" / name) for name in ("train", "test")}
    train, cpu = stores["train"], torch.device("cpu")
    generator = load_generator(data / "generator", cpu, classes=train.classes, shape=train.shape)
    model, _ = load_model(data / "margin_model" / "best", cpu)
    rows, first = [], None
    plain = SamplerParams(num_steps=18, sigma_min=0.01, sigma_max=20.0)
    changes: dict[str, dict[str, Any]] = {
        "float32": {},
        "bf16": {"bf16": True},
        "compile": {"compile": True},
        "compile, bf16": {"compile": True, "bf16": True},
        "half the steps": {"num_steps": 9},
    }
    for name, change in changes.items():
        sampler = plain.model_copy(update=change)
        chunks = list(
            sample_images(
                generator.net, 0, images, batch_size=120, seed=0, sigma_data=generator.sigma_data, sampler=sampler
            )
        )  # fmt: skip
        drawn = np.concatenate([chunk for chunk, _ in chunks]).astype(int)
        first = drawn if first is None else first
        with tempfile.TemporaryDirectory() as folder:
            store = write_store(
                Path(folder) / "s", chunks, classes=train.classes, shape=train.shape, shard_rows=images, origin={}
            )
            found = judge(stores | {"synthetic": store}, model, Penultimate(model), JudgeSection(), cpu)["synthetic"]
        rows.append({"sampler": name, "levels_off": float(np.abs(drawn - first).mean()), **found})
        print(
            "  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in rows[-1].items())
        )
    return rows


def main(
    channels: int = 32,
    blocks: int = 2,
    images: int = 32,
    steps: int = 5,
    rounds: int = 3,
    threads: int = 1,
    device: str = "cpu",
    compiled: bool = False,
    data: Path | None = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(threads)
    where = torch.device(device)
    ours, peer = networks(channels, blocks, where)
    sampler = SamplerParams(num_steps=steps)
    draws: dict[tuple[str, str, str], Draw] = {
        ("diffusers", "float32", "as it comes"): diffusers_draw(
            peer, steps, images, bf16=False, channels_last=False, compiled=False
        )
    }
    variants = [(False, False), (True, False), (True, True)][: 2 + compiled]
    for bf16, compile_both in variants:
        same = ("bf16" if bf16 else "float32", "channels last, compiled" if compile_both else "channels last")
        draws["diffusers", *same] = diffusers_draw(
            peer, steps, images, bf16=bf16, channels_last=True, compiled=compile_both
        )  # fmt: skip
        draws["ours", *same] = our_draw(ours, sampler.model_copy(update={"bf16": bf16, "compile": compile_both}), images)
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (ours, peer)]
    print(
        f"{sizes[0]:.2f} and {sizes[1]:.2f} million parameters, {images} images in a batch, {sampler.evaluations} evaluations"
    )
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in draws}
    for turn in range(rounds + 1):
        for key, draw in draws.items():
            spent = seconds(draw, where)
            if turn:
                times[key].append(spent)
    rate = {key: images / median(spent) for key, spent in times.items()}
    rows = []
    for (who, *how), found in rate.items():
        row: dict[str, Any] = {"sampler": who, "precision": how[0], "layout": how[1], "images_per_s": found}
        row["over_diffusers_as_it_comes"] = found / rate["diffusers", "float32", "as it comes"]
        row["over_diffusers_alike"] = found / rate["diffusers", how[0], how[1]]
        rows.append(row)
        print(
            f"{who:10} {how[0]:8} {how[1]:24} {found:8.2f} images/s  {row['over_diffusers_as_it_comes']:5.2f} of diffusers as "
            f"it comes  {row['over_diffusers_alike']:5.2f} of diffusers alike",
            flush=True,
        )
    best = rows[-1]  # ours, bf16, and compiled where asked for
    name = f"EDM sampling ({best['precision']}, {best['layout']}), images/s over diffusers as it comes"
    ratio, alike = best["over_diffusers_as_it_comes"], best["over_diffusers_alike"]
    print(f"{name}: {ratio:.2f} (goal {GOAL}); over diffusers alike: {alike:.2f}")
    extra = quality(data, 360) if data else []
    if json_file:
        headline = {"name": name, "ratio": ratio, "goal": GOAL, "alike": alike}
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": threads}
        json_file.write_text(json.dumps({"headline": headline, "rows": [*rows, *extra], "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
