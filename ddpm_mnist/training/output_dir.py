"""The folder of a run: whether it may be written, and its first files."""

import os
import shutil
from pathlib import Path

from ..options import ConfigError
from .checkpoint import PREFIX, find_checkpoint, is_draft
from .config import TrainConfig
from .log import METRICS_FILE

CONFIG_FILE = "train_config.yaml"
BEFORE_THE_FIRST_CHECKPOINT = {CONFIG_FILE, METRICS_FILE, "logs", "samples"}


def check_output_dir(config: TrainConfig, warn=print) -> Path | None:
    """Look whether the run may write into its folder; write nothing yet, since the data may still be refused.

    Returns:
        The checkpoint to resume from, or None for a new run.

    Raises:
        ConfigError: the folder is a file, cannot be written, or holds what nobody asked to replace; or the checkpoint
            that was asked for is missing or damaged.
    """
    output_dir = Path(config.output_dir)
    option = f"--output_dir {output_dir}"
    if config.overwrite_output_dir and config.resume_from_checkpoint:
        raise ConfigError("--overwrite_output_dir starts anew, --resume_from_checkpoint continues: give one of them")
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
