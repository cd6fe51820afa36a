"""What a run says of itself: metrics.jsonl, trackers, sample grids, and its results at the end."""

import importlib.metadata
import json
import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, first_line
from ..hub.push import without_paths
from ..images.dataset import Data
from ..record import read_metrics, weights_sha256
from .config import TrainConfig

METRICS_FILE, RESULTS_FILE = "metrics.jsonl", "train_results.json"


def tracker_names(report_to: str) -> str | None:
    """`--report_to` for Accelerator. ConfigError: the package is not installed."""
    if report_to in ("none", "all"):
        return None if report_to == "none" else "all"
    for package in (report_to, f"{report_to}X"):  # tensorboardX serves as tensorboard
        try:
            importlib.metadata.version(package)  # of an installed package; a folder of that name is none
        except importlib.metadata.PackageNotFoundError:
            continue
        return report_to
    raise ConfigError(f"--report_to {report_to}: not installed; `pip install {report_to}`, or --report_to none")


def tracker_options(config: TrainConfig, step: int) -> dict[str, dict]:
    """What each tracker is started with, for Accelerate. A run that resumes goes on as the same run of its tracker: it
    has the id in `logs/run_id`, which lasts as long as the output folder."""
    output_dir = Path(config.output_dir)
    path = output_dir / "logs" / "run_id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    run_id = path.read_text(encoding="utf-8").strip()
    name = f"{output_dir.resolve().name}-{run_id}"
    same = {"name": name, "resume": "allow"}
    return {
        "tensorboard": {"purge_step": step + 1} if step else {},  # hides what was logged after the checkpoint
        "wandb": {**same, "id": run_id, "dir": output_dir},
        "trackio": {**same, "space_id": config.trackio_space_id, "private": config.hub_private_repo or None},
    }


def flat(settings: dict) -> dict[str, int | float | str]:
    """Settings as trackers take them: `{"unet": {"dropout": 0.1}}` -> `{"unet.dropout": 0.1}`, the rest as text."""
    sections = {k: v for k, v in settings.items() if isinstance(v, dict)}
    nested = {f"{name}.{k}": v for name, section in sections.items() for k, v in section.items()}
    plain = {k: v for k, v in settings.items() if k not in sections}
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in (plain | nested).items()}


class MetricsLog:
    """Metrics to the trackers and, a JSON object a line, to metrics.jsonl; sample grids to samples/ and trackers."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, step: int):
        self.accelerator, self.last = accelerator, {}
        self.mark = (time.perf_counter(), step)
        local = config.dataset_name is not None and Path(config.dataset_name).exists()
        settings = flat(without_paths(config.saved(), local))
        on = config.report_to != "none" and accelerator.is_main_process
        try:
            accelerator.init_trackers("ddpm-mnist", init_kwargs=tracker_options(config, step) if on else None)
            for tracker in accelerator.trackers:
                if step == 0 or tracker.name != "tensorboard":  # which would show the settings as a second run
                    tracker.store_init_configuration(settings)
        except Exception as error:  # no account, no network, no place to write: each tracker has its own
            raise ConfigError(
                f"--report_to {config.report_to}: cannot start ({first_line(error)}); mend it, or --report_to none"
            ) from error
        output_dir = Path(config.output_dir)
        self.path, self.samples = output_dir / METRICS_FILE, output_dir / "samples"
        if accelerator.is_main_process:
            # What an interrupted run logged after the checkpoint that it resumes from will be logged again.
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log `metrics`; every process may call it, the main one writes."""
        self.to_trackers(lambda tracker: tracker.log(metrics, step=step))
        self.last = self.last | metrics
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def write_picture(self, step: int, picture: Image.Image) -> None:
        """Keep a grid of samples; for the main process."""
        self.samples.mkdir(exist_ok=True)
        picture.save(self.samples / f"step-{step:06d}.png")
        self.to_trackers(lambda tracker: log_picture(tracker, step, picture))

    def write_final(self, step: int, figures: dict[str, float]) -> None:
        """The figures of the whole run to the trackers; `train_results.json` has them too."""
        self.to_trackers(lambda tracker: tracker.log({f"final/{k}": v for k, v in figures.items()}, step=step))

    def close(self) -> None:
        """End the log: trackers send what they still hold."""
        self.to_trackers(lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()  # Accelerate would end them again

    def to_trackers(self, tell: Callable[[GeneralTracker], object]) -> None:
        """Tell each tracker something. One that fails is dropped, and that is said: no run ends over a tracker."""
        for tracker in list(self.accelerator.trackers):
            try:
                tell(tracker)
            except Exception as error:  # of its network, its disk, its threads
                self.accelerator.trackers.remove(tracker)
                self.accelerator.print(f"{tracker.name} failed ({first_line(error)}); the run goes on without it.")

    def images_per_second(self, step: int, global_batch: int) -> float:
        """The rate since the last call, validation and checkpoints included."""
        (then, earlier), now = self.mark, time.perf_counter()
        self.mark = (now, step)
        return (step - earlier) * global_batch / (now - then)


def log_picture(tracker: GeneralTracker, step: int, picture: Image.Image) -> None:
    """A picture to a tracker that takes pictures, each in its own way."""
    pixels = np.asarray(picture.convert("RGB"))[None]
    if tracker.name == "trackio":  # Accelerate's tracker has no method for it
        import trackio

        tracker.log({"samples": trackio.Image(picture)}, step=step)
    elif tracker.name == "tensorboard":
        tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images({"samples": pixels}, step=step)


def count_update(counts: Tensor, loss: Tensor, finite: Tensor) -> Tensor:
    """The counts of a run after one more update, which was skipped unless its gradient was `finite`.

    `[4]`: the sum of the losses and their number, both since the last log; the skipped updates, in all and in a row.
    They stay on the device until they are logged: reading them at every step would make a GPU wait for the host.
    """
    loss_sum, losses, skipped, in_a_row = counts
    loss_sum = loss_sum + torch.where(finite, loss, 0)
    return torch.stack([loss_sum, losses + finite, skipped + ~finite, torch.where(finite, 0, in_a_row + 1)])


def write_results(
    output_dir: Path,
    accelerator: Accelerator,
    data: Data,
    parameters: int,
    metrics: dict[str, float],
    steps: int,
    seconds: float,
) -> None:
    """What a run measured, and on what, into train_results.json beside the model."""
    results = {
        "dataset": data.name,
        "dataset_is_local": data.local,
        "weights_sha256": weights_sha256(output_dir),
        "parameters": parameters,
        "steps_of_this_session": steps,
        "minutes_of_this_session": seconds / 60,
        "metrics": metrics,
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, accelerate)},
        "python": platform.python_version(),
    }
    (output_dir / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
