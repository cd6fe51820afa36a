"""A repo on the Hub: who may write to it, how it is made, and what goes wrong, in one line for the user."""

import hashlib
import tempfile
from pathlib import Path

from ..errors import ConfigError
from .card import written_by_hand


def read_token() -> str:
    """The token, from where `hf auth login` and HF_TOKEN put it. ConfigError: there is none."""
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ConfigError("no token: `hf auth login`, or set HF_TOKEN, or HF_TOKEN_PATH to a file that holds it")
    return token


def check_repo_id(repo_id: str | None, full: bool = False, option: str = "--hub_model_id") -> None:
    """ConfigError: it is missing, or no repo id; or, where it must be `full`, it lacks the user."""
    from huggingface_hub.utils import validate_repo_id

    if not repo_id or (full and "/" not in repo_id):
        raise ConfigError(f"{option}{f' {repo_id}' if repo_id else ': missing'}; write {option} USER/NAME")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise explain(error, repo_id, option) from None


def explain(error: Exception, repo_id: str, option: str = "--hub_model_id") -> ConfigError:
    """One line, with the cure, for whatever the Hub's client raised."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    option = f"{option} {repo_id}"
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


def option_of(repo_type: str) -> str:
    """The option that names a repo of this type: a "model" or a "space"."""
    return "--space_id" if repo_type == "space" else "--hub_model_id"


def make_repo(api, repo_id: str, private: bool, revision: str | None, repo_type: str = "model") -> str:
    """Create the repo, and the branch, unless they are there; returns the full id, USER/NAME, as the Hub has it.

    Raises:
        ConfigError: see `explain`; or the repo is public though `private` was asked for.
    """
    kind = {"repo_type": repo_type, **({"space_sdk": "gradio"} if repo_type == "space" else {})}
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ConfigError(
                f"--private: {repo_id} exists and is public, and nothing was uploaded; make it private in its settings "
                f"on the website, or use another {option_of(repo_type)}"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    except ConfigError:
        raise
    except Exception as error:  # of the client, its network library and its threads
        raise explain(error, repo_id, option_of(repo_type)) from error
    return repo_id


def edited_on_the_hub(
    api, repo_id: str, revision: str | None = None, last_pushed: str | None = None, repo_type: str = "model"
) -> bool:
    """Whether the README.md on the Hub was written or edited there: it is not ours, nor has the hash `last_pushed`."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repo_id, "README.md", revision=revision, repo_type=repo_type, local_dir=folder)
            there = Path(path).read_bytes()
        except LocalEntryNotFoundError as error:  # the Hub was not reached; an EntryNotFoundError by its class
            raise explain(error, repo_id, option_of(repo_type)) from error
        except (EntryNotFoundError, RepositoryNotFoundError):
            return False
        except Exception as error:
            raise explain(error, repo_id, option_of(repo_type)) from error
    by_hand = written_by_hand(there.decode("utf-8", errors="replace"))
    return by_hand and hashlib.sha256(there).hexdigest() != last_pushed
