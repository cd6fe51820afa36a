"""The U-Net and the noise schedule of a run, from the two sections of its config."""

import inspect

import torch

from ..errors import ConfigError, first_line, suggestion
from ..pipeline import denoise
from ..scheduler import DDPMScheduler
from ..unet import UNet2DModel
from .config import TrainConfig

AT_MOST = {"layers_per_block": 64, "num_train_timesteps": 1_000_000, "num_class_embeds": 100_000}  # slow to build
CHOICES = {  # other values do not train, or diffusers silently accepts them or rejects them without naming the option
    "time_embedding_type": ("positional",),  # "fourier" divides by t, and t = 0 is a timestep
    "class_embed_type": (None,),  # num_class_embeds is enough for classes
    "mid_block_type": ("UNetMidBlock2D", None),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),  # those that all samplers know
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
CLASSES = {"unet": UNet2DModel, "scheduler": DDPMScheduler}


def build(config: TrainConfig, section: str, channels: int = 1):
    """`UNet2DModel` or `DDPMScheduler` by its section of the config. ConfigError: it refuses a key or a value.

    `channels` are those of the images, which the U-Net takes unless the config says how many.
    """
    settings = getattr(config, section)
    if section == "unet" and settings["in_channels"] is None:
        settings = settings | {"in_channels": channels, "out_channels": channels}
    parameters = inspect.signature(CLASSES[section]).parameters
    for key, value in settings.items():
        if key not in parameters:
            raise ConfigError(f"{section}.{key}: unknown key; {suggestion(str(key), list(parameters))}")
        if isinstance(parameters[key].default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{section}.{key} {value}: must be true or false")
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            if key in CHOICES and entry not in CHOICES[key]:
                raise ConfigError(f"{section}.{key} {entry}: choose from {', '.join(map(str, CHOICES[key]))}")
        if key in AT_MOST and isinstance(value, (int, float)) and not 1 <= value <= AT_MOST[key]:
            raise ConfigError(f"{section}.{key} {value}: must be at least 1 and at most {AT_MOST[key]:,}")
    try:
        return CLASSES[section](**settings)
    except Exception as e:  # whatever a value of the wrong type leads to
        raise ConfigError(f"{section}: {first_line(e)}") from None


def check_models(config: TrainConfig) -> None:
    """Build both on the meta device and check what training requires. ConfigError: it cannot work."""
    with torch.device("meta"):
        unet = build(config, "unet")
    scheduler = build(config, "scheduler")
    T = scheduler.config.num_train_timesteps
    if len(scheduler.betas) != T:
        raise ConfigError(f"scheduler.trained_betas: has {len(scheduler.betas)} values for num_train_timesteps={T}")
    if not ((scheduler.betas > 0) & (scheduler.betas <= 1)).all():
        where = "beta_start, beta_end" if scheduler.config.trained_betas is None else "trained_betas"
        raise ConfigError(f"scheduler.{where}: every beta must lie in (0, 1]; Ho et al. use 1e-4 and 0.02")
    if scheduler.alphas_cumprod[-1] == 0 and scheduler.config.prediction_type == "epsilon":
        raise ConfigError(
            "scheduler.prediction_type epsilon: x_0 does not follow from it at the last timestep, since "
            "scheduler.rescale_betas_zero_snr leaves nothing of the image there; use v_prediction"
        )
    if scheduler.alphas_cumprod[0] == 1:
        raise ConfigError("scheduler.beta_start: the first timesteps add no noise in float32; raise it")
    if config.ddpm_num_inference_steps > T:
        raise ConfigError(f"--ddpm_num_inference_steps {config.ddpm_num_inference_steps}: there are only {T} timesteps")

    channels = unet.config.in_channels, unet.config.out_channels
    if channels not in ((1, 1), (3, 3)):
        raise ConfigError(
            f"unet.in_channels {channels[0]}, unet.out_channels {channels[1]}: both 1 (grayscale) or both 3 (RGB)"
        )
    size, halvings = unet.config.sample_size, len(unet.config.block_out_channels) - 1
    if not isinstance(size, int) or size < 1 or size % 2**halvings:
        raise ConfigError(
            f"unet.sample_size {size}: stock diffusers, which the pipeline is for, cannot halve it {halvings} times; "
            f"use a multiple of {2**halvings} (images are resized to it) or fewer levels"
        )
    labels = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64, device="meta")
    try:  # values that both take now, and that would fail minutes later
        unet(torch.zeros(1, channels[0], size, size, device="meta"), 0, class_labels=labels)
        next(denoise(lambda x_t, t: x_t, scheduler, torch.zeros(1, 1, 1, 1), config.ddpm_num_inference_steps))
    except Exception as e:
        raise ConfigError(f"unet, scheduler: these settings cannot draw ({first_line(e)})") from None
