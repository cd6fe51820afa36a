"""Sampling speed beside stock diffusers: `python -m benchmarks.sampling --model ddpm-mnist`

Compares stock's U-Net in its DDIMPipeline with ours, in float32 and bf16: the same weights, 50 DDIM steps each. Also
reports how much bf16 changes the pixels, and times the whole command, `python generate.py`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers

import ddpm_mnist
from ddpm_mnist.loading import Model, load_model
from ddpm_mnist.options import SampleOptions

from .common import DEVICE, OURS, ROOT, STOCK, build, machine, table, take_turns


def rows(model: str | None, num_images: int, steps: int, repeats: int):
    if model:
        ours, stock = load_model(model), STOCK.from_pretrained(model, subfolder="unet")
    else:
        unet, stock = (build(cls, (16, 48, 96), None).eval() for cls in (OURS, STOCK))
        ours = Model(unet, ddpm_mnist.DDPMScheduler(), None)
    pipeline = diffusers.DDIMPipeline(stock, diffusers.DDIMScheduler.from_config(ours.scheduler.config)).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    pictures = {}

    def sample(name: str, mixed_precision: str) -> None:
        options = SampleOptions(
            scheduler="ddim", num_inference_steps=steps, batch_size=num_images, mixed_precision=mixed_precision
        )
        pictures[name] = ours.draw_images(range(num_images), options)

    seconds = take_turns(
        {
            "stock DDIMPipeline": lambda: pipeline(num_images, num_inference_steps=steps, output_type="np"),
            "ours": lambda: sample("ours", "no"),
            "ours, bf16": lambda: sample("ours, bf16", "bf16"),
        },
        repeats,
        warm_up=1,
    )
    for name, taken in seconds.items():
        change = (pictures[name] - pictures["ours"]).abs().clamp(max=2) * 127.5 if name in pictures else None
        changed = "" if change is None else f"{change.mean():.2f} of 255, {(change > 32).float().mean():.2%} over 32"
        yield name, f"{taken:.2f}", f"{num_images / taken:.1f}", f"{seconds['stock DDIMPipeline'] / taken:.2f}", changed


def time_generate(model: str, num_images: int, steps: int) -> float:
    """Seconds of the whole command, with start-up and writing the files."""
    command = [sys.executable, "generate.py", f"--model={Path(model).resolve()}", f"--num_images={num_images}"]
    with tempfile.TemporaryDirectory() as folder:
        command += [f"--num_inference_steps={steps}", "--scheduler=ddim", f"--output={folder}/grid.png"]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a pipeline; default: the default U-Net, untrained")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.num_images} images, {args.steps} DDIM steps, median of {args.repeats}. {machine()}.\n")
    header = ("code", "seconds", "images/s", "/ stock", "difference of a pixel")
    table(header, rows(args.model, args.num_images, args.steps, args.repeats))
    if args.model:
        print(f"`python generate.py`: {time_generate(args.model, args.num_images, args.steps):.1f} s.")


if __name__ == "__main__":
    main()
