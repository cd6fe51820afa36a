"""The training objective of DDPM: L_simple (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 14)."""

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from torch import Tensor

from .scheduler import DDPMScheduler


def squared_error(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    images: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    class_labels: Tensor | None = None,
) -> Tensor:
    """The squared error of the network's prediction for every pixel; its mean is L_simple, eq. 14.

    Images stay in float32 whatever the precision of the network: in half precision 1 - beta rounds to 1 at the first
    timesteps, and no noise would be added.

    Args:
        images: x_0, `[B, C, H, W]`, float32 in [-1, 1].
        noise: epsilon ~ N(0, I), shaped like `images`.
        timesteps: `[B]`, int64, 0 <= t < T.
        class_labels: `[B]`, int64, for a conditional U-Net.

    Returns:
        `[B, C, H, W]`, float32.
    """
    noisy_images = scheduler.add_noise(images, noise, timesteps)  # x_t ~ q(x_t | x_0), eq. 4
    model_output = unet(noisy_images, timesteps, class_labels=class_labels).sample  # epsilon_theta(x_t, t)
    target = prediction_target(scheduler, images, noise, timesteps)  # epsilon
    return F.mse_loss(model_output.float(), target, reduction="none")  # |epsilon - epsilon_theta(x_t, t)|^2


def prediction_target(scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network learns to predict, by `prediction_type`: epsilon (eq. 14), x_0 or v; `[B, C, H, W]`."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "sample":
        return images
    return scheduler.get_velocity(images, noise, timesteps)


def loss_weights(scheduler: DDPMScheduler, timesteps: Tensor, snr_gamma: float | None) -> Tensor | int:
    """The weight of each image's squared error; `[B, 1, 1, 1]`, or 1 (L_simple) without `snr_gamma`.

    Min-SNR (Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4): min(SNR, gamma) as a weight of the error
    of x_0, and so min(SNR, gamma) / SNR as one of epsilon's, where SNR = alpha-bar_t / (1 - alpha-bar_t).
    """
    if snr_gamma is None:
        return 1
    snr = compute_snr(scheduler, timesteps)
    of_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[scheduler.config.prediction_type]
    return (snr.clamp(max=snr_gamma) / of_x0)[:, None, None, None]
