"""`train_ddpm_mnist.py --check`: what the run will do and cost, and its problems, without training."""

import time

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from ..images.batches import Images
from ..scheduler import DDPMScheduler
from .config import TrainConfig
from .setup import Run, prepare


def noise_report(scheduler: DDPMScheduler) -> tuple[list[str], list[str]]:
    """How much noise the first and the last timesteps add: lines of the report, and problems."""
    alphas_cumprod = scheduler.alphas_cumprod
    lines, problems = [], []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = alphas_cumprod.to(dtype)
        silent = int(((1 - rounded) <= 0).sum())
        lines.append(
            f"noise in {str(dtype).removeprefix('torch.')}: {silent} of {len(scheduler)} timesteps would add none"
        )
    if (1 - alphas_cumprod <= 0).any():
        problems.append("scheduler.beta_start: the first timesteps add no noise in float32; raise it")
    signal = float(alphas_cumprod[-1])
    lines.append(f"terminal SNR: {signal / (1 - signal):.2e} (sqrt(alphas_cumprod) = {signal**0.5:.4f} of x_0 is left)")
    if signal**0.5 > 0.1:
        problems.append(
            f"scheduler.beta_end, num_train_timesteps: x_T still holds {signal**0.5:.0%} of x_0, but sampling starts "
            "from pure noise; raise one of them, or set scheduler.rescale_betas_zero_snr"
        )
    return lines, problems


def schedule_report(config: TrainConfig, steps: int) -> tuple[list[str], list[str]]:
    """The learning rate and the averaged weights over the run: lines of the report, and problems."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.learning_rate)
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps
    )
    rate = lr_scheduler.lr_lambdas[0]
    curve = ", ".join(f"{q}% {config.learning_rate * rate(steps * q // 100):.1e}" for q in (0, 5, 25, 50, 75, 100))
    lines, problems = [f"learning rate over the run: {curve}"], []
    if config.lr_warmup_steps >= steps:
        problems.append(f"--lr_warmup_steps {config.lr_warmup_steps}: the run has only {steps} steps; lower it")

    if config.use_ema:
        ema = EMAModel([parameter], decay=config.ema_max_decay)
        share, left = 0.0, 1.0  # of the average's weight: from the last tenth of the run; from before it
        for step in range(steps, steps - max(1, steps // 10), -1):
            decay = ema.get_decay(step)
            share, left = share + left * (1 - decay), left * decay
        lines.append(
            f"averaged weights: {share:.0%} of them from the run's last tenth, final decay {ema.get_decay(steps):.5f}"
        )
    return lines, problems


def cost_report(run: Run) -> list[str]:
    """Time and memory, from one real training step and one forward pass."""
    config, accelerator, unet, steps = run.config, run.accelerator, run.unet, run.num_steps
    size = config.unet["sample_size"]
    images = torch.randn(config.train_batch_size, config.unet["in_channels"], size, size, device=accelerator.device)
    T = len(run.scheduler)
    timesteps = torch.arange(len(images), device=accelerator.device) * T // len(images)
    run.draw_references()
    classes = config.unet.get("num_class_embeds")
    labels = None if classes is None else torch.zeros_like(timesteps)
    saved = 0  # bytes that autograd keeps for the backward pass

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    seconds = []
    for attempt in range(3):
        started = time.perf_counter()
        run.means(images, torch.randn_like(images), timesteps, labels)
        with torch.autograd.graph.saved_tensors_hooks(pack if attempt == 0 else lambda t: t, lambda t: t):
            loss = F.mse_loss(unet(images, timesteps, class_labels=labels).sample.float(), images)
        accelerator.backward(loss)
        loss.item()  # wait for a GPU
        seconds.append(time.perf_counter() - started)
    with torch.no_grad():
        forward = time.perf_counter()
        unet(images, timesteps, class_labels=labels).sample.sum().item()
        forward = (time.perf_counter() - forward) / len(images)

    bare = accelerator.unwrap_model(unet, keep_torch_compile=False)
    weights = sum(p.numel() * p.element_size() for p in bare.parameters())
    moments = 1 if config.optimizer == "muon" else 2  # Muon has momentum only, but for the few weights left to AdamW
    copies = 2 + moments + config.use_ema  # of the weights; one is the gradients
    average = " and average" if config.use_ema else ""
    minutes = min(seconds) * config.gradient_accumulation_steps * steps / 60
    return [
        f"memory: {copies * weights / 1e6:.1f} MB of weights, gradients, {config.optimizer}'s moments{average}"
        f" + {saved / 1e6:.0f} MB of activations in a batch",
        f"time: {len(images) / min(seconds):.0f} images/s per process, about {minutes:.1f} minutes without validation",
        f"sampling: {forward * T:.1f} s an image in {T} steps, {forward * 50:.2f} s in 50, in batches of {len(images)}",
    ]


def check(config: TrainConfig) -> int:
    """Print the report; 0 when all is well, 2 when something in it will spoil the run.

    Raises:
        ConfigError: what would stop the run at its start.
    """
    with prepare(config) as run:
        accelerator, data, unet = run.accelerator, run.data, run.bare_unet
        held = f"{data.train.images.nbytes / 1e6:.0f} MB resident" if isinstance(data.train, Images) else "streamed"
        size, halvings = config.unet["sample_size"], len(unet.config.block_out_channels) - 1
        levels = " -> ".join(f"{size // 2**i}x{size // 2**i}x{c}" for i, c in enumerate(unet.config.block_out_channels))
        noise_lines, noise_problems = noise_report(run.scheduler)
        schedule_lines, schedule_problems = schedule_report(config, run.num_steps)
        threads, epochs = torch.get_num_threads(), run.num_steps * run.global_batch / len(data.train)
        report = [
            f"output: {config.output_dir}, {f'resuming from {run.checkpoint}' if run.checkpoint else 'a new run'}",
            f"data: {data.name}, {len(data.train):,} images ({held}), {len(data.test):,} held out",
            f"device: {accelerator.device}, mixed precision {accelerator.mixed_precision}, {threads} threads a process",
            f"U-Net: {run.parameters:,} parameters, {levels}",
            f"divisibility: {size} halves {halvings} times, {unet.config.norm_num_groups} groups divide every width",
            f"run: {run.num_steps:,} steps of {run.global_batch} images ({epochs:.1f} epochs)",
            *noise_lines,
            *schedule_lines,
            *cost_report(run),
        ]
        problems = noise_problems + schedule_problems
        accelerator.print(*report, *(f"PROBLEM {problem}" for problem in problems), sep="\n")
        return 2 if problems else 0
