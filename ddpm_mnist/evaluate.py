"""Measure a trained model: are its samples like the real images, as varied, new, and how many bits does it need?

    python -m ddpm_mnist.evaluate --model ddpm-mnist --dataset_name PATH_OR_ID

Beside each figure stands the floor: the same figure for real training images in place of samples. No download is
needed: the features are those of a small classifier, trained on the same data. What is written into the model's folder
(evaluation.json, evaluation.md, two pictures) goes into its card with push_to_hub.py.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .bound import variational_bound
from .card import weights_sha256
from .classifier import accuracy, get_classifier, read, train_classifier
from .config import ConfigError, TrainConfig, opt, read_options, run_script
from .data import Data, Images, load_data
from .draws import seeded_generator
from .generate import STEPS, GenerateConfig, load_model
from .metrics import (
    bootstrap_ci,
    density_coverage,
    frechet_distance,
    mean_and_ci,
    nearest,
    precision_recall,
)
from .sampling import grid, sample_images, to_pil

CONFIDENT = 0.9


@dataclass
class EvaluateConfig:
    """The options of `python -m ddpm_mnist.evaluate`."""

    model: str = opt("ddpm-mnist", "Folder of a pipeline, or its Hub id.")
    dataset_name: str | None = opt(None, "Hub id or local folder of what it was trained on; as in training.")
    num_images: int = opt(2000, "Samples to draw, and real images to set beside them.")
    batch_size: int = opt(100, "Samples at a time; it does not change them.")
    scheduler: Literal["ddpm", "ddim", "dpmsolver"] = opt("ddim", "Sampler.")
    num_inference_steps: int | None = opt(None, "Steps. Default: all 1000 for ddpm, 50 for ddim, 20 for dpmsolver.")
    guidance_scale: float = opt(2.0, "How far towards the class, for a conditional model; 1 is no guidance.")
    mixed_precision: Literal["no", "bf16"] = opt(
        "no", "bf16: over twice as fast where the hardware computes in it, for the samples."
    )
    seed: int = opt(0, "Of samples, subsets, noise and classifier.")
    bound_images: int = opt(10, "Test images for each timestep of the variational bound; 0: leave the bound out.")
    feature_extractor: Literal["classifier", "inception"] = opt(
        "classifier", "inception: also the Frechet distance that papers quote; needs torch-fidelity and its weights."
    )
    classifier_steps: int = opt(1400, "Length of the classifier's training.")
    min_classifier_accuracy: float = opt(0.985, "On the test split; a classifier that reads less is an error.")
    output_dir: str | None = opt(None, "Where the results go. Default: the model's folder.")


@dataclass
class Figure:
    """A measurement, half its 95% interval, the same of real training images, and which way is better."""

    name: str
    text: str
    value: float
    ci: float | None
    floor: float | None
    better: str

    def row(self) -> str:
        value = f"{self.value:.4g}" + ("" if self.ci is None else f" ± {self.ci:.2g}")
        return f"| {self.text} | {value} | {'' if self.floor is None else f'{self.floor:.4g}'} | {self.better} |"


def draw_samples(config: EvaluateConfig, unet, scheduler, null_class_label: int | None) -> tuple[Tensor, Tensor | None]:
    """`[num_images, C, H, W]` uint8, as a file would hold them, and the classes asked for, in equal parts, or None."""
    numbers = torch.arange(config.num_images)
    classes, asked = unet.config.num_class_embeds, None
    if classes is not None:
        asked = numbers % (classes - (null_class_label is not None))
    steps = config.num_inference_steps or min(STEPS[config.scheduler], scheduler.config.num_train_timesteps)
    drawn = []
    for batch in tqdm(numbers.split(config.batch_size), desc=f"sampling, {config.scheduler}, {steps} steps"):
        labels = None if asked is None else asked[batch].to(unet.device)
        guidance = (config.guidance_scale, null_class_label)
        with torch.autocast(unet.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            samples = sample_images(unet, scheduler, config.seed, batch.tolist(), steps, labels, *guidance)
        drawn.append(((samples.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(drawn), asked


def inception_features(pixels: Tensor) -> Tensor:
    """`[N, 2048]`: what papers compare. ConfigError: torch-fidelity, or its weights, are not there."""
    try:
        from torch_fidelity.utils import create_feature_extractor

        extractor = create_feature_extractor("inception-v3-compat", ["2048"], cuda=torch.cuda.is_available())
    except Exception as e:  # not installed, or no way to download the weights: whatever it is, there is one cure
        raise ConfigError(
            f"--feature_extractor inception: not available ({type(e).__name__}: {str(e)[:80]}); `pip install "
            "torch-fidelity`, connect once for its weights, or leave the option out"
        ) from None
    rgb = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.cat([extractor(part.to(device))[0].cpu() for part in rgb.split(100)])


def compare(
    samples: Tensor, asked: Tensor | None, data: Data, classifier, seed: int, classifier_steps: int = 1400
) -> list[Figure]:
    """Samples, and as many training images for the floor, against the test split.

    Args:
        samples: `[N, C, H, W]` uint8.
        asked: `[N]`, the class that each was to be, or None.
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

    def distance(x: Tensor) -> float:
        return frechet_distance(x, test_features)

    add(
        "frechet_distance",
        "Fréchet distance to the test split",
        distance(features),
        bootstrap_ci(distance, features, seed),
        distance(floor_features),
        "down",
    )
    real = test_features[test_rows]
    for function, names in (
        (precision_recall, ("precision", "recall")),
        (density_coverage, ("density", "coverage")),
    ):
        for name, values, floors in zip(names, function(features, real), function(floor_features, real)):
            add(name, name, *mean_and_ci(values), floors.double().mean().item(), "up")
    sure, floor_sure = (c > CONFIDENT for c in (confidence, floor_confidence))
    add("confident", f"read with over {CONFIDENT} confidence", *mean_and_ci(sure), floor_sure.float().mean(), "up")

    def imbalance(read_as: Tensor) -> float:
        """Total variation distance between the shares of the classes and those of the test split."""
        shares = (torch.bincount(x, minlength=classifier.config.num_labels) / len(x) for x in (read_as, test_classes))
        return (next(shares) - next(shares)).abs().sum().item() / 2

    if asked is None:
        text, ci = "share of classes out of balance", bootstrap_ci(imbalance, classes, seed)
        add("class_imbalance", text, imbalance(classes), ci, imbalance(floor_classes), "down")
    else:
        add("read_as_asked", "read as the class asked for", *mean_and_ci(classes == asked), None, "up")
        trained = train_classifier(Images(samples, asked), classifier_steps, seed)
        floor = train_classifier(
            Images(data.train.images[train_rows], data.train.labels[train_rows]), classifier_steps, seed
        )
        add(
            "accuracy_from_samples",
            "accuracy of a classifier trained on the samples alone",
            accuracy(trained, data.test),
            None,
            accuracy(floor, data.test),
            "up",
        )

    def flat(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float() / 255

    pixels, train_pixels, test_pixels = flat(samples), flat(data.train.images[others]), flat(data.test.images)

    def to_train_over_to_test(points: Tensor, k: int = 1) -> Tensor:
        to_test = nearest(points, test_pixels, k)[0][:, -1]  # k = 2 for test images, which are nearest to themselves
        return torch.stack([nearest(points, train_pixels)[0][:, 0], to_test], dim=1)

    def ratio(pairs: Tensor) -> float:
        return (pairs[:, 0].median() / pairs[:, 1].median()).item()

    pairs, floor_pairs = to_train_over_to_test(pixels), to_train_over_to_test(test_pixels[test_rows], k=2)
    text = "distance to the nearest training image, over that to the nearest test image"
    ci = bootstrap_ci(ratio, pairs, seed)
    add("nearest_ratio", text, ratio(pairs), ci, ratio(floor_pairs), "1: nothing memorised")
    return figures


def neighbours_picture(samples: Tensor, train: Images):
    """The first sixteen samples, each above its three nearest training images."""
    samples = samples[:16]
    points, reference = (x.flatten(1).float() / 255 for x in (samples, train.images))
    found = nearest(points, reference, 3)[1]
    rows = torch.cat([samples, *(train.images[found[:, i]] for i in range(3))])
    return grid(to_pil(rows.float() / 127.5 - 1), columns=len(samples), zoom=2)


def bound_picture(terms: list[float], path: Path) -> None:
    """The terms of the bound over the timesteps, which no loss curve shows: nearly all bits are at the first ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.loglog(range(1, len(terms)), terms[:-1], linewidth=1)
    axes.set(xlabel="t (1: the decoder, L_0)", ylabel="bits per dimension", title=f"sum: {sum(terms):.3f} bits/dim")
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def evaluate(config: EvaluateConfig) -> dict:
    """Measure, write the results and return them.

    Raises:
        ConfigError: an option cannot be right, or the model, the data or the classifier are not what it takes.
    """
    for name in ("num_images", "batch_size", "num_inference_steps", "classifier_steps"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"--{name} {getattr(config, name)}: must be at least 1")
    if config.bound_images < 0 or config.bound_images == 1:
        raise ConfigError(f"--bound_images {config.bound_images}: must be 2 or more for an interval, or 0 for no bound")
    local = Path(config.model).is_dir()
    if config.output_dir is None and not local:
        raise ConfigError(f"--output_dir: missing; {config.model} is no folder, so say where the results shall go")
    output_dir = Path(config.output_dir or config.model)

    started = time.perf_counter()
    unet, scheduler, null_class_label = load_model(GenerateConfig(model=config.model, scheduler=config.scheduler))
    if scheduler.config.num_train_timesteps < (config.num_inference_steps or 1):
        raise ConfigError(
            f"--num_inference_steps {config.num_inference_steps}: the model has "
            f"{scheduler.config.num_train_timesteps} timesteps"
        )
    data_config = TrainConfig(dataset_name=config.dataset_name, num_validation_samples=10**9)
    data_config.unet = {"in_channels": unet.config.in_channels, "sample_size": unet.config.sample_size}
    data = load_data(data_config)
    if min(config.num_images, len(data.train), len(data.test)) < 10:
        raise ConfigError(f"--num_images {config.num_images}: samples, training and test images must be at least 10")
    classifier, read_right = get_classifier(data, config.classifier_steps, config.seed, config.min_classifier_accuracy)
    samples, asked = draw_samples(config, unet, scheduler, null_class_label)
    figures = compare(samples, asked, data, classifier, config.seed, config.classifier_steps)
    if config.feature_extractor == "inception":
        test = inception_features(data.test.images)
        value, floor = (
            frechet_distance(inception_features(x), test) for x in (samples, data.train.images[: config.num_images])
        )
        figures.append(Figure("fid", "FID (Inception)", value, None, floor, "down"))
    bound = None
    if config.bound_images:
        try:
            ddpm = load_model(GenerateConfig(model=config.model, scheduler="ddpm"))[1]
            bound = variational_bound(unet, ddpm, data.test, config.bound_images, seed=config.seed)
        except ValueError as e:
            raise ConfigError(f"--bound_images {config.bound_images}: {e}; 0 leaves the bound out") from None
        text = f"variational bound, bits/dim ({bound['evaluations']:,} evaluations)"
        figures.append(Figure("bits_per_dim", text, bound["bits_per_dim"], bound["ci"], None, "down"))

    steps = config.num_inference_steps or min(STEPS[config.scheduler], scheduler.config.num_train_timesteps)
    guided = f", guidance {config.guidance_scale}" if null_class_label is not None else ""
    protocol = (
        f"{config.num_images:,} samples by {config.scheduler} in {steps} steps{guided}, seed {config.seed}, averaged "
        f"weights if the run kept them, against {len(data.test):,} test images of {data.name} (distances within "
        f"{min(config.num_images, len(data.test)):,} of them for precision to coverage); features of a classifier that "
        f"reads {read_right:.2%} of the test split; floor: as many training images in place of the samples; ±: 95%"
    )
    results = {
        "weights_sha256": weights_sha256(Path(config.model)) if local else None,
        "metrics": {f.name: round(float(f.value), 6) for f in figures},
        "ci": {f.name: float(f.ci) for f in figures if f.ci is not None},
        "floor": {f.name: float(f.floor) for f in figures if f.floor is not None},
        "protocol": protocol,
        "classifier_accuracy": read_right,
        "bound": bound,
        "minutes": (time.perf_counter() - started) / 60,
        "config": vars(config),
    }
    table = "\n".join(["| | model | real images | better |", "| --- | --- | --- | --- |", *(f.row() for f in figures)])
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    (output_dir / "evaluation.md").write_text(f"{table}\n\n*{protocol}.*\n")
    neighbours_picture(samples, data.train).save(output_dir / "evaluation_neighbours.png")
    if bound is not None:
        bound_picture(bound["terms"], output_dir / "evaluation_bound.png")
    return results


def main() -> int:
    config = read_options(EvaluateConfig, __doc__.splitlines()[0])
    results = evaluate(config)
    folder = Path(config.output_dir or config.model)
    print((folder / "evaluation.md").read_text())
    print(f"Wrote {folder / 'evaluation.json'} after {results['minutes']:.1f} minutes.")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
