"""The variational bound on -log p(x_0), in bits per dimension. L_simple weights the same terms differently.

Ho et al. 2020, section 2, eq. 5: L = L_T + L_{T-1} + ... + L_1 + L_0, on images that the model was not trained on, with
pixels in 256 levels. The paper's t = 1 ... T is t = 0 ... T-1 in the code.
"""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr
from tqdm.auto import tqdm

from ..images.batches import Images, scale
from ..randomness import seeded_generator
from ..scheduler import DDPMScheduler


def log_probability_between(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)) for the standard normal, lower < upper; accurate in the tails too."""
    swap = lower > 0  # mirror the right tail to the left one, where log Phi is precise
    lower, upper = torch.where(swap, -upper, lower), torch.where(swap, -lower, upper)
    return log_ndtr(upper) + torch.log1p(-torch.exp(log_ndtr(lower) - log_ndtr(upper)))


def decoder_nll(images: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """L_0 = -log p(x_0 | x_1) in nats, `[B, C, H, W]`: a Gaussian's mass within 1/255 of each pixel (eq. 13)."""
    images, mean = images.double(), mean.double()
    upper = torch.where(images > 0.999, torch.inf, (images + 1 / 255 - mean) / std)
    lower = torch.where(images < -0.999, -torch.inf, (images - 1 / 255 - mean) / std)
    return -log_probability_between(lower, upper)


def prior_kl(images: Tensor, scheduler: DDPMScheduler) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in nats, `[B, C, H, W]`: how far x_T is from pure noise."""
    alpha_prod = scheduler.alphas_cumprod[-1].cpu().double()
    return 0.5 * (alpha_prod * images.double() ** 2 - alpha_prod - torch.log(1 - alpha_prod))


def transition_nll(images: Tensor, prediction: Tensor, timesteps: Tensor, scheduler: DDPMScheduler) -> Tensor:
    """L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and L_0 for t = 0, in nats, `[B, C, H, W]`.

    Args:
        images: x_0, `[B, C, H, W]` in [-1, 1].
        prediction: the x_0 that the model predicts from x_t, `[B, C, H, W]`.
        timesteps: t, `[B]`, int64.
    """
    alphas_cumprod = scheduler.alphas_cumprod.cpu().double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    posterior = (1 - before) / (1 - alphas_cumprod) * betas  # beta-tilde_t, eq. 7
    variance = (betas if scheduler.config.variance_type.startswith("fixed_large") else posterior).clone()  # sigma_t^2
    variance[0] = posterior[1]  # as in the authors' code: beta-tilde_1 is 0, and a density needs a positive variance
    weight = before.sqrt() * betas / (1 - alphas_cumprod)  # of x_0 in the mean of q(x_{t-1} | x_t, x_0), eq. 7
    posterior, variance, weight = (x[timesteps][:, None, None, None] for x in (posterior, variance, weight))

    # x_t contributes the same to both means, so they differ only in the part of x_0.
    distance = (weight * (images.double() - prediction.double())) ** 2
    kl = 0.5 * (torch.log(variance / posterior) + (posterior + distance) / variance - 1)
    first = timesteps == 0
    kl[first] = decoder_nll(images[first], prediction[first], variance[first].sqrt())
    return kl


@torch.no_grad()
def predict_x0(
    unet, scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor, class_labels: Tensor | None
) -> Tensor:
    """The x_0 that a model predicts from x_t, `[B, C, H, W]`; timesteps and labels are `[B]`, and all is on the CPU."""
    sample, t = scheduler.add_noise(images, noise, timesteps).to(unet.device), timesteps.to(unet.device)
    labels = None if class_labels is None else class_labels.to(unet.device)
    output = unet(sample, t, class_labels=labels).sample.float()
    alpha_prod = scheduler.alphas_cumprod.to(unet.device)[t][:, None, None, None]
    return scheduler.predict_original_sample(output, alpha_prod, sample).cpu()


def variational_bound(unet, scheduler: DDPMScheduler, test: Images, per_timestep: int = 10, seed: int = 0) -> dict:
    """Estimate the bound of a model with a fixed variance, with random images and noise at every timestep.

    L_T is exact over all images. The first T / 50 timesteps get ten times as many images, because their terms are
    largest and vary most. The result has "bits_per_dim", "ci" (half of its 95% interval), "terms" (T + 1 numbers: L_0
    ... L_{T-1}, L_T) and "evaluations".
    """
    T = scheduler.config.num_train_timesteps
    counts = torch.full((T,), per_timestep)
    counts[: T // 50] *= 10
    timesteps = torch.repeat_interleave(torch.arange(T), counts)
    generator = seeded_generator(seed, "bound")
    rows = torch.randint(0, len(test), (len(timesteps),), generator=generator)

    nats = torch.empty(len(timesteps), dtype=torch.float64)
    for part in tqdm(torch.arange(len(timesteps)).split(250), desc="variational bound"):
        images, t = scale(test.images[rows[part]]), timesteps[part]
        noise = torch.randn(images.shape, generator=generator)
        labels = test.labels[rows[part]] if unet.config.num_class_embeds is not None else None
        prediction = predict_x0(unet, scheduler, images, noise, t, labels)
        nats[part] = transition_nll(images, prediction, t, scheduler).mean(dim=(1, 2, 3))

    bits = (nats / math.log(2)).split(counts.tolist())
    last = prior_kl(scale(test.images), scheduler).mean().item() / math.log(2)
    terms = [*(b.mean().item() for b in bits), last]
    ci = 1.96 * sum((b.var() / len(b)).item() for b in bits) ** 0.5
    return {"bits_per_dim": math.fsum(terms), "ci": ci, "terms": terms, "evaluations": len(timesteps)}
