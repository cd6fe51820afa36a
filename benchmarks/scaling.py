"""How time and memory scale: `python -m benchmarks.scaling --dataset_name ylecun/mnist`

1. The whole script with one process and with two, which share the cores and the batch (torchrun over gloo).
2. One training step against image size, width and batch: images a second, and peak memory in a fresh process.
3. The time to draw a batch, and the memory, against the number of images.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddpm_mnist.images.batches import Images, index_batches
from ddpm_mnist.record import METRICS_FILE, read_metrics

from .common import OURS, ROOT, Trainer, build, machine, table, take_turns


def images_per_second(processes: int, batch_size: int, dataset: list[str], steps: int) -> float:
    """Of the whole script without validation and checkpoints: the median of the logged rates except the first."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        options = [f"--output_dir={folder}/run", f"--train_batch_size={batch_size}", f"--max_train_steps={steps}"]
        options += ["--validation_steps=0", "--checkpointing_steps=100000", "--logging_steps=10"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-m", *launcher, "train_ddpm_mnist.py", *dataset, *options]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        lines = read_metrics(Path(folder, "run", METRICS_FILE))
    return statistics.median(line["images_per_second"] for line in lines[1:] if "images_per_second" in line)


def process_rows(dataset: list[str], batch_size: int, steps: int, repeats: int):
    rates = {1: [], 2: []}
    for _ in range(repeats):  # in turns
        for processes, rate in rates.items():
            rate.append(images_per_second(processes, batch_size // processes, dataset, steps))
    one = statistics.median(rates[1])
    for processes, rate in rates.items():
        middle = statistics.median(rate)
        yield processes, batch_size // processes, f"{middle:.0f}", f"{middle / one:.2f}"


def measure_step(size: int, widths: tuple[int, ...], batch_size: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a training step, and how many MB the peak memory of this process grew for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = Trainer(build(OURS, widths, None, size), batch_size, dtype, fused=True)
    seconds = take_turns({"step": trainer.step}, 3, warm_up=1)["step"]
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def growth_rows(dtype: torch.dtype):
    base = {"size": 28, "widths": (16, 48, 96), "batch_size": 64}
    changes = [{}, *({"size": s} for s in (32, 64)), *({"widths": w} for w in ((8, 24, 48), (32, 96, 192)))]
    changes += [{"batch_size": b} for b in (16, 256)]
    context = multiprocessing.get_context("spawn")
    for change in changes:
        shape = base | change
        with context.Pool(1) as pool:  # a fresh process: the peak of an old one never falls
            seconds, megabytes = pool.apply(measure_step, (*shape.values(), dtype))
        rate = shape["batch_size"] / seconds
        yield *shape.values(), f"{seconds * 1e3:.0f}", f"{rate:.0f}", f"{megabytes:.0f}"


def dataset_rows():
    for num_images in (6_000, 60_000, 600_000, 2_400_000):
        images = Images(torch.zeros(num_images, 1, 28, 28, dtype=torch.uint8), None)
        batches = images.batches(index_batches(num_images, 0, 0, 64))
        started = time.perf_counter()
        next(batches)
        first = time.perf_counter() - started
        seconds = take_turns({"batch": batches.__next__}, 50)["batch"]
        yield f"{num_images:,}", f"{first * 1e3:.1f}", f"{seconds * 1e3:.2f}", f"{images.images.nbytes / 2**20:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", help="default: the script's own")
    parser.add_argument("--steps", type=int, default=60, help="updates in each run of the script")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the script for each number of processes")
    args = parser.parse_args()
    dataset = [f"--dataset_name={args.dataset_name}"] if args.dataset_name else []
    print(f"Scaling. {machine()}.\n")
    header = ("processes", "batch of each", "images/s together", "/ one process")
    table(header, process_rows(dataset, 64, args.steps, args.repeats))
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        print(f"One training step, {name}:\n")
        table(("image size", "widths", "batch", "ms", "images/s", "peak MB"), growth_rows(dtype))
    print("The training set in memory:\n")
    table(("images", "first batch, ms", "a later batch, ms", "MB"), dataset_rows())


if __name__ == "__main__":
    main()
