"""The error of the predicted x_0 by signal-to-noise ratio. Compares recipes in seconds, without sampling.

    python -m benchmarks.recipe.error_by_snr --dataset_name ylecun/mnist --models FOLDER [FOLDER ...]

Prints the mean squared error of x_0 (images in [-1, 1]) on test images, with the same noise for every model. The
columns are log SNRs and not timesteps, so that models with different schedules and targets can be compared. At log SNR
-2 the digit is being decided: of all columns, that one correlates best with the Fréchet distance of samples (README.md
in this folder).
"""

import argparse

import torch

from ddpm_mnist.evaluation.error import model_x0
from ddpm_mnist.images.batches import scale
from ddpm_mnist.images.dataset import load_data
from ddpm_mnist.loading import load_model
from ddpm_mnist.options import DataOptions
from ddpm_mnist.randomness import seeded_generator

LOG_SNRS = (4, 2, 0, -1, -2, -3, -4, -6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--models", nargs="+", required=True, help="folders of unconditional pipelines")
    parser.add_argument("--num_images", type=int, default=400)
    args = parser.parse_args()
    data = load_data(DataOptions(dataset_name=args.dataset_name), 1, 28, num_held_out=args.num_images)
    images = scale(data.test.images)
    noise = torch.randn(images.shape, generator=seeded_generator(0, "held-out noise"))
    print("| log SNR", *LOG_SNRS, "", sep=" | ")
    print("| ---" * (len(LOG_SNRS) + 1) + " |")
    for name in args.models:
        model = load_model(name)
        errors = [(model_x0(model, images, noise, snr) - images).square().mean() for snr in LOG_SNRS]
        print(f"| {name}", *(f"{error:.4f}" for error in errors), "", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
