"""Pushing a trained model to the Hub, in one commit, after checks."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..errors import ConfigError, file_problem
from ..options import opt, read_yaml
from ..record import CONFIG_FILE, METRICS_FILE, ONNX_FILE, RESULTS_FILE, read_json, weights_sha256, without_paths
from .card import usage, write_card, written_by_hand
from .repo import check_repo_id, edited_on_the_hub, hub_errors, make_repo, read_token

CONFIGS = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
FILES = (*CONFIGS, "unet/diffusion_pytorch_model*", "pipeline.py", "README.md", "notebook.ipynb", ONNX_FILE)
FILES += ("samples.png", "loss_curve.png", "trajectory.png", "gallery/*.png")
FILES += (CONFIG_FILE, RESULTS_FILE, METRICS_FILE)
EVALUATION = ("evaluation.json", "evaluation_*.png")
OUR_PIPELINE = Path(__file__).parents[1] / "pipeline.py"

# Runs in a fresh process without this repo: does stock diffusers load the folder and draw from it?
STOCK_SAMPLE = """
import json, sys, torch
from diffusers import DiffusionPipeline, UNet2DModel
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code="class_labels" in sys.argv[2])
assert type(pipe.unet) is UNet2DModel
pipe.set_progress_bar_config(disable=True)
images = pipe(**json.loads(sys.argv[2]), num_inference_steps=min(4, len(pipe.scheduler)), output_type="pt").images
assert not any(name.startswith("ddpm_mnist") for name in sys.modules)
assert images.isfinite().all(), "it draws no finite numbers"
"""


@dataclass(frozen=True)
class PushConfig:
    """What to push"""

    hub_model_id: str | None = opt(None, "The repo: USER/NAME. Required.")
    model_dir: str = opt("ddpm-mnist", "The output_dir of a finished training run.", path=True)
    private: bool = opt(False, "Make a new repo private; refuse to push to one that is public.")
    revision: str | None = opt(None, "Branch; made if missing. Default: main.")
    commit_message: str = opt("Upload DDPM", "Message of the commit.")
    license: str = opt("apache-2.0", "License of the weights, for the model card. Default: as the code.")
    dry_run: bool = opt(False, "Validate and list the files; upload nothing.")


def push_model(config: PushConfig) -> None:
    """Validate a trained model, write its card, upload both, and print how it is used.

    ConfigError: an option is invalid, the model does not load, or the Hub refuses something.
    """
    model_dir, repo_id = Path(config.model_dir), config.hub_model_id
    check_repo_id(repo_id)
    if problem := file_problem(model_dir / "README.md"):
        raise ConfigError(f"--model_dir {model_dir}: {problem}")
    api = None if config.dry_run else HfApi(token=read_token())
    validate_model(model_dir)
    if api is not None:
        make_repo(api, repo_id, config.private, config.revision)
    write_card(model_dir, repo_id, config.license, config.revision)
    files = files_to_push(model_dir)
    ours = not written_by_hand(files["README.md"].decode("utf-8", errors="replace"))
    if api is not None and ours and edited_on_the_hub(api, repo_id, config.revision):
        del files["README.md"]
        print(f"README.md of {repo_id} was edited on the Hub: it stays. To replace it, delete it there and push again.")
    for path, content in files.items():
        print(f"{len(content):>12,}  {path}")
    print(f"{sum(map(len, files.values())):>12,}  bytes in {len(files)} files for {repo_id}")
    if api is None:
        print("Nothing was sent (--dry_run).")
        return
    address = upload(api, config, files)
    print(f"\n{address}\n\n{usage(repo_id, model_dir, config.revision)}")


def validate_model(model_dir: Path) -> None:
    """Load the folder with stock diffusers in a fresh process, and draw. ConfigError: it does not load, or not draw."""
    option = f"--model_dir {model_dir}"
    for needed in ("model_index.json", CONFIG_FILE, RESULTS_FILE):  # the last comes at a run's end
        if not (model_dir / needed).is_file():
            raise ConfigError(
                f"{option}: holds no {needed}; name the output_dir of a finished training run, or finish it with "
                "--resume_from_checkpoint latest"
            )
    index, code = read_json(model_dir / "model_index.json"), model_dir / "pipeline.py"
    conditional = isinstance(index.get("_class_name"), list)
    if not conditional and code.is_file():
        raise ConfigError(f"{option}: this model does not use pipeline.py, which would be pushed too; move it away")
    if conditional and (not code.is_file() or code.read_bytes() != OUR_PIPELINE.read_bytes()):
        problem = "pipeline.py, which the check would run, is missing or not this version's"
        raise ConfigError(f"{option}: {problem}; to use this version's, copy {OUR_PIPELINE} there")
    named = {str(value[0]) for value in index.values() if isinstance(value, list)}
    if conditional and named - {"pipeline", "diffusers"}:
        raise ConfigError(f"{option}: model_index.json names other code than pipeline.py; export it again")
    arguments = json.dumps({"class_labels": [0, 0]} if conditional else {"batch_size": 2})
    # -P: the folder in which the process starts, perhaps this repo, is no place to import from
    command = [sys.executable, "-P", "-c", STOCK_SAMPLE, str(model_dir), arguments]
    text = {"encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, env=os.environ | {"HF_TOKEN": ""}, capture_output=True, **text)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"{option}: stock diffusers cannot load and run it ({last}); train or export it again")


def files_to_push(model_dir: Path) -> dict[str, bytes]:
    """Path -> content of what is pushed: the model, its card and its record, without paths of this machine."""
    evaluated = read_json(model_dir / "evaluation.json").get("weights_sha256") == weights_sha256(model_dir)
    patterns = FILES + EVALUATION if evaluated else FILES  # else it measured other weights
    paths = sorted(path for pattern in patterns for path in model_dir.glob(pattern) if path.is_file())
    files = {path.relative_to(model_dir).as_posix(): path.read_bytes() for path in paths}
    for name in CONFIGS:  # diffusers notes where it loaded a pipeline from
        config = read_json(model_dir / name)
        if config.pop("_name_or_path", None) is not None:
            files[name] = json.dumps(config, indent=2).encode()
    settings = read_yaml("--model_dir", model_dir / CONFIG_FILE)
    local = read_json(model_dir / RESULTS_FILE).get("dataset_is_local", True)
    files[CONFIG_FILE] = yaml.safe_dump(without_paths(settings, local), sort_keys=False).encode()
    return files


def upload(api: HfApi, config: PushConfig, files: dict[str, bytes]) -> str:
    """Upload the files in one commit, all or nothing; returns its address, or that of the newest commit if nothing has
    changed. Can be interrupted anywhere and run again."""
    with hub_errors(config.hub_model_id):
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        for path in api.list_repo_files(config.hub_model_id, revision=config.revision):
            if path not in files and any(fnmatch(path, pattern) for pattern in (ONNX_FILE, *EVALUATION)):
                operations.append(CommitOperationDelete(path))  # of older weights
        commit = api.create_commit(
            config.hub_model_id, operations, commit_message=config.commit_message, revision=config.revision
        )
    return commit.commit_url
