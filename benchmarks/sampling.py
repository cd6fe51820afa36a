"""Sampling speed beside stock diffusers: `python -m benchmarks.sampling --model ddpm-mnist`

Compares stock's U-Net in its DDIMPipeline with ours in `sample_images`, in float32 and bf16: the same weights, 50 DDIM
steps each. Also reports how much bf16 changes the pixels, and times the whole command, `python generate.py`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers

from ddpm_mnist.sampling import sample_images

from .common import DEVICE, OURS, ROOT, STOCK, build, machine, table, take_turns


def rows(model: str | None, num_images: int, steps: int, repeats: int):
    def unet(cls):
        made = cls.from_pretrained(model, subfolder="unet") if model else build(cls, (16, 48, 96), None)
        return made.to(DEVICE).eval()

    stock, ours = unet(STOCK), unet(OURS)
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.DDIMPipeline(stock, scheduler).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    pictures = {}

    def sample(name: str, mixed_precision: str) -> None:
        pictures[name] = sample_images(
            ours, scheduler, range(num_images), steps, batch_size=num_images, mixed_precision=mixed_precision
        )

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
        command = [sys.executable, "generate.py", "--model", str(Path(args.model).resolve())]
        command += ["--num_images", str(args.num_images), "--num_inference_steps", str(args.steps)]
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            options = ["--scheduler", "ddim", "--output", f"{folder}/grid.png"]
            subprocess.run(command + options, check=True, capture_output=True, cwd=ROOT)
        print(f"`python generate.py`, with start-up and writing the files: {time.perf_counter() - started:.1f} s.")


if __name__ == "__main__":
    main()
