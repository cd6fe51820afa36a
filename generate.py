"""Draw images from a trained model: a grid, the single images, and how they came out of the noise.

python generate.py --model ddpm-mnist --num_images 64 --save_trajectory
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from ddpm_mnist.errors import ConfigError, file_problem
from ddpm_mnist.options import SampleOptions, opt, read_options, run_script


@dataclass(frozen=True)
class GenerateConfig(SampleOptions):
    """What to draw"""

    class_label: int | None = opt(None, "The class to draw, for a conditional model. Default: all in turn.")
    output: str = opt(
        "grid.png", "The grid; single images go into a folder of that name without the suffix.", path=True
    )
    save_trajectory: bool = opt(False, "Also a picture of x_t and of the x_0 predicted from it, along the way.")
    overwrite: bool = opt(False, "Replace the output of an earlier run.")


def output_paths(config: GenerateConfig) -> list[Path]:
    """The grid, the single images, the trajectory. ConfigError: one exists, or cannot be written."""
    grid = Path(config.output)
    singles, trajectory = grid.with_suffix(""), grid.with_name(f"{grid.stem}_trajectory.png")
    if grid.suffix.lower() != ".png":
        raise ConfigError(f"--output {grid}: must end in .png")
    paths = [grid, *(singles / f"{number:05d}.png" for number in range(config.num_images))]
    paths += [trajectory] if config.save_trajectory else []
    existing = [path for path in (grid, singles, trajectory) if path.exists() and path in (singles, *paths)]
    if existing and not config.overwrite:
        raise ConfigError(f"--output {grid}: {existing[0]} exists; give --overwrite")
    for path in singles.glob("[0-9]" * 5 + ".png"):  # of an earlier run that drew more, or the user's
        if path not in paths:
            raise ConfigError(f"--output {grid}: {path} would stay among the new images; move it, or name another")
    for path in paths:
        if problem := file_problem(path):
            raise ConfigError(f"--output {grid}: {problem}")
    return paths


def generate(config: GenerateConfig) -> list[Path]:
    """Draw and save; returns the files written. ConfigError: an option cannot be right, or the model not be loaded."""
    paths = output_paths(config)
    from tqdm.auto import tqdm  # here and not above, so that --help need not wait for torch

    from ddpm_mnist.loading import load_model
    from ddpm_mnist.sampling import grid, images_and_trajectory, trajectory_picture

    model = load_model(config.model)
    steps, classes = model.num_steps(config), model.num_classes
    if config.class_label is not None and (classes is None or not 0 <= config.class_label < classes):
        raise ConfigError(f"--class_label {config.class_label}: the model has {classes or 'no'} classes")

    drawn = model.draw(range(config.num_images), config, config.class_label)
    total = -(-config.num_images // config.batch_size) * steps
    drawn = tqdm(drawn, total=total, desc=f"{config.scheduler}, {steps} steps")
    images, trajectory = images_and_trajectory(drawn, steps)

    singles = paths[1].parent
    singles.mkdir(parents=True, exist_ok=True)
    pictures = [grid(images, zoom=2), *images, *([trajectory_picture(trajectory)] if config.save_trajectory else [])]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    return paths


def main(arguments: list[str]) -> int:
    written = generate(read_options(GenerateConfig, arguments, __doc__.splitlines()[0]))
    print(f"Wrote {written[0]} and {len(written) - 1} more files.")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
