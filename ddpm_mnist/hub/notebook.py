"""notebook.ipynb of a model repo: the Hub opens it in Colab or Kaggle. It needs diffusers and nothing of this repo."""

import json
from pathlib import Path

INSTALL = """\
import importlib.util
import subprocess
import sys

missing = [name for name in ("torch", "diffusers", "accelerate") if importlib.util.find_spec(name) is None]
if missing:  # Colab and Kaggle have torch: it stays as it is
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)"""
LOAD = """\
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, {pipeline}
from diffusers.utils import make_image_grid

pipe = {pipeline}.from_pretrained("{repo_id}"{trust})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
zoom = max(1, 64 // size)


def show(images, columns):
    grid = make_image_grid([image.convert("RGB") for image in images], len(images) // columns, columns)
    return grid.resize((grid.width * zoom, grid.height * zoom), 0)"""
DRAW = """\
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
images = pipe({arguments}, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images
show(images, 8)"""
STEPS = """\
scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(50)
sample = torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0)).to(pipe.device)
labels = {labels}
moments = []
for number, t in enumerate(scheduler.timesteps):
    with torch.no_grad():
        model_output = pipe.unet(sample, t, class_labels=labels).sample
    step = scheduler.step(model_output, t, sample, use_clipped_model_output=True)
    sample = step.prev_sample
    if number % 5 == 4:
        moments.append((sample, step.pred_original_sample))

rows = [moment[kind][image] for image in range(4) for kind in (0, 1) for moment in moments]
pixels = (torch.stack(rows) / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
show(pipe.numpy_to_pil(pixels), 10)"""


def notebook(repo_id: str, classes: int | None) -> dict:
    """The notebook as JSON; `classes`: how many can be asked for, None for an unconditional model."""
    conditional = classes is not None
    pipeline, trust = ("DiffusionPipeline", ", trust_remote_code=True") if conditional else ("DDPMPipeline", "")
    arguments = f"class_labels=[number % {classes} for number in range(32)]" if conditional else "batch_size=32"
    labels = f"torch.arange(4, device=pipe.device) % {classes}" if conditional else "None"
    trusted = " `trust_remote_code=True` runs the repo's `pipeline.py`." if conditional else ""
    cells = (
        f"# {repo_id}\n\nDraw images with this model. It needs `torch` and `diffusers`, on a GPU or a CPU.",
        INSTALL,
        f"Load the pipeline.{trusted}",
        LOAD.format(pipeline=pipeline, repo_id=repo_id, trust=trust),
        "32 images in 20 steps:",
        DRAW.format(arguments=arguments),
        "Four images leave the noise. Upper rows: x_t. Lower rows: the x_0 that the U-Net predicts from it.",
        STEPS.format(labels=labels),
    )
    return {
        "cells": [cell(number, text) for number, text in enumerate(cells)],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def cell(number: int, text: str) -> dict:
    """A cell: every second one is code."""
    common = {"id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    code = {"cell_type": "code", "execution_count": None, "outputs": []}
    return common | (code if number % 2 else {"cell_type": "markdown"})


def write_notebook(model_dir: Path, repo_id: str, classes: int | None) -> None:
    """Write notebook.ipynb into the folder of a model."""
    text = json.dumps(notebook(repo_id, classes), indent=1)
    (model_dir / "notebook.ipynb").write_text(text + "\n", encoding="utf-8")
