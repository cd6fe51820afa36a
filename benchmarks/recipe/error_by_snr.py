"""How wrong is the predicted x_0, by signal-to-noise ratio? Tells recipes apart in seconds, without sampling.

    python benchmarks/recipe/error_by_snr.py --dataset_name ylecun/mnist --models FOLDER [FOLDER ...]

The mean square error of x_0 (images in [-1, 1]) on test images, on the same noise for every model, at log SNRs and not
at timesteps, so that models with other schedules and targets can stand side by side. Where log SNR is -2 the digit is
being decided: of all columns that one goes best with the Fréchet distance of samples (README.md here).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from ddpm_mnist.config import TrainConfig
from ddpm_mnist.draws import seeded_generator
from ddpm_mnist.generate import GenerateConfig, load_model

from ddpm_mnist.data import load_data, scale

LOG_SNRS = (4, 2, 0, -1, -2, -3, -4, -6)


@torch.no_grad()
def x0_error(unet, scheduler, images: torch.Tensor, noise: torch.Tensor, log_snr: float) -> float:
    """Mean over images `[N, C, H, W]` and their pixels, at the timestep nearest to `log_snr`."""
    scheduler.register_to_config(clip_sample=False)  # what the network says, not what clipping makes of it
    alphas_cumprod = scheduler.alphas_cumprod
    t = (torch.log(alphas_cumprod / (1 - alphas_cumprod)) - log_snr).abs().argmin()
    errors = []
    for x_0, epsilon in zip(images.split(100), noise.split(100)):
        timesteps = t.expand(len(x_0))
        sample = scheduler.add_noise(x_0, epsilon, timesteps)
        predicted = scheduler.predict_original_sample(unet(sample, timesteps).sample, alphas_cumprod[t], sample)
        errors.append((predicted - x_0).square().mean(dim=(1, 2, 3)))
    return torch.cat(errors).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--models", nargs="+", required=True, help="folders of unconditional pipelines")
    parser.add_argument("--num_images", type=int, default=400)
    args = parser.parse_args()
    config = TrainConfig(dataset_name=args.dataset_name, num_validation_samples=args.num_images)
    config.unet = {"in_channels": 1, "sample_size": 28}
    images = scale(load_data(config).test.images)
    noise = torch.randn(images.shape, generator=seeded_generator(0, "held-out noise"))
    print("| log SNR", *LOG_SNRS, "", sep=" | ")
    print("| ---" * (len(LOG_SNRS) + 1) + " |")
    for model in args.models:
        unet, scheduler, _ = load_model(GenerateConfig(model=model, scheduler="ddpm"))
        unet = unet.cpu()
        errors = [x0_error(unet, scheduler, images, noise, log_snr) for log_snr in LOG_SNRS]
        print(f"| {model}", *(f"{error:.4f}" for error in errors), "", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
