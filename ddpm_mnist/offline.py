"""What the Hub answers: one quick question, without its client's minutes of retries, and its errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import ConfigError, first_line

MODEL_FILES = ["*.json", "*.yaml", "scheduler/*.json", "unet/*.json"]  # of a model, all that is downloaded
MODEL_FILES += [f"unet/diffusion_pytorch_model{part}.safetensors" for part in ("", "-*-of-*")]
NOT_CACHED = "the Hub cannot be reached, and the cache does not hold it; check the network, or name a local folder"
ADVICE = {  # by HTTP status
    401: "the Hub does not know this token; `hf auth login` again, or make a new one",
    403: "the token may not do this; make one that may (to push: with the role 'write', under your own name)",
    404: "the repo does not exist, or the token may not see it; check the name",
    409: "somebody else changed it at the same time; run this again",
    429: "the Hub asks to wait; run this again in some minutes",
}


def explain(error: Exception) -> str:
    """What an error of the Hub's client says to the user, and what to do."""
    error = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    if isinstance(error, HFValidationError):
        return "is not a repo id; write USER/NAME, of letters, digits, '-', '_' and '.'"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision; check --revision"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        trouble = "the Hub has trouble; run this again later" if status >= 500 else first_line(error)
        return f"{status}: {ADVICE.get(status, trouble)}"
    return f"the Hub cannot be reached, or broke off ({first_line(error)}); check the network and run this again"


def repo_and_revision(name: str) -> tuple[str, str | None]:
    """The repo, and the branch, tag or commit that the user named: USER/NAME or USER/NAME@REVISION."""
    repo_id, _, revision = name.partition("@")
    return repo_id, revision or None


@contextmanager
def hub_or_cache(option: str, name: str, repo_type: str, timeout: float = 5.0) -> Iterator[None]:
    """While the context lasts, `huggingface_hub`, and `datasets` and `diffusers` on it, load from the Hub, or, where
    it does not answer or refuses, from the cache. Afterwards the Hub is asked again: it may be back by then.

    ConfigError: the Hub has no such repo or revision; or it refuses (an old token, too many questions), and the cache
    has none.
    """
    answered, refusal = not constants.HF_HUB_OFFLINE, None
    try:
        if answered:
            repo_id, revision = repo_and_revision(name)
            HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=timeout)
    except RevisionNotFoundError:
        raise ConfigError(f"{option} {name}: the repo has no such revision; name a branch, a tag or a commit") from None
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError):
        raise ConfigError(
            f"{option} {name}: not on this disk, and not on the Hub, or private; check it, or `hf auth login`"
        ) from None
    except Exception as error:  # the Hub refuses; or nothing answers, in the words of the network library of the day
        answered = False
        refusal = explain(error) if isinstance(error, HfHubHTTPError) else None
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not answered:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        if refusal is None and not isinstance(error, (ConnectionError, LocalEntryNotFoundError)):
            raise
        raise ConfigError(f"{option} {name}: {refusal or NOT_CACHED}") from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def model_folder(option: str, name: str) -> Path:
    """The folder of a model: a local one, or what the Hub holds at USER/NAME or USER/NAME@REVISION, in the cache.

    ConfigError: there is none, or it cannot be loaded.
    """
    if Path(name).exists():
        return Path(name)
    if "/" not in name:
        raise ConfigError(f"{option} {name}: no such folder; first, accelerate launch train_ddpm_mnist.py")
    repo_id, revision = repo_and_revision(name)
    try:
        with hub_or_cache(option, name, "model"):
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=MODEL_FILES))
    except ConfigError:
        raise
    except Exception as error:  # of the Hub's client and the disk
        raise ConfigError(f"{option} {name}: cannot be loaded ({first_line(error)})") from error


def commit_of(folder: Path) -> str | None:
    """The commit that `model_folder` found on the Hub; None for a local folder."""
    return folder.name if folder.parent.name == "snapshots" else None
