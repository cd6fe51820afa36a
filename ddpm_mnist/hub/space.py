"""A Space on the Hub that shows a model: the page in `demo/`, with what it imports of this package."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, SpaceCard, SpaceCardData

from ..errors import ConfigError
from .card import signed
from .repo import check_repo_id, edited_on_the_hub, hub_errors, make_repo

ROOT = Path(__file__).parents[2]
TEMPLATE = Path(__file__).with_name("space_template.md")
PAGE = ("app.py", "drawing.py", "film.js", "pad.js", "schedule.js", "page.css", "requirements.txt")  # in demo/
PACKAGE = ("__init__.py", "pipeline.py", "randomness.py", "sampling.py", "scheduler.py")  # in ddpm_mnist/


def check_space(space_id: str, main_branch: bool) -> None:
    """ConfigError: it is not a repo id, the model is pushed to another branch, or the page is missing."""
    check_repo_id(space_id, "--space_id")
    if not main_branch:
        raise ConfigError(
            f"--space_id {space_id}: a Space shows the model's main branch; push without --revision and --create_pr"
        )
    if not (ROOT / "demo" / "app.py").is_file():
        raise ConfigError(f"--space_id {space_id}: demo/app.py is missing; run this in a clone of the repository")


def space_files(model_id: str, license: str) -> dict[str, bytes]:
    """Path -> content of all that a Space needs: the page, its README.md, and the id of the model."""
    data = SpaceCardData(license=license, models=[model_id])
    card = SpaceCard.from_template(data, str(TEMPLATE), name=model_id.split("/")[-1])
    files = {"README.md": signed(str(card)).encode(), "model.txt": f"{model_id}\n".encode()}
    files |= {name: (ROOT / "demo" / name).read_bytes() for name in PAGE}
    return files | {f"ddpm_mnist/{name}": (ROOT / "ddpm_mnist" / name).read_bytes() for name in PACKAGE}


def open_space(api: HfApi, space_id: str, private: bool) -> None:
    """Create the Space unless it exists. ConfigError: see `make_repo`; or it holds another app, which stays."""
    make_repo(api, space_id, private, repo_type="space")
    with hub_errors(space_id, "--space_id"):
        paths = api.list_repo_files(space_id, repo_type="space")
    if "app.py" in paths and "model.txt" not in paths:
        raise ConfigError(f"--space_id {space_id}: is a Space of another app, and nothing was uploaded; name a new one")


def upload_space(api: HfApi, space_id: str, files: dict[str, bytes], private: bool) -> str:
    """Upload the files in one commit, or none if nothing has changed; returns the address of the Space.

    A README.md that was edited on the Hub stays. (A new Space holds one of the Hub's, which is replaced.)
    """
    with hub_errors(space_id, "--space_id"):
        is_new = not api.file_exists(space_id, "app.py", repo_type="space")
        if not is_new and edited_on_the_hub(api, space_id, repo_type="space"):
            files = {path: content for path, content in files.items() if path != "README.md"}
            print(f"README.md of the Space {space_id} was edited on the Hub: it stays.")
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(space_id, operations, repo_type="space", commit_message="Upload the page")
    if private:
        print("The Space needs a token to load a private model: add a secret HF_TOKEN in its settings.")
    return f"{api.endpoint}/spaces/{space_id}"
