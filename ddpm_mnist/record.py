"""The files in which a run records itself: their names, how they are read, and the hash of the weights."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path, PureWindowsPath

from .errors import ConfigError, first_line

CONFIG_FILE, METRICS_FILE, RESULTS_FILE = "train_config.yaml", "metrics.jsonl", "train_results.json"
WEIGHTS_FILE, ONNX_FILE = "unet/diffusion_pytorch_model.safetensors", "onnx/model.onnx"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model_dir: Path) -> str:
    """The hash that ties a measurement to the weights that it was made with."""
    return sha256(model_dir / WEIGHTS_FILE)


def read_json(path: Path) -> dict:
    """The mapping in a JSON file; empty if there is no file. ConfigError: it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
        return content
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)}); delete it, or make it again") from None


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of a metrics.jsonl: a run that was killed may leave half a line."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            lines.append(content)
    return lines


def sample_grids(output_dir: Path) -> dict[int, Path]:
    """The grids that a run drew, `samples/step-N.png`, by N, in this order."""
    grids = {path.stem.removeprefix("step-"): path for path in (output_dir / "samples").glob("step-*.png")}
    return dict(sorted((int(step), path) for step, path in grids.items() if step.isdecimal()))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a training run."""
    return (folder / "state.pt").is_file() and (folder / "unet").is_dir()


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder. Windows refuses while another program, such as a virus scanner, reads in it."""
    for pause in (1, 4):
        with suppress(PermissionError):
            path.replace(target)
            return
        time.sleep(pause)
    path.replace(target)


def write_whole(path: Path, text: str) -> None:
    """Write a text file: all of it or, on a full disk or when killed, nothing."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    rename(draft, path)


def write_json(path: Path, content: dict) -> None:
    """Write a mapping as JSON."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def flat(settings: dict) -> dict:
    """The settings without sections: {"unet": {"dropout": 0.1}} -> {"unet.dropout": 0.1}."""
    pairs = {}
    for name, value in settings.items():
        pairs |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return pairs


def without_paths(settings: dict, local: bool) -> dict:
    """The settings with file names for paths, which may hold the user's name; `local`: the dataset is a path."""
    settings = settings | {"cache_dir": None}
    paths = {"output_dir", "dataset_name"} if local else {"output_dir"}
    for key, value in settings.items():
        text = value if isinstance(value, str) else ""
        text = text.partition("@")[0] if key == "dataset_name" and not local else text  # without a revision of the Hub
        path = PureWindowsPath(text)  # reads the paths of both kinds of system
        if path.name and (key in paths or path.anchor or len(path.parts) > 2):  # a Hub id has two parts
            settings[key] = path.name
    return settings
