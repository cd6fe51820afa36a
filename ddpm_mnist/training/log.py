"""Logging: metrics.jsonl, trackers and sample grids."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..errors import ConfigError, first_line
from ..record import METRICS_FILE, flat, read_metrics, sample_grids, without_paths, write_whole
from .config import TrainConfig


class Stderr:
    """stderr for the progress bar: a run goes on if nobody reads it any more (a `tee` that ended, a lost line)."""

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()

    def flush(self) -> None:
        """`write` did."""


class MetricsLog:
    """Metrics and sample grids to metrics.jsonl, to samples/, and to the trackers; only the main process writes."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, step: int):
        self.accelerator = accelerator
        output_dir = Path(config.output_dir)
        self.file, self.samples, name = output_dir / METRICS_FILE, output_dir / "samples", output_dir.resolve().name
        options = {  # TensorBoard hides what was logged after the step at which a run begins
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"name": name, "dir": config.output_dir},
            "trackio": {"name": name, "private": config.hub_private_repo or None},
        }
        try:
            accelerator.init_trackers("ddpm-mnist", init_kwargs=options)
            for tracker in accelerator.trackers:
                if step == 0 or tracker.name != "tensorboard":  # which would show the settings as a second run
                    tracker.store_init_configuration(published_settings(config))
        except Exception as error:  # no account, no network, no place to write: each tracker has its own
            raise ConfigError(
                f"--report_to {config.report_to}: cannot start ({first_line(error)}); fix that, or --report_to none"
            ) from error

    def forget_after(self, step: int) -> None:
        """Delete what was logged after this step: training resumes from it and logs it again."""
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.file) if line["step"] <= step]
        write_whole(self.file, "".join(kept))
        for number, path in sample_grids(self.samples.parent).items():
            if number > step:
                path.unlink()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log `metrics`: a line of JSON in the file, and to the trackers."""
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.to_trackers(lambda tracker: tracker.log(metrics, step=step))

    def write_picture(self, step: int, picture: Image.Image) -> None:
        """Keep a grid of samples; print where the first one is."""
        if not self.accelerator.is_main_process:
            return
        path, first = self.samples / f"step-{step:06d}.png", not self.samples.exists()
        self.samples.mkdir(exist_ok=True)
        picture.save(path)
        if first:
            self.accelerator.print(f"First samples: {path}")
        self.to_trackers(lambda tracker: log_picture(tracker, step, picture))

    def close(self) -> None:
        """End the log: trackers send what they still hold."""
        self.to_trackers(lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()  # Accelerate would end them again

    def to_trackers(self, call: Callable[[GeneralTracker], object]) -> None:
        """Call each tracker. One that fails is dropped, which is printed: a run goes on without its tracker."""
        for tracker in list(self.accelerator.trackers):
            try:
                call(tracker)
            except Exception as error:  # of its network, its disk, its threads
                self.accelerator.trackers.remove(tracker)
                self.accelerator.print(f"{tracker.name} failed ({first_line(error)}); the run goes on without it.")


def published_settings(config: TrainConfig) -> dict[str, int | float | str]:
    """The settings as trackers take them: without paths and sections, and as numbers or text."""
    settings = flat(without_paths(config.saved(), local=Path(config.dataset_name).exists()))
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings.items()}


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
