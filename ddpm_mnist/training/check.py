"""`train_ddpm_mnist.py --check`: what the run would cost, and its problems, without training."""

import time

import torch
import torch.nn.functional as F

from .config import TrainConfig
from .run import Run, prepare


def check(config: TrainConfig) -> int:
    """Print the report; 0 if all is well, 2 if something in it would spoil the run.

    ConfigError: an error that would stop the run at its start.
    """
    with prepare(config) as run:
        accelerator, data, problems = run.accelerator, run.data, find_problems(run)
        seconds = min(time_batch(run) for _ in range(3))
        minutes = seconds * config.gradient_accumulation_steps * run.num_steps / 60
        accelerator.print(
            f"output: {config.output_dir}, {f'resuming from {run.checkpoint}' if run.checkpoint else 'a new run'}",
            f"data: {data.name}, {len(data.train):,} images, {len(data.test):,} held out",
            f"device: {accelerator.device}, mixed precision {accelerator.mixed_precision}, "
            f"{torch.get_num_threads()} threads per process",
            f"run: {run.parameters:,} parameters, {run.num_steps:,} steps of {run.global_batch} images, "
            f"{run.num_steps * run.global_batch / len(data.train):.1f} epochs",
            f"time: {config.train_batch_size / seconds:.0f} images/s per process, about {minutes:.1f} minutes without "
            "validation",
            *(f"PROBLEM {problem}" for problem in problems),
            sep="\n",
        )
        return 2 if problems else 0


def time_batch(run: Run) -> float:
    """Seconds of a micro-batch, forward and backward."""
    started = time.perf_counter()
    images, labels, timesteps, noise = next(run.batches())
    noisy_images = run.scheduler.add_noise(images, noise, timesteps)
    model_output = run.unet(noisy_images, timesteps, class_labels=labels).sample
    loss = F.mse_loss(model_output.float(), run.target(noisy_images, images, noise, timesteps, labels))
    run.accelerator.backward(loss)
    loss.item()  # wait for a GPU
    return time.perf_counter() - started


def find_problems(run: Run) -> list[str]:
    """What would spoil the run, a line each."""
    problems, alphas_cumprod, warmup = [], run.scheduler.alphas_cumprod, run.config.lr_warmup_steps
    if (1 - alphas_cumprod <= 0).any():
        problems.append("scheduler.beta_start: the first timesteps add no noise in float32; raise it")
    signal = float(alphas_cumprod[-1]) ** 0.5
    if signal > 0.1:
        problems.append(
            f"scheduler.beta_end, num_train_timesteps: x_T still holds {signal:.0%} of x_0, but sampling starts from "
            "pure noise; raise one of them, or set scheduler.rescale_betas_zero_snr"
        )
    if warmup >= run.num_steps:
        problems.append(f"--lr_warmup_steps {warmup}: the run has only {run.num_steps} steps; lower it")
    return problems
