"""The figures of an evaluation, each beside the same figure for real images, and its pictures."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..images.batches import Images, scale
from ..images.dataset import Data
from ..loading import Model
from ..randomness import seeded_generator
from ..sampling import grid, to_pil
from ..scheduler import DDPMScheduler
from .classifier import accuracy, labelled, read, train_classifier
from .metrics import (
    bootstrap_ci,
    density_coverage,
    frechet_distance,
    gaussian_of,
    jackknife,
    mean_and_ci,
    nearest,
    precision_recall,
    share_and_ci,
)

CONFIDENT = 0.9
CONFIDENT_TEXT = f"classified with over {CONFIDENT} confidence"
LOG_SNRS = (2, 0, -1, -2, -3)  # at -2 the digit is being decided


@dataclass
class Figure:
    """A measurement: its value, half the 95% interval, the value for real training images, and which way is better."""

    name: str
    text: str
    value: float
    ci: float | None
    floor: float | None
    better: str

    def row(self) -> str:
        """A row of the Markdown table."""
        value = f"{self.value:.4g}" + ("" if self.ci is None else f" ± {self.ci:.2g}")
        return f"| {self.text} | {value} | {'' if self.floor is None else f'{self.floor:.4g}'} | {self.better} |"


def load_inception() -> torch.nn.Module:
    """The network whose features the FID of papers compares.

    Raises:
        ConfigError: torch-fidelity is not installed, or its weights cannot be downloaded.
    """
    try:
        from torch_fidelity.utils import create_feature_extractor

        return create_feature_extractor("inception-v3-compat", ["2048"], cuda=torch.cuda.is_available())
    except Exception as e:  # not installed, or its weights cannot be downloaded: the advice is the same
        raise ConfigError(
            f"--feature_extractor inception: not available ({type(e).__name__}: {str(e)[:80]}); `pip install "
            "torch-fidelity`, connect once for its weights, or omit the option"
        ) from None


def inception_features(extractor: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Inception features of images `[N, C, H, W]`, uint8: `[N, 2048]`."""
    rgb = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.cat([extractor(part.to(device))[0].cpu() for part in rgb.split(100)])


def compare(
    samples: Tensor, asked: Tensor | None, data: Data, classifier, seed: int, classifier_steps: int = 1400
) -> list[Figure]:
    """Compare samples with the test split; for the floor, compare as many training images with it.

    Args:
        samples: `[N, C, H, W]` uint8.
        asked: the class that each sample was asked for, `[N]`, or None.
        classifier: scores images; see `get_classifier`.
        seed: fixes the subsets and the resampling.
        classifier_steps: length of the training of the classifiers that learn from samples.
    """
    generator = seeded_generator(seed, "subset")
    count = len(samples)

    def some(images: Images, number: int) -> Tensor:
        return torch.randperm(len(images), generator=generator)[:number]

    train_rows, test_rows = some(data.train, count), some(data.test, count)
    others = some(data.train, len(data.test))  # as many training images as there are test images
    test_classes, test_confidence, test_features = read(classifier, data.test.images)
    floor_classes, floor_confidence, floor_features = read(classifier, data.train.images[train_rows])
    classes, confidence, features = read(classifier, samples)
    figures = []

    def add(name: str, text: str, value: float, ci: float | None, floor: float | None, better: str) -> None:
        figures.append(Figure(name, text, value, ci, floor, better))

    test_gaussian = gaussian_of(test_features)

    def distance(x: Tensor) -> float:
        return frechet_distance(x, test_gaussian)

    block = 1 if asked is None else int(asked.max()) + 1  # they count through the classes
    (unbiased, ci), (floor_unbiased, _) = (
        jackknife(distance, features, block=block),
        jackknife(distance, floor_features),
    )
    text = f"Fréchet distance of {count:,} samples to the test split"
    add("frechet_distance", text, distance(features), ci, distance(floor_features), "down")
    text = "the same, without the bias of a finite sample"
    add("frechet_unbiased", text, unbiased, ci, floor_unbiased, "down")
    real = test_features[test_rows]
    for function, names in (
        (precision_recall, ("precision", "recall")),
        (density_coverage, ("density", "coverage")),
    ):
        for name, values, floors in zip(names, function(features, real), function(floor_features, real)):
            value_and_ci = share_and_ci(values) if values.dtype == torch.bool else mean_and_ci(values)
            add(name, name, *value_and_ci, floors.double().mean().item(), "up")
    sure, floor_sure = (c > CONFIDENT for c in (confidence, floor_confidence))
    add("confident", CONFIDENT_TEXT, *share_and_ci(sure), floor_sure.float().mean(), "up")

    def imbalance(read_as: Tensor) -> float:
        """Total variation distance between the predicted classes and those of the test split."""
        shares = (torch.bincount(x, minlength=classifier.config.num_labels) / len(x) for x in (read_as, test_classes))
        return (next(shares) - next(shares)).abs().sum().item() / 2

    if asked is None:
        text, ci = "share of classes out of balance", bootstrap_ci(imbalance, classes, seed)
        add("class_imbalance", text, imbalance(classes), ci, imbalance(floor_classes), "down")
    else:
        add("read_as_asked", "classified as the requested class", *share_and_ci(classes == asked), None, "up")
        trained = train_classifier(Images(samples, asked), classifier_steps, seed)
        train, test = labelled(data)
        rows = some(train, count)
        floor = train_classifier(Images(train.images[rows], train.labels[rows]), classifier_steps, seed)
        add(
            "accuracy_from_samples",
            "accuracy of a classifier trained on the samples alone",
            accuracy(trained, test),
            None,
            accuracy(floor, test),
            "up",
        )

    def flat(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float() / 255

    pixels, train_pixels, test_pixels = flat(samples), flat(data.train.images[others]), flat(data.test.images)

    def to_train_over_to_test(points: Tensor, k: int = 1) -> Tensor:
        to_test = nearest(points, test_pixels, k)[0][:, -1]  # k = 2 for test images: the nearest is the image itself
        return torch.stack([nearest(points, train_pixels)[0][:, 0], to_test], dim=1)

    def ratio(pairs: Tensor) -> float:
        return (pairs[:, 0].median() / pairs[:, 1].median()).item()

    pairs, floor_pairs = to_train_over_to_test(pixels), to_train_over_to_test(test_pixels[test_rows], k=2)
    text = "distance to the nearest training image, over that to the nearest test image"
    ci = bootstrap_ci(ratio, pairs, seed)
    add("nearest_ratio", text, ratio(pairs), ci, ratio(floor_pairs), "1: nothing memorised")
    return figures


@torch.no_grad()
def x0_errors(
    model: Model, images: Tensor, noise: Tensor, log_snr: float, class_labels: Tensor | None = None
) -> Tensor:
    """The squared error of the x_0 that a model predicts at the timestep nearest to a log SNR; `[N]`, mean of pixels.

    Args:
        images, noise: `[N, C, H, W]`, float32: x_0 in [-1, 1], and epsilon.
        class_labels: `[N]`, for a conditional model.
    """
    scheduler = DDPMScheduler.from_config(model.scheduler.config, clip_sample=False)  # measure the network alone
    alphas_cumprod, device = scheduler.alphas_cumprod, model.unet.device
    t = (torch.logit(alphas_cumprod.double()) - log_snr).abs().argmin()
    errors = []
    for rows in torch.arange(len(images)).split(100):
        x_0, epsilon = images[rows], noise[rows]
        timesteps = t.expand(len(x_0))
        sample = scheduler.add_noise(x_0, epsilon, timesteps).to(device)
        labels = None if class_labels is None else class_labels[rows].to(device)
        output = model.unet(sample, timesteps.to(device), class_labels=labels).sample
        predicted = scheduler.predict_original_sample(output, alphas_cumprod[t].to(device), sample)
        errors.append((predicted.cpu() - x_0).square().mean(dim=(1, 2, 3)))
    return torch.cat(errors)


def tell_apart(models: tuple[Model, Model], samples: tuple[Tensor, Tensor], data: Data, classifier, seed: int) -> str:
    """A Markdown table of two models and their difference, all by the same noise.

    What chance does to one it does to the other too, and so their difference is known far better than either value.

    Args:
        models: the one and the other.
        samples: of each, `[N, C, H, W]` uint8, number i of both out of the same noise.
        seed: fixes the noise on the test images.
    """
    real = gaussian_of(read(classifier, data.test.images)[2])
    scores = [read(classifier, x) for x in samples]
    features = [features for _, _, features in scores]
    width = features[0].shape[1]

    def difference(both: Tensor) -> float:
        return frechet_distance(both[:, :width], real) - frechet_distance(both[:, width:], real)

    block = models[0].num_classes or 1  # samples count through the classes
    unbiased = [jackknife(lambda x: frechet_distance(x, real), x, block=block)[0] for x in features]
    rows = [
        (
            "Fréchet distance, without the bias of a finite sample",
            *unbiased,
            jackknife(difference, torch.cat(features, 1), block=block),
        )
    ]
    sure = [(confidence > CONFIDENT).double() for _, confidence, _ in scores]
    rows.append((CONFIDENT_TEXT, *(x.mean().item() for x in sure), mean_and_ci(sure[0] - sure[1])))
    test = data.test if models[0].num_classes is None else labelled(data)[1]
    chosen = torch.randperm(len(test), generator=seeded_generator(seed, "subset"))[:400]  # it may be sorted
    images, labels = scale(test.images[chosen]), None if models[0].num_classes is None else test.labels[chosen]
    noise = torch.randn(images.shape, generator=seeded_generator(seed, "held-out noise"))
    for log_snr in LOG_SNRS:
        errors = [x0_errors(model, images, noise, log_snr, labels) for model in models]
        text = f"squared error of x_0 at log SNR {log_snr}"
        rows.append((text, *(x.mean().item() for x in errors), mean_and_ci(errors[0] - errors[1])))
    lines = ["| | model | other | difference, 95% interval | |", "| --- | --- | --- | --- | --- |"]
    for text, one, other, (value, ci) in rows:
        verdict = "told apart" if abs(value) > ci else "not told apart"
        lines.append(f"| {text} | {one:.4g} | {other:.4g} | {value:+.2g} ± {ci:.2g} | {verdict} |")
    return "\n".join(lines)


def neighbours_picture(samples: Tensor, train: Images) -> Image.Image:
    """The first sixteen samples, each above its three nearest training images."""
    samples = samples[:16]
    points, reference = (x.flatten(1).float() / 255 for x in (samples, train.images))
    found = nearest(points, reference, 3)[1]
    rows = torch.cat([samples, *(train.images[found[:, i]] for i in range(3))])
    return grid(to_pil(scale(rows)), columns=len(samples), zoom=2)


def bound_picture(terms: list[float], path: Path) -> None:
    """Plot the terms of the bound against the timestep; nearly all bits are in the first timesteps."""
    from matplotlib.figure import Figure as Plot  # not pyplot, which would change the caller's backend

    plot = Plot(figsize=(7, 3.5))
    axes = plot.add_subplot()
    axes.loglog(range(1, len(terms)), terms[:-1], linewidth=1)
    axes.set(xlabel="t (1: the decoder, L_0)", ylabel="bits per dimension", title=f"sum: {sum(terms):.3f} bits/dim")
    plot.tight_layout()
    plot.savefig(path, dpi=100, metadata={"Software": None})
