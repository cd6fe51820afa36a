"""Held-out loss and sample grids in the course of a run."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..images.batches import Images, scale
from ..loading import Model
from ..loss import noise_weights, squared_error
from ..options import SampleOptions
from ..randomness import seeded_generator
from ..sampling import grid, moments_to_show, to_pil, trajectory_picture
from ..scheduler import DDPMScheduler
from .output_dir import GALLERY
from .setup import Run


def validate(run: Run) -> None:
    """Log the held-out loss of raw and averaged weights, and a grid of samples; every process does its share."""
    metrics, config = {}, run.config
    for name, weights in (("raw", None), ("ema", run.ema)) if run.ema is not None else (("raw", None),):
        with evaluating(run.bare_unet, weights):
            losses = held_out_loss(run.bare_unet, run.scheduler, run.data.test, run.accelerator, config.eval_batch_size)
            metrics |= {f"held_out_{name}/{key}": value for key, value in losses.items()}
            if weights is run.ema:  # the averaged weights where there are any
                samples = sample_grid_images(run)
    if run.accelerator.is_main_process:
        run.log.write(run.step, metrics)
        run.log.write_picture(run.step, grid(to_pil(samples), zoom=2))


@contextmanager
def evaluating(unet: torch.nn.Module, ema: EMAModel | None):
    """The U-Net in eval mode, with the averaged weights where `ema` is given; afterwards exactly as it was."""
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
    """L_simple (eq. 14) on held-out images, comparable from one step, and from one run, to the next: the error of the
    noise, whatever the network outputs, for uniform timesteps, whatever their density in training.

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
        conditional = unet.config.num_class_embeds is not None
        labels = held_out.labels[rows].to(accelerator.device) if conditional else None
        error = noise_weights(scheduler, t) * squared_error(unet, scheduler, scale(images), epsilon, t, labels)
        error = error.mean(dim=(1, 2, 3))
        quarter = F.one_hot(t * 4 // T, 4).to(error.dtype)
        sums += torch.stack([(error[:, None] * quarter).sum(0), quarter.sum(0)])
    errors, counts = accelerator.reduce(sums, "sum").cpu()
    losses = {f"loss_q{q + 1}": (errors[q] / counts[q]).item() for q in range(4) if counts[q] > 0}
    return {"loss": (errors.sum() / counts.sum()).item(), **losses}


def sample_grid_images(run: Run) -> Tensor:
    """Samples by Algorithm 2, the same every time but for the weights; each process draws its share of them.

    Returns:
        `[num_validation_images, C, H, W]` in [-1, 1], on every process. A conditional U-Net counts through its classes,
        with guidance where it was trained with dropped labels.
    """
    config, accelerator = run.config, run.accelerator
    share = -(-config.num_validation_images // accelerator.num_processes)  # equal for all; the surplus is cut off below
    numbers = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    drawn = model_of(run).draw_images(numbers, grid_options(run))
    return accelerator.gather(drawn.contiguous())[: config.num_validation_images]


def model_of(run: Run) -> Model:
    return Model(run.bare_unet, run.scheduler, run.config.null_class_label)


def grid_options(run: Run) -> SampleOptions:
    return SampleOptions(num_inference_steps=run.config.ddpm_num_inference_steps, batch_size=128, seed=run.config.seed)


def write_card_pictures(run: Run) -> None:
    """Pictures for the model card: single samples in `gallery/`, and in `trajectory.png` how the first came about."""
    steps, moments, images = run.config.ddpm_num_inference_steps, [], []
    with evaluating(run.bare_unet, run.ema):
        for number, (batch, step) in enumerate(model_of(run).draw(range(GALLERY), grid_options(run))):
            if batch == 0 and number in moments_to_show(steps):
                moments.append(step)
            if step.last:
                images += to_pil(step.prev_sample)
    trajectory_picture(moments).save(run.output_dir / "trajectory.png")
    (run.output_dir / "gallery").mkdir(exist_ok=True)
    for number, image in enumerate(images):
        grid([image], zoom=max(1, 256 // image.width)).save(run.output_dir / f"gallery/{number}.png")
