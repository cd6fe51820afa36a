"""Measure a trained model: quality, variety and novelty of its samples, and its bits per dimension.

    python evaluate.py --model ddpm-mnist

Beside each value is that of real images in place of the samples. The features come from a small classifier that is
trained here on the same data. The results are written into the model's folder (evaluation.json, evaluation.md, two
pictures); push_to_hub.py adds the table to the model card.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from ddpm_mnist.errors import ConfigError, file_problem
from ddpm_mnist.options import DataOptions, SampleOptions, opt, options_of, peek, read_options, read_yaml, run_script
from ddpm_mnist.record import CONFIG_FILE, RESULTS_FILE, is_checkpoint, read_json, weights_sha256, write_json

RESULTS, TABLE = "evaluation.json", "evaluation.md"
NEIGHBOURS, BOUND = "evaluation_neighbours.png", "evaluation_bound.png"
OUTPUTS = (RESULTS, TABLE, NEIGHBOURS, BOUND)
FROM_THE_MODEL = ("dataset_name", "dataset_config_name", "image_column", "label_column", "center_crop")


@dataclass(frozen=True)
class EvaluateConfig(DataOptions, SampleOptions):
    """Evaluation"""

    num_images: int = opt(
        2000, "Samples to draw; precision and recall compare as many test images.", at_least=10, at_most=1_000_000
    )
    batch_size: int = opt(100, "Samples at a time; it does not change them.", at_least=1, at_most=1_000_000)
    seed: int = opt(0, "Fixes samples, subsets, noise and classifier.", at_least=0, at_most=2**63 - 1)
    bound_images: int = opt(
        10, "Images per timestep of the bound, 2 or more; 0: no bound.", at_least=0, at_most=1_000_000
    )
    classifier_steps: int = opt(1400, "Length of the classifier's training.", at_least=1, at_most=1_000_000)
    output_dir: str | None = opt(None, "Where the results go. Default: the model's folder.", path=True)


def parse_args(arguments: list[str]) -> EvaluateConfig:
    """Read the options. Those of the dataset default to what the model was trained with.

    ConfigError: an option is invalid; or the model was trained on a local dataset that does not exist.
    """
    folder = record_of(peek(arguments, "model"))
    file, results = folder / CONFIG_FILE, read_json(folder / RESULTS_FILE)
    values = read_yaml("--model", file) if file.is_file() else {}
    values = {name: values[name] for name in FROM_THE_MODEL if name in values}
    config = read_options(EvaluateConfig, arguments, __doc__.splitlines()[0], file, values)
    local, name = results.get("dataset_is_local", False), config.dataset_name
    if local and name == values.get("dataset_name") and not Path(name).exists():
        raise ConfigError(f"--dataset_name: the model was trained on {name}, which does not exist; give its path")
    return config


def record_of(model: str | None) -> Path:
    """The folder with what a run wrote beside its model; for a checkpoint, that of its run; for a Hub id, the cache."""
    folder = Path(model or EvaluateConfig.model).expanduser()
    if model is None or folder.exists():  # the Hub is asked only for what was named
        return folder.parent if is_checkpoint(folder) else folder
    from ddpm_mnist.offline import model_folder

    return model_folder(model)


def evaluate(config: EvaluateConfig) -> str:
    """Measure, write the results and return them as text.

    ConfigError: an option is invalid, or the model or the data cannot be evaluated.
    """
    if config.bound_images == 1:
        raise ConfigError("--bound_images 1: must be 2 or more for an interval, or 0 for no bound")
    if config.output_dir is None and not Path(config.model).is_dir():
        raise ConfigError(f"--output_dir: missing; {config.model} is not a folder, so name one for the results")
    output_dir = Path(config.output_dir or config.model)
    for name in OUTPUTS:
        if problem := file_problem(output_dir / name):
            raise ConfigError(f"--output_dir {output_dir}: {problem}")

    from ddpm_mnist.evaluation import report  # here and not above, so that --help need not wait for torch
    from ddpm_mnist.loading import load_model

    model = load_model(config.model)
    measured = Path(config.model).is_dir() and not is_checkpoint(Path(config.model))  # what goes into the model's card
    weights = weights_sha256(Path(config.model)) if measured else None
    results, samples, train = report.measure_model(model, config)
    settings = {o.name: getattr(config, o.name) for o in options_of(EvaluateConfig) if not o.metadata["path"]}
    results |= {"config": settings, "weights_sha256": weights}
    text = f"{report.table(results)}\n\n*{results['protocol']}.*\n"
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / RESULTS, results)
    (output_dir / TABLE).write_text(text, encoding="utf-8")
    report.neighbours_picture(samples, train).save(output_dir / NEIGHBOURS)
    (output_dir / BOUND).unlink(missing_ok=True)  # of an earlier evaluation
    if results["bound"]:
        report.bound_picture(results["bound"], output_dir / BOUND)
    return text + f"\nWrote {output_dir / RESULTS}."


def main(arguments: list[str]) -> int:
    print(evaluate(parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
