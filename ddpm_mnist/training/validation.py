"""Held-out loss and sample grids during a run."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..images.batches import Images, scale
from ..loss import prediction_target
from ..options import SampleOptions
from ..randomness import seeded_generator
from ..sampling import grid, to_pil
from ..scheduler import DDPMScheduler
from .run import Run


def validate(run: Run) -> None:
    """Log the held-out loss of raw and averaged weights, and a grid of samples; every process does its share."""
    metrics = {}
    for name, weights in {"raw": None, "ema": run.ema}.items() if run.ema is not None else [("raw", None)]:
        with eval_mode(run.bare_unet, weights):
            losses = held_out_loss(
                run.bare_unet, run.scheduler, run.data.test, run.accelerator, sample_options(run).batch_size
            )
            metrics |= {f"held_out_{name}/{key}": value for key, value in losses.items()}
    with eval_mode(run.bare_unet, run.ema):  # the averaged weights if there are any
        samples = draw_grid(run)
    run.log.write(run.step, metrics)
    run.log.write_picture(run.step, grid(to_pil(samples), zoom=2))


@contextmanager
def eval_mode(unet: torch.nn.Module, ema: EMAModel | None):
    """The U-Net in eval mode, with the averaged weights if `ema` is given; afterwards exactly as it was."""
    unet.eval()
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(unet.parameters())
        unet.train()


@torch.no_grad()
def held_out_loss(
    unet: torch.nn.Module, scheduler: DDPMScheduler, held_out: Images, accelerator: Accelerator, batch_size: int = 128
) -> dict[str, float]:
    """L_simple (eq. 14) on held-out images: the squared error of the noise at uniform timesteps, whatever a run trains
    on, so that steps and runs of one recipe can be compared.

    The noise is fixed and the timesteps are stratified: image i of N gets the middle of the i-th of N equal parts of
    0 ... T-1, in a fixed random order. Processes share the images.

    The result has "loss", the mean, and "loss_q1" (the quarter of the timesteps with the least noise) to "loss_q4".
    """
    T, total = scheduler.config.num_train_timesteps, len(held_out)
    generator = seeded_generator(0, "held-out noise")
    noise = torch.randn(held_out.images.shape, generator=generator)
    timesteps = ((torch.arange(total) + 0.5) / total * T).long()[torch.randperm(total, generator=generator)]

    sums = torch.zeros(2, 4, device=accelerator.device)  # of squared errors, and of images, by quarter
    mine = torch.arange(total)[accelerator.process_index :: accelerator.num_processes]
    for rows in mine.split(batch_size):
        pixels, epsilon, t = (x[rows].to(accelerator.device) for x in (held_out.images, noise, timesteps))
        conditional = unet.config.num_class_embeds is not None
        labels = held_out.labels[rows].to(accelerator.device) if conditional else None
        images = scale(pixels)
        model_output = unet(scheduler.add_noise(images, epsilon, t), t, class_labels=labels).sample
        target = prediction_target(scheduler, images, epsilon, t)
        error = F.mse_loss(model_output.float(), target, reduction="none") * noise_error_weights(scheduler, t)
        error = error.mean(dim=(1, 2, 3))
        quarter = F.one_hot(t * 4 // T, 4).to(error.dtype)
        sums += torch.stack([(error[:, None] * quarter).sum(0), quarter.sum(0)])
    errors, counts = accelerator.reduce(sums, "sum").cpu()
    losses = {f"loss_q{q + 1}": (errors[q] / counts[q]).item() for q in range(4) if counts[q] > 0}
    return {"loss": (errors.sum() / counts.sum()).item(), **losses}


def noise_error_weights(scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor | int:
    """The factor from the squared error of the output to that of the noise it implies: `[B, 1, 1, 1]`, or 1.

    For a given x_t, an error e of x_0 is one of -e sqrt(SNR) of epsilon, and an error e of v is one of
    e sqrt(alpha-bar_t), since epsilon = sqrt(alpha-bar_t) v + sqrt(1 - alpha-bar_t) x_t.
    """
    if scheduler.config.prediction_type == "epsilon":
        return 1
    alpha_prod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None]
    return alpha_prod if scheduler.config.prediction_type == "v_prediction" else alpha_prod / (1 - alpha_prod)


def sample_options(run: Run) -> SampleOptions:
    """How the run draws its own samples: Algorithm 2, with the default guidance."""
    config, steps = run.config, run.config.ddpm_num_inference_steps
    size = min(128, max(8, 2 * config.train_batch_size))  # without gradients there is room for more; the gallery has 8
    return SampleOptions(num_inference_steps=steps, batch_size=size, seed=config.seed)


def draw_grid(run: Run) -> Tensor:
    """Samples by Algorithm 2, `[num_validation_images, C, H, W]` in [-1, 1], from the same noise every time.

    Each process draws its share of them, and gets all. A conditional U-Net counts through its classes.
    """
    accelerator, count = run.accelerator, run.config.num_validation_images
    share = -(-count // accelerator.num_processes)  # equal for all; the surplus is cut off below
    numbers = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    drawn = run.model.draw_images(numbers, sample_options(run))
    return accelerator.gather(drawn.contiguous())[:count]
