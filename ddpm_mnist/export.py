"""The finished model as a folder that anyone loads with stock diffusers."""

from pathlib import Path

import diffusers
from torch import Tensor

from .scheduler import DDPMScheduler
from .unet import UNet2DModel


def export_pipeline(
    unet: UNet2DModel, scheduler: DDPMScheduler, output_dir: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write `model_index.json`, `unet/` and `scheduler/` of a `diffusers.DDPMPipeline`.

    The in-repo classes are replaced by the stock ones, strictly by name and shape, so that what is written has been
    loaded by stock diffusers once already and names nothing of this repo.

    Args:
        unet, scheduler: what was trained, and with what.
        output_dir: the folder; other files in it stay.
        weights: in place of the U-Net's own, such as their average.
    """
    stock_unet = diffusers.UNet2DModel.from_config(unet.config)
    stock_unet.load_state_dict(unet.state_dict() if weights is None else weights, strict=True)
    pipeline = diffusers.DDPMPipeline(stock_unet, diffusers.DDPMScheduler.from_config(scheduler.config))
    pipeline.save_pretrained(output_dir, safe_serialization=True)
