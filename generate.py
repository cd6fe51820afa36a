"""Draw images from a trained model: a grid, the single images, and how they came out of the noise.

python generate.py --model ddpm-mnist --num_images 64 --save_trajectory
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ddpm_mnist.errors import ConfigError, file_problem
from ddpm_mnist.loading import load_model
from ddpm_mnist.options import SampleOptions, opt, read_options, run_script
from ddpm_mnist.sampling import grid, moments_to_show, to_pil, trajectory_picture


@dataclass(frozen=True)
class GenerateConfig(SampleOptions):
    """What to draw"""

    class_label: int | None = opt(None, "The class to draw, for a conditional model. Default: all in turn.")
    output: str = opt(
        "grid.png", "The grid; single images go into a folder of that name without the suffix.", path=True
    )
    save_trajectory: bool = opt(False, "Also a picture of x_t and of the x_0 predicted from it, along the way.")
    overwrite: bool = opt(False, "Replace the output of an earlier run.")


def generate(config: GenerateConfig) -> list[Path]:
    """Draw and save; returns the files written.

    Raises:
        ConfigError: an option cannot be right, the model cannot be loaded, or a file is there already.
    """
    output = Path(config.output)
    singles, trajectory_path = output.with_suffix(""), output.with_name(f"{output.stem}_trajectory.png")
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output}: must end in .png")
    numbers = range(config.num_images)
    paths = [output, *(singles / f"{number:05d}.png" for number in numbers)]
    paths += [trajectory_path] if config.save_trajectory else []
    there = [path for path in (output, singles, trajectory_path) if path.exists() and path in (singles, *paths)]
    if there and not config.overwrite:
        raise ConfigError(f"--output {output}: {there[0]} is there already; give --overwrite")
    for path in paths:
        if problem := file_problem(path):
            raise ConfigError(f"--output {output}: {problem}")

    model = load_model(config.model)
    steps = model.num_steps(config)
    classes = model.num_classes
    if config.class_label is not None and (classes is None or not 0 <= config.class_label < classes):
        raise ConfigError(f"--class_label {config.class_label}: the model has {classes or 'no'} classes")

    trajectory = []  # steps of the first batch
    images = []
    batches = -(-len(numbers) // config.batch_size)
    drawn = model.draw(numbers, config, config.class_label)
    progress = tqdm(drawn, total=batches * steps, desc=f"{config.scheduler}, {steps} steps")
    for number, (batch, step) in enumerate(progress):
        if batch == 0 and number in moments_to_show(steps):
            trajectory.append(step)
        if step.last:
            images.extend(to_pil(step.prev_sample))

    singles.mkdir(parents=True, exist_ok=True)
    new = set(paths)
    for path in singles.glob("[0-9]" * 5 + ".png"):  # of an earlier run that drew more
        if path not in new and path.is_file():
            path.unlink()
    grid(images, zoom=2).save(output)
    for image, path in zip(images, paths[1:]):
        image.save(path)
    if config.save_trajectory:
        trajectory_picture(trajectory).save(trajectory_path)
    return paths


def main(arguments: list[str]) -> int:
    config = read_options(GenerateConfig, arguments, __doc__.splitlines()[0])
    written = generate(config)
    print(f"Wrote {written[0]} and {len(written) - 1} more files.")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
