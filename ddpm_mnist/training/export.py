"""The end of a run: the pipeline folder, its pictures and results, and the push."""

import os
import time
from pathlib import Path

import accelerate
import diffusers
import torch
from torch import Tensor

from .. import record
from ..errors import ConfigError, first_line
from ..hub.push import PushConfig, push_model
from ..pipeline import ClassConditionalDDPMPipeline, apply_umask
from ..record import METRICS_FILE, ONNX_FILE, RESULTS_FILE, read_json, read_metrics, weights_sha256, write_json
from ..sampling import grid, shown_steps, to_pil, trajectory_picture
from ..scheduler import DDPMScheduler
from ..unet import UNet2DModel
from .run import Run
from .validation import eval_mode, sample_options

GALLERY = 8  # single samples for the model card


def export(run: Run) -> None:
    """Write the trained model as a diffusers pipeline, with its results; push it if `push_to_hub` is set."""
    if not run.accelerator.is_main_process:
        return
    config, output_dir, say = run.config, run.output_dir, run.accelerator.print
    try:
        export_pipeline(run.bare_unet, run.scheduler, output_dir, run.averaged_weights(), config.null_class_label)
        seconds = time.perf_counter() - run.started
        write_card_pictures(run)
        same = read_json(output_dir / RESULTS_FILE).get("weights_sha256") == weights_sha256(output_dir)
        if run.step > run.first_step or not same:
            write_results(run, seconds)
    except (ConfigError, MemoryError, torch.OutOfMemoryError):  # of drawing the pictures
        raise
    except Exception as error:  # a full disk, in the words of several libraries
        raise ConfigError(
            f"--output_dir {output_dir}: the pipeline cannot be written ({first_line(error)}); make room, then"
            " --resume_from_checkpoint latest"
        ) from error
    say(f"Saved to {output_dir}: {run.parameters:,} parameters, {seconds / 60:.1f} minutes.")
    if config.push_to_hub:
        push_model(PushConfig(config.hub_model_id, str(output_dir), private=config.hub_private_repo))
    grids = [*record.sample_grids(output_dir).values()]
    picture = grids[-1] if grids else output_dir / "trajectory.png"
    say(f"Trained on {run.data.name}. Samples: {picture}. Next: python generate.py --model {output_dir}")


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

    `weights`, such as their average, replace the U-Net's own. An earlier export to ONNX is deleted; other files stay.
    """
    ours = Path(output_dir) / "pipeline.py"  # of a conditional model that was here
    if ours.is_file() and ours.read_bytes() == ClassConditionalDDPMPipeline._source:
        ours.unlink()
    Path(output_dir, ONNX_FILE).unlink(missing_ok=True)
    stock_unet = diffusers.UNet2DModel.from_config(unet.config)
    stock_unet.load_state_dict(unet.state_dict() if weights is None else weights, strict=True)
    stock_scheduler = diffusers.DDPMScheduler.from_config(scheduler.config)
    if unet.config.num_class_embeds is None:
        pipe = diffusers.DDPMPipeline(stock_unet, stock_scheduler)
    else:
        pipe = ClassConditionalDDPMPipeline(stock_unet, stock_scheduler, null_class_label)
    pipe.save_pretrained(output_dir, safe_serialization=True)
    apply_umask(output_dir)


def write_card_pictures(run: Run) -> None:
    """Pictures for the model card: single samples in `gallery/`, and their way out of the noise in `trajectory.png`."""
    options = sample_options(run)
    shown = shown_steps(run.model.num_steps(options))
    with eval_mode(run.bare_unet, run.ema):
        drawn = enumerate(run.model.draw(range(GALLERY), options), 1)
        trajectory = [step for number, (_, step) in drawn if number in shown]
    trajectory_picture(trajectory).save(run.output_dir / "trajectory.png")
    (run.output_dir / "gallery").mkdir(exist_ok=True)
    for number, image in enumerate(to_pil(trajectory[-1].prev_sample)):
        grid([image], zoom=max(1, 256 // image.width)).save(run.output_dir / f"gallery/{number}.png")


def write_results(run: Run, seconds: float) -> None:
    """What the run measured, and how it was trained, into train_results.json."""
    accelerator, device = run.accelerator, run.accelerator.device
    names = {"cpu": f"{os.cpu_count()} CPU cores", "cuda": torch.cuda.is_available() and torch.cuda.get_device_name()}
    metrics = {}  # those logged at this step; none without validation
    for line in read_metrics(run.output_dir / METRICS_FILE):
        metrics |= line if line.pop("step") == run.step else {}
    results = {
        "dataset": run.data.name,
        "dataset_is_local": run.data.local,
        "commits": {"dataset": run.data.commit},  # on the Hub
        "weights_sha256": weights_sha256(run.output_dir),
        "parameters": run.parameters,
        "steps_of_this_session": run.step - run.first_step,
        "minutes_of_this_session": seconds / 60,
        "metrics": metrics,
        "processes": accelerator.num_processes,
        "device_name": names.get(device.type, device.type.upper()),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, accelerate)},
    }
    write_json(run.output_dir / RESULTS_FILE, results)
