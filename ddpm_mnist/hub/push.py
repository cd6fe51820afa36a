"""Putting a trained model on the Hub: check that it works, list what goes, upload it in one commit."""

import hashlib
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from ..errors import ConfigError, file_problem, first_line
from ..options import read_yaml
from ..record import is_digits, read_json, without_paths
from .card import SPACE_ID, class_to_show, three_lines, write_card
from .repo import check_repo_id, edited_on_the_hub, explain, make_repo, read_token
from .space import check_space, open_space, space_files, upload_space

MODEL_FILES = ("model_index.json", "unet/*", "scheduler/*", "pipeline.py", "README.md", "notebook.ipynb")
PICTURES = ("samples.png", "loss_curve.png", "trajectory.png", "gallery/*.png")
PUSHED_CARD = ".pushed_card"  # hash of the card that was pushed last
RECORD_FILES = ("train_config.yaml", "train_results.json", "metrics.jsonl", "evaluation.json", "evaluation_*.png")

# Runs in a fresh process, where this repo is absent: does stock diffusers load the folder, and what does it draw?
STOCK_SAMPLE = """
import inspect, math, sys, numpy, torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
folder, conditional, output = sys.argv[1], sys.argv[2] == "1", sys.argv[3]
if conditional:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    guidance = 1.0 if pipe.config.get("null_class_label") is None else 2.0  # in case the defaults are others
    arguments = {"class_labels": [0, 1], "guidance_scale": guidance}
    if "guidance_min_log_snr" in inspect.signature(pipe.__call__).parameters:
        arguments["guidance_min_log_snr"] = -math.inf  # as a pipeline.py from before this option does
else:
    pipe, arguments = DDPMPipeline.from_pretrained(folder), {"batch_size": 2}
assert type(pipe.unet) is UNet2DModel
pipe.set_progress_bar_config(disable=True)
images = pipe(**arguments, generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="pt").images
assert not any(name.startswith("ddpm_mnist") for name in sys.modules)
numpy.save(output, images.numpy())
"""


def is_conditional(model_dir: Path) -> bool:
    """Whether the model draws classes that it is asked for."""
    return (model_dir / "pipeline.py").is_file()


def validate_model(model_dir: Path) -> None:
    """Load the folder with stock diffusers in a fresh process, and compare its seeded sample with the in-repo classes'.

    Raises:
        ConfigError: it does not load, or draws something else.
    """
    option = f"--model_dir {model_dir}"
    for needed in ("model_index.json", "train_config.yaml", "train_results.json"):  # the last comes at a run's end
        if not (model_dir / needed).is_file():
            raise ConfigError(
                f"{option}: holds no {needed}; name the output_dir of a finished training run, or finish it with "
                "--resume_from_checkpoint latest"
            )
    import numpy as np
    import torch
    from diffusers import DDPMPipeline

    from ..pipeline import ClassConditionalDDPMPipeline
    from ..scheduler import DDPMScheduler
    from ..unet import UNet2DModel

    conditional = is_conditional(model_dir)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "sample.npy"
        command = [sys.executable, "-c", STOCK_SAMPLE, str(model_dir.resolve()), str(int(conditional)), str(output)]
        environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"}
        environment["PYTHONPATH"] = without_this_repo(os.environ.get("PYTHONPATH", ""))
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(f"{option}: stock diffusers cannot load and run it ({last}); train or export it again")
        stock = np.load(output)
    try:
        unet = UNet2DModel.from_pretrained(model_dir, subfolder="unet", use_safetensors=True).eval()
        scheduler = DDPMScheduler.from_pretrained(model_dir, subfolder="scheduler")
    except Exception as e:  # of diffusers, safetensors and the disk
        raise ConfigError(f"{option}: cannot be loaded ({first_line(e)})") from None
    if conditional:
        index = ClassConditionalDDPMPipeline.load_config(model_dir)
        pipe = ClassConditionalDDPMPipeline(unet, scheduler, index.get("null_class_label"))
        guidance = 1.0 if pipe.config.null_class_label is None else 2.0
        arguments = {"class_labels": [0, 1], "guidance_scale": guidance, "guidance_min_log_snr": -math.inf}
    else:
        pipe, arguments = DDPMPipeline(unet, scheduler), {"batch_size": 2}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    ours = pipe(**arguments, generator=generator, num_inference_steps=4, output_type="pt").images.numpy()
    if not np.allclose(ours, stock, atol=1e-3):
        raise ConfigError(f"{option}: stock diffusers draws another sample than this repo does; report this as a bug")


def without_this_repo(python_path: str) -> str:
    """A PYTHONPATH without checkouts of this repo, for a process in another folder. Other packages stay."""
    folders = [os.path.abspath(folder) for folder in python_path.split(os.pathsep) if folder]
    return os.pathsep.join(f for f in folders if not os.path.isfile(os.path.join(f, "push_to_hub.py")))


def files_to_push(model_dir: Path, include_checkpoints: bool, tensorboard: bool) -> list[Path]:
    """What goes, relative to the folder: the model, its card and its record; never more, unless asked."""
    patterns = [*MODEL_FILES, *PICTURES, *RECORD_FILES]
    patterns += ["checkpoint-[0-9]*/**/*"] if include_checkpoints else []
    patterns += ["logs/**/*"] if tensorboard else []
    found = {path for pattern in patterns for path in model_dir.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(model_dir) for path in found)


def published_name(path: Path) -> str:
    """The name of a file in the repo: its own, but for TensorBoard's, which hold the name of the machine."""
    return re.sub(r"(tfevents\.\d+)\.[^/]*?((\.\d+){0,2})$", r"\1\2", path.as_posix())


def published_config(model_dir: Path) -> bytes:
    """`train_config.yaml` as it is published."""
    settings = read_yaml("--model_dir", model_dir / "train_config.yaml")
    local = read_json(model_dir / "train_results.json").get("dataset_is_local", True)
    return yaml.safe_dump(without_paths(settings, local), sort_keys=False).encode()


def upload(
    api,
    model_dir: Path,
    repo_id: str,
    files: list[Path],
    *,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload DDPM",
) -> str:
    """Upload the files in one commit; returns the address of it, or of the newest one where nothing has changed.

    Can be interrupted anywhere and run again: uploaded files are kept by their hash, and the commit is all or nothing.

    Raises:
        ConfigError: see `explain`.
    """
    from huggingface_hub import CommitOperationAdd

    contents = {path: model_dir / path for path in files}
    if Path("train_config.yaml") in contents:
        contents[Path("train_config.yaml")] = published_config(model_dir)
    try:
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(published_name(path), content) for path, content in contents.items()],
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    except Exception as error:  # of the client, its network library and its threads
        raise explain(error, repo_id) from error
    card = model_dir / "README.md"
    if Path("README.md") in contents:
        digest = hashlib.sha256(card.read_bytes()).hexdigest()
        (model_dir / PUSHED_CARD).write_text(digest + "\n", encoding="utf-8")
    return commit.pr_url or commit.commit_url


def list_files(sizes: dict[str, int], goal: str, say) -> None:
    """Say what goes where: a line for each file, and the sum."""
    for path, size in sizes.items():
        say(f"{size:>12,}  {path}")
    say(f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files for {goal}")


def push_model(
    model_dir: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload DDPM",
    license: str = "mit",
    include_checkpoints: bool = False,
    tensorboard: bool = False,
    dry_run: bool = False,
    space_id: str | None = None,
    say=print,
) -> None:
    """All of it: validate, create the repo, write the card, say what is uploaded, upload, say how it is used.

    With `space_id`, a Space that shows the model too.

    Raises:
        ConfigError: see `read_token`, `validate_model`, `make_repo` and `upload`.
    """
    check_repo_id(repo_id, full=dry_run)
    if create_pr and revision not in (None, "main"):
        raise ConfigError(f"--create_pr: a pull request goes to main, not to --revision {revision}; give one of them")
    if space_id is not None:
        check_space(space_id, full=dry_run, other_branch=create_pr or revision not in (None, "main"))
    token = None if dry_run else read_token()
    for name in ("README.md", PUSHED_CARD, SPACE_ID, "samples.png", "loss_curve.png", "notebook.ipynb"):
        if model_dir.is_dir() and (problem := file_problem(model_dir / name)):
            raise ConfigError(f"--model_dir {model_dir}: {problem}")
    validate_model(model_dir)
    keep_card = False
    if not dry_run:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = make_repo(api, repo_id, private, revision)
        mine = model_dir / PUSHED_CARD
        last_pushed = mine.read_text(encoding="utf-8").strip() if mine.is_file() else None
        keep_card = edited_on_the_hub(api, repo_id, revision, last_pushed)
        if space_id is not None:
            space_id = open_space(api, space_id, private)
            (model_dir / SPACE_ID).write_text(space_id + "\n", encoding="utf-8")
    write_card(model_dir, repo_id, license, say)
    files = files_to_push(model_dir, include_checkpoints, tensorboard)
    if keep_card:
        files.remove(Path("README.md"))
        say(f"README.md of {repo_id} was edited on the Hub: it stays. To replace it, delete it there and push again.")
    sizes = {published_name(path): (model_dir / path).stat().st_size for path in files}
    list_files(sizes, repo_id, say)
    if space_id is not None:
        space = space_files(space_id, repo_id, license)
        list_files({path: len(content) for path, content in space.items()}, f"the Space {space_id}", say)
    if dry_run:
        say("Nothing was sent (--dry_run).")
        return
    options = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
    address = upload(api, model_dir, repo_id, files, **options)
    digits = is_digits(read_json(model_dir / "train_results.json").get("dataset", ""))
    unet = read_json(model_dir / "unet" / "config.json")
    if space_id is not None:
        say(f"\n{upload_space(api, space_id, space, private, say)}")
    say(f"\n{address}\n\n{three_lines(repo_id, class_to_show(unet, digits), digits)}")
