"""Randomness as a function, not a state: every random number of a run follows from its seed and what it is for.

So a run can stop anywhere and go on, or be spread over more processes, and draw the same numbers.
"""

import numpy as np
import torch
from torch import Tensor

from .config import TrainConfig

# The place of a purpose in this row is part of every result: only append.
PURPOSES = ("epoch", "training noise", "held-out noise", "sample", "dropout", "label dropout", "bound", "subset")


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """63 bits (what `manual_seed` takes) that are a function of the arguments, unrelated to those of any others."""
    state = np.random.SeedSequence([seed, PURPOSES.index(purpose), *numbers]).generate_state(1, np.uint64)[0]
    return int(state >> 1)


def seeded_generator(seed: int, purpose: str, number: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream is a function of (seed, purpose, number)."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, purpose, number))


def seed_dropout(seed: int, number: int, share: int) -> None:
    """Make dropout, which draws from the global generators, a function of the global batch and the share of it.

    So a run with dropout is exact to resume; but its masks, unlike all else, depend on how a batch is shared out.
    """
    torch.manual_seed(derived_seed(seed, "dropout", number, share))


def draw_noise_and_timesteps(
    seed: int,
    number: int,
    shape: tuple[int, ...],
    num_train_timesteps: int,
    device: torch.device,
    timestep_sampling: str = "uniform",
) -> tuple[Tensor, Tensor]:
    """epsilon ~ N(0, I), `shape` = `[B, C, H, W]`, and t ~ Uniform{0 ... T-1}, `[B]`, of global batch `number`.

    `timestep_sampling` "stratified": one t from each of B equal parts of 0 ... T-1, all by one draw (Kingma et al.
    2021, https://arxiv.org/abs/2107.00630, appendix I.1). Each t is still uniform, but a batch's mean varies less.

    B is the global batch: every process draws all of it and takes its rows, so that the numbers do not depend on how
    many processes share it. (They do depend on the device: a GPU has another generator than a CPU.)
    """
    generator = seeded_generator(seed, "training noise", number, device)
    noise = torch.randn(shape, generator=generator, device=device)
    timesteps = torch.randint(0, num_train_timesteps, shape[:1], generator=generator, device=device)
    if timestep_sampling == "stratified":
        parts = torch.arange(shape[0], device=device) * num_train_timesteps // shape[0]
        timesteps = (timesteps[0] + parts) % num_train_timesteps
    return noise, timesteps


def drop_labels(labels: Tensor, config: TrainConfig, number: int, global_batch: int, rows: slice) -> Tensor | None:
    """The labels `[B]` of these rows of global batch `number`, some replaced by the one that stands for none.

    None for an unconditional U-Net. Which are dropped is drawn for the whole global batch, as the noise is.
    """
    if config.num_classes is None:
        return None
    if config.null_class_label is None:
        return labels
    generator = seeded_generator(config.seed, "label dropout", number, labels.device)
    dropped = torch.rand(global_batch, generator=generator, device=labels.device) < config.class_dropout_prob
    return torch.where(dropped[rows], config.null_class_label, labels)
