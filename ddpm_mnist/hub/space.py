"""A Space on the Hub that shows a model: the page in `demo/`, with everything that it imports."""

import hashlib
from pathlib import Path
from string import Template

from ..errors import ConfigError
from .card import MARK
from .repo import check_repo_id, edited_on_the_hub, explain, make_repo

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = Path(__file__).with_name("space_template.md")
PAGE = ("app.py", "drawing.py", "film.js", "pad.js", "schedule.js", "page.css", "requirements.txt")  # in demo/
PAPER = ("pipeline.py", "randomness.py")  # in ddpm_mnist/, which the page imports as they are
SDK_VERSION = "6.31.0"  # of Gradio, with which the page is tested


def check_space(space_id: str, full: bool, other_branch: bool) -> None:
    """ConfigError: it is no repo id, or lacks the user where it must be `full`; or the push goes to another branch."""
    check_repo_id(space_id, full, "--space_id")
    if other_branch:
        raise ConfigError(
            f"--space_id {space_id}: a Space shows the model's main branch; push without --revision and --create_pr"
        )
    if not (ROOT / "demo" / "app.py").is_file():
        raise ConfigError(f"--space_id {space_id}: demo/app.py is missing; run this in a clone of the repository")


def space_files(space_id: str, model_id: str, license: str) -> dict[str, bytes]:
    """Path -> content of all that a Space needs: the page, its README.md, and the id of the model."""
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=model_id.split("/")[-1], model_id=model_id, sdk_version=SDK_VERSION, license=license
    )
    files = {"README.md": f"{text}{MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n".encode()}
    files |= {name: (ROOT / "demo" / name).read_bytes() for name in PAGE}
    files |= {name: (ROOT / "ddpm_mnist" / name).read_bytes() for name in PAPER}
    return files | {"model.txt": f"{model_id}\n".encode()}


def open_space(api, space_id: str, private: bool) -> str:
    """Create the Space unless it is there; returns its full id.

    Raises:
        ConfigError: see `make_repo`; or the Space is there and holds another app, which stays as it is.
    """
    space_id = make_repo(api, space_id, private, None, "space")
    there = files_there(api, space_id)
    if "app.py" in there and "model.txt" not in there:
        raise ConfigError(f"--space_id {space_id}: is a Space of another app, and nothing was uploaded; name a new one")
    return space_id


def files_there(api, space_id: str) -> list[str]:
    """The paths that a Space holds. ConfigError: see `explain`."""
    try:
        return api.list_repo_files(space_id, repo_type="space")
    except Exception as error:  # of the client, its network library and its threads
        raise explain(error, space_id, "--space_id") from error


def upload_space(api, space_id: str, files: dict[str, bytes], private: bool, say=print) -> str:
    """Upload the files in one commit, or none where nothing has changed; returns the address of the Space.

    A README.md that was edited on the Hub stays. (A new Space holds one of the Hub, which is replaced.)

    Raises:
        ConfigError: see `explain`.
    """
    from huggingface_hub import CommitOperationAdd

    if "app.py" in files_there(api, space_id) and edited_on_the_hub(api, space_id, repo_type="space"):
        files = {path: content for path, content in files.items() if path != "README.md"}
        say(f"README.md of the Space {space_id} was edited on the Hub: it stays.")
    try:
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(space_id, operations, repo_type="space", commit_message="Upload the page")
    except Exception as error:  # of the client, its network library and its threads
        raise explain(error, space_id, "--space_id") from error
    if private:
        say("To load a private model the Space needs a token: in its settings, add a secret HF_TOKEN that may read it.")
    return f"{api.endpoint}/spaces/{space_id}"
