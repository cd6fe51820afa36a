"""Putting a trained model on the Hub: check that it works, list what goes, upload it in one commit."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..options import ConfigError
from .card import three_lines, write_card

MODEL_FILES = ("model_index.json", "unet/*", "scheduler/*", "pipeline.py", "README.md", "samples.png", "loss_curve.png")
RECORD_FILES = ("train_config.yaml", "train_results.json", "metrics.jsonl", "evaluation.json", "evaluation_*.png")

# Runs in a fresh process, where this repo is absent: does stock diffusers load the folder, and what does it draw?
STOCK_SAMPLE = """
import sys, numpy, torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
folder, conditional, output = sys.argv[1], sys.argv[2] == "1", sys.argv[3]
if conditional:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    arguments = {"class_labels": [0, 1]}
else:
    pipe, arguments = DDPMPipeline.from_pretrained(folder), {"batch_size": 2}
assert type(pipe.unet) is UNet2DModel
pipe.set_progress_bar_config(disable=True)
images = pipe(**arguments, generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="pt").images
assert not any(name.startswith("ddpm_mnist") for name in sys.modules)
numpy.save(output, images.numpy())
"""


def read_token(token_file: str | None) -> str:
    """The token, from a file or from where `hf auth login` and HF_TOKEN put it. ConfigError: there is none."""
    from huggingface_hub import get_token

    if token_file is not None:
        try:
            token = Path(token_file).read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"--token_file {token_file}: cannot be read; name a file that holds the token") from None
    else:
        token = get_token()
    if not token:
        raise ConfigError("no token: `hf auth login`, or set HF_TOKEN, or give --token_file")
    return token


def check_repo_id(repo_id: str | None) -> None:
    """ConfigError: it is missing, or no repo id."""
    from huggingface_hub.utils import validate_repo_id

    if not repo_id:
        raise ConfigError("--hub_model_id: missing; write --hub_model_id USER/NAME")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise explain(error, repo_id) from None


def is_conditional(model_dir: Path) -> bool:
    """Whether the model draws classes that it is asked for."""
    return (model_dir / "pipeline.py").is_file()


def validate_model(model_dir: Path) -> None:
    """Load the folder with stock diffusers in a fresh process, and compare its seeded sample with the in-repo classes'.

    Raises:
        ConfigError: it does not load, or draws something else.
    """
    option = f"--model_dir {model_dir}"
    for needed in ("model_index.json", "train_config.yaml"):  # the pipeline, and what the card tells of its training
        if not (model_dir / needed).is_file():
            raise ConfigError(f"{option}: holds no {needed}; name the output_dir of a finished training run")
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
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_TOKEN")}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(f"{option}: stock diffusers cannot load and run it ({last}); train or export it again")
        stock = np.load(output)
    try:
        unet = UNet2DModel.from_pretrained(model_dir, subfolder="unet", use_safetensors=True).eval()
        scheduler = DDPMScheduler.from_pretrained(model_dir, subfolder="scheduler")
    except (OSError, ValueError, RuntimeError) as e:
        raise ConfigError(f"{option}: cannot be loaded ({' '.join(str(e).split())[:150]})") from None
    if conditional:
        index = ClassConditionalDDPMPipeline.load_config(model_dir)
        pipe = ClassConditionalDDPMPipeline(unet, scheduler, index.get("null_class_label"))
        arguments = {"class_labels": [0, 1]}
    else:
        pipe, arguments = DDPMPipeline(unet, scheduler), {"batch_size": 2}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    ours = pipe(**arguments, generator=generator, num_inference_steps=4, output_type="pt").images.numpy()
    if not np.allclose(ours, stock, atol=1e-3):
        raise ConfigError(f"{option}: stock diffusers draws another sample than this repo does; report this as a bug")


def files_to_push(model_dir: Path, include_checkpoints: bool, tensorboard: bool) -> list[Path]:
    """What goes, relative to the folder: the model, its card and its record; never more, unless asked."""
    patterns = [*MODEL_FILES, *RECORD_FILES]
    patterns += ["checkpoint-*/**/*"] if include_checkpoints else []
    patterns += ["logs/**/*"] if tensorboard else []
    found = {path for pattern in patterns for path in model_dir.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(model_dir) for path in found)


def explain(error: Exception, repo_id: str) -> ConfigError:
    """One line, with the cure, for whatever the Hub's client raised."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    option = f"--hub_model_id {repo_id}"
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    if isinstance(cause, HFValidationError):
        return ConfigError(f"{option}: is no repo id; write USER/NAME, of letters, digits, '-', '_' and '.'")
    if isinstance(cause, RevisionNotFoundError):
        return ConfigError(f"{option}: has no such revision; check --revision")
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        status = cause.response.status_code
        cures = {
            400: "the Hub refuses what was sent; see `--debug` for its answer",
            401: "the Hub does not know this token; `hf auth login` again, or make a new one",
            403: "the token may not write there; make one with the role 'write', or use your own name",
            404: "there is no such repo, or the token may not see it; check the name",
            409: "somebody else changed it at the same time; run this again",
            413: "the Hub finds it too large; leave out checkpoints",
            429: "the Hub asks to wait; run this again in some minutes",
        }
        cure = cures.get(status, "the Hub has trouble; run this again later" if status >= 500 else "see --debug")
        return ConfigError(f"{option}: {status}: {cure}")
    return ConfigError(f"{option}: the Hub cannot be reached, or broke off; check the network and run this again")


def push(
    model_dir: Path,
    repo_id: str,
    token: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload DDPM",
    files: list[Path],
) -> str:
    """Upload the files in one commit; returns the address of it, or of the newest one where nothing has changed.

    Can be cut off anywhere and run again: what has been uploaded is kept by its hash, and the commit is all or nothing.

    Raises:
        ConfigError: see `explain`; or the repo is public though `private` was asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise ConfigError(
                f"--private: {repo_id} exists and is public, and nothing was uploaded; make it private in its settings "
                "on the website, or use another --hub_model_id"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=model_dir,
            allow_patterns=[str(path) for path in files],
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    except ConfigError:
        raise
    except Exception as error:  # of the client, its network library and its threads
        raise explain(error, repo_id) from error
    return commit.pr_url or commit.commit_url


def push_model(
    model_dir: Path,
    repo_id: str,
    *,
    token_file: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload DDPM",
    license: str = "mit",
    include_checkpoints: bool = False,
    tensorboard: bool = False,
    dry_run: bool = False,
    say=print,
) -> None:
    """All of it: validate, write the card, say what goes, upload, say how it is used.

    Raises:
        ConfigError: see `read_token`, `validate_model` and `push`.
    """
    check_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise ConfigError(f"--create_pr: a pull request goes to main, not to --revision {revision}; give one of them")
    token = None if dry_run else read_token(token_file)
    validate_model(model_dir)
    write_card(model_dir, repo_id, license, say)
    files = files_to_push(model_dir, include_checkpoints, tensorboard)
    for path in files:
        say(f"{(model_dir / path).stat().st_size:>12,}  {path}")
    say(f"{sum((model_dir / path).stat().st_size for path in files):>12,}  bytes in {len(files)} files for {repo_id}")
    if dry_run:
        say("Nothing was sent (--dry_run).")
        return
    address = push(
        model_dir,
        repo_id,
        token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        files=files,
    )
    say(f"\n{address}\n\n{three_lines(repo_id, is_conditional(model_dir))}")
