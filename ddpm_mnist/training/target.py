"""What the network is trained to output, update by update. The equations are in ddpm_mnist/loss.py.

`Target` is what the loop calls. In the paper it is the noise. Three lines of the recommended recipe change it. Two
of them have a state: `References` and `Guide`.
"""

from copy import deepcopy

import torch
from torch import Tensor

from ..images.batches import Images
from ..loss import guided_target, posterior_mean, prediction_target
from ..randomness import seeded_generator
from ..scheduler import DDPMScheduler
from ..unet import UNet2DModel
from .batches import mirror
from .config import TrainConfig

REDRAW_REFERENCES_EVERY = 10  # updates: drawing the images costs more than using them once
MAX_REFERENCE_PIXELS = 2**24  # 64 MB


class Target:
    """The target of each update; `references` (for `reference_images`) and `guide` (for `guide_scale`) may be None."""

    def __init__(self, config: TrainConfig, train: Images, scheduler: DDPMScheduler, unet: UNet2DModel):
        self.scheduler, self.step, self.scale = scheduler, 0, config.guide_scale
        self.references = References(config, train) if config.reference_images else None
        self.guide = Guide(config, unet) if config.guide_scale > 1 else None

    def begin_update(self, step: int, weights: dict[str, Tensor]) -> None:
        """Prepare for update `step`, which begins with these averaged weights."""
        self.step = step
        if self.references is not None:
            self.references.draw(step)
        if self.guide is not None:
            self.guide.follow(step, weights)

    def __call__(
        self, noisy_images: Tensor, images: Tensor, noise: Tensor, timesteps: Tensor, labels: Tensor | None
    ) -> Tensor:
        """What the network should output for x_t, `[B, C, H, W]`: see `prediction_target`.

        With `reference_images`, its expectation given x_t; in the last part of a run, guided.
        """
        if self.references is not None:
            references, allowed = self.references.images, self.references.same_class(labels)
            images, noise = posterior_mean(self.scheduler, noisy_images, images, noise, timesteps, references, allowed)
        target = prediction_target(self.scheduler, images, noise, timesteps)
        if self.guide is None or self.step < self.guide.first_step:
            return target
        strong, weak = self.guide.outputs(noisy_images, timesteps, labels)
        return guided_target(target, strong, weak, self.scale)


class References:
    """The training images over which `posterior_mean` averages, drawn anew every few updates.

    `images`: `[N, C, H, W]` in [-1, 1]; `labels`: `[N]`, or None.
    """

    def __init__(self, config: TrainConfig, train: Images):
        self.config, self.train, self.images, self.labels = config, train, None, None
        self.count = min(config.reference_images, len(train), MAX_REFERENCE_PIXELS // train.images[0].numel())

    def draw(self, step: int) -> None:
        """Draw the images for update `step`; most updates keep those of the update before."""
        number, since = divmod(step, REDRAW_REFERENCES_EVERY)
        if self.images is not None and since:
            return
        generator = seeded_generator(self.config.seed, "references", number)
        indices = torch.randint(len(self.train), (self.count,), generator=generator)
        self.images, self.labels = next(self.train.batches([indices]))
        if self.config.random_flip:
            flipped = torch.rand(self.count, generator=generator) < 0.5
            self.images = mirror(self.images, flipped.to(self.images.device))

    def same_class(self, labels: Tensor | None) -> Tensor | None:
        """Which references may have led to an image with this label, `[B, N]`; all for a dropped one. None: all."""
        if labels is None:
            return None
        same, null = labels[:, None] == self.labels, self.config.null_class_label
        return same if null is None else same | (labels == null)[:, None]


class Guide:
    """Two copies of the U-Net, weak and strong; the difference of their outputs moves the target: `guided_target`.

    `weak` keeps the averaged weights of update `weak_step`, `strong` those of the present one; update `first_step` is
    the first guided one. `unet`: `Run.bare_unet`: Accelerate made it compute in mixed precision and return float32.
    """

    def __init__(self, config: TrainConfig, unet: UNet2DModel):
        self.weak, self.strong = (deepcopy(unet).eval().requires_grad_(False) for _ in range(2))
        self.weak_step = round(config.guide_weak * config.max_train_steps)
        self.first_step = round(config.guide_start * config.max_train_steps)

    def follow(self, step: int, weights: dict[str, Tensor]) -> None:
        """Take the averaged weights that update `step` begins with."""
        if step <= self.weak_step:
            self.weak.load_state_dict(weights)
        if step >= self.first_step:
            self.strong.load_state_dict(weights)

    @torch.no_grad()
    def outputs(self, noisy_images: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the strong and the weak network output for x_t: `[B, C, H, W]` each, float32."""
        return tuple(unet(noisy_images, timesteps, class_labels=labels).sample for unet in (self.strong, self.weak))
