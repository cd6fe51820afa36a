"""What the loss compares with the network's output, and how likely each timestep is in training.

The paper's loss is L_simple (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 14): the squared error of the noise.
The recommended recipe changes its target and the density of t, never its form: `F.mse_loss(model_output, target)`.
"""

import torch
from torch import Tensor

from .scheduler import DDPMScheduler

# The non-uniform timesteps: mean and standard deviation of log SNR_t = log(alpha-bar_t / (1 - alpha-bar_t)).
LOG_SNR_MEAN, LOG_SNR_STD = -1.75, 1.9


def prediction_target(scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network learns to output, by `prediction_type`; `[B, C, H, W]`.

    epsilon, the noise (eq. 14); x_0, the images ("sample"); or v = sqrt(alpha-bar_t) epsilon - sqrt(1 - alpha-bar_t)
    x_0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512). The squared error of v is that of epsilon over
    alpha-bar_t.
    """
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "sample":
        return images
    return scheduler.get_velocity(images, noise, timesteps)


def guided_target(target: Tensor, strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """The target plus (scale - 1) times the strong network's output minus the weak one's.

    A strong network makes the same errors as a weak one, but smaller, so extrapolating from weak to strong gives
    better images. Karras et al. 2024 (https://arxiv.org/abs/2406.02507) draw with weak + w (strong - weak). Here the
    difference moves the target, so that one network learns it (Tang et al. 2025, https://arxiv.org/abs/2502.12154). If
    that network is also the strong one, it converges to the result of drawing with w = 1 / (2 - scale). All tensors are
    `[B, C, H, W]`; 1 <= scale < 2, and 1 is no guide.
    """
    return target + (scale - 1) * (strong - weak)


def log_likelihood(x_t: Tensor, candidates: Tensor, alpha_prod: Tensor) -> Tensor:
    """log q(x_t | x_0), eq. 4, up to a term without x_0: `[B, CHW]`, N candidates for x_0 `[N, CHW]` -> `[B, N]`.

    `alpha_prod`: alpha-bar_t, one for all or `[B, 1]`.
    """
    scores = alpha_prod.sqrt() * (x_t @ candidates.T) - alpha_prod / 2 * candidates.square().sum(dim=1)
    return scores / (1 - alpha_prod).clamp(min=1e-12)


@torch.no_grad()
def posterior_mean(
    scheduler: DDPMScheduler,
    noisy_images: Tensor,
    images: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    references: Tensor,
    same_class: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and E[epsilon | x_t], if x_0 is equally likely to be the image itself or one of N references.

    Many images may have led to an x_t that is mostly noise. The best output is their mean, weighted by how probable
    each is. The network would need many draws of x_0 to learn it; here it is computed. If the references are drawn as
    x_0 is, the expected gradient for given weights stays the same, since x_0 is one of the candidates, and has less
    noise (stable target field, Xu et al. 2023, https://arxiv.org/abs/2302.00670).

    Args:
        noisy_images, images, noise: x_t, x_0 and epsilon, `[B, C, H, W]`, float32.
        timesteps: `[B]`, int64.
        references: `[N, C, H, W]`, float32, drawn independently with replacement from the training images.
        same_class: `[B, N]`, bool: the references that the image's label allows; None: all.

    Returns:
        Two tensors `[B, C, H, W]`, float32. Where the signal is stronger than the noise, images and noise are returned
        unchanged: there x_t nearly always shows which image it came from.
    """
    alpha_prod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps][:, None]
    x_t, x_0, candidates = noisy_images.flatten(1), images.flatten(1), references.flatten(1)
    scores = log_likelihood(x_t, candidates, alpha_prod)
    if same_class is not None:
        scores = scores.masked_fill(~same_class, -torch.inf)
    of_itself = log_likelihood(x_t, x_0, alpha_prod).diag()[:, None]
    weights = torch.cat([scores, of_itself], dim=1).softmax(dim=1)
    mean_image = weights[:, :-1] @ candidates + weights[:, -1:] * x_0
    mean_noise = (x_t - alpha_prod.sqrt() * mean_image) / (1 - alpha_prod).clamp(min=1e-12).sqrt()

    mostly_noise = (alpha_prod < 0.5)[:, :, None, None]
    mean_image, mean_noise = mean_image.view_as(images), mean_noise.view_as(images)
    return torch.where(mostly_noise, mean_image, images), torch.where(mostly_noise, mean_noise, noise)


def timestep_density(scheduler: DDPMScheduler, uniform_share: float) -> Tensor | None:
    """The probability of each timestep in training: `[T]`, float64, sums to 1; None if all are equally likely.

    A share of them is uniform, as in Algorithm 1. The others are drawn so that log SNR_t is normally distributed around
    the noise level at which the digit forms. For the paper's schedule, over a third of uniform t have a log
    SNR below -4, where x_t is nearly pure noise. Training on other distributions of the noise level: Karras et al.
    2022, https://arxiv.org/abs/2206.00364, section 5.
    """
    if uniform_share == 1 or len(scheduler.alphas_cumprod) == 1:
        return None
    log_snr = torch.logit(scheduler.alphas_cumprod.cpu().double().clamp(1e-12, 1 - 1e-12))
    normal = torch.exp(-0.5 * ((log_snr - LOG_SNR_MEAN) / LOG_SNR_STD) ** 2) * torch.gradient(log_snr)[0].abs()
    if normal.sum() == 0:  # all timesteps have the same log SNR
        return None
    uniform = torch.full_like(normal, 1 / len(normal))
    return uniform_share * uniform + (1 - uniform_share) * normal / normal.sum()
