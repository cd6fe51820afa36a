"""Algorithm 2 of Ho et al. 2020: from pure noise to images, one timestep after another."""

from collections.abc import Callable

import torch
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .draws import seeded_generator
from .pipeline import guided_noise, step_arguments


@torch.no_grad()
def sample_images(
    unet,
    scheduler,
    seed: int,
    numbers: range | list[int],
    num_inference_steps: int,
    class_labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    null_class_label: int | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] = lambda i, sample, pred_original_sample: None,
) -> Tensor:
    """Draw images, each with a random stream of its own: number i of a seed is the same in any batch or process.

    Args:
        unet: predicts from (x_t, t); in eval mode.
        scheduler: any diffusers scheduler of the same noise schedule; its `step` is the sampler.
        seed: with `numbers`, fixes every image; the noise is drawn on the CPU, so that a GPU gets the same.
        numbers: which images of the seed, one a row of the result.
        num_inference_steps: how many timesteps to visit.
        class_labels: `[B]`, for a conditional U-Net.
        guidance_scale, null_class_label: see `ddpm_mnist.pipeline.guided_noise`.
        on_step: called after each step with its index, x_{t-1} and, where the scheduler gives it, the predicted x_0.

    Returns:
        `[len(numbers), C, H, W]`, float32, about [-1, 1].
    """
    size = unet.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    generators = [seeded_generator(seed, "sample", number) for number in numbers]
    sample = randn_tensor((len(generators), unet.config.in_channels, *size), generators, device=unet.device)

    scheduler.set_timesteps(num_inference_steps, device=unet.device)
    sample = sample * scheduler.init_noise_sigma  # x_T ~ N(0, I), line 1
    arguments = step_arguments(scheduler, generators)
    for i, t in enumerate(scheduler.timesteps):  # line 2
        model_input = scheduler.scale_model_input(sample, t)
        model_output = guided_noise(unet, model_input, t, class_labels, guidance_scale, null_class_label)
        step = scheduler.step(model_output.float(), t, sample, **arguments)
        sample = step.prev_sample  # lines 3 and 4
        on_step(i, sample, step.get("pred_original_sample", sample))
    return sample  # line 6


def to_pil(images: Tensor) -> list[Image.Image]:
    """`[N, C, H, W]` in [-1, 1] (clamped to it) -> N images, mode L or RGB."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]


def grid(images: list[Image.Image], columns: int | None = None, zoom: int = 1) -> Image.Image:
    """The images row by row in one picture, as near to a square as their number allows; gaps stay black."""
    columns = columns or next(c for c in range(1, len(images) + 1) if c * c >= len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    blank = [Image.new(images[0].mode, (width, height))] * (rows * columns - len(images))
    whole = make_image_grid([*images, *blank], rows, columns)  # always RGB
    return whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST).convert(images[0].mode)
