"""Algorithm 1, lines 2 to 4: the draws of each update, as functions of the seed and the number of the update."""

import itertools
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from ..images.batches import Images, index_batches
from ..loss import timestep_density
from ..randomness import draw_mask, draw_noise_and_timesteps, seed_dropout
from ..scheduler import DDPMScheduler
from .config import TrainConfig


def micro_batches(
    config: TrainConfig, train: Images, scheduler: DDPMScheduler, accelerator: Accelerator, first: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """Endless: this process's micro-batches of global batch number `first`, then of `first + 1`, and so on.

    Each is images `[B, C, H, W]` in [-1, 1], labels `[B]` (None: no classes), timesteps `[B]`, and noise as the images.
    """
    seed, size, micro_steps = config.seed, config.train_batch_size, config.gradient_accumulation_steps
    rank, processes = accelerator.process_index, accelerator.num_processes
    global_batch = size * micro_steps * processes
    noise_shape, num_timesteps = (global_batch, *train.images.shape[1:]), len(scheduler)
    cumulative = timestep_density(scheduler, config.uniform_timesteps)
    if cumulative is not None:  # summed in float64, which MPS lacks; moved once, since a GPU waits for each move
        cumulative = cumulative.cumsum(0).to(accelerator.device, torch.float32)
    images_and_labels = train.batches(index_batches(len(train), seed, first, size, micro_steps, rank, processes))

    for step in itertools.count(first):
        all_noise, all_timesteps = draw_noise_and_timesteps(
            seed, step, noise_shape, num_timesteps, accelerator.device, cumulative
        )
        for micro_step in range(micro_steps):
            share = processes * micro_step + rank
            rows = slice(share * size, (share + 1) * size)
            seed_dropout(seed, step, share)
            images, labels = next(images_and_labels)
            if config.class_dropout_prob:
                probability = config.class_dropout_prob
                dropped = draw_mask(seed, "label dropout", step, probability, global_batch, rows, labels.device)
                labels = torch.where(dropped, config.null_class_label, labels)
            if config.random_flip:
                flipped = draw_mask(seed, "flip", step, 0.5, global_batch, rows, images.device)
                images = mirror(images, flipped)
            yield images, labels, all_timesteps[rows], all_noise[rows]


def mirror(images: Tensor, flipped: Tensor) -> Tensor:
    """The images `[B, C, H, W]`, mirrored where `flipped`, `[B]`, is true."""
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)
