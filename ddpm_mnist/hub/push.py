"""Pushing a trained model to the Hub, in one commit, after checks."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import ConfigError, file_problem
from ..options import opt, read_yaml
from ..record import CONFIG_FILE, METRICS_FILE, RESULTS_FILE, read_json, sha256, without_paths
from .card import SPACE_ID, read_text, usage, write_card
from .repo import check_repo_id, edited_on_the_hub, hub_errors, make_repo, read_token
from .space import check_space, open_space, space_files, upload_space

FILES = ("model_index.json", "unet/*", "scheduler/*", "pipeline.py", "README.md", "notebook.ipynb")
FILES += ("samples.png", "loss_curve.png", "trajectory.png", "gallery/*.png")
FILES += (CONFIG_FILE, RESULTS_FILE, METRICS_FILE, "evaluation.json", "evaluation_*.png")
PUSHED_CARD = ".pushed_card"  # hash of the card that was pushed last
WRITTEN = ("README.md", PUSHED_CARD, SPACE_ID, "samples.png", "loss_curve.png", "notebook.ipynb")  # by a push

# Runs in a fresh process without this repo: does stock diffusers load the folder, and what does it draw?
STOCK_SAMPLE = """
import json, sys, numpy, torch
from diffusers import DiffusionPipeline, UNet2DModel
folder, arguments, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipe.unet) is UNet2DModel
pipe.set_progress_bar_config(disable=True)
images = pipe(**arguments, generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="pt").images
assert not any(name.startswith("ddpm_mnist") for name in sys.modules)
numpy.save(output, images.numpy())
"""


@dataclass(frozen=True)
class PushConfig:
    """What to push"""

    hub_model_id: str = opt("", "The repo: USER/NAME. Needed.")
    model_dir: str = opt("ddpm-mnist", "The output_dir of a finished training run.", path=True)
    space_id: str | None = opt(None, "Also a Space that shows the model, by the page in demo/: USER/NAME.")
    private: bool = opt(False, "Make a new repo private; refuse to push to one that is public.")
    revision: str | None = opt(None, "Branch; made if missing. Default: main.")
    create_pr: bool = opt(False, "Open a pull request instead of committing.")
    commit_message: str = opt("Upload DDPM", "Message of the commit.")
    license: str = opt("mit", "License of the weights, for the model card.")
    include_checkpoints: bool = opt(False, "Also checkpoints, with the optimizer's state.")
    dry_run: bool = opt(False, "Validate and list, and send nothing.")


def push_model(model_dir: Path, hub_model_id: str, **options) -> None:
    """Validate a trained model, write its card, upload both, and print how it is used. `options`: see `PushConfig`.

    ConfigError: an option cannot be right, the model does not load, or the Hub refuses something.
    """
    config, repo_id = PushConfig(hub_model_id, str(model_dir), **options), hub_model_id
    check_push(config)
    api = None if config.dry_run else HfApi(token=read_token())
    validate_model(model_dir)
    keep_card = api is not None and open_repos(api, config)
    write_card(model_dir, repo_id, config.license)
    files = files_to_push(model_dir, config.include_checkpoints)
    if keep_card:
        files.remove("README.md")
        print(f"README.md of {repo_id} was edited on the Hub: it stays. To replace it, delete it there and push again.")
    list_files({path: (model_dir / path).stat().st_size for path in files}, repo_id)
    space = space_files(repo_id, config.license) if config.space_id is not None else {}
    if space:
        list_files({path: len(content) for path, content in space.items()}, f"the Space {config.space_id}")
    if api is None:
        print("Nothing was sent (--dry_run).")
        return
    options = {"revision": config.revision, "create_pr": config.create_pr, "commit_message": config.commit_message}
    address = upload(api, model_dir, repo_id, files, **options)
    if space:
        print(f"\n{upload_space(api, config.space_id, space, config.private)}")
    print(f"\n{address}\n\n{usage(repo_id, (model_dir / 'pipeline.py').is_file())}")


def check_push(config: PushConfig) -> None:
    """ConfigError: an option cannot be right, or the files that a push writes into the folder cannot be written."""
    main_branch, folder = config.revision in (None, "main"), Path(config.model_dir)
    check_repo_id(config.hub_model_id)
    if config.create_pr and not main_branch:
        raise ConfigError(f"--create_pr: goes to main, and --revision {config.revision} elsewhere; give one of them")
    if config.space_id is not None:
        check_space(config.space_id, main_branch and not config.create_pr)
    problems = (file_problem(folder / name) for name in WRITTEN if folder.is_dir())
    if problem := next(filter(None, problems), None):
        raise ConfigError(f"--model_dir {folder}: {problem}")


def open_repos(api: HfApi, config: PushConfig) -> bool:
    """Create the repo and the Space, unless they exist; returns whether the card on the Hub must stay."""
    model_dir = Path(config.model_dir)
    make_repo(api, config.hub_model_id, config.private, config.revision)
    if config.space_id is not None:
        open_space(api, config.space_id, config.private)
        (model_dir / SPACE_ID).write_text(config.space_id + "\n", encoding="utf-8")
    return edited_on_the_hub(api, config.hub_model_id, config.revision, read_text(model_dir / PUSHED_CARD).strip())


def validate_model(model_dir: Path) -> None:
    """Load the folder with stock diffusers in a fresh process, and compare its seeded sample with the in-repo classes'.

    ConfigError: it does not load, or draws something else.
    """
    option = f"--model_dir {model_dir}"
    for needed in ("model_index.json", CONFIG_FILE, RESULTS_FILE):  # the last comes at a run's end
        if not (model_dir / needed).is_file():
            raise ConfigError(
                f"{option}: holds no {needed}; name the output_dir of a finished training run, or finish it with "
                "--resume_from_checkpoint latest"
            )
    import numpy as np

    conditional = (model_dir / "pipeline.py").is_file()
    arguments = {"class_labels": [0, 0], "guidance_scale": 1.0} if conditional else {"batch_size": 2}
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment["PYTHONPATH"] = without_this_repo(os.environ.get("PYTHONPATH", ""))
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "sample.npy")
        command = [sys.executable, "-c", STOCK_SAMPLE, str(model_dir.resolve()), json.dumps(arguments), output]
        text = {"encoding": "utf-8", "errors": "replace"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, **text)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(f"{option}: stock diffusers cannot load and run it ({last}); train or export it again")
        stock = np.load(output)
    if not np.allclose(own_sample(model_dir, arguments), stock, atol=1e-3):
        raise ConfigError(f"{option}: stock diffusers draws another sample than this repo does; report this as a bug")


def own_sample(model_dir: Path, arguments: dict):
    """What the classes of this repo draw by the same seed as `STOCK_SAMPLE`: a NumPy array `[2, C, H, W]`."""
    import torch
    from diffusers import DDPMPipeline

    from ..loading import load_model
    from ..pipeline import ClassConditionalDDPMPipeline

    model = load_model(str(model_dir), "--model_dir")
    pipe = (ClassConditionalDDPMPipeline if model.num_classes else DDPMPipeline)(model.unet.cpu(), model.scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, generator=generator, num_inference_steps=4, output_type="pt").images.numpy()


def without_this_repo(python_path: str) -> str:
    """A PYTHONPATH without checkouts of this repo, for a process in another folder. Other packages stay."""
    folders = [os.path.abspath(folder) for folder in python_path.split(os.pathsep) if folder]
    return os.pathsep.join(f for f in folders if not os.path.isfile(os.path.join(f, "push_to_hub.py")))


def files_to_push(model_dir: Path, include_checkpoints: bool = False) -> list[str]:
    """What is pushed, relative to the folder: the model, its card and its record; never more, unless asked."""
    patterns = [*FILES, "checkpoint-[0-9]*/**/*"] if include_checkpoints else FILES
    paths = {path for pattern in patterns for path in model_dir.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(model_dir).as_posix() for path in paths)


def published_config(model_dir: Path) -> bytes:
    """`train_config.yaml` as it is published, without paths."""
    settings = read_yaml("--model_dir", model_dir / CONFIG_FILE)
    local = read_json(model_dir / RESULTS_FILE).get("dataset_is_local", True)
    return yaml.safe_dump(without_paths(settings, local), sort_keys=False).encode()


def list_files(sizes: dict[str, int], goal: str) -> None:
    """Print what is uploaded where: a line for each file, and the sum."""
    for path, size in sizes.items():
        print(f"{size:>12,}  {path}")
    print(f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files for {goal}")


def upload(api: HfApi, model_dir: Path, repo_id: str, files: list[str], **options) -> str:
    """Upload the files in one commit; returns its address, or that of the newest commit if nothing has changed.

    Can be interrupted anywhere and run again: uploaded files are kept by their hash, and the commit is all or nothing.
    `options`: of `HfApi.create_commit`. ConfigError: see `explain`.
    """
    contents = {path: published_config(model_dir) if path == CONFIG_FILE else model_dir / path for path in files}
    with hub_errors(repo_id):
        operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
        commit = api.create_commit(repo_id, operations, **options)
    if "README.md" in files:
        (model_dir / PUSHED_CARD).write_text(sha256(model_dir / "README.md") + "\n", encoding="utf-8")
    return commit.pr_url or commit.commit_url
