"""Training speed beside stock diffusers: `python -m benchmarks.train_throughput`

A training step is noise, forward, loss, backward and AdamW, on images in memory. "stock" is diffusers' UNet2DModel with
its default heads, 8 wide, and PyTorch's default AdamW, as in train_unconditional.py. "stock, one head" and "ours, heads
of 8" separate the effect of the heads from that of the code. All models take turns in one process.
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_mnist.training.hardware import keep_freed_memory

from .common import DEVICE, OURS, STOCK, Trainer, build, machine, table, take_turns

MODELS = {
    "stock": (STOCK, 8, False),
    "stock, one head": (STOCK, None, False),
    "ours, heads of 8": (OURS, 8, True),
    "ours": (OURS, None, True),
}
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def peak_gflops(dtype: torch.dtype) -> float:
    """The speed of a large matrix product on this machine."""
    size = 2048 if DEVICE.type == "cpu" else 8192
    a = torch.randn(size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / take_turns({"product": lambda: a @ a}, 7)["product"] / 1e9


def flops_of_a_step(unet: torch.nn.Module, batch_size: int) -> float:
    """Multiplications and additions of a training step of stock's code: three times those of the forward pass."""
    config = unet.config
    sample = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size, device=DEVICE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(sample, 0)
    return 3 * counter.get_total_flops()


def rows(widths_list: list[tuple[int, ...]], batch_size: int, steps: int):
    peaks = {name: peak_gflops(dtype) for name, dtype in PRECISIONS.items()}
    for widths in widths_list:
        trainers = {
            (name, precision): Trainer(build(cls, widths, head_dim), batch_size, dtype, fused)
            for precision, dtype in PRECISIONS.items()
            for name, (cls, head_dim, fused) in MODELS.items()
        }
        flops = flops_of_a_step(trainers["stock", "float32"].unet, batch_size)
        seconds = take_turns({key: trainer.step for key, trainer in trainers.items()}, steps)
        for (name, precision), taken in seconds.items():
            ratios = [f"{seconds['stock', p] / taken:.2f}" for p in PRECISIONS]
            speed = flops / taken / 1e9
            share = f"{speed / peaks[precision]:.0%}"
            yield widths, name, precision, f"{batch_size / taken:.0f}", *ratios, f"{speed:.0f}", share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each model, after two to warm up")
    parser.add_argument("--widths", default="16,48,96 32,64,64 64,128,128", help="block_out_channels; one model each")
    parser.add_argument("--keep_freed_memory", action="store_true", help="call mallopt as our script does")
    args = parser.parse_args()
    if args.keep_freed_memory:
        keep_freed_memory()
    widths = [tuple(map(int, one.split(","))) for one in args.widths.split()]
    memory = "kept (mallopt)" if args.keep_freed_memory else "the system's default"
    print(f"Training, batch {args.batch_size}, 28x28, median of {args.steps} steps. {machine()}.")
    print(f"Freed memory: {memory}.\n")
    header = ("U-Net", "code", "precision", "images/s", "/ stock float32", "/ stock bf16", "GFLOP/s", "of the peak")
    table(header, rows(widths, args.batch_size, args.steps))


if __name__ == "__main__":
    main()
