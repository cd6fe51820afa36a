"""Algorithm 2 of Ho et al. 2020: from pure noise to images, one timestep after another.

The loop over the timesteps is `denoise` in `pipeline.py`, the file that travels with a conditional model, so that a
stranger's pipeline and this repo draw the same. Here is what surrounds it: a random stream for each image, labels,
batches, the samplers, and reading a model.
"""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .client import hub_or_cache
from .data import to_uint8
from .options import ConfigError, first_line, opt
from .pipeline import GUIDANCE_SCALE, MIN_LOG_SNR, count_classes, denoise
from .randomness import seeded_generator
from .scheduler import DDPMScheduler
from .unet import UNet2DModel

Sampler = Literal["ddpm", "ddim", "dpmsolver"]
SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver": DPMSolverMultistepScheduler}
DEFAULT_STEPS = {"ddpm": 50, "ddim": 50, "dpmsolver": 20}  # docs/results.md has the trials


@dataclass
class SampleOptions:
    """Samples"""

    model: str = opt("ddpm-mnist", "Folder of a pipeline, or its Hub id; or a checkpoint folder.", path=True)
    num_images: int = opt(16, "How many.", at_least=1)
    batch_size: int = opt(64, "Images at a time; it does not change them.", at_least=1)
    scheduler: Sampler = opt("ddpm", "Sampler: ddpm, Algorithm 2; ddim, which adds no noise; dpmsolver, the fastest.")
    num_inference_steps: int | None = opt(
        None, "Steps. Default: 50, for dpmsolver 20. The paper takes all 1000.", at_least=1
    )
    guidance_scale: float = opt(
        GUIDANCE_SCALE,
        "Strength of the guidance of a conditional model: more is clearer and less varied; 1 is none.",
        at_least=-1000,
        at_most=1000,
    )
    guidance_min_log_snr: float = opt(
        MIN_LOG_SNR,
        "Guide only where log SNR(t) is at least so much, for more variety; -1000: everywhere.",
        at_least=-1000,
        at_most=1000,
    )
    mixed_precision: Literal["no", "bf16"] = opt(
        "no", "bf16: over twice as fast where the hardware computes in it; the changes are imperceptible."
    )
    seed: int = opt(0, "Image i of a seed is always the same image.", at_least=0)


def make_sampler(name: str, config, num_inference_steps: int):
    """The diffusers scheduler of that name in `SAMPLERS`, for the noise schedule that `config` describes.

    `fixed_large` is for single timesteps: beta_t of a jump over many is too much noise (Song et al. 2021, table 1). In
    fewer steps than timesteps, ddpm therefore takes `fixed_small`, and is then DDIM with eta 1.
    """
    few = num_inference_steps < config.num_train_timesteps
    change = {"variance_type": "fixed_small"} if few and config.get("variance_type") == "fixed_large" else {}
    return SAMPLERS[name].from_config(config, **change)


# ---- the model -----------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A trained model: `unet` in eval mode, its noise schedule, and the label that stands for none (None: no such)."""

    unet: UNet2DModel
    scheduler: DDPMScheduler
    null_class_label: int | None

    @property
    def num_classes(self) -> int | None:
        """How many classes can be asked for; None for an unconditional model."""
        return count_classes(self.unet.config.num_class_embeds, self.null_class_label)

    def sampler(self, name: str, num_inference_steps: int | None) -> tuple:
        """The diffusers scheduler of that name in `SAMPLERS`, and how many steps it is to take.

        Raises:
            ConfigError: more steps than the model has timesteps; or as many, which DPM-Solver cannot take.
        """
        timesteps = self.scheduler.config.num_train_timesteps
        if (num_inference_steps or 1) > timesteps:
            raise ConfigError(f"--num_inference_steps {num_inference_steps}: the model has {timesteps} timesteps")
        if name == "dpmsolver" and (num_inference_steps or 1) == timesteps:
            raise ConfigError(
                f"--num_inference_steps {timesteps}: dpmsolver takes at most {timesteps - 1}; 20 are enough"
            )
        steps = num_inference_steps or min(DEFAULT_STEPS[name], timesteps)
        return make_sampler(name, self.scheduler.config, steps), steps


def is_checkpoint(name: str | Path) -> bool:
    """Whether a folder is a checkpoint of a training run."""
    return (Path(name) / "state.pt").is_file() and (Path(name) / "unet").is_dir()


def found(name: str, option: str) -> AbstractContextManager:
    """The context to load a model in: see `hub_or_cache`; nothing special for a folder."""
    if Path(name).exists():
        return nullcontext()
    return hub_or_cache(
        name, "model", f"{option} {name}: neither a folder nor on the Hub; check it, or `hf auth login`"
    )


def load_unet(name: str, option: str = "--model") -> UNet2DModel:
    """The U-Net of a pipeline (folder or Hub id), or of a checkpoint folder, whose averaged weights are preferred.

    Raises:
        ConfigError: there is no such model, or it cannot be read.
    """
    local = Path(name)
    if is_checkpoint(name):
        subfolder = "unet_ema" if (local / "unet_ema").is_dir() else "unet"
    elif local.exists() and not (local / "model_index.json").is_file():
        raise ConfigError(
            f"{option} {name}: holds no model_index.json; name the output_dir of a finished training run, or a "
            "checkpoint folder in it"
        )
    else:
        subfolder = "unet"
    try:
        with found(name, option):
            return UNet2DModel.from_pretrained(name, subfolder=subfolder, use_safetensors=True)
    except ConfigError:
        raise
    except Exception as error:  # of diffusers, safetensors, the Hub's client and the disk
        raise ConfigError(f"{option} {name}: cannot be loaded ({first_line(error)})") from error


def load_model(name: str, option: str = "--model") -> Model:
    """A pipeline (folder or Hub id) or a checkpoint folder, on this machine's accelerator where there is one.

    Raises:
        ConfigError: it cannot be read.
    """
    unet = load_unet(name, option).to(device()).eval()
    try:
        if is_checkpoint(name):
            run = torch.load(Path(name) / "state.pt", map_location="cpu", weights_only=True)["run"]
            null = run["unet"]["num_class_embeds"] - 1 if run["class_dropout_prob"] else None
            return Model(unet, DDPMScheduler(**run["scheduler"]), null)
        with found(name, option):
            scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
            return Model(unet, scheduler, DiffusionPipeline.load_config(name).get("null_class_label"))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{option} {name}: cannot be loaded ({first_line(error)})") from error


def use_cpu_is_set() -> bool:
    """Whether ACCELERATE_USE_CPU says to stay on the CPU, in any of the words that Accelerate takes for yes."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on")


def device() -> torch.device:
    """Where training runs too: the accelerator of this machine (CUDA, MPS ...) unless ACCELERATE_USE_CPU says no."""
    if use_cpu_is_set() or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


# ---- the images ----------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The state of a batch after one step of Algorithm 2."""

    index: int  # 0 for the first batch
    last: bool  # the step is the batch's last: `sample` is x_0
    sample: Tensor  # x_{t-1}, `[B, C, H, W]`, float32, about [-1, 1]
    pred_original_sample: Tensor  # the x_0 that x_t points to, where the sampler gives it


@torch.no_grad()
def sample_steps(
    unet: torch.nn.Module,
    sampler,
    numbers: range | list[int],
    num_inference_steps: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    class_labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    null_class_label: int | None = None,
    guidance_min_log_snr: float = -math.inf,
    mixed_precision: str = "no",
) -> Iterator[Step]:
    """Draw images batch by batch, and yield after each step of each batch.

    Each image has a random stream of its own: number i of a seed is the same in any batch or process.

    Args:
        unet: predicts from (x_t, t); in eval mode.
        sampler: any diffusers scheduler of the U-Net's noise schedule.
        numbers: which images of the seed.
        num_inference_steps: how many timesteps to visit.
        seed: with `numbers`, fixes every image; the noise is drawn on the CPU, so that a GPU gets the same.
        class_labels: `[len(numbers)]`, for a conditional U-Net.
        guidance_scale, null_class_label, guidance_min_log_snr: see `guided_noise` and `guidance_at` in pipeline.py.
        mixed_precision: "bf16" for the U-Net in bfloat16, "no" for as it is.
    """
    size, device = unet.config.sample_size, unet.device
    shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    predict = torch.autocast(device.type, torch.bfloat16)(unet.forward) if mixed_precision == "bf16" else unet
    sampler.set_timesteps(num_inference_steps, device=device)
    steps = len(sampler.timesteps)
    for index, rows in enumerate(torch.arange(len(numbers)).split(batch_size)):
        generators = [seeded_generator(seed, "sample", numbers[row]) for row in rows.tolist()]
        noise = randn_tensor((len(rows), *shape), generators, device=device)  # x_T ~ N(0, I), line 1
        labels = None if class_labels is None else class_labels[rows].to(device)
        guidance = (guidance_scale, null_class_label, guidance_min_log_snr)
        loop = denoise(predict, sampler, noise, num_inference_steps, generators, labels, *guidance)
        for i, (sample, pred_original_sample) in enumerate(loop):  # lines 2 to 5
            yield Step(index, i == steps - 1, sample, pred_original_sample)


def sample_images(unet: torch.nn.Module, sampler, numbers, num_inference_steps: int, **options) -> Tensor:
    """The images that `sample_steps` ends at: `[len(numbers), C, H, W]`, float32, about [-1, 1]."""
    steps = sample_steps(unet, sampler, numbers, num_inference_steps, **options)
    return torch.cat([step.sample for step in steps if step.last])  # line 6


def labels_for(numbers: range | list[int], num_classes: int | None, class_label: int | None = None) -> Tensor | None:
    """The class that each image is asked to be: `class_label`, or counting through all. None: no classes."""
    if num_classes is None:
        return None
    return torch.tensor([number % num_classes if class_label is None else class_label for number in numbers])


# ---- pictures ------------------------------------------------------------------------------------------------------


def to_pil(images: Tensor) -> list[Image.Image]:
    """`[N, C, H, W]` in [-1, 1] (clamped to it) -> N images, mode L or RGB."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]


def moments_to_show(num_inference_steps: int) -> set[int]:
    """Ten of the numbers 0 ... num_inference_steps - 1, evenly spread up to the last; all of fewer."""
    return {round((i + 1) * num_inference_steps / 10) - 1 for i in range(10)}


def trajectory_picture(moments: list[Step], count: int = 4) -> Image.Image:
    """The first images of a batch in two rows each: x_t above the x_0 predicted from it; time runs to the right."""
    kinds = [[to_pil(step[kind][:count]) for step in moments] for kind in (2, 3)]  # sample, pred_original_sample
    rows = [[moment[i] for moment in kind] for i in range(len(kinds[0][0])) for kind in kinds]
    return grid([image for row in rows for image in row], columns=len(moments), zoom=2)


def grid(images: list[Image.Image], columns: int | None = None, zoom: int = 1) -> Image.Image:
    """The images row by row in one picture, as nearly square as possible; empty places stay black."""
    columns = columns or next(c for c in range(1, len(images) + 1) if c * c >= len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    blank = [Image.new(images[0].mode, (width, height))] * (rows * columns - len(images))
    whole = make_image_grid([*images, *blank], rows, columns)  # always RGB
    return whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST).convert(images[0].mode)
