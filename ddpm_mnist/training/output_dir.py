"""The folder of a run: whether it may be written, and its first files."""

from pathlib import Path

import filelock
import yaml

from ..errors import ConfigError, first_line, writable_problem
from ..record import CONFIG_FILE, METRICS_FILE, RESULTS_FILE, read_metrics, write_whole
from .checkpoint import find_checkpoint, is_draft, remove, step_of
from .config import TrainConfig

LOCK_FILE = ".lock"
FOLDERS = ("", "unet", "scheduler", "samples", "gallery")  # a run writes into these, in part at its end
TRACKER_FOLDERS = ("logs", "wandb")
BEFORE_THE_FIRST_CHECKPOINT = {CONFIG_FILE, METRICS_FILE, "samples", *TRACKER_FOLDERS}


def lock_output_dir(output_dir: Path) -> filelock.BaseFileLock:
    """Make the folder and lock it for this process. The system releases the lock when the process ends in any way.

    ConfigError: another run holds the lock.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output_dir / LOCK_FILE, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(
            f"--output_dir {output_dir}: another run is writing there; wait for its end, stop it, or name another"
        ) from None
    except Exception as error:  # a file system without locks reports that in many ways
        print(f"{output_dir} cannot be locked against a second run ({first_line(error)}).")
    return lock


def check_output_dir(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a new run. Writes nothing yet, since the data may still be refused.

    ConfigError: the run may not write into its folder, or the checkpoint is missing or damaged.
    """
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    option = f"--output_dir {output_dir}"
    if config.overwrite_output_dir and resume:
        raise ConfigError("--overwrite_output_dir starts anew, --resume_from_checkpoint continues: give one of them")
    images = Path(config.dataset_name).resolve()
    as_saved = (images / "dataset_dict.json").is_file() or (images / "state.json").is_file()  # by save_to_disk
    if images.is_dir() and not as_saved and images in (output_dir.resolve(), *output_dir.resolve().parents):
        raise ConfigError(
            f"{option}: lies in the folder of the images, where `datasets` would read it; use one outside"
        )
    if problem := next(filter(None, (writable_problem(output_dir / name) for name in FOLDERS)), None):
        raise ConfigError(f"{option}: {problem}")
    if (output_dir / LOCK_FILE).exists():  # before another run's checkpoints are read, which it may be deleting
        lock_output_dir(output_dir).release()

    names = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    names = {name for name in names if not name.startswith(".") and name != "lost+found"}  # .lock, drafts, .git
    if names <= BEFORE_THE_FIRST_CHECKPOINT and not read_metrics(output_dir / METRICS_FILE):
        names = set()  # a run that failed before its first update
    if not resume:
        if names and CONFIG_FILE not in names:
            raise ConfigError(f"{option}: is not empty, and holds no earlier run; name another")
        if names and not config.overwrite_output_dir:
            raise ConfigError(
                f"{option}: is not empty; name another, go on with --resume_from_checkpoint latest, or start anew with "
                "--overwrite_output_dir"
            )
        return None
    checkpoint = find_checkpoint(resume, output_dir)
    others = names - BEFORE_THE_FIRST_CHECKPOINT
    if checkpoint is None and others:
        raise ConfigError(
            f"--resume_from_checkpoint {resume}: {output_dir} holds other files, but no checkpoint; name another "
            "--output_dir"
        )
    if checkpoint is not None and others and checkpoint.absolute().parent.resolve() != output_dir.resolve():
        raise ConfigError(
            f"{option}: holds a run that resuming from {checkpoint} would replace; name the checkpoint's folder "
            f"({checkpoint.parent}), or an empty one"
        )
    return checkpoint


def begin_output_dir(config: TrainConfig, more_to_train: bool) -> None:
    """Save the settings in the folder.

    `--overwrite_output_dir` deletes what a run writes as it goes; the pipeline is replaced at the end. If there is
    `more_to_train`, its results are deleted now, so that nobody pushes the earlier weights with these settings.
    """
    output_dir = Path(config.output_dir)
    try:
        for path in list(output_dir.iterdir()):
            of_a_run = step_of(path) >= 0 or path.name in ("samples", METRICS_FILE)
            if is_draft(path.name) or (config.overwrite_output_dir and of_a_run):
                remove(path)
        if more_to_train:
            (output_dir / RESULTS_FILE).unlink(missing_ok=True)
        write_whole(output_dir / CONFIG_FILE, yaml.safe_dump(config.saved(), sort_keys=False))
    except OSError as error:
        raise ConfigError(
            f"--output_dir {output_dir}: cannot be written ({first_line(error)}); name another"
        ) from error
