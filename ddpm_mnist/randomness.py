"""Random numbers are functions of (seed, purpose, number), not of a generator's state.

So a run draws the same numbers after it was resumed, and with any number of processes.
"""

import numpy as np
import torch
from torch import Tensor

# The position of a purpose in this tuple is part of every result: only append.
PURPOSES = (
    "epoch",
    "training noise",
    "held-out noise",
    "sample",
    "dropout",
    "label dropout",
    "bound",
    "subset",
    "flip",
    "references",
)


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """63 bits (what `manual_seed` takes) that depend on all arguments."""
    state = np.random.SeedSequence([seed, PURPOSES.index(purpose), *numbers]).generate_state(1, np.uint64)[0]
    return int(state >> 1)


def seeded_generator(seed: int, purpose: str, number: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream is a function of (seed, purpose, number)."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, purpose, number))


def seed_dropout(seed: int, number: int, share: int) -> None:
    """Seed dropout, which draws from the global generators, for one share of global batch `number`.

    So a run with dropout resumes exactly. Its masks, unlike all other numbers, depend on how the global batch is split.
    """
    torch.manual_seed(derived_seed(seed, "dropout", number, share))


def draw_noise_and_timesteps(
    seed: int,
    number: int,
    shape: tuple[int, ...],
    num_train_timesteps: int,
    device: torch.device,
    cumulative: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """epsilon ~ N(0, I), `shape` = `[B, C, H, W]`, and t in 0 ... T-1, `[B]`, of global batch `number`.

    B is the global batch: every process draws all of it and takes its rows, so that the numbers do not depend on the
    number of processes. (They do depend on the device: a GPU has another generator than a CPU.) `cumulative`: for each
    t the probability of at most t, `[T]`, on the device; None: t ~ Uniform{0 ... T-1}.
    """
    generator = seeded_generator(seed, "training noise", number, device)
    noise = torch.randn(shape, generator=generator, device=device)
    if cumulative is not None:
        quantiles = torch.rand(shape[:1], generator=generator, device=device)
        return noise, torch.searchsorted(cumulative, quantiles, right=True).clamp(max=num_train_timesteps - 1)
    return noise, torch.randint(0, num_train_timesteps, shape[:1], generator=generator, device=device)


def draw_mask(
    seed: int, purpose: str, number: int, probability: float, global_batch: int, rows: slice, device: torch.device
) -> Tensor:
    """`[B]`, bool: true with this probability, for these rows of global batch `number`.

    It is drawn for the whole global batch, as the noise is.
    """
    generator = seeded_generator(seed, purpose, number, device)
    return (torch.rand(global_batch, generator=generator, device=device) < probability)[rows]
