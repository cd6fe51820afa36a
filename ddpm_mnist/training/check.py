"""`train_ddpm_mnist.py --check`: what the run would cost, and its problems, without training."""

import time

import torch
import torch.nn.functional as F

from .config import TrainConfig
from .run import Run, prepare


def check(config: TrainConfig) -> int:
    """Print the report; 0 if all is well, 2 if something in it would spoil the run.

    Raises:
        ConfigError: an error that would stop the run at its start.
    """
    with prepare(config) as run:
        accelerator, data = run.accelerator, run.data
        size, widths = config.unet["sample_size"], run.bare_unet.config.block_out_channels
        levels = " -> ".join(f"{size // 2**i}x{size // 2**i}x{width}" for i, width in enumerate(widths))
        epochs = run.num_steps * run.global_batch / len(data.train)
        problems = find_problems(run)
        accelerator.print(
            f"output: {config.output_dir}, {f'resuming from {run.checkpoint}' if run.checkpoint else 'a new run'}",
            f"data: {data.name}, {len(data.train):,} images, {len(data.test):,} held out",
            f"device: {accelerator.device}, mixed precision {accelerator.mixed_precision}, "
            f"{torch.get_num_threads()} threads per process",
            f"U-Net: {run.parameters:,} parameters, {levels}",
            f"run: {run.num_steps:,} steps of {run.global_batch} images ({epochs:.1f} epochs)",
            *measure_cost(run),
            *(f"PROBLEM {problem}" for problem in problems),
            sep="\n",
        )
        return 2 if problems else 0


def find_problems(run: Run) -> list[str]:
    """What would spoil the run, a line each."""
    problems, alphas_cumprod = [], run.scheduler.alphas_cumprod
    if (1 - alphas_cumprod <= 0).any():
        problems.append("scheduler.beta_start: the first timesteps add no noise in float32; raise it")
    signal = float(alphas_cumprod[-1]) ** 0.5
    if signal > 0.1:
        problems.append(
            f"scheduler.beta_end, num_train_timesteps: x_T still holds {signal:.0%} of x_0, but sampling starts from "
            "pure noise; raise one of them, or set scheduler.rescale_betas_zero_snr"
        )
    if run.config.lr_warmup_steps >= run.num_steps:
        problems.append(
            f"--lr_warmup_steps {run.config.lr_warmup_steps}: the run has only {run.num_steps} steps; lower it"
        )
    return problems


def measure_cost(run: Run) -> list[str]:
    """Time and memory, from real training steps without updates, and one forward pass."""
    config, accelerator, unet = run.config, run.accelerator, run.unet
    seconds, activations = [], []  # activations: bytes that autograd keeps for the backward pass

    def count(tensor: torch.Tensor) -> torch.Tensor:
        activations.append(tensor.numel() * tensor.element_size())
        return tensor

    for _ in range(3):
        activations.clear()
        images, labels, timesteps, noise = next(run.batches())
        started = time.perf_counter()
        noisy_images = run.scheduler.add_noise(images, noise, timesteps)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model_output = unet(noisy_images, timesteps, class_labels=labels).sample
            loss = F.mse_loss(model_output.float(), run.target(noisy_images, images, noise, timesteps, labels))
        accelerator.backward(loss)
        loss.item()  # wait for a GPU
        seconds.append(time.perf_counter() - started)
    with torch.no_grad():
        started = time.perf_counter()
        unet(noisy_images, timesteps, class_labels=labels).sample.sum().item()
        forward = (time.perf_counter() - started) / len(images)

    weights = sum(p.numel() * p.element_size() for p in run.bare_unet.parameters())
    moments = 1 if config.optimizer == "muon" else 2  # Muon has momentum only, except for AdamW's few weights
    copies = 2 + moments + config.use_ema  # of the weights; one is the gradients
    minutes = min(seconds) * config.gradient_accumulation_steps * run.num_steps / 60
    return [
        f"memory: {copies * weights / 1e6:.1f} MB of weights, gradients, {config.optimizer}'s moments"
        f"{' and average' if config.use_ema else ''} + {sum(activations) / 1e6:.0f} MB of activations in a batch",
        f"time: {len(images) / min(seconds):.0f} images/s per process, about {minutes:.1f} minutes without validation",
        f"sampling: {forward * len(run.scheduler):.1f} s an image in {len(run.scheduler)} steps, {forward * 50:.2f} s "
        f"in 50, in batches of {len(images)}",
    ]
