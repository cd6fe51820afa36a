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
from diffusers import UNet2DModel
from huggingface_hub import constants, hf_hub_download
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))  # in a Space, the folder ddpm_mnist lies beside this file
from ddpm_mnist.pipeline import (  # noqa: E402
    GUIDANCE_SCALE,
    MIN_LOG_SNR,
    Step,
    count_classes,
    denoise,
    guided,
    with_timesteps,
)
from ddpm_mnist.sampling import DEFAULT_STEPS, SAMPLERS, labels_for, make_sampler, noise_of, to_uint8  # noqa: E402
from ddpm_mnist.scheduler import DDPMScheduler  # noqa: E402

IN_TURN, NO_LABEL = "each in turn", "none"

# The limits that keep a public page alive.
MAX_IMAGES, MAX_TRIES, MAX_WORK = 16, 8, 2000  # work: images times steps
MAX_GUIDANCE, MAX_SEED, MAX_DRAWING = 10.0, 2**31 - 1, 500_000  # the last: characters of a drawing's data URL
MAX_FRAMES = 50  # of the steps that the page shows


class Refusal(ValueError):
    """What a visitor asked for cannot be done; the message says why, and what to do."""


class Model(NamedTuple):
    """A trained model, on the CPU and in eval mode, and its name on the page."""

    name: str
    card: str | None  # address of the model card; None for a folder
    unet: UNet2DModel
    scheduler: DDPMScheduler
    null_class_label: int | None  # the label that stands for none

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
        return len(self.scheduler)


class Settings(NamedTuple):
    """What a picture depends on besides the model; the names are those of the page's address."""

    label: str = IN_TURN
    count: int = 10
    guidance: float = GUIDANCE_SCALE
    sampler: str = "ddpm"
    steps: int = 50
    seed: int = 0


def load_model(name: str) -> Model:
    """The pipeline in a folder or on the Hub, as weights and numbers: no code of it is run.

    Raises:
        Exception: of diffusers, safetensors, the Hub's client or the disk: it cannot be loaded.
    """
    local = Path(name).is_dir()
    index = Path(name) / "model_index.json" if local else Path(hf_hub_download(name, "model_index.json"))
    null_class_label = json.loads(index.read_text(encoding="utf-8")).get("null_class_label")
    load = {"use_safetensors": True, "low_cpu_mem_usage": False}
    unet = UNet2DModel.from_pretrained(name, subfolder="unet", **load).eval()
    scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
    shown, card = (Path(name).resolve().name, None) if local else (name, f"{constants.ENDPOINT}/{name}")
    return Model(shown, card, unet, scheduler, null_class_label)


# ---- pictures ------------------------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> str:
    """uint8 `[H, W]` or `[H, W, 3]` -> a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def frame(model: Model, t: int, sample: Tensor, predicted: Tensor) -> dict[str, Any]:
    """A picture with a row for each image: on the left x_t, on the right the x_0 predicted from it."""
    both = to_uint8(torch.cat([sample, predicted], dim=3)).permute(0, 2, 3, 1).numpy()  # [B, H, 2 W, C]
    pixels = both.reshape(-1, *both.shape[2:])
    left = float(model.scheduler.alphas_cumprod[t]) ** 0.5 if t >= 0 else 1.0
    return {"t": t, "left": left, "png": png(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)}


def moments(steps: Iterator[Step]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(t, x_t, the x_0 predicted from it) of each step; at the end (-1, x_0, x_0)."""
    for step in steps:
        yield step.timestep, step.sample, step.pred_original_sample
    yield -1, step.prev_sample, step.prev_sample


def film(model: Model, steps: Iterator[Step], count: int, names: list[str], **more) -> Iterator[dict[str, Any]]:
    """What `film.js` shows, again after each of the `count` steps that it keeps: frames, the names of the images, and
    `done`."""
    frames, kept = [], {round(i * count / MAX_FRAMES) for i in range(MAX_FRAMES)} | {count}
    height, width = model.shape[1:]
    for number, (t, sample, predicted) in enumerate(moments(steps)):
        if number in kept:
            frames.append(frame(model, t, sample, predicted))
            size = {"width": width, "height": height, "steps": count}
            yield {"frames": frames.copy(), "names": names, "done": t < 0, **size, **more}


def as_mnist(drawing: Image.Image, size: int = 28) -> Image.Image:
    """A drawing, white on black, scaled and centred as MNIST's digits are.

    Its longer side becomes 20 of 28 pixels, and its centre of mass the centre of the image
    (http://yann.lecun.com/exdb/mnist/).

    Raises:
        Refusal: nothing is drawn.
    """
    box = drawing.getbbox()
    if box is None:
        raise Refusal("Nothing is written yet: write on the black square first.")
    digit = drawing.crop(box)
    scale = size * 20 / 28 / max(digit.size)
    digit = digit.resize([max(1, round(side * scale)) for side in digit.size], Image.Resampling.BOX)
    weight = np.asarray(digit, dtype=np.float64) + 1e-9
    across = (weight.sum(0) * (np.arange(digit.width) + 0.5)).sum() / weight.sum()
    down = (weight.sum(1) * (np.arange(digit.height) + 0.5)).sum() / weight.sum()
    image = Image.new("L", (size, size))
    image.paste(digit, (round(size / 2 - across), round(size / 2 - down)))
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
        guidance, label = float(settings.guidance), str(settings.label)
    except (TypeError, ValueError, OverflowError):
        raise Refusal("Images, steps, guidance and seed must be numbers.") from None
    labels = {IN_TURN, *map(str, range(model.classes or 0))}
    most_steps = model.timesteps - (settings.sampler == "dpmsolver")  # which cannot take all
    for name, value, good, what in (
        ("label", label, label in labels, f"choose 0 to {(model.classes or 1) - 1}, or {IN_TURN!r}"),
        ("count", count, 1 <= count <= MAX_IMAGES, f"draw 1 to {MAX_IMAGES} images"),
        ("guidance", guidance, 0 <= guidance <= MAX_GUIDANCE, f"must be from 0 to {MAX_GUIDANCE:g}"),
        ("sampler", settings.sampler, settings.sampler in SAMPLERS, f"choose {', '.join(SAMPLERS)}"),
        ("steps", steps, 1 <= steps <= most_steps, f"must be from 1 to {most_steps}"),
        ("seed", seed, 0 <= seed <= MAX_SEED, f"must be from 0 to {MAX_SEED}"),
    ):
        if not good:
            raise Refusal(f"{name} {str(value)[:20]}: {what}.")
    if count * steps > MAX_WORK:
        advice = f"take at most {MAX_WORK // count} steps, or fewer images"
        raise Refusal(f"{count} images in {steps} steps are too much work for this page: {advice}.")
    return Settings(label, count, guidance, settings.sampler, steps, seed)


def draw(model: Model, settings: Settings) -> Iterator[dict[str, Any]]:
    """Draw pictures from noise; yields what `film.js` shows so far. Refusal: see `check`."""
    settings = check(model, settings)
    numbers, query = range(settings.count), settings._asdict()
    labels = labels_for(numbers, model.classes, None if settings.label == IN_TURN else int(settings.label))
    names = [str(number + 1) for number in numbers] if labels is None else [str(label) for label in labels.tolist()]
    if labels is None:
        del query["label"], query["guidance"]
    sampler = make_sampler(settings.sampler, model.scheduler.config, settings.steps)
    noise, generators = noise_of(settings.seed, numbers, model.shape)
    predict = guided(model.unet, sampler, labels, settings.guidance, model.null_class_label, MIN_LOG_SNR)
    steps = denoise(predict, sampler, noise, settings.steps, generators)
    yield from film(model, steps, settings.steps, names, query=urlencode(query), file=f"images-seed{settings.seed}")


def rewrite(model: Model, drawing: str | None, t: int, label: str, tries: int, seed: int) -> Iterator[dict[str, Any]]:
    """Noise a drawing to timestep t, several times with different noise, and denoise; yields as `draw`.

    Raises:
        Refusal: nothing is drawn, or a setting cannot be right.
    """
    image = as_mnist(read_drawing(drawing), model.shape[1])
    seed = check(model, Settings(steps=1, seed=seed)).seed
    if not (isinstance(tries, int | float) and 1 <= tries <= MAX_TRIES and isinstance(t, int | float)):
        raise Refusal(f"Times must be from 1 to {MAX_TRIES}, and t a number.")
    null = model.null_class_label
    without_label = label == NO_LABEL and null is not None
    if model.classes is not None and not without_label and label not in map(str, range(model.classes)):
        raise Refusal(f"Label {label}: choose 0 to {model.classes - 1}.")
    tries, guidance = range(int(tries)), 1.0 if without_label else GUIDANCE_SCALE
    labels = labels_for(tries, model.classes, null if without_label or model.classes is None else int(label))

    num_steps = min(DEFAULT_STEPS["ddim"], model.timesteps)
    sampler = with_timesteps(make_sampler("ddim", model.scheduler.config, num_steps), num_steps, "cpu")
    visited = sampler.timesteps[sampler.timesteps <= max(t, int(sampler.timesteps.min()))]
    start = int(visited[0])
    noise, generators = noise_of(seed, tries, model.shape)
    x_0 = torch.from_numpy(np.asarray(image, dtype=np.float32)) / 127.5 - 1
    sample = model.scheduler.add_noise(x_0.expand_as(noise), noise, torch.full((len(noise),), start))
    predict = guided(model.unet, sampler, labels, guidance, null, MIN_LOG_SNR)
    steps = denoise(predict, sampler, sample, num_steps, generators, start)
    names = [f"noise {number + 1}" for number in tries]
    original = png(np.asarray(image))
    yield from film(model, steps, len(visited), names, original=original, file=f"rewritten-t{start}")
