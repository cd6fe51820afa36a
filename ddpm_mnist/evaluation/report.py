"""What an evaluation reports: metrics beside those of real images, and pictures.

`config` is the options of evaluate.py.
"""

import math
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
from .bound import variational_bound
from .classifier import Judge, classify, load_judge
from .metrics import frechet_distance, gaussian_of, in_balls, jackknife, nearest, share_and_ci

CONFIDENT = 0.9
METRICS = {  # name -> (text, which way is better); a new metric is a row here and a line in `metrics_of`
    "frechet_distance": ("Fréchet distance of {samples:,} samples to the test split", "down"),
    "frechet_unbiased": ("the same, without the bias of a finite sample", "down"),
    "precision": ("precision", "up"),
    "recall": ("recall", "up"),
    "confident": (f"classified with over {CONFIDENT} confidence", "up"),
    "class_accuracy": ("classified as the requested class", "up"),
    "nearest_ratio": ("distance to the nearest training image, over that to the nearest test image", "as real images"),
    "bits_per_dim": ("variational bound, bits/dim ({evaluations:,} evaluations)", "down"),
}


def draw_samples(model: Model, config) -> Images:
    """Samples `[N, C, H, W]`, uint8 as in a file, labelled with the classes requested."""
    numbers = range(config.num_images)
    total = math.ceil(config.num_images / config.batch_size) * model.num_steps(config)
    drawn = tqdm(model.draw(numbers, config), f"sampling, {config.scheduler}", total)
    samples = [to_uint8(step.prev_sample).cpu() for _, step in drawn if step.last]
    return Images(torch.cat(samples), labels_for(numbers, model.num_classes))


def measure_model(model: Model, config) -> tuple[dict, Tensor, Tensor]:
    """What evaluation.json holds, the samples, and the training images, `[N, C, H, W]` uint8.

    ConfigError: the model, the data or the classifier are not what an evaluation takes.
    """
    if model.shape[0] not in (1, 3) or model.shape[1] != model.shape[2]:
        raise ConfigError(f"--model {config.model}: draws images {model.shape}; an evaluation takes [1 or 3, N, N]")
    steps, variance, bound = model.num_steps(config), model.scheduler.config.variance_type, {}
    if config.bound_images and (variance.startswith("learned") or len(model.scheduler) == 1):
        raise ConfigError("--bound_images: no bound of a learned variance, or of a single timestep; 0 skips it")
    judge = load_judge(model, config)
    data, samples = judge.data, draw_samples(model, config)
    values = measure(samples, judge)
    if config.bound_images:
        bound = variational_bound(model.unet, model.scheduler, data.test, config.bound_images, config.seed)
        values["bits_per_dim"] = bound["bits_per_dim"], bound["ci"], None
    counts = {"samples": len(samples), "evaluations": bound.get("evaluations")}
    how = ", bf16" if config.mixed_precision == "bf16" else ""
    how += ", of all classes in turn" if model.num_classes else ""
    if model.null_class_label is not None:
        how += f", guidance {config.guidance_scale:g} where log SNR >= {config.guidance_min_log_snr:g}"
    results = {
        "metrics": {name: round(value, 6) if math.isfinite(value) else None for name, (value, _, _) in values.items()},
        "texts": {name: METRICS[name][0].format(**counts) for name in values},
        "ci": {name: ci for name, (_, ci, _) in values.items() if ci is not None and math.isfinite(ci)},
        "real_images": {name: x for name, (_, _, x) in values.items() if x is not None and math.isfinite(x)},
        "protocol": f"{len(samples):,} samples by {config.scheduler} in {steps} steps{how}, seed {config.seed}; "
        f"{len(data.test):,} test images of {data.name}; features of a classifier with an accuracy of "
        f"{judge.accuracy:.2%}; real images: in place of the samples, "
        f"{min(len(samples), len(judge.unseen)):,} training images that it was not trained on; ±: 95%",
        "bound": bound,
    }
    return results, samples.images, data.train.images


def measure(samples: Images, judge: Judge) -> dict[str, tuple[float, float | None, float]]:
    """All `METRICS` but the bound: name -> value, half its 95% interval, value of real images.

    The labels of the samples are the requested classes, counting through all; None for an unconditional model.
    """
    test, generator = judge.data.test, seeded_generator(judge.seed, "subset")
    conditional, count = samples.labels is not None, min(len(samples), len(judge.unseen))
    test_rows = torch.randperm(len(test), generator=generator)[:count]
    real = Images(judge.unseen.images[:count], judge.unseen.labels[:count] if conditional else None)
    block = int(samples.labels.max()) + 1 if conditional else 1
    distances = partial(nearest_distances, train=judge.data.train.images, test=test.images)
    values = metrics_of(samples, distances(samples.images), block, test_rows, judge)
    # test images in place of samples: k=2, since the nearest test image of each is itself
    of_real = metrics_of(real, distances(test.images[test_rows], k=2), 1, test_rows, judge)
    return {name: (*value, of_real[name][0]) for name, value in values.items()}


def metrics_of(
    images: Images, distances: Tensor, block: int, test_rows: Tensor, judge: Judge
) -> dict[str, tuple[float, float | None]]:
    """Each metric of N images, samples or real ones, and half its 95% interval.

    `distances`, `block`: see `nearest_distances` and `jackknife`. `test_rows`: at most N rows of the test split, for
    precision and recall, which compare sets of equal size.
    """
    real = judge.features
    classes, confidence, features = classify(judge.classifier, images.images)
    frechet = partial(frechet_distance, reference=gaussian_of(real))
    unbiased, ci = jackknife(frechet, features, block=block)
    values = {
        "frechet_distance": (frechet(features), ci),
        "frechet_unbiased": (unbiased, ci),
        "precision": share_and_ci(in_balls(features[: len(test_rows)], real[test_rows])),
        "recall": share_and_ci(in_balls(real[test_rows], features[: len(test_rows)])),
        "confident": share_and_ci(confidence > CONFIDENT),
    }
    if images.labels is not None:
        values["class_accuracy"] = share_and_ci(classes == images.labels)
    values["nearest_ratio"] = ratio_of_medians(distances), jackknife(ratio_of_medians, distances, block=block)[1]
    return values


def ratio_of_medians(distances: Tensor) -> float:
    """Of the two columns of `nearest_distances`."""
    return (distances[:, 0].median() / distances[:, 1].median()).item()


def nearest_distances(images: Tensor, train: Tensor, test: Tensor, k: int = 1) -> Tensor:
    """`[N, 2]`: to the nearest training image and to the k-th nearest test image."""
    return torch.stack([nearest(images, train)[0][:, 0], nearest(images, test, k)[0][:, -1]], dim=1)


def table(results: dict) -> str:
    """The metrics of evaluation.json as a Markdown table."""
    lines = ["| | model | real images | better |", "| --- | --- | --- | --- |"]
    for name, value in results["metrics"].items():
        ci = f" ± {results['ci'][name]:.2g}" if name in results["ci"] else ""
        real = f"{results['real_images'][name]:.4g}" if name in results["real_images"] else ""
        value = "not defined: test images have exact copies" if value is None else f"{value:.4g}{ci}"
        lines.append(f"| {results['texts'][name]} | {value} | {real} | {METRICS[name][1]} |")
    return "\n".join(lines)


def neighbours_picture(samples: Tensor, train: Tensor) -> Image.Image:
    """The first sixteen samples, each above its three nearest training images; `[N, C, H, W]` uint8."""
    samples = samples[:16]
    indices = nearest(samples, train, k=3)[1]
    rows = torch.cat([samples, *(train[indices[:, i]] for i in range(3))])
    return grid(to_pil(scale(rows)), columns=len(samples), zoom=2)


def bound_picture(bound: dict, path: Path) -> None:
    """Plot the terms of the bound by timestep."""
    from matplotlib.figure import Figure  # not pyplot, which would change the caller's backend

    figure, terms = Figure(figsize=(5, 3.5), layout="tight"), bound["terms"]
    axes = figure.add_subplot(xlabel="t (1: the decoder, L_0)", ylabel="bits per dimension")
    axes.loglog(range(1, len(terms)), terms[:-1], linewidth=1)
    axes.set_title(f"sum: {sum(terms):.3f} bits/dim")
    figure.savefig(path, dpi=100, metadata={"Software": None})
