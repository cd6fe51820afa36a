"""Shared by the benchmarks: a model, its training step, interleaved timing, and Markdown tables."""

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F

import ddpm_mnist

ROOT = Path(__file__).parent.parent
STOCK, OURS = diffusers.UNet2DModel, ddpm_mnist.UNet2DModel
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """The hardware and the library versions, in one line."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    cpu = next((line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), platform.machine())
    bf16 = " with AVX512-BF16" if any("avx512_bf16" in line for line in cpuinfo()) else ""
    return f"{name}, {cpu}{bf16}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def cpuinfo() -> list[str]:
    """The lines of /proc/cpuinfo; empty on systems that lack it."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def build(cls: type, widths: tuple[int, ...], head_dim: int | None, size: int = 28, channels: int = 1):
    """The U-Net of configs/mnist.yaml with these widths. Both classes get the same initial weights."""
    torch.manual_seed(0)
    return cls(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
        attention_head_dim=head_dim,
        norm_num_groups=8,
    ).to(DEVICE)


class Trainer:
    """A model, its optimizer and one fixed batch. `step` is a training step without data loading or logging."""

    def __init__(self, unet: torch.nn.Module, batch_size: int, dtype: torch.dtype, fused: bool):
        self.unet, bf16 = unet, dtype == torch.bfloat16
        # Only the network runs in bf16, as with Accelerate; noise is added in float32.
        self.predict = torch.autocast(DEVICE.type, torch.bfloat16)(unet.forward) if bf16 else unet
        self.scheduler = ddpm_mnist.DDPMScheduler()
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=fused)
        shape = (batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.images, self.noise = torch.rand(shape, device=DEVICE) * 2 - 1, torch.randn(shape, device=DEVICE)
        self.timesteps = torch.randint(0, 1000, (batch_size,), device=DEVICE)

    def step(self) -> None:
        noisy_images = self.scheduler.add_noise(self.images, self.noise, self.timesteps)
        F.mse_loss(self.predict(noisy_images, self.timesteps).sample.float(), self.noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def take_turns(functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2) -> dict[str, float]:
    """The median seconds of each function. They are called in turns, so that other load on the machine affects all."""
    seconds = {name: [] for name in functions}
    for i in range(warm_up + repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table, each row as soon as it is known."""
    header = list(header)
    print(f"| {' | '.join(header)} |\n| {' | '.join('---' for _ in header)} |")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print()
