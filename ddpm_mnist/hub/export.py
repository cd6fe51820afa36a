"""The finished model as a folder that anyone loads with stock diffusers."""

from pathlib import Path

import diffusers
from torch import Tensor

from .. import pipeline
from ..scheduler import DDPMScheduler
from ..unet import UNet2DModel


def export_pipeline(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    output_dir: str | Path,
    weights: dict[str, Tensor] | None = None,
    null_class_label: int | None = None,
) -> None:
    """Write `model_index.json`, `unet/` and `scheduler/` of a `diffusers.DDPMPipeline`.

    A conditional U-Net gets a `ClassConditionalDDPMPipeline` instead, and its file `pipeline.py`.

    The weights are loaded into the stock classes first, strictly by name and shape, so that the folder names nothing of
    this repo and is known to load with stock diffusers.

    Args:
        unet, scheduler: what was trained, and with what.
        output_dir: the folder; other files in it stay.
        weights: in place of the U-Net's own, such as their average.
        null_class_label: the label that stood for a dropped one in training.
    """
    stock_unet = diffusers.UNet2DModel.from_config(unet.config)
    stock_unet.load_state_dict(unet.state_dict() if weights is None else weights, strict=True)
    stock_scheduler = diffusers.DDPMScheduler.from_config(scheduler.config)
    if unet.config.num_class_embeds is None:
        diffusers.DDPMPipeline(stock_unet, stock_scheduler).save_pretrained(output_dir, safe_serialization=True)
        return
    conditional = pipeline.ClassConditionalDDPMPipeline(stock_unet, stock_scheduler, null_class_label)
    conditional.save_pretrained(output_dir, safe_serialization=True)
