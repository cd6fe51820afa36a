"""The housekeeping of a run: its folder, its log, the signals that stop it."""

import ctypes
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from .card import weights_sha256
from .checkpoint import PREFIX, find_checkpoint, is_draft, list_checkpoints
from .config import ConfigError, TrainConfig

CONFIG_FILE, METRICS_FILE, RESULTS_FILE = "train_config.yaml", "metrics.jsonl", "train_results.json"
MAX_SKIPPED_IN_A_ROW = 25  # more than the halvings that fp16's first loss scale, 2**16, may need
BEFORE_THE_FIRST_CHECKPOINT = {CONFIG_FILE, METRICS_FILE, "logs", "samples"}


def tracker_names(report_to: str) -> str | None:
    """`--report_to` for Accelerator. ConfigError: the package is not installed."""
    if report_to in ("none", "all"):
        return None if report_to == "none" else "all"
    if importlib.util.find_spec(report_to) is None:
        raise ConfigError(f"--report_to {report_to}: not installed; `pip install {report_to}`, or --report_to none")
    return report_to


def use_hardware(accelerator: Accelerator) -> None:
    """Share the cores among this machine's processes, where the launcher set one thread for each; on a GPU, let
    float32 products use its tensor cores (TF32), as its convolutions do anyway.

    `accelerate launch` and torchrun set OMP_NUM_THREADS=1 unless told otherwise, which halves the speed of two cores
    and wastes seven of eight. To use fewer cores than there are, give the run fewer (taskset, a container's cpuset).
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the kernel: a training step frees and asks for the same hundreds of
    megabytes, and to get them page by page again costs a CPU 7% of its time. Other systems are left as they are."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def one_process_only() -> str | None:
    """A warning where `accelerate launch --cpu --num_processes N` was typed, which starts one process, silently."""
    meant_more = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if meant_more and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return (
            "!!! accelerate launch starts ONE process on a CPU, whatever --num_processes says (without MPI). For N: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N train_ddpm_mnist.py ...\n"
        )
    return None


def check_output_dir(config: TrainConfig, warn=print) -> Path | None:
    """Look whether the run may write into its folder; write nothing yet, since the data may still be refused.

    Returns:
        The checkpoint to go on from, or None for a new run.

    Raises:
        ConfigError: the folder is a file, cannot be written, or holds what nobody asked to replace; or the checkpoint
            that was asked for is missing or damaged.
    """
    output_dir = Path(config.output_dir)
    option = f"--output_dir {output_dir}"
    if config.overwrite_output_dir and config.resume_from_checkpoint:
        raise ConfigError("--overwrite_output_dir starts anew, --resume_from_checkpoint goes on: give one of them")
    existing = next(p for p in (output_dir, *output_dir.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ConfigError(f"{option}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError(f"{option}: {existing} cannot be written; name another, or change its permissions")
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir, warn)
        if checkpoint is not None:
            return checkpoint
    there = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    there = {name for name in there if not is_draft(name)}  # of a run that was killed in its first save
    if config.resume_from_checkpoint and there - BEFORE_THE_FIRST_CHECKPOINT:
        raise ConfigError(
            f"--resume_from_checkpoint {config.resume_from_checkpoint}: {output_dir} holds other files, but no "
            "checkpoint; --overwrite_output_dir starts anew"
        )
    if there and not config.resume_from_checkpoint and not config.overwrite_output_dir:
        raise ConfigError(
            f"{option}: is not empty; name another, go on with --resume_from_checkpoint latest, or start anew with "
            "--overwrite_output_dir"
        )
    return None


def begin_output_dir(config: TrainConfig) -> None:
    """Make the folder and save the settings in it.

    `--overwrite_output_dir` deletes what a run writes as it goes (checkpoints, samples, logs) and nothing else; the
    exported pipeline is replaced at the end.
    """
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in output_dir.iterdir():
        if is_draft(path.name):
            shutil.rmtree(path)
    if config.overwrite_output_dir:
        for path in output_dir.iterdir():
            if path.name.startswith(PREFIX) or path.name in ("logs", "samples"):
                shutil.rmtree(path)
        (output_dir / METRICS_FILE).unlink(missing_ok=True)
    (output_dir / CONFIG_FILE).write_text(config.to_yaml())


class MetricsLog:
    """Metrics to the trackers and, a JSON object a line, to metrics.jsonl; sample grids to samples/ and them."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, output_dir: Path, step: int):
        self.accelerator, self.last = accelerator, {}
        self.mark = (time.perf_counter(), step)
        settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(config).items()}
        accelerator.init_trackers("ddpm-mnist", config=settings)
        self.path, self.samples = output_dir / METRICS_FILE, output_dir / "samples"
        if accelerator.is_main_process:
            # What an interrupted run logged after the checkpoint that it goes on from will be logged again.
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.accelerator.log(metrics, step=step)
        self.last = self.last | metrics
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def write_picture(self, step: int, picture: Image.Image) -> None:
        self.samples.mkdir(exist_ok=True)
        picture.save(self.samples / f"step-{step:06d}.png")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                pixels = np.asarray(picture.convert("RGB"))[None]
                if tracker.name == "tensorboard":
                    tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({"samples": pixels}, step=step)

    def images_per_second(self, step: int, global_batch: int) -> float:
        """The rate since the last call, validation and checkpoints included."""
        (then, earlier), now = self.mark, time.perf_counter()
        self.mark = (now, step)
        return (step - earlier) * global_batch / (now - then)


def not_finite(config: TrainConfig, output_dir: Path, step: int) -> str:
    """The error of a run that came apart."""
    checkpoints = list_checkpoints(output_dir)
    good = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
    return (
        f"--learning_rate {config.learning_rate}: loss or weights are no longer finite at step {step}; lower it, or "
        f"set --mixed_precision no; {good}"
    )


def count_update(counts: Tensor, loss: Tensor, finite: Tensor) -> Tensor:
    """The counts of a run after one more update, whose gradient was `finite` or else was left out.

    `[4]`: the sum of the losses and their number, both since the last log; the left-out updates, in all and in a row.
    They stay on the device until they are logged: a GPU that is asked at every step stands still meanwhile.
    """
    loss_sum, losses, skipped, in_a_row = counts
    loss_sum = loss_sum + torch.where(finite, loss, 0)
    return torch.stack([loss_sum, losses + finite, skipped + ~finite, torch.where(finite, 0, in_a_row + 1)])


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to stop after the update it is at; a second Ctrl-C stops at once."""

    EVERY = 10  # updates between two agreements of several processes: each costs a wait for all

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signum, self.asked = accelerator, 0, 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.receive)

    def receive(self, signum: int, frame) -> None:
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        """Whether to stop; the same answer in all processes."""
        if self.accelerator.num_processes == 1:
            return self.signum != 0
        self.asked += 1
        if self.asked % self.EVERY:
            return False
        signums = self.accelerator.gather(torch.tensor([self.signum], device=self.accelerator.device))
        self.signum = int(signums.max())
        return self.signum != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signum if self.signum else 0


def write_results(
    output_dir: Path,
    accelerator: Accelerator,
    dataset: str,
    parameters: int,
    metrics: dict[str, float],
    steps: int,
    seconds: float,
) -> None:
    """What a run measured, and on what, into train_results.json beside the model."""
    results = {
        "dataset": dataset,
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
    (output_dir / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n")
