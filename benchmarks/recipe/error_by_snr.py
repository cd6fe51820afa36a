"""The squared error of the predicted x_0 by signal-to-noise ratio, and the least that any network can have.

    python -m benchmarks.recipe.error_by_snr --dataset_name ylecun/mnist --models FOLDER [FOLDER ...] [--plot FILE]

Compares models in seconds, without sampling; with the same images and noise for all. The rows are log SNRs and not
timesteps, so that models with different schedules and targets can be compared. At log SNR -2 the digit is being
decided: the whole error there, both columns, ranked nearly all models without the guide as the Fréchet distance does.

On x_t made from training images, no output is better than the mean of the training images, weighted by how probable
each is given x_t (Xu et al. 2023, https://arxiv.org/abs/2302.00670, eq. 5). Where x_t shows which image it came from,
this least error is near 0, and only a network that has memorised the images can reach it.
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_mnist.evaluation.bound import predict_x0
from ddpm_mnist.images.batches import Images, scale
from ddpm_mnist.images.dataset import load_data
from ddpm_mnist.loading import Model, load_model
from ddpm_mnist.loss import log_likelihood
from ddpm_mnist.options import DataOptions
from ddpm_mnist.randomness import seeded_generator
from ddpm_mnist.scheduler import DDPMScheduler

LOG_SNRS = (2, 1, 0, -1, -2, -3, -4)
NUM_IMAGES = 512
PART = 5000  # training images at a time


def timestep_at(scheduler: DDPMScheduler, log_snr: float) -> Tensor:
    """The timestep with the log SNR nearest to this one, `[]`, int64."""
    return (torch.logit(scheduler.alphas_cumprod.double()) - log_snr).abs().argmin()


def model_x0(model: Model, images: Tensor, noise: Tensor, log_snr: float, class_labels: Tensor | None = None) -> Tensor:
    """The x_0 that the network predicts at a log SNR, without clipping: `[N, C, H, W]`.

    Args:
        images, noise: `[N, C, H, W]`, float32: x_0 in [-1, 1], and epsilon.
        class_labels: `[N]`, for a conditional model.
    """
    scheduler = DDPMScheduler.from_config(model.scheduler.config, clip_sample=False)
    timesteps = timestep_at(scheduler, log_snr).expand(len(images))
    return predict_x0(model.unet, scheduler, images, noise, timesteps, class_labels)


@torch.no_grad()
def best_x0(x_t: Tensor, alpha_prod: Tensor, train: Images, class_labels: Tensor | None = None) -> Tensor:
    """E[x_0 | x_t], if x_0 is equally likely to be each training image (of the class): `[N, C, H, W]`."""
    x_t_flat = x_t.flatten(1)
    total, mean = torch.full((len(x_t), 1), -1e30), torch.zeros_like(x_t_flat)  # log of a sum that grows part by part
    for rows in torch.arange(len(train)).split(PART):
        candidates = scale(train.images[rows]).flatten(1)
        scores = log_likelihood(x_t_flat, candidates, alpha_prod)
        if class_labels is not None:
            scores = scores.masked_fill(class_labels[:, None] != train.labels[rows], -torch.inf)
        grown = torch.logaddexp(total, scores.logsumexp(dim=1, keepdim=True))
        mean = mean * (total - grown).exp() + (scores - grown).exp() @ candidates
        total = grown
    return mean.view_as(x_t)


def error_by_snr(model: Model, train: Images, seed: int = 0) -> list[dict[str, float]]:
    """For each of `LOG_SNRS`, on training images: the "least" error, and by how much the model's is "above" it."""
    generator = seeded_generator(seed, "bound")
    rows = torch.randint(len(train), (NUM_IMAGES,), generator=generator)
    images = scale(train.images[rows])
    noise = torch.randn(images.shape, generator=generator)
    labels = train.labels[rows] if model.num_classes is not None else None
    results = []
    for log_snr in LOG_SNRS:
        timestep = timestep_at(model.scheduler, log_snr)
        noisy_images = model.scheduler.add_noise(images, noise, timestep[None])
        best = best_x0(noisy_images, model.scheduler.alphas_cumprod[timestep], train, labels)
        predicted = model_x0(model, images, noise, log_snr, labels)
        # The mean of (predicted - x_0)^2 is the sum of these two, since x_0 - best has mean 0 for each x_t.
        least, above = (best - images).square().mean().item(), (predicted - best).square().mean().item()
        results.append({"log_snr": log_snr, "least": round(least, 6), "above": round(above, 6)})
    return results


def plot(errors: dict[str, list[dict[str, float]]], path: str) -> None:
    """Plot the error of each model above the least possible one, and the latter."""
    figure = Figure(figsize=(5, 3.5), layout="tight")
    axes = figure.add_subplot(xlabel="log SNR", ylabel="squared error of x_0", title="mostly noise on the left")
    for name, rows in errors.items():
        axes.semilogy(LOG_SNRS, [row["above"] for row in rows], marker=".", label=f"{name}, above the least possible")
    rows = next(iter(errors.values()))  # the same for all models of the same images and classes
    axes.semilogy(LOG_SNRS, [row["least"] for row in rows], marker=".", label="least possible")
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--models", nargs="+", required=True, help="folders of pipelines")
    parser.add_argument("--plot", help="a .png file")
    args = parser.parse_args()
    errors = {}
    for name in args.models:
        model = load_model(name)
        data = load_data(DataOptions(dataset_name=args.dataset_name), *model.shape[:2], model.num_classes)
        errors[name] = error_by_snr(model, data.train)
    print("| log SNR | least possible", *(f"{name}, above it" for name in errors), "", sep=" | ")
    print("| ---" * (len(errors) + 2) + " |")
    for i, rows in enumerate(zip(*errors.values())):
        print(f"| {LOG_SNRS[i]} | {rows[0]['least']:.4f}", *(f"{row['above']:.4f}" for row in rows), "", sep=" | ")
    if args.plot:
        plot(errors, args.plot)


if __name__ == "__main__":
    main()
