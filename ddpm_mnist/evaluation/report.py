"""What an evaluation reports: metrics beside those of real images, and pictures.

`config` is the options of evaluate.py.
"""

from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..images.batches import Images, scale
from ..loading import Model
from ..randomness import seeded_generator
from ..sampling import grid, labels_for, to_pil, to_uint8
from ..scheduler import DDPMScheduler
from .bound import predict_x0, variational_bound
from .classifier import Judge, accuracy, classify, load_judge, train_classifier
from .metrics import bootstrap, frechet_distance, gaussian_of, in_balls, jackknife, nearest, share_and_ci

CONFIDENT = 0.9
METRICS = {  # name -> (text, which way is better); a new metric is a row here and a line in `metrics_of`
    "frechet_distance": ("Fréchet distance of {samples:,} samples to the test split", "down"),
    "frechet_unbiased": ("the same, without the bias of a finite sample", "down"),
    "precision": ("precision", "up"),
    "recall": ("recall", "up"),
    "confident": (f"classified with over {CONFIDENT} confidence", "up"),
    "read_as_asked": ("classified as the requested class", "up"),
    "accuracy_from_samples": ("accuracy of a classifier trained on the samples alone", "up"),
    "nearest_ratio": ("distance to the nearest training image, over that to the nearest test image", "1: no copies"),
    "bits_per_dim": ("variational bound, bits/dim ({evaluations:,} evaluations)", "down"),
}
LOG_SNRS = (2, 0, -1, -2, -3)  # at -2 the digit is being decided


def draw_samples(model: Model, config) -> Images:
    """Samples `[N, C, H, W]`, uint8 as in a file, labelled with the classes requested."""
    numbers = torch.arange(config.num_images)
    parts = tqdm(numbers.split(config.batch_size), desc=f"sampling, {config.scheduler}")
    samples = [to_uint8(model.draw_images(part.tolist(), config)).cpu() for part in parts]
    return Images(torch.cat(samples), labels_for(numbers.tolist(), model.num_classes))


def measure_model(model: Model, config) -> tuple[dict, Tensor, Tensor]:
    """What evaluation.json holds, the samples, and the training images, `[N, C, H, W]` uint8.

    ConfigError: the model, the data or the classifier are not what an evaluation takes.
    """
    steps, variance, bound = model.num_steps(config), model.scheduler.config.variance_type, {}
    if config.bound_images and variance.startswith("learned"):
        raise ConfigError(f"--bound_images: variance_type {variance} has no bound here; 0 skips it")
    judge = load_judge(model, config)
    data, samples = judge.data, draw_samples(model, config)
    values = measure(samples, judge)
    if config.bound_images:
        bound = variational_bound(model.unet, model.scheduler, data.test, config.bound_images, config.seed)
        values["bits_per_dim"] = bound["bits_per_dim"], bound["ci"], None
    counts = {"samples": len(samples), "evaluations": bound.get("evaluations")}
    guidance = "" if model.null_class_label is None else f", guidance {config.guidance_scale:g}"
    results = {
        "metrics": {name: round(value, 6) for name, (value, _, _) in values.items()},
        "texts": {name: METRICS[name][0].format(**counts) for name in values},
        "ci": {name: ci for name, (_, ci, _) in values.items() if ci is not None},
        "floor": {name: floor for name, (_, _, floor) in values.items() if floor is not None},
        "protocol": f"{len(samples):,} samples by {config.scheduler} in {steps} steps{guidance}, seed {config.seed}; "
        f"{len(data.test):,} test images of {data.name}; features of a classifier with an accuracy of "
        f"{judge.accuracy:.2%}; real images: as many training images in place of the samples; ±: 95%",
        "bound": bound,
    }
    return results, samples.images, data.train.images


def measure(samples: Images, judge: Judge) -> dict[str, tuple[float, float | None, float]]:
    """`METRICS` but the bound: name -> value, half the 95% interval, and the floor: the value for as many real images.

    The labels of the samples are the requested classes, counting through all; None for an unconditional model.
    """
    train, test, generator = judge.data.train, judge.data.test, seeded_generator(judge.config.seed, "subset")
    draws = (train, len(samples)), (test, len(samples)), (train, len(test))
    rows, test_rows, others = (torch.randperm(len(x), generator=generator)[:count] for x, count in draws)
    conditional = samples.labels is not None
    real = Images(train.images[rows], train.labels[rows] if conditional else None)
    block = int(samples.labels.max()) + 1 if conditional else 1
    distances = partial(nearest_distances, train=train.images[others], test=test.images)
    values = metrics_of(samples, distances(samples.images), block, test_rows, judge)
    # the floor of the distances is that of test images, whose nearest test image is themselves
    floor = metrics_of(real, distances(test.images[test_rows], k=2), 1, test_rows, judge)
    return {name: (*value, floor[name][0]) for name, value in values.items()}


def metrics_of(
    images: Images, distances: Tensor, block: int, test_rows: Tensor, judge: Judge
) -> dict[str, tuple[float, float | None]]:
    """Each metric of N images, samples or real ones, and half its 95% interval.

    Args:
        distances, block: see `nearest_distances` and `jackknife`.
        test_rows: N rows of the test split, for precision and recall, which compare sets of equal size.
    """
    test, classifier, config = judge.data.test, judge.classifier, judge.config
    real = classify(classifier, test.images)[2]
    classes, confidence, features = classify(classifier, images.images)
    frechet = partial(frechet_distance, reference=gaussian_of(real))
    unbiased, ci = jackknife(frechet, features, block=block)
    values = {
        "frechet_distance": (frechet(features), ci),
        "frechet_unbiased": (unbiased, ci),
        "precision": share_and_ci(in_balls(features, real[test_rows])),
        "recall": share_and_ci(in_balls(real[test_rows], features)),
        "confident": share_and_ci(confidence > CONFIDENT),
    }
    if images.labels is not None:
        taught = train_classifier(images, config.classifier_steps, config.seed)
        values["read_as_asked"] = share_and_ci(classes == images.labels)
        values["accuracy_from_samples"] = accuracy(taught, test), None
    values["nearest_ratio"] = bootstrap(lambda x: (x[:, 0].median() / x[:, 1].median()).item(), distances, config.seed)
    return values


def nearest_distances(images: Tensor, train: Tensor, test: Tensor, k: int = 1) -> Tensor:
    """`[N, 2]`: to the nearest training image and to the k-th nearest test image."""
    return torch.stack([nearest(images, train)[0][:, 0], nearest(images, test, k)[0][:, -1]], dim=1)


def x0_errors(
    model: Model, images: Tensor, noise: Tensor, log_snr: float, class_labels: Tensor | None = None
) -> Tensor:
    """The squared error of the x_0 that a model predicts at the timestep nearest to a log SNR; `[N]`, mean of pixels.

    Args:
        images, noise: `[N, C, H, W]`, float32: x_0 in [-1, 1], and epsilon.
        class_labels: `[N]`, for a conditional model.
    """
    scheduler = DDPMScheduler.from_config(model.scheduler.config, clip_sample=False)  # measure the network alone
    t = (torch.logit(scheduler.alphas_cumprod.double()) - log_snr).abs().argmin()
    predicted = predict_x0(model.unet, scheduler, images, noise, t.expand(len(images)), class_labels)
    return (predicted - images).square().mean(dim=(1, 2, 3))


def table(results: dict) -> str:
    """The metrics of evaluation.json as a Markdown table."""
    lines = ["| | model | real images | better |", "| --- | --- | --- | --- |"]
    for name, value in results["metrics"].items():
        ci = f" ± {results['ci'][name]:.2g}" if name in results["ci"] else ""
        floor = f"{results['floor'][name]:.4g}" if name in results["floor"] else ""
        lines.append(f"| {results['texts'][name]} | {value:.4g}{ci} | {floor} | {METRICS[name][1]} |")
    return "\n".join(lines)


def neighbours_picture(samples: Tensor, train: Tensor) -> Image.Image:
    """The first sixteen samples, each above its three nearest training images; `[N, C, H, W]` uint8."""
    samples = samples[:16]
    indices = nearest(samples, train, k=3)[1]
    rows = torch.cat([samples, *(train[indices[:, i]] for i in range(3))])
    return grid(to_pil(scale(rows)), columns=len(samples), zoom=2)


def bound_picture(terms: list[float], path: Path) -> None:
    """Plot the terms of the bound against the timestep; nearly all bits are in the first timesteps."""
    from matplotlib.figure import Figure  # not pyplot, which would change the caller's backend

    plot = Figure(figsize=(7, 3.5), layout="tight")
    axes = plot.add_subplot()
    axes.loglog(range(1, len(terms)), terms[:-1], linewidth=1)
    axes.set(xlabel="t (1: the decoder, L_0)", ylabel="bits per dimension", title=f"sum: {sum(terms):.3f} bits/dim")
    plot.savefig(path, dpi=100, metadata={"Software": None})
