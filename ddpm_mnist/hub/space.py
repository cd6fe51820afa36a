"""A Space on the Hub that shows a model: the page in `demo/`, which draws in the visitor's browser, and the model."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData

from ..errors import ConfigError
from .card import signed
from .onnx import ONNX_FILE
from .repo import check_repo_id, edited_on_the_hub, hub_errors, make_repo, read_file

DEMO = Path(__file__).parents[2] / "demo"
TEMPLATE = Path(__file__).with_name("space_template.md")
PAGE = ("index.html", "page.css", "page.js", "film.js", "pad.js", "schedule.js", "worker.js", "model.js", "sampler.js")
STARTER = b"Welcome to your static Space!"  # in the index.html that the Hub puts into a new one, beside these
STARTER_FILES = {".gitattributes", "README.md", "index.html", "style.css"}
MODEL = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", ONNX_FILE)  # what the page reads


def check_space(space_id: str, main_branch: bool) -> None:
    """ConfigError: it is not a repo id, the model is pushed to another branch, or the page is missing."""
    check_repo_id(space_id, "--space_id")
    if not main_branch:
        raise ConfigError(f"--space_id {space_id}: a Space shows the model's main branch; push without --revision")
    if not (DEMO / "index.html").is_file():
        raise ConfigError(f"--space_id {space_id}: demo/ is missing; run this in a clone of the repository")


def page_files(model_dir: Path, name: str) -> dict[str, bytes]:
    """Path -> content of the page of a model that was exported to ONNX, which any server of files can serve."""
    files = {"model.txt": f"{name}\n".encode()} | {file: (DEMO / file).read_bytes() for file in PAGE}
    return files | {f"model/{file}": (model_dir / file).read_bytes() for file in MODEL}


def space_files(model_dir: Path, model_id: str, license: str) -> dict[str, bytes]:
    """Path -> content of all that a Space needs: the page, the model, and the Space's README.md."""
    data = SpaceCardData(license=license, models=[model_id])
    card = SpaceCard.from_template(data, str(TEMPLATE), name=model_id.split("/")[-1])
    return {"README.md": signed(str(card)).encode()} | page_files(model_dir, model_id)


def open_space(api: HfApi, space_id: str, private: bool) -> None:
    """Create the Space unless it exists. ConfigError: see `make_repo`; or it holds another app, which stays."""
    make_repo(api, space_id, private, repo_type="space")
    with hub_errors(space_id, "--space_id"):
        paths = api.list_repo_files(space_id, repo_type="space")
    index = read_file(api, space_id, "index.html", None, "space") or STARTER
    if "model.txt" not in paths and (set(paths) - STARTER_FILES or STARTER not in index):
        raise ConfigError(f"--space_id {space_id}: is a Space of another app, and nothing was uploaded; name a new one")


def upload_space(api: HfApi, space_id: str, files: dict[str, bytes]) -> str:
    """Upload the files in one commit, or none if nothing has changed; returns the address of the Space.

    A README.md that was edited on the Hub stays. What the Hub put into a new Space goes.
    """
    with hub_errors(space_id, "--space_id"):
        there = api.list_repo_files(space_id, repo_type="space")
        ours = "model.txt" in there
        old = [] if ours else [path for path in there if path not in (".gitattributes", *files)]
        if ours and edited_on_the_hub(api, space_id, repo_type="space"):
            files = {path: content for path, content in files.items() if path != "README.md"}
            print(f"README.md of the Space {space_id} was edited on the Hub: it stays.")
        operations = [CommitOperationDelete(path) for path in old]
        operations += [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(space_id, operations, repo_type="space", commit_message="Upload the page")
    return f"{api.endpoint}/spaces/{space_id}"
