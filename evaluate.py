"""Measure a trained model: are its samples like the real images, as varied, new, and how many bits does it need?

    python evaluate.py --model ddpm-mnist
    python evaluate.py --model ddpm-mnist --compare ANOTHER --num_images 500    # which is better, by the same noise?

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
from huggingface_hub import snapshot_download
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_mnist.errors import ConfigError, file_problem
from ddpm_mnist.evaluation.bound import cannot_bound, variational_bound
from ddpm_mnist.evaluation.classifier import get_classifier, labelled
from ddpm_mnist.evaluation.metrics import frechet_distance
from ddpm_mnist.evaluation.report import (
    Figure,
    bound_picture,
    compare,
    inception_features,
    load_inception,
    neighbours_picture,
    tell_apart,
)
from ddpm_mnist.images.dataset import EMBEDDED_DATASET, Data, ImageShape, load_data
from ddpm_mnist.loading import Model, is_checkpoint, load_model
from ddpm_mnist.offline import hub_or_cache
from ddpm_mnist.options import DataOptions, SampleOptions, opt, options_of, peek, read_options, read_yaml, run_script
from ddpm_mnist.randomness import seeded_generator
from ddpm_mnist.record import is_digits, read_json, weights_sha256
from ddpm_mnist.sampling import labels_for, to_uint8

OUTPUTS = ("evaluation.json", "evaluation.md", "evaluation_neighbours.png", "evaluation_bound.png")


@dataclass(frozen=True)
class EvaluateConfig(DataOptions, SampleOptions):
    """Evaluation"""

    num_images: int = opt(2000, "Samples to draw, and real images to compare with.", at_least=1)
    batch_size: int = opt(100, "Samples at a time; it does not change them.", at_least=1)
    seed: int = opt(0, "Fixes samples, subsets, noise and classifier.", at_least=0)
    bound_images: int = opt(10, "Test images for each timestep of the variational bound; 0: no bound.", at_least=0)
    feature_extractor: Literal["classifier", "inception"] = opt(
        "classifier", "inception: also the Frechet distance that papers quote; needs torch-fidelity and its weights."
    )
    classifier_steps: int = opt(1400, "Length of the classifier's training.", at_least=1)
    min_classifier_accuracy: float | None = opt(
        None,
        "On the test split; a lower accuracy is an error. Default: 0.985 for digits, none for other images.",
        at_least=0,
        at_most=1,
    )
    compare: str | None = opt(
        None,
        "Another model: print the differences between the two, by the same noise, and write nothing.",
        path=True,
    )
    output_dir: str | None = opt(None, "Where the results go. Default: the model's folder.", path=True)


def draw_samples(config: EvaluateConfig, model: Model) -> tuple[Tensor, Tensor | None, int]:
    """`[num_images, C, H, W]` uint8, as a file would hold them; the classes asked for, or None; the number of steps."""
    steps = model.num_steps(config)
    numbers = range(config.num_images)
    batches = (step.prev_sample for _, step in model.draw(numbers, config) if step.last)
    total = -(-config.num_images // config.batch_size)
    progress = tqdm(batches, total=total, desc=f"sampling, {config.scheduler}, {steps} steps")
    return torch.cat([to_uint8(samples).cpu() for samples in progress]), labels_for(numbers, model.num_classes), steps


def load_judge(config: EvaluateConfig, model: Model) -> tuple[Data, torch.nn.Module, float]:
    """The data, the classifier that was trained on it, and the share of the test split that it reads right.

    Raises:
        ConfigError: the data or the classifier are not what an evaluation takes.
    """
    shape = ImageShape(model.unet.config.in_channels, model.unet.config.sample_size)
    data = load_data(config, shape, with_labels=True)
    if min(config.num_images, len(data.train), len(data.test)) < 10:
        raise ConfigError(f"--num_images {config.num_images}: samples, training and test images must be at least 10")
    least = config.min_classifier_accuracy
    if least is None:
        least = 0.985 if is_digits(data.name) else 0.0
    return data, *get_classifier(data, config.classifier_steps, config.seed, least)


def compare_with(config: EvaluateConfig) -> str:
    """The table that tells two models apart. ConfigError: see `evaluate`; or they draw images of different kinds."""
    models = load_model(config.model), load_model(config.compare, "--compare")
    kinds = [(m.unet.config.in_channels, m.unet.config.sample_size, m.num_classes) for m in models]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"--compare {config.compare}: draws (channels, size, classes) {kinds[1]}, and --model {kinds[0]}; name two "
            "models of the same images"
        )
    data, classifier, _ = load_judge(config, models[0])
    samples = tuple(draw_samples(config, model)[0] for model in models)
    return tell_apart(models, samples, data, classifier, config.seed)


def evaluate(config: EvaluateConfig) -> dict:
    """Measure, write the results and return them.

    Raises:
        ConfigError: an option cannot be right, or the model, the data or the classifier are not what it takes.
    """
    if config.bound_images == 1:
        raise ConfigError("--bound_images 1: must be 2 or more for an interval, or 0 for no bound")
    local = Path(config.model).is_dir()
    if config.output_dir is None and not local:
        raise ConfigError(f"--output_dir: missing; {config.model} is no folder, so say where the results shall go")
    output_dir = Path(config.output_dir or config.model)
    for name in OUTPUTS:
        if problem := file_problem(output_dir / name):
            raise ConfigError(f"--output_dir {output_dir}: {problem}")

    started = time.perf_counter()
    model = load_model(config.model)
    model.num_steps(config)
    if config.bound_images and (problem := cannot_bound(model.scheduler)):
        raise ConfigError(f"--bound_images {config.bound_images}: {problem}; 0 leaves the bound out")
    inception = load_inception() if config.feature_extractor == "inception" else None
    data, classifier, read_right = load_judge(config, model)
    samples, asked, steps = draw_samples(config, model)
    figures = compare(samples, asked, data, classifier, config.seed, config.classifier_steps)
    if inception is not None:
        test = inception_features(inception, data.test.images)
        some = torch.randperm(len(data.train), generator=seeded_generator(config.seed, "subset"))[: config.num_images]
        value, floor = (
            frechet_distance(inception_features(inception, x), test) for x in (samples, data.train.images[some])
        )
        figures.append(Figure("fid", "FID (Inception)", value, None, floor, "down"))
    bound = None
    if config.bound_images:
        test_images = data.test if model.num_classes is None else labelled(data)[1]
        bound = variational_bound(model.unet, model.scheduler, test_images, config.bound_images, seed=config.seed)
        text = f"variational bound, bits/dim ({bound['evaluations']:,} evaluations)"
        figures.append(Figure("bits_per_dim", text, bound["bits_per_dim"], bound["ci"], None, "down"))

    guided = ""
    if model.null_class_label is not None:
        guided = f", guidance {config.guidance_scale:g} where log SNR is at least {config.guidance_min_log_snr:g}"
    protocol = (
        f"{config.num_images:,} samples by {config.scheduler} in {steps} steps{guided}, seed {config.seed}, averaged "
        f"weights if the run kept them, against {len(data.test):,} test images of {data.name} (distances within "
        f"{min(config.num_images, len(data.test)):,} of them for precision to coverage); features of a classifier that "
        f"classifies {read_right:.2%} of the test split correctly; floor: as many training images in place of the "
        "samples; ±: 95%"
    )
    results = {
        "weights_sha256": weights_sha256(Path(config.model)) if local and not is_checkpoint(config.model) else None,
        "metrics": {f.name: round(float(f.value), 6) for f in figures},
        "texts": {f.name: f.text for f in figures},
        "ci": {f.name: float(f.ci) for f in figures if f.ci is not None},
        "floor": {f.name: float(f.floor) for f in figures if f.floor is not None},
        "protocol": protocol,
        "classifier_accuracy": read_right,
        "bound": bound,
        "minutes": (time.perf_counter() - started) / 60,
        "config": {o.name: getattr(config, o.name) for o in options_of(EvaluateConfig) if not o.metadata["path"]},
    }
    table = "\n".join(["| | model | real images | better |", "| --- | --- | --- | --- |", *(f.row() for f in figures)])
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output_dir / "evaluation.md").write_text(f"{table}\n\n*{protocol}.*\n", encoding="utf-8")
    neighbours_picture(samples, data.train).save(output_dir / "evaluation_neighbours.png")
    if bound is not None:
        bound_picture(bound["terms"], output_dir / "evaluation_bound.png")
    return results


def record_of(model: str) -> Path:
    """The folder with what a run wrote beside its model; for a checkpoint, that of its run; for a Hub id, the cache."""
    folder = Path(model).expanduser()
    if folder.exists():
        return folder.parent if is_checkpoint(folder) else folder
    try:
        with hub_or_cache(model, "model", "no such model"):
            return Path(snapshot_download(model, allow_patterns=["train_config.yaml", "train_results.json"]))
    except Exception:  # `load_model` will say what is wrong with the model
        return folder


def parse_args(arguments: list[str]) -> EvaluateConfig:
    """The options; those of the data have the model's own as defaults.

    Raises:
        ConfigError: an option cannot be right; or the model was trained on a local set that is not here.
    """
    model = peek(arguments, "model").model
    record = record_of(model) if model else Path(EvaluateConfig.model)  # the Hub is asked for what was named
    file = record / "train_config.yaml"
    values = read_yaml("--model", file) if file.is_file() else {}
    values = {option.name: values[option.name] for option in options_of(DataOptions) if option.name in values}
    results = read_json(record / "train_results.json")
    if results.get("dataset") == EMBEDDED_DATASET:  # which the run may have fallen back to
        values["dataset_name"] = EMBEDDED_DATASET
    config = read_options(EvaluateConfig, arguments, __doc__.splitlines()[0], file, values)
    local, name = results.get("dataset_is_local", False), config.dataset_name
    if local and name and name == values.get("dataset_name") and not Path(name).exists():
        raise ConfigError(f"--dataset_name: the model was trained on {name}, which is not here; say where it is")
    return config


def main(arguments: list[str]) -> int:
    config = parse_args(arguments)
    if config.compare is not None:
        print(compare_with(config))
        return 0
    results = evaluate(config)
    folder = Path(config.output_dir or config.model)
    print((folder / "evaluation.md").read_text(encoding="utf-8"))
    print(f"Wrote {folder / 'evaluation.json'} after {results['minutes']:.1f} minutes.")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
