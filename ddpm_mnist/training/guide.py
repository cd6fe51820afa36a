"""The guide: two copies of the U-Net that say where the last part of a run leads. The equation: `guided_target`."""

from copy import deepcopy

import torch
from torch import Tensor

from ..unet import UNet2DModel


class Guide:
    """`weak` keeps the averaged weights of an early update, and `strong` those of the present one.

    Args:
        unet: the network in training.
        num_steps: the length of the run; `weak_share` and `start` are shares of it.

    Attributes:
        weak_step: the update whose average is the weak one; `first_step`: the first with a guided target.
    """

    def __init__(self, unet: UNet2DModel, num_steps: int, weak_share: float, start: float):
        self.weak, self.strong = (deepcopy(unet).eval().requires_grad_(False) for _ in range(2))
        self.weak_step, self.first_step = round(weak_share * num_steps), round(start * num_steps)

    def follow(self, step: int, weights: dict[str, Tensor]) -> None:
        """Take the averaged weights that update `step` begins with."""
        if step <= self.weak_step:
            self.weak.load_state_dict(weights)
        if step >= self.first_step:
            self.strong.load_state_dict(weights)

    @torch.no_grad()
    def outputs(self, noisy_images: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the strong and the weak network output for x_t: `[B, C, H, W]` each, float32."""
        strong, weak = (unet(noisy_images, timesteps, class_labels=labels).sample for unet in (self.strong, self.weak))
        return strong.float(), weak.float()
