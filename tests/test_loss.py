"""The target of the loss and the density of timesteps, against their formulas."""

import pytest
import torch

from ddpm_mnist import DDPMScheduler
from ddpm_mnist.loss import LOG_SNR_MEAN, LOG_SNR_STD, guided_target, posterior_mean, timestep_density
from ddpm_mnist.randomness import draw_noise_and_timesteps
from ddpm_mnist.training.config import TrainConfig
from ddpm_mnist.training.target import Guide


def brute_force_mean(x_t, alpha, choices):
    """E[x_0 | x_t] and E[epsilon | x_t] by eq. 4's density, in float64, for K equally likely x_0: `[K, C, H, W]`."""
    x_t, choices, alpha = x_t.double(), choices.double(), alpha.double()
    noises = (x_t - alpha.sqrt() * choices) / (1 - alpha).sqrt()
    weights = (-0.5 * (noises**2).flatten(1).sum(1)).softmax(0)[:, None, None, None]
    return (weights * choices).sum(0), (weights * noises).sum(0)


def test_the_posterior_mean_is_that_of_the_density_where_x_t_is_mostly_noise():
    torch.manual_seed(0)
    scheduler = DDPMScheduler()
    alike = torch.randn(1, 1, 8, 8)  # else x_t would tell them apart
    images, references = (alike + 0.3 * torch.randn(n, 1, 8, 8) for n in (40, 30))
    noise, timesteps = torch.randn(images.shape), torch.arange(40) * 25
    same_class = torch.rand(40, 30) < 0.5
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    alphas = scheduler.alphas_cumprod[timesteps]
    for allowed in (None, same_class):
        mean = posterior_mean(scheduler, noisy_images, images, noise, timesteps, references, allowed)
        torch.testing.assert_close(scheduler.add_noise(*mean, timesteps), noisy_images, atol=1e-5, rtol=0)
        changed = [not torch.equal(a, b) for a, b in zip(mean[0], images)]
        assert changed == (alphas < 0.5).tolist() and 20 < sum(changed) < 40
        for i in range(40):
            if alphas[i] < 0.5:
                others = references if allowed is None else references[allowed[i]]
                expected = brute_force_mean(noisy_images[i], alphas[i], torch.cat([images[i : i + 1], others]))
                for value, exact in zip((mean[0][i], mean[1][i]), expected):
                    torch.testing.assert_close(value, exact.float(), atol=2e-4, rtol=0)
            else:
                assert torch.equal(mean[1][i], noise[i])


def test_the_posterior_mean_does_not_depend_on_which_image_led_to_x_t():
    """So its mean over the image that was drawn is the mean given x_t: the expected gradient does not change."""
    torch.manual_seed(0)
    scheduler, timesteps = DDPMScheduler(), torch.tensor([500])
    images, x_t = torch.randn(4, 1, 8, 8) * 0.3, torch.randn(1, 1, 8, 8)
    alpha = scheduler.alphas_cumprod[500]
    results = []
    for i in range(4):
        noise = (x_t - alpha.sqrt() * images[i]) / (1 - alpha).sqrt()
        others = images[[j for j in range(4) if j != i]]
        results.append(posterior_mean(scheduler, x_t, images[i : i + 1], noise, timesteps, others))
    for result in results[1:]:
        for mean, first in zip(result, results[0]):
            torch.testing.assert_close(mean, first, atol=1e-5, rtol=0)


def test_timesteps_follow_their_density():
    scheduler = DDPMScheduler()
    assert timestep_density(scheduler, 1.0) is None
    normal, mixed = (timestep_density(scheduler, share) for share in (0.0, 0.25))
    for density in (normal, mixed):
        assert density.sum().item() == pytest.approx(1) and density.dtype == torch.float64
    torch.testing.assert_close(mixed, 0.25 / 1000 + 0.75 * normal)
    log_snr = torch.logit(scheduler.alphas_cumprod.double())
    mean = (normal * log_snr).sum().item()
    assert mean == pytest.approx(LOG_SNR_MEAN, abs=0.05)
    assert (normal * (log_snr - mean) ** 2).sum().sqrt().item() == pytest.approx(LOG_SNR_STD, abs=0.05)
    shape, device, cumulative = (64, 1, 2, 2), torch.device("cpu"), mixed.cumsum(0).float()
    for given, expected in ((None, torch.full((20,), 0.05)), (cumulative, mixed.reshape(20, 50).sum(1))):
        drawn = [draw_noise_and_timesteps(0, i, shape, 1000, device, given)[1] for i in range(300)]
        counts = torch.bincount(torch.cat(drawn), minlength=1000).double().reshape(20, 50).sum(1) / (300 * 64)
        assert (counts - expected).abs().max() < 0.01


# ---- the guide -----------------------------------------------------------------------------------------------------


def test_the_guide_keeps_an_early_average_and_follows_the_present_one():
    unet = torch.nn.Linear(2, 2)
    guide = Guide(TrainConfig(max_train_steps=10, guide_weak=0.2, guide_start=0.7), unet)
    for step in range(10):
        guide.follow(step, {"weight": torch.full((2, 2), float(step)), "bias": torch.zeros(2)})
        present = step if step >= 7 else unet.weight[0, 0]
        assert (guide.strong.weight[0, 0], guide.weak.weight[0, 0]) == (present, min(step, 2))
    short = Guide(TrainConfig(max_train_steps=2), unet)  # both in the same update: then nothing moves
    short.follow(1, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert torch.equal(short.strong.weight, short.weak.weight)
    assert not any(p.requires_grad for network in (guide.strong, guide.weak) for p in network.parameters())


@pytest.mark.parametrize("scale", [1.0, 1.25, 1.5])
def test_a_network_that_learns_the_guided_target_ends_at_the_guided_output(scale):
    """The output is weak + w (strong - weak) of Karras et al. 2024, with w = 1 / (2 - scale)."""
    target, weak = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    strong = target
    for _ in range(60):
        strong = guided_target(target, strong, weak, scale)
    torch.testing.assert_close(strong, weak + (target - weak) / (2 - scale))
