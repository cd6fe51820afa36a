"""A repo on the Hub: the token, making the repo, and errors in one line for the user."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from ..errors import ConfigError
from ..offline import explain
from .card import written_by_hand


def read_token() -> str:
    """The token, from where `hf auth login`, HF_TOKEN or HF_TOKEN_PATH put it. ConfigError: none, or not a token."""
    try:
        token = get_token()
    except Exception:  # HF_TOKEN_PATH names a folder, or a file in another encoding
        token = "not a token"
    if not token:
        raise ConfigError("no token: `hf auth login`, or set HF_TOKEN, or HF_TOKEN_PATH to a file that holds it")
    if not re.fullmatch("[!-~]+", token) or token.count("hf_") > 1:  # the client joins the lines of a file
        raise ConfigError("HF_TOKEN, or the file at HF_TOKEN_PATH, holds no valid token; `hf auth login` again")
    return token


def check_repo_id(repo_id: str | None) -> None:
    """ConfigError: it is missing, or not USER/NAME."""
    if not repo_id or "/" not in repo_id:
        raise ConfigError(f"--hub_model_id{f' {repo_id}' if repo_id else ': missing'}; write --hub_model_id USER/NAME")
    with hub_errors(repo_id):
        validate_repo_id(repo_id)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Whatever the Hub's client raises while the context lasts becomes a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of the client, its network library and its threads
        raise ConfigError(f"--hub_model_id {repo_id}: {explain(error)}") from error


def make_repo(api: HfApi, repo_id: str, private: bool, revision: str | None = None) -> None:
    """Create the repo, and the branch, unless they exist. ConfigError: see `explain`; or it is not `private`."""
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the account's default
        if private and not api.repo_info(repo_id).private:
            problem = "exists and is public, and nothing was uploaded; make it private on the website, or name another"
            raise ConfigError(f"--hub_model_id {repo_id}: {problem}")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)


def edited_on_the_hub(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """True if a person wrote or edited README.md on the Hub."""
    with hub_errors(repo_id), tempfile.TemporaryDirectory() as folder:
        if not api.file_exists(repo_id, "README.md", revision=revision):
            return False
        card = Path(api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)).read_bytes()
    return written_by_hand(card.decode("utf-8", errors="replace"))
