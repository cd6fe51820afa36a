"""Checkpoints that are complete or absent.

A checkpoint is written into a hidden folder beside its place, listed in a manifest with the SHA-256 of each file,
synced to the disk, and only then renamed; older ones are deleted after that. So whenever and however a run is
stopped, the newest folder with a matching manifest is good. Weights are safetensors; the optimizer's state is read with
`weights_only=True`, which runs no code.

    checkpoint-500/unet/         the weights, as diffusers writes them
                   unet_ema/     their average, likewise
                   unet_weak/    the average of an early update, for the guide, likewise
                   state.pt      optimizer, learning rate, gradient scaler, counters
                   manifest.json
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError, first_line
from ..loading import loading
from ..pipeline import apply_umask
from ..record import flat, rename, sha256, write_json

PREFIX, MANIFEST = "checkpoint-", "manifest.json"


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    Windows, and network disks such as CIFS, cannot sync folders; there the system decides when.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs what is open to write
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():
            raise


def step_of(folder: Path) -> int:
    """500 for checkpoint-500; -1 for other names."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdigit() else -1


def is_draft(name: str) -> bool:
    """Whether a folder of that name is left from a save that was killed."""
    return name.startswith(f".{PREFIX}") and name.endswith((".draft", ".old"))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted((p for p in output_dir.glob(PREFIX + "*") if p.is_dir() and step_of(p) >= 0), key=step_of)


def remove(path: Path) -> None:
    """Delete a file, a folder, or a link, whose target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_checkpoint(
    output_dir: Path, step: int, unet, weights: dict[str, dict[str, Tensor]], state: dict, total_limit: int | None
) -> None:
    """Write checkpoint-`step`, then delete later ones, and the oldest over `total_limit`.

    `weights`: folder name -> state dict; the config of `unet` is saved with each. `state`: for `torch.save`; tensors,
    numbers, strings, lists and dicts only. ConfigError: it cannot be written (disk full, no permission); older
    checkpoints are as they were.
    """
    target = output_dir / f"{PREFIX}{step}"
    draft, replaced = (output_dir / f".{target.name}.{name}" for name in ("draft", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        for name, state_dict in weights.items():
            unet.save_config(draft / name)
            tensors = {key: tensor.contiguous() for key, tensor in state_dict.items()}
            save_file(tensors, draft / name / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        apply_umask(draft)
        torch.save(state, draft / "state.pt")
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        write_json(draft / MANIFEST, {"files": {p.relative_to(draft).as_posix(): sha256(p) for p in files}})
        for path in [*files, draft / MANIFEST, *(p for p in draft.rglob("*") if p.is_dir()), draft]:
            fsync(path)
        if target.exists():  # the same step again, after a resume from an earlier one
            rename(target, replaced)
        rename(draft, target)
    except Exception as e:  # the writers report a full disk in three ways
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):  # there is none, or `target` is still there
            replaced.rename(target)
        raise ConfigError(
            f"--output_dir {output_dir}: {target.name} cannot be written ({' '.join(str(e).split())[:120]}); make "
            "room, then --resume_from_checkpoint latest: older checkpoints are complete"
        ) from e
    fsync(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    checkpoints = [path for path in list_checkpoints(output_dir) if step_of(path) <= step]
    later = set(list_checkpoints(output_dir)).difference(checkpoints)  # "latest" must not lead back to these
    for path in [*later, *(checkpoints[:-total_limit] if total_limit is not None else [])]:
        with suppress(OSError):  # Windows and NFS keep what another program reads; the next save tries again
            remove(path)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        altered = [name for name, digest in files.items() if sha256(checkpoint / name) != digest]
    except Exception as e:  # a file is missing, or the manifest holds anything
        return f"it cannot be read ({first_line(e)})"
    return f"{altered[0]} was altered" if altered else None


def find_checkpoint(resume_from: str, output_dir: Path, warn=print) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None for 'latest' without any checkpoint.

    ConfigError: the named one is missing or damaged, or 'latest' has only damaged ones to choose from.
    """
    if resume_from != "latest":
        path = Path(resume_from) if Path(resume_from).is_dir() else output_dir / resume_from
        problem = damage(path) if path.is_dir() else "there is no such folder"
        if problem:
            raise ConfigError(f"--resume_from_checkpoint {resume_from}: {problem}; try 'latest' or a checkpoint-N")
        return path
    candidates = list_checkpoints(output_dir)[::-1]
    for path in candidates:
        problem = damage(path)
        if problem is None:
            return path
        warn(f"Skipping {path}: {problem}.")
    if candidates:
        raise ConfigError(f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged; start anew")
    return None


@torch.no_grad()
def load_checkpoint(checkpoint: Path, run: dict, weights: dict[str, dict[str, Tensor]]) -> dict:
    """Fill the tensors of `weights`, and return the `state`, on the CPU; both as in `save_checkpoint`.

    `run`: the identity of the run that resumes, which must equal the checkpoint's; {}: any. ConfigError: an entry
    differs, which the message names with both values; or something cannot be loaded.
    """
    option = f"--resume_from_checkpoint {checkpoint}"
    with loading(option, checkpoint):  # weights_only: it runs no code of the file
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        saved, now, _ = flat(state["run"]), flat(run), int(state["step"])
    for name in now | saved if run else {}:
        if saved.get(name) != now.get(name):
            raise ConfigError(
                f"{option}: it was trained with {name} = {saved.get(name)}, this run has {now.get(name)}; give the "
                "same, or start anew in another --output_dir"
            )
    with loading(option, checkpoint):
        for name, tensors in weights.items():
            saved = load_file(checkpoint / name / SAFETENSORS_WEIGHTS_NAME)
            for key, tensor in tensors.items():
                tensor.copy_(saved[key])
    return state
