"""What a run measures of itself as it goes: the loss on held-out images, and a picture of samples."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor

from .data import Images, scale
from .draws import seeded_generator
from .sampling import sample_images
from .scheduler import DDPMScheduler


def prediction_target(scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network is to predict, by `prediction_type`: epsilon (eq. 14), x_0 or v; `[B, C, H, W]`."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "sample":
        return images
    return scheduler.get_velocity(images, noise, timesteps)


def loss_weights(scheduler: DDPMScheduler, timesteps: Tensor, snr_gamma: float | None) -> Tensor | int:
    """What each image's squared error counts, by its timestep; `[B, 1, 1, 1]`, or 1 without `snr_gamma`.

    Min-SNR (Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4): min(SNR, gamma) as a weight of the error
    of x_0, and so min(SNR, gamma) / SNR as one of epsilon's, where SNR = alpha-bar_t / (1 - alpha-bar_t).
    """
    if snr_gamma is None:
        return 1
    snr = compute_snr(scheduler, timesteps)
    of_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[scheduler.config.prediction_type]
    return (snr.clamp(max=snr_gamma) / of_x0)[:, None, None, None]


@contextmanager
def evaluating(unet: torch.nn.Module, ema: EMAModel | None):
    """The U-Net in eval mode, with the averaged weights where `ema` is given; afterwards as it was, to the bit."""
    unet.eval()
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    try:
        yield unet
    finally:
        if ema is not None:
            ema.restore(unet.parameters())
        unet.train()


@torch.no_grad()
def held_out_loss(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    held_out: Images,
    accelerator: Accelerator,
    batch_size: int,
    seed: int = 0,
) -> dict[str, float]:
    """L_simple (eq. 14) on images that were not trained on, comparable from one step, and from one run, to the next.

    The noise is fixed and the timesteps are stratified: image i of N gets the middle of the i-th of N equal parts of
    0 ... T-1, in a fixed random order. Processes share the images.

    Returns:
        "loss", the mean, and "loss_q1" (the quarter of the timesteps with the least noise) to "loss_q4".
    """
    T, total = scheduler.config.num_train_timesteps, len(held_out)
    generator = seeded_generator(seed, "held-out noise")
    noise = torch.randn(held_out.images.shape, generator=generator)
    timesteps = ((torch.arange(total) + 0.5) / total * T).long()[torch.randperm(total, generator=generator)]

    sums = torch.zeros(2, 4, device=accelerator.device)  # of squared errors, and of images, by quarter
    mine = torch.arange(accelerator.process_index, total, accelerator.num_processes)
    for rows in mine.split(batch_size):
        images, epsilon, t = (x[rows].to(accelerator.device) for x in (held_out.images, noise, timesteps))
        images = scale(images)
        labels = class_labels(unet, held_out, rows, accelerator.device)
        prediction = unet(scheduler.add_noise(images, epsilon, t), t, class_labels=labels).sample.float()
        target = prediction_target(scheduler, images, epsilon, t)
        error = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
        quarter = F.one_hot(t * 4 // T, 4).to(error.dtype)
        sums += torch.stack([(error[:, None] * quarter).sum(0), quarter.sum(0)])
    errors, counts = accelerator.reduce(sums, "sum").cpu()
    losses = {f"loss_q{q + 1}": (errors[q] / counts[q]).item() for q in range(4) if counts[q] > 0}
    return {"loss": (errors.sum() / counts.sum()).item(), **losses}


def class_labels(unet, held_out: Images, rows: Tensor, device: torch.device) -> Tensor | None:
    """The labels of those rows for a conditional U-Net, None for any other."""
    return held_out.labels[rows].to(device) if unet.config.num_class_embeds is not None else None


def sample_grid_images(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    accelerator: Accelerator,
    num_images: int,
    batch_size: int,
    num_inference_steps: int,
    seed: int,
    null_class_label: int | None,
) -> Tensor:
    """`num_images` samples by DDIM, the same every time but for the weights; each process draws its share of them.

    Returns:
        `[num_images, C, H, W]` in [-1, 1], on every process. A conditional U-Net counts through its classes, with
        guidance where `null_class_label` makes it possible.
    """
    sampler = DDIMScheduler.from_config(scheduler.config)
    share = -(-num_images // accelerator.num_processes)  # equal for all, as gather wants; what is over is cut off below
    numbers = torch.arange(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    classes = unet.config.num_class_embeds
    classes = classes if null_class_label is None else classes - 1
    drawn = []
    for batch in numbers.split(batch_size):
        labels = None if classes is None else (batch % classes).to(accelerator.device)
        drawn.append(
            sample_images(unet, sampler, seed, batch.tolist(), num_inference_steps, labels, 2.0, null_class_label)
        )
    return accelerator.gather(torch.cat(drawn).contiguous())[:num_images]
