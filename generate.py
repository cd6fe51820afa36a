"""Draw images from a trained model: a grid, the single images, and the steps from noise to image.

python generate.py --model ddpm-mnist --num_images 64 --save_trajectory
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpm_mnist.errors import ConfigError, file_problem
from ddpm_mnist.options import SampleOptions, opt, read_options, run_script

KEY = "ddpm-mnist"  # text field of a PNG, for a hash of the model and the settings


@dataclass(frozen=True)
class GenerateConfig(SampleOptions):
    """What to draw"""

    class_label: int | None = opt(None, "The class to draw, for a conditional model. Default: all in turn.")
    output: str = opt(
        "grid.png", "The grid; single images go into a folder of that name without the suffix.", path=True
    )
    save_trajectory: bool = opt(False, "Also save a picture of ten steps: x_{t-1}, and the x_0 predicted from x_t.")
    overwrite: bool = opt(False, "Replace pictures drawn with other settings.")


class Output:
    """Where the pictures of a run go. Each stores a key of its model and settings: a repeated run reuses it.

    ConfigError: a picture cannot be written.
    """

    def __init__(self, config: GenerateConfig):
        self.grid, self.key = Path(config.output), ""
        if self.grid.suffix.lower() != ".png":
            raise ConfigError(f"--output {self.grid}: must end in .png")
        self.trajectory = self.grid.with_name(f"{self.grid.stem}_trajectory.png") if config.save_trajectory else None
        self.singles = self.grid.with_suffix("")
        self.paths = [self.grid, *map(self.single, range(config.num_images))]
        self.paths += [self.trajectory] if self.trajectory else []
        for path in self.paths:
            if problem := file_problem(path):
                raise ConfigError(f"--output {self.grid}: {problem}")

    def check(self, key: str, overwrite: bool) -> None:
        """ConfigError: a picture with another key exists and may not be replaced."""
        self.key = key
        more = set(self.singles.glob("[0-9]" * 5 + ".png")).difference(self.paths)  # of a run that drew more
        for path in [*(() if overwrite else self.paths), *more]:
            if path.exists() and self.read(path) is None:
                advice = "it would stay; move it" if path in more else "give --overwrite, or name another"
                raise ConfigError(f"--output {self.grid}: {path} exists, but does not match these settings; {advice}")

    def single(self, number: int) -> Path:
        """Where image `number` goes."""
        return self.singles / f"{number:05d}.png"

    def read(self, path: Path) -> Image.Image | None:
        """The picture in a file, if it is complete and was drawn by the same settings."""
        with suppress(Exception), Image.open(path) as image:
            image.load()
            return image if image.text.get(KEY) == self.key else None

    def write(self, picture: Image.Image, path: Path) -> None:
        """Save a picture with the key."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngInfo()
        text.add_text(KEY, self.key)
        draft = path.with_name(f".{path.name}.draft")
        picture.save(draft, "PNG", pnginfo=text)
        draft.replace(path)  # complete or absent, whenever the run is stopped


def generate(config: GenerateConfig) -> Output:
    """Draw and save; returns where. ConfigError: an option is invalid, or the model cannot be loaded."""
    output, trajectory = Output(config), []
    from tqdm.auto import tqdm  # here and not above, so that --help need not wait for torch

    from ddpm_mnist.loading import load_model
    from ddpm_mnist.sampling import grid, shown_steps, to_pil, trajectory_picture

    model = load_model(config.model)
    steps, classes = model.num_steps(config), model.num_classes
    if config.class_label is not None and (classes is None or not 0 <= config.class_label < classes):
        raise ConfigError(f"--class_label {config.class_label}: the model has {classes or 'no'} classes")

    output.check(model.key(config, config.class_label), config.overwrite)
    images = {number: output.read(output.single(number)) for number in range(config.num_images)}
    first = config.batch_size if config.save_trajectory else 0  # the trajectory is of the first batch
    missing = [number for number, image in images.items() if image is None or number < first]
    draws, batches = model.draw(missing, config, config.class_label), -(-len(missing) // config.batch_size)
    draws = tqdm(draws, f"{config.scheduler}, {steps} steps", total=batches * steps)
    for count, (batch, step) in enumerate(draws, 1):
        if count in shown_steps(steps):
            trajectory.append(step)
        for number, image in zip(batch, to_pil(step.prev_sample)) if step.last else ():
            images[number] = image
            output.write(image, output.single(number))
    output.write(grid(list(images.values()), zoom=2), output.grid)
    if config.save_trajectory:
        output.write(trajectory_picture(trajectory), output.trajectory)
    return output


def main(arguments: list[str]) -> int:
    output = generate(read_options(GenerateConfig, arguments, __doc__.splitlines()[0]))
    print(f"Wrote {', '.join(str(path) for path in (output.grid, output.singles, output.trajectory) if path)}.")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
