"""Sampling: the samplers, the random stream of each image, and pictures of samples.

The loop over the timesteps, Algorithm 2, is `denoise` in `pipeline.py`, the file that travels with a conditional model,
so that its pipeline and this repo draw by the same code.
"""

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .errors import ConfigError, first_line
from .pipeline import Step
from .randomness import seeded_generator
from .scheduler import DDPMScheduler

SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver": DPMSolverMultistepScheduler}
DEFAULT_STEPS = {"ddpm": 50, "ddim": 50, "dpmsolver": 20}  # docs/results.md has the trials


def make_sampler(name: str, config, num_inference_steps: int):
    """The scheduler of that name in `SAMPLERS`, for the noise schedule that `config` describes.

    `fixed_large` suits single timesteps only: for a longer jump, beta_t is too much noise (DDIM, Song et al. 2021,
    https://arxiv.org/abs/2010.02502, table 1). With fewer steps than timesteps, ddpm therefore uses `fixed_small`,
    which makes it DDIM with eta 1. DPM-Solver++ (Lu et al. 2022, https://arxiv.org/abs/2211.01095) is used in its SDE
    form, which draws better digits. ConfigError: the scheduler refuses this config.
    """
    few = num_inference_steps < config.num_train_timesteps
    change = {"variance_type": "fixed_small"} if few and config.get("variance_type") == "fixed_large" else {}
    if name == "dpmsolver":
        change["algorithm_type"] = "sde-dpmsolver++"
    try:
        known = {key: value for key, value in config.items() if key != "_use_default_values"}  # defaults are meant too
        return SAMPLERS[name].from_config(known, **change)
    except Exception as error:  # such as betas by sigmoid, which only ddpm knows
        raise ConfigError(f"--scheduler {name}: {first_line(error)}; use ddpm") from error


def initial_noise(
    seed: int, numbers: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> tuple[Tensor, list[torch.Generator]]:
    """x_T ~ N(0, I) of these images of a seed, `[len(numbers), *shape]`, and the generator of each for its steps.

    Image i of a seed is the same in any batch or process. Its noise is drawn on the CPU, so that a GPU gets the same.
    """
    generators = [seeded_generator(seed, "sample", number) for number in numbers]
    return randn_tensor((len(numbers), *shape), generators, device=torch.device(device)), generators


def labels_for(numbers: range | list[int], num_classes: int | None, class_label: int | None = None) -> Tensor | None:
    """The class of each image, `[N]` int64: `class_label`, or all in turn. None: no classes."""
    if num_classes is None:
        return None
    return torch.tensor([number % num_classes if class_label is None else class_label for number in numbers])


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] (clamped to it) -> uint8 0 ... 255, rounded: the inverse of `scale` in images/batches.py."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


# ---- pictures ------------------------------------------------------------------------------------------------------


def to_pil(images: Tensor) -> list[Image.Image]:
    """`[N, C, H, W]` in [-1, 1] (clamped to it) -> N images, mode L or RGB."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]


def shown_steps(num_inference_steps: int) -> set[int]:
    """Which steps, counted from 1, a picture of the trajectory shows: ten, evenly spread, with the last."""
    return {round((i + 1) * num_inference_steps / 10) for i in range(10)} - {0}


def trajectory_picture(steps: list[Step], count: int = 4) -> Image.Image:
    """The first images of a batch, two rows each: x_{t-1}, and below it the x_0 predicted from x_t; time runs right."""
    pairs = [torch.stack([step.prev_sample[:count], step.pred_original_sample[:count]]) for step in steps]
    rows = torch.stack(pairs).transpose(0, 2)  # [steps, 2, B, C, H, W] -> [B, 2, steps, C, H, W]
    return grid(to_pil(rows.flatten(0, 2)), columns=len(steps), zoom=2)


def grid(images: list[Image.Image], columns: int | None = None, zoom: int = 1) -> Image.Image:
    """The images row by row in one picture, as nearly square as possible; empty places stay black."""
    columns = columns or next(c for c in range(1, len(images) + 1) if c * c >= len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    blank = [Image.new(images[0].mode, (width, height))] * (rows * columns - len(images))
    whole = make_image_grid([*images, *blank], rows, columns)  # always RGB
    return whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST).convert(images[0].mode)
