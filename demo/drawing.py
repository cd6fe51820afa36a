"""What the page shows: pictures as they leave the noise, and drawings that are noised and denoised. Knows no Gradio."""

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from huggingface_hub import constants, hf_hub_download
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "ddpm_mnist"))  # in a Space, both lie beside this file
from pipeline import (  # noqa: E402
    GUIDANCE_SCALE,
    MIN_LOG_SNR,
    count_classes,
    guidance_at,
    guided_noise,
    step_arguments,
    with_timesteps,
)
from randomness import seeded_generator  # noqa: E402

SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver": DPMSolverMultistepScheduler}
DEFAULT_STEPS = {"ddpm": 50, "ddim": 50, "dpmsolver": 20}
IN_TURN, NO_LABEL = "each in turn", "none"

# The limits that keep a public page alive.
MAX_IMAGES, MAX_TRIES, MAX_WORK = 16, 8, 2000  # work: images times steps
MAX_GUIDANCE, MAX_SEED, MAX_DRAWING = 10.0, 2**31 - 1, 500_000  # the last: characters of a drawing's data URL
MAX_FRAMES = 50  # of the steps that the page shows


class Refusal(ValueError):
    """What a visitor asked for cannot be done; the message says why, and what to do."""


class Model(NamedTuple):
    """A trained model, on the CPU and in eval mode, and how the page speaks of it."""

    name: str
    card: str | None  # address of the model card; None for a folder
    unet: UNet2DModel
    schedule: DDPMScheduler
    null_class_label: int | None  # the label that stands for none
    noun: str  # "digit" or "image"

    @property
    def classes(self) -> int | None:
        """How many classes can be asked for; None for an unconditional model."""
        return count_classes(self.unet.config.num_class_embeds, self.null_class_label)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def timesteps(self) -> int:
        return self.schedule.config.num_train_timesteps


class Settings(NamedTuple):
    """What a picture depends on besides the model; the names are those of the page's address."""

    digit: str = IN_TURN
    count: int = 10
    guidance: float = GUIDANCE_SCALE
    sampler: str = "ddpm"
    steps: int = 50
    seed: int = 0


# ---- the model -----------------------------------------------------------------------------------------------------


def load_model(name: str) -> Model:
    """The pipeline in a folder or on the Hub. No code of it is run: the loop is in the `pipeline.py` of this repo.

    Raises:
        Exception: of diffusers, safetensors, the Hub's client or the disk: it cannot be loaded.
    """
    local = Path(name).is_dir()

    def read(file: str) -> dict[str, Any]:
        path = Path(name) / file if local else hf_hub_download(name, file)
        return json.loads(Path(path).read_text(encoding="utf-8"))

    index = read("model_index.json")
    load = {"use_safetensors": True, "low_cpu_mem_usage": False}
    unet = UNet2DModel.from_pretrained(name, subfolder="unet", **load).eval()
    schedule = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
    try:
        dataset = read("train_results.json")["dataset"]
    except Exception:  # a model of another script
        dataset = ""
    noun = "digit" if dataset.replace("\\", "/").split("/")[-1] in ("mnist", "scikit-learn digits") else "image"
    card = None if local else f"{constants.ENDPOINT}/{name}"
    shown = Path(name).resolve().name if local else name
    return Model(shown, card, unet, schedule, index.get("null_class_label"), noun)


class Moment(NamedTuple):
    """One timestep of a batch: x_t, and the x_0 that the U-Net predicts from it; `[B, C, H, W]`, about [-1, 1]."""

    t: int
    sample: Tensor
    predicted: Tensor


@torch.no_grad()
def denoise(model: Model, sampler, sample: Tensor, generators, labels, guidance: float, start: int) -> Iterator[Moment]:
    """Algorithm 2 from x_t at the sampler's first timestep that is at most `start`; the last moment is x_0 twice.

    Args:
        sampler: a diffusers scheduler whose timesteps are set.
        sample: x_t, `[B, C, H, W]`; generators: one for each image; labels: `[B]` or None.
    """
    arguments = step_arguments(sampler, generators)
    for t in sampler.timesteps[sampler.timesteps <= start]:
        model_input = sampler.scale_model_input(sample, t)
        scale = guidance_at(sampler, t, guidance, MIN_LOG_SNR)
        model_output = guided_noise(model.unet, model_input, t, labels, scale, model.null_class_label)
        step = sampler.step(model_output, t, sample, **arguments)
        # DPM-Solver++ does not return the predicted x_0, but keeps it
        yield Moment(int(t), sample, step.get("pred_original_sample", getattr(sampler, "model_outputs", [sample])[-1]))
        sample = step.prev_sample
    yield Moment(-1, sample, sample)


def make_sampler(model: Model, name: str, steps: int):
    """The diffusers scheduler of that name in `SAMPLERS`, with its timesteps set; as generate.py makes it."""
    config = model.schedule.config
    large = steps < model.timesteps and config.variance_type == "fixed_large"  # too much noise for fewer steps
    change = {"variance_type": "fixed_small"} if large else {}
    return with_timesteps(SAMPLERS[name].from_config(config, **change), steps, "cpu")


def noise_of(model: Model, seed: int, count: int) -> tuple[Tensor, list[torch.Generator]]:
    """x_T of the images 0 to count - 1 of a seed, `[count, C, H, W]`, and their generators: those of generate.py."""
    generators = [seeded_generator(seed, "sample", number) for number in range(count)]
    return torch.stack([torch.randn(model.shape, generator=generator) for generator in generators]), generators


# ---- pictures ------------------------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> str:
    """uint8 `[H, W]` or `[H, W, 3]` -> a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def frame(model: Model, moment: Moment) -> dict[str, Any]:
    """A moment for `film.js`: a picture with a row for each image, x_t on the left, the predicted x_0 on the right."""
    both = torch.cat([moment.sample, moment.predicted], dim=3)  # [B, C, H, 2 W]
    pixels = ((both.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pixels = pixels.reshape(-1, *pixels.shape[2:])
    left = float(model.schedule.alphas_cumprod[moment.t]) ** 0.5 if moment.t >= 0 else 1.0
    return {"t": moment.t, "left": left, "png": png(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)}


def film(model: Model, moments: Iterator[Moment], names: list[str], steps: int, **more) -> Iterator[dict[str, Any]]:
    """What `film.js` shows, again after each step that it keeps: frames, the names of the images, and `done`."""
    frames, kept = [], {round(i * steps / MAX_FRAMES) for i in range(MAX_FRAMES)} | {steps}
    height, width = model.shape[1:]
    for number, moment in enumerate(moments):
        if number in kept or moment.t < 0:
            frames.append(frame(model, moment))
            size = {"width": width, "height": height, "steps": steps}
            yield {"frames": frames.copy(), "names": names, "done": moment.t < 0, **size, **more}


def as_mnist(drawing: Image.Image, size: int = 28) -> Image.Image:
    """A drawing, white on black, scaled and centred as MNIST's digits are.

    The longer side of the ink becomes 20 of 28 pixels, and the ink's centre of mass the centre of the image
    (http://yann.lecun.com/exdb/mnist/).

    Raises:
        Refusal: nothing is drawn.
    """
    box = drawing.getbbox()
    if box is None:
        raise Refusal("Nothing is written yet: write on the black square first.")
    ink = drawing.crop(box)
    scale = size * 20 / 28 / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BOX)
    weight = np.asarray(ink, dtype=np.float64) + 1e-9
    across = (weight.sum(0) * (np.arange(ink.width) + 0.5)).sum() / weight.sum()
    down = (weight.sum(1) * (np.arange(ink.height) + 0.5)).sum() / weight.sum()
    image = Image.new("L", (size, size))
    image.paste(ink, (round(size / 2 - across), round(size / 2 - down)))
    return image


def read_drawing(data: str | None) -> Image.Image:
    """The drawing of `pad.js`, a PNG as a data URL. Refusal: it is something else, or too large."""
    if not data:
        raise Refusal("Nothing is written yet: write on the black square first.")
    try:
        if len(data) > MAX_DRAWING or not data.startswith("data:image/png;base64,"):
            raise ValueError
        image = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1])), formats=["PNG"])
        if max(image.size) > 1000:
            raise ValueError
        return image.convert("L")
    except (ValueError, OSError):
        raise Refusal("The drawing cannot be read: clear it and write again.") from None


# ---- what a visitor can ask for --------------------------------------------------------------------------------------


def check(model: Model, settings: Settings) -> Settings:
    """The settings as whole numbers within the limits. Refusal: one of them is not."""
    try:
        count, steps, seed = int(settings.count), int(settings.steps), int(settings.seed)
        guidance, digit = float(settings.guidance), str(settings.digit)
    except (TypeError, ValueError, OverflowError):
        raise Refusal("Images, steps, guidance and seed must be numbers.") from None
    labels = {IN_TURN, *map(str, range(model.classes or 0))}
    for name, value, good, what in (
        ("digit", digit, digit in labels, f"choose 0 to {(model.classes or 1) - 1}, or {IN_TURN!r}"),
        ("count", count, 1 <= count <= MAX_IMAGES, f"draw 1 to {MAX_IMAGES} images"),
        ("guidance", guidance, 0 <= guidance <= MAX_GUIDANCE, f"must be from 0 to {MAX_GUIDANCE:g}"),
        ("sampler", settings.sampler, settings.sampler in SAMPLERS, f"choose {', '.join(SAMPLERS)}"),
        ("steps", steps, 1 <= steps <= model.timesteps, f"must be from 1 to {model.timesteps}"),
        ("seed", seed, 0 <= seed <= MAX_SEED, f"must be from 0 to {MAX_SEED}"),
    ):
        if not good:
            raise Refusal(f"{name} {str(value)[:20]}: {what}.")
    if count * steps > MAX_WORK:
        cure = f"take at most {MAX_WORK // count} steps, or fewer images"
        raise Refusal(f"{count} images in {steps} steps are too much work for this page: {cure}.")
    return Settings(digit, count, guidance, settings.sampler, steps, seed)


def draw(model: Model, settings: Settings) -> Iterator[dict[str, Any]]:
    """Draw pictures from noise; yields what `film.js` shows so far. Refusal: see `check`."""
    settings = check(model, settings)
    names, labels, query = [f"{number + 1}" for number in range(settings.count)], None, settings._asdict()
    if model.classes is None:
        del query["digit"], query["guidance"]
    else:
        classes = [number % model.classes for number in range(settings.count)]
        if settings.digit != IN_TURN:
            classes = [int(settings.digit)] * settings.count
        names, labels = [str(label) for label in classes], torch.tensor(classes)
    sampler = make_sampler(model, settings.sampler, settings.steps)
    noise, generators = noise_of(model, settings.seed, settings.count)
    guidance = settings.guidance if model.null_class_label is not None else 1.0
    moments = denoise(model, sampler, noise * sampler.init_noise_sigma, generators, labels, guidance, model.timesteps)
    file = f"{model.noun}s-seed{settings.seed}"
    yield from film(model, moments, names, len(sampler.timesteps), query=urlencode(query), file=file)


def rewrite(model: Model, drawing: str | None, t: int, label: str, tries: int, seed: int) -> Iterator[dict[str, Any]]:
    """Noise a drawing to timestep t, several times with different noise, and denoise; yields as `draw`.

    Raises:
        Refusal: nothing is drawn, or a setting cannot be right.
    """
    image = as_mnist(read_drawing(drawing), model.shape[1])
    check(model, Settings(seed=seed))
    if not (isinstance(tries, int | float) and 1 <= tries <= MAX_TRIES and isinstance(t, int | float)):
        raise Refusal(f"Times must be from 1 to {MAX_TRIES}, and t a number.")
    sampler = make_sampler(model, "ddim", min(DEFAULT_STEPS["ddim"], model.timesteps))
    visited = sampler.timesteps[sampler.timesteps <= max(t, int(sampler.timesteps.min()))]
    noise, generators = noise_of(model, int(seed), int(tries))
    x_0 = torch.from_numpy(np.asarray(image, dtype=np.float32)) / 127.5 - 1
    sample = model.schedule.add_noise(x_0.expand_as(noise), noise, visited[:1].expand(len(noise)))
    labels, guidance = None, 1.0
    if model.classes is not None:
        none = label == NO_LABEL and model.null_class_label is not None
        if not none and label not in map(str, range(model.classes)):
            raise Refusal(f"Label {label}: choose 0 to {model.classes - 1}.")
        labels = torch.full((len(noise),), model.null_class_label if none else int(label))
        guidance = 1.0 if none or model.null_class_label is None else Settings().guidance
    moments = denoise(model, sampler, sample, generators, labels, guidance, int(visited[0]))
    names = [f"noise {number + 1}" for number in range(len(noise))]
    original = png(np.asarray(image))
    yield from film(model, moments, names, len(visited), original=original, file=f"rewritten-t{int(visited[0])}")
