"""Reading from the Hub: one quick check in place of minutes of retries, and errors in one line."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import ConfigError, first_line

MODEL_FILES = ["*.json", "*.yaml", "scheduler/*.json", "unet/*.json"]  # of a model, all that is downloaded
WEIGHTS = [f"diffusion_pytorch_model{part}.safetensors" for part in ("", "-*-of-*")]
MODEL_FILES += [f"{folder}{name}" for folder in ("", "unet/") for name in WEIGHTS]  # "": in older repos
GATED = "is gated; accept its terms on its page on the Hub, and `hf auth login`"
ADVICE = {  # by HTTP status
    401: "the Hub rejects this token; `hf auth login` again, or make a new one",
    403: "this token lacks the permission (to push: the role 'write', and a repo under your own name)",
    404: "the repo does not exist, or the token may not see it; check the name",
    409: "somebody else changed it at the same time; run this again",
    429: "too many requests; run this again in a few minutes",
}


def explain(error: Exception) -> str:
    """What an error of the Hub's client says to the user, and what to do."""
    error = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    if isinstance(error, HFValidationError):
        return "is not a repo id; write USER/NAME, of letters, digits, '-', '_' and '.'"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision; check --revision"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status, said = error.response.status_code, " ".join((error.server_message or "").split())[:200]
        trouble = "the Hub has trouble; run this again later" if status >= 500 else "the Hub refuses this"
        return f"{status}: {ADVICE.get(status, trouble)}{f' ({said})' if said else ''}"
    if str(error).startswith("Invalid metadata"):
        return f"the Hub refuses the model card: {' '.join(str(error).split())[:200]}"
    return f"the connection to the Hub failed ({first_line(error)}); check the network and run this again"


def hub_folder(option: str, name: str, repo_type: str, files: list[str] | None = None) -> Path:
    """The folder in the cache with what the Hub holds at USER/NAME or USER/NAME@REVISION (branch, tag or commit).

    If the Hub refuses or is unreachable, the cached copy. `files`: patterns; None: all files.

    ConfigError: the Hub has no such repo or revision; or it refuses (an old token, too many questions) or cannot be
    reached, and the cache has none.
    """
    repo_id, _, revision = name.partition("@")
    where, refusal = {"repo_type": repo_type, "revision": revision or None}, None
    try:  # one quick question: the client itself waits for minutes where nothing answers
        HfApi().repo_info(repo_id, timeout=5.0, **where)
    except RevisionNotFoundError:
        raise ConfigError(f"{option} {name}: the repo has no such revision; name a branch, a tag or a commit") from None
    except (RepositoryNotFoundError, HFValidationError) as error:
        problem = "no such path, and missing or private on the Hub; check it, or `hf auth login`"
        raise ConfigError(f"{option} {name}: {GATED if isinstance(error, GatedRepoError) else problem}") from None
    except Exception as error:  # the Hub refuses or is unreachable; network libraries have errors of their own
        refusal = f"the Hub cannot be reached ({type(error).__name__}), and the cache has none; check the network"
        refusal = explain(error) if isinstance(error, HfHubHTTPError) else f"{refusal}, or use a local folder"
    try:
        cached = refusal is not None
        return Path(snapshot_download(repo_id, allow_patterns=files, local_files_only=cached, **where))
    except Exception as error:  # of the Hub's client and the disk
        problem = GATED if isinstance(error, GatedRepoError) else f"cannot be loaded ({first_line(error)})"
        raise ConfigError(f"{option} {name}: {refusal or problem}") from error


def model_folder(name: str) -> Path:
    """The folder of a model: a local one, or that of `hub_folder`. ConfigError: there is none."""
    if Path(name).exists():
        return Path(name)
    if "/" not in name:
        raise ConfigError(f"--model {name}: no such folder; first, accelerate launch train_ddpm_mnist.py")
    return hub_folder("--model", name, "model", MODEL_FILES)
