"""The training objective of DDPM, L_simple (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 14): its target, its
weights, and the density of t."""

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
    """The squared error of the network's output for every pixel; for epsilon, its mean is L_simple, eq. 14.

    Images stay in float32 whatever the precision of the network: in half precision 1 - beta rounds to 1 at the first
    timesteps, and no noise would be added.

    Args:
        images: x_0, `[B, C, H, W]`, float32 in [-1, 1]; or its mean given x_t, see `posterior_means`.
        noise: epsilon ~ N(0, I), shaped like `images`; or its mean given x_t.
        timesteps: `[B]`, int64, 0 <= t < T.
        class_labels: `[B]`, int64, for a conditional U-Net.

    Returns:
        `[B, C, H, W]`, float32.
    """
    noisy_images = scheduler.add_noise(images, noise, timesteps)  # x_t ~ q(x_t | x_0), eq. 4
    model_output = unet(noisy_images, timesteps, class_labels=class_labels).sample  # epsilon_theta(x_t, t), or v
    target = prediction_target(scheduler, images, noise, timesteps)  # epsilon, or v
    return F.mse_loss(model_output.float(), target, reduction="none")


def selecting_waits(tensor: Tensor) -> bool:
    """Whether selecting rows by a mask is a host-device sync: not on a CPU."""
    return tensor.device.type != "cpu"


@torch.no_grad()
def posterior_means(
    scheduler: DDPMScheduler,
    images: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    references: Tensor,
    same_class: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and E[epsilon | x_t], where x_0 is equally likely to be the image itself or one of N references.

    Many images may have led to an x_t that is mostly noise. The network should output their mean, weighted by how
    probable each is, and would need many draws of x_0 to find it; here it is computed. x_t stays what it is. If the
    references are drawn as x_0 is, so does the expected gradient for given weights, by the law of total expectation;
    its noise is less (stable target field, Xu et al. 2023, https://arxiv.org/abs/2302.00670).

    Args:
        images: x_0, `[B, C, H, W]`, float32.
        noise: epsilon, shaped like `images`.
        timesteps: `[B]`, int64.
        references: `[N, C, H, W]`, float32, drawn independently with replacement from the training images.
        same_class: `[B, N]`, bool: the references that the image's label allows; None: all.

    Returns:
        Two of `[B, C, H, W]`, float32. Where the signal is stronger than the noise, images and noise as they are: there
        x_t tells nearly always which image it came from.
    """
    alpha_prod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    mostly_noise = alpha_prod < 0.5
    rows = slice(None) if selecting_waits(images) else mostly_noise
    alpha, x_0, epsilon, others = (
        alpha_prod[rows, None],
        images[rows].flatten(1),
        noise[rows].flatten(1),
        references.flatten(1),
    )
    x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * epsilon  # eq. 4

    # log q(x_t | x_0) = (sqrt(alpha-bar) x_t . x_0 - alpha-bar |x_0|^2 / 2) / (1 - alpha-bar) + terms without x_0
    scores = alpha.sqrt() * (x_t @ others.T) - alpha / 2 * torch.linalg.vector_norm(others, dim=1).square()
    own_product = (x_t @ x_0.T).diagonal()[:, None]  # a matrix product, as above: equally exact where TF32 is used
    own_score = alpha.sqrt() * own_product - alpha / 2 * torch.linalg.vector_norm(x_0, dim=1, keepdim=True).square()
    if same_class is not None:
        scores = scores.masked_fill(~same_class[rows], -torch.inf)
    weights = (torch.cat([scores, own_score], dim=1) / (1 - alpha).clamp(min=1e-12)).softmax(dim=1)
    mean_x_0 = weights[:, :-1] @ others + weights[:, -1:] * x_0
    mean_epsilon = (x_t - alpha.sqrt() * mean_x_0) / (1 - alpha).clamp(min=1e-12).sqrt()

    means = []
    for drawn, mean in ((images, mean_x_0), (noise, mean_epsilon)):
        all_rows = drawn.clone()
        all_rows[rows] = mean.unflatten(1, drawn.shape[1:])
        means.append(torch.where(mostly_noise[:, None, None, None], all_rows, drawn))
    return means[0], means[1]


def prediction_target(scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network learns to predict, by `prediction_type`: epsilon (eq. 14), x_0 or v; `[B, C, H, W]`."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "sample":
        return images
    return scheduler.get_velocity(images, noise, timesteps)


def noise_weights(scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor | int:
    """What turns the squared error of the network's output into that of the noise which follows from it.

    For epsilon itself: 1. With x_t fixed, an error e of x_0 is one of -e sqrt(SNR) of epsilon, and since
    epsilon = sqrt(alpha-bar_t) v + sqrt(1 - alpha-bar_t) x_t, an error e of v is one of e sqrt(alpha-bar_t).

    Returns:
        `[B, 1, 1, 1]`, float32, or 1.
    """
    if scheduler.config.prediction_type == "epsilon":
        return 1
    alpha_prod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None]
    return alpha_prod if scheduler.config.prediction_type == "v_prediction" else alpha_prod / (1 - alpha_prod)


def loss_weights(
    scheduler: DDPMScheduler, timesteps: Tensor, weighting: str = "output", snr_gamma: float | None = None
) -> Tensor | int:
    """The weight of each image's squared error; `[B, 1, 1, 1]`, or 1.

    Args:
        weighting: "noise": the loss is L_simple, the squared error of the noise, whatever the network outputs; see
            `noise_weights`. "output": the squared error of what the network outputs; for v, L_simple with the weight
            1 / alpha-bar_t, which counts more where x_t is mostly noise.
        snr_gamma: min-SNR instead (Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4): min(SNR, gamma)
            as a weight of the error of x_0, and so min(SNR, gamma) / SNR of epsilon's, SNR = alpha-bar_t / (1 -
            alpha-bar_t).
    """
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        of_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return (snr.clamp(max=snr_gamma) / of_x0[scheduler.config.prediction_type])[:, None, None, None]
    return noise_weights(scheduler, timesteps) if weighting == "noise" else 1


def timestep_density(
    scheduler: DDPMScheduler, log_snr_mean: float, log_snr_std: float, uniform_share: float
) -> Tensor | None:
    """The probability of each timestep in training: `[T]`, float64, sums to 1; None where all are uniform.

    A share of them is uniform, as in Algorithm 1. The others are drawn so that log SNR_t = log(alpha-bar_t / (1 -
    alpha-bar_t)) is normally distributed. (For the paper's schedule, over a third of uniform t have a log SNR below -4,
    where x_t is all but noise, and hardly anything is decided.) Training on other
    distributions of the noise level: Karras et al. 2022, https://arxiv.org/abs/2206.00364, section 5.
    """
    if uniform_share == 1 or len(scheduler.alphas_cumprod) == 1:
        return None
    alphas_cumprod = scheduler.alphas_cumprod.cpu().double().clamp(1e-12, 1 - 1e-12)
    log_snr = torch.logit(alphas_cumprod)
    normal = torch.exp(-0.5 * ((log_snr - log_snr_mean) / log_snr_std) ** 2) * torch.gradient(log_snr)[0].abs()
    uniform = torch.full_like(normal, 1 / len(normal))
    return uniform_share * uniform + (1 - uniform_share) * normal / normal.sum()
