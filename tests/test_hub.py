"""push_to_hub.py, the model card and loading, against a Hub on loopback, with unmodified clients in other processes."""

import json
import multiprocessing.connection
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import nbformat
import pytest
import yaml
from conftest import ROOT, as_nobody, in_process, posix, python, smoke_args
from hub_server import File, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image

import evaluate
import push_to_hub
import train_ddpm_mnist
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.hub import push as push_module
from ddpm_mnist.hub.card import gallery, usage, write_card
from ddpm_mnist.hub.push import PushConfig, files_to_push, push_model, upload, validate_model
from ddpm_mnist.hub.repo import make_repo, read_token
from ddpm_mnist.images.dataset import load_data
from ddpm_mnist.loading import load_model
from ddpm_mnist.options import DataOptions
from ddpm_mnist.record import weights_sha256, without_paths

ALICE, BOB = "hf_" + "AliceToken" * 3, "hf_" + "BobsToken" * 3
EXPECTED_FILES = {
    *(".gitattributes", "README.md", "notebook.ipynb", "loss_curve.png", "samples.png", "trajectory.png"),
    *("train_config.yaml", "train_results.json", "metrics.jsonl", "model_index.json"),
    *("scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
    *(f"gallery/{number}.png" for number in range(8)),
}


@pytest.fixture
def hub():
    with HubServer(tokens={ALICE: "alice", BOB: "bob"}) as server:
        yield server


def client(hub: HubServer, home, token: str | None = None) -> dict[str, str]:
    """Environment of a process that talks to that Hub, with a cache of its own."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return env | {"HF_TOKEN": token or "", "PYTHONPATH": ""}


def push_outside(hub, model, tmp_path, *args, token=ALICE, repo="alice/digits") -> subprocess.CompletedProcess:
    """push_to_hub.py in a process of its own."""
    command = ["push_to_hub.py", "--model_dir", model, "--hub_model_id", repo, *args]
    return python(*command, **client(hub, tmp_path / "home", token))


@pytest.fixture
def hub_here(hub, monkeypatch, tmp_path) -> HubServer:
    """The Hub on loopback for this process too, as alice."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", ALICE)
    return hub


@pytest.fixture
def push(hub_here, monkeypatch, capfd):
    """push(model, *args): push_to_hub.py in this process, without validating the model."""
    monkeypatch.setattr(push_module, "validate_model", lambda model_dir: None)

    def run(model, *args, token: str | None = ALICE, repo: str = "alice/digits"):
        monkeypatch.setenv("HF_TOKEN", token or "")
        capfd.readouterr()
        code = in_process(push_to_hub.main, "--model_dir", model, "--hub_model_id", repo, *args)
        return subprocess.CompletedProcess([], code, *capfd.readouterr())

    return run


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """The folder of a finished run, to be changed."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def elsewhere(hub, tmp_path, code: str) -> subprocess.CompletedProcess:
    """Run code in an empty folder and with an empty cache, without this repo."""
    (tmp_path / "fresh").mkdir()
    check = "\nimport sys; assert not any(m.startswith('ddpm_mnist') for m in sys.modules)"
    return python("-c", code + check, cwd=tmp_path / "fresh", **client(hub, tmp_path / "fresh/home"))


def notebook_code(repo) -> str:
    """All the code of the notebook in a repo."""
    notebook = nbformat.reads(repo.files()["notebook.ipynb"].decode(), as_version=4)
    nbformat.validate(notebook)
    return "\n" + "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def card_code(repo) -> str:
    """All the code of the card in a repo."""
    return "\n".join(re.findall(r"```python\n(.*?)```", repo.files()["README.md"].decode(), re.DOTALL))


def front_matter(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


# ---- the whole trip ------------------------------------------------------------------------------------------------


def test_the_fresh_process_gets_packages_of_pythonpath_and_runs_no_code_of_the_folder(
    conditional_model, tmp_path, monkeypatch
):
    """On clusters, `module load` puts packages into it. This repo may be in it too, or installed, or just be here."""
    monkeypatch.chdir(ROOT)
    copy = Path(shutil.copytree(conditional_model, tmp_path / "copy"))
    (tmp_path / "sitecustomize.py").write_text("import pathlib; pathlib.Path(__file__).with_name('seen').touch()")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    validate_model(copy)
    assert (tmp_path / "seen").exists()
    with (copy / "pipeline.py").open("a") as file:
        file.write("Path(__file__).with_name('ran').touch()\n")
    with pytest.raises(ConfigError, match="pipeline.py, which the check would run, is missing or not this"):
        validate_model(copy)
    assert not list(tmp_path.rglob("ran"))

    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDPMPipeline"}))
    with pytest.raises(ConfigError, match="this model does not use pipeline.py"):
        validate_model(copy)

    shutil.copyfile(conditional_model / "pipeline.py", copy / "pipeline.py")
    (copy / "other.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n")
    for key, name in (("_class_name", "ClassConditionalDDPMPipeline"), ("scheduler", "DDPMScheduler")):
        (copy / "model_index.json").write_text(json.dumps(index | {key: ["other", name]}))
        with pytest.raises(ConfigError, match="model_index.json names other code"):
            validate_model(copy)
    assert not list(tmp_path.rglob("ran"))


def test_train_push_load(hub, model, tmp_path):
    done = push_outside(hub, model, tmp_path)
    assert done.returncode == 0, done.stderr
    repo = hub.repo("alice/digits")
    assert set(repo.files()) == EXPECTED_FILES
    assert [c.message for c in repo.branches["main"]] == ["initial commit", "Upload DDPM"]
    code = re.search(r"from diffusers import .*", done.stdout, re.DOTALL)[0]  # the lines that it prints
    assert f"{hub.url}/alice/digits/commit/" in done.stdout
    assert code.strip() in (card := card_code(repo))
    fresh = elsewhere(hub, tmp_path, card + notebook_code(repo))
    assert fresh.returncode == 0, fresh.stderr
    assert Image.open(tmp_path / "fresh/image.png").size == (28, 28)


def test_conditional_trip(hub, push, conditional_model, tmp_path):
    done = push(conditional_model, repo="alice/seven")  # validated in the first test of the trip
    assert done.returncode == 0, done.stderr
    files = hub.repo("alice/seven").files()
    assert set(files) == EXPECTED_FILES | {"pipeline.py"}
    card = files["README.md"]
    assert b'from_pretrained("alice/seven", trust_remote_code=True)' in card and b'revision="COMMIT"' in card
    assert [entry["text"] for entry in front_matter(card)["widget"]] == [f"class {number}" for number in range(8)]
    again = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(conditional_model)!r}, trust_remote_code=True)
pipe.save_pretrained("again", push_to_hub=True, repo_id="alice/again")
"""
    again = python("-c", again, cwd=tmp_path, **client(hub, tmp_path / "home", ALICE))
    assert again.returncode == 0, again.stderr
    code = """
from diffusers import DiffusionPipeline, UNet2DModel
DiffusionPipeline.from_pretrained("alice/again", trust_remote_code=True)
repo = "alice/seven"
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
pipe(class_labels=[7], guidance_scale=2.0, num_inference_steps=3).images[0].save("seven.png")
assert UNet2DModel.from_pretrained(repo, subfolder="unet").config.num_class_embeds == 11
"""
    repo = hub.repo("alice/seven")
    fresh = elsewhere(hub, tmp_path, code + card_code(repo) + notebook_code(repo))
    assert fresh.returncode == 0, fresh.stderr
    assert Image.open(tmp_path / "fresh/seven.png").size == (28, 28)


def test_train_with_push_to_hub(hub_here, train, tmp_path):
    out = train("run", max_train_steps=2, push_to_hub=True, hub_model_id="alice/trained", hub_private_repo=True)
    assert "alice" not in (out / "train_config.yaml").read_text(encoding="utf-8")  # a run with this file pushes nothing
    repo = hub_here.repo("alice/trained")
    assert repo.private and "unet/diffusion_pytorch_model.safetensors" in repo.files()
    with pytest.raises(ConfigError, match="403: this token lacks the permission"):  # before the training
        train("other", push_to_hub=True, hub_model_id="bob/trained")
    assert not list(tmp_path.glob("other/*"))


def test_train_on_a_dataset_from_the_hub(hub, hub_here, tiny_dataset_dir, tmp_path, monkeypatch):
    files = {f"mnist/{path.name}": path.read_bytes() for path in Path(tiny_dataset_dir).iterdir()}
    hub.create("ylecun/mnist", "dataset", files=files)
    hub.create("alice/private-mnist", "dataset", private=True, files=files)
    default = [a for a in smoke_args("", tmp_path / "default", max_train_steps=2) if "dataset_name" not in a]
    done = python("train_ddpm_mnist.py", *default, **client(hub, tmp_path / "home"))
    assert done.returncode == 0 and "250 images of ylecun/mnist" in done.stdout, done.stderr
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ConfigError, match="missing or private on the Hub"):
        load_data(DataOptions("alice/private-mnist", cache_dir=str(tmp_path / "datasets")), 1, 28)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("401", "401: the Hub rejects this token"), ("403", "403: this token lacks the permission")]
    + [("429", "429: too many requests"), ("500", "500: the Hub has trouble"), ("503", "503: the Hub has trouble")]
    + [("400", r"400: the Hub refuses this \(injected\)"), ("403 GatedRepo", "is gated; accept its terms")],
)
def test_a_hub_that_refuses_is_no_missing_network(hub_here, tmp_path, monkeypatch, fault, reason):
    """The cause is said, and nobody's digits are trained on in place of MNIST; what is in the cache is used."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_here.create("alice/m", files={"model_index.json": b"{}"})
    hub_here.create("ylecun/mnist", "dataset", files={"train.parquet": b""})
    late = "Gated" in fault  # whoever may not read the files may ask about the repo
    monkeypatch.setattr(hub_here, "fault", lambda _, request: fault if not late or "/resolve/" in request else None)
    options = DataOptions(cache_dir=str(tmp_path / "datasets"))
    for load in (lambda: load_model("alice/m"), lambda: load_data(options, 1, 28)):
        with pytest.raises(ConfigError, match=rf"^--(model alice/m|dataset_name ylecun/mnist): {reason}"):
            load()


def test_a_revision_is_read_everywhere_and_commits_are_recorded(
    hub_here, push, model, tiny_dataset_dir, train, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert push(model, "--revision", "v2").returncode == 0
    files = {path.name: path.read_bytes() for path in Path(tiny_dataset_dir).iterdir()}
    data = hub_here.create("alice/set", "dataset", files=files)
    pinned = data.at("main").oid
    data.add("main", "nothing is left", {})
    commit = hub_here.repo("alice/digits").at("v2").oid
    name = f"alice/set@{pinned}"
    run = train("run", max_train_steps=2, cache_dir=tmp_path / "datasets", dataset_name=name)
    results = json.loads((run / "train_results.json").read_text())
    assert results["commits"] == {"dataset": pinned} and results["dataset"] == "alice/set"
    load_model("alice/digits@v2")
    assert evaluate.parse_args(["--model", "alice/digits@v2", "--dataset_name", "alice/set"]).center_crop is False
    monkeypatch.setattr(hub_here, "fault", lambda number, request: "500")
    for name in ("alice/digits@v2", f"alice/digits@{commit}"):  # from the cache
        load_model(name)


def test_a_revision_that_is_not_there_is_one_line(hub_here, model, push, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_here.create("alice/digits")
    hub_here.create("alice/set", "dataset")
    options = DataOptions("alice/set@v9", cache_dir=str(tmp_path / "datasets"))
    for load in (lambda: load_model("alice/digits@v9"), lambda: load_data(options, 1, 28)):
        with pytest.raises(ConfigError, match="alice/(digits|set)@v9: the repo has no such revision; name a branch"):
            load()


@pytest.mark.parametrize(("name", "local"), [("ylecun/mnist", False), ("mine", True)])
def test_a_model_of_the_hub_is_evaluated_on_what_it_was_trained_on(hub_here, tmp_path, monkeypatch, name, local):
    settings = yaml.safe_dump({"dataset_name": name, "image_column": "digit"}).encode()
    files = {"train_config.yaml": settings, "train_results.json": json.dumps({"dataset_is_local": local}).encode()}
    hub_here.create("alice/other", files=files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    if local:
        with pytest.raises(ConfigError, match="--dataset_name: the model was trained on mine, which does not exist"):
            evaluate.parse_args(["--model", "alice/other"])
    config = evaluate.parse_args(["--model", "alice/other", *(["--dataset_name=there"] if local else [])])
    assert (config.dataset_name, config.image_column) == ("there" if local else name, "digit")
    with pytest.raises(ConfigError, match="--output_dir: missing; alice/other is not a folder"):
        evaluate.evaluate(config)
    with pytest.raises(ConfigError, match="--model alice/none: no such path, and missing or private on the Hub"):
        evaluate.parse_args(["--model", "alice/none"])


# ---- what is pushed, and where -------------------------------------------------------------------------------------


def test_nothing_changed_makes_no_commit_and_a_change_makes_one(hub, push, model):
    for _ in range(2):
        done = push(model, "--commit_message", "first")
        assert done.returncode == 0, done.stderr
    history = hub.repo("alice/digits").branches["main"]
    assert [c.message for c in history] == ["initial commit", "first"]
    assert push(model, "--license", "mit", "--commit_message", "second").returncode == 0
    assert [c.message for c in history] == ["initial commit", "first", "second"]


def test_private_makes_a_private_repo_and_refuses_a_public_one(hub, push, copy):
    push(copy, "--private")
    assert hub.repo("alice/digits").private
    hub.create("alice/open")
    done = push(copy, "--private", repo="alice/open")
    assert done.returncode == 2 and "--hub_model_id alice/open: exists and is public" in done.stderr
    assert set(hub.repo("alice/open").files()) == {".gitattributes"}


def test_revision(hub, push, model):
    """What is printed, and the card and the notebook of a branch, load that branch."""
    done = push(model, "--revision", "v2")
    repo = hub.repo("alice/digits")
    files = repo.files("v2")
    for text in (done.stdout, files["README.md"].decode(), files["notebook.ipynb"].decode().replace("\\", "")):
        assert 'DiffusionPipeline.from_pretrained("alice/digits", revision="v2")' in text
    assert set(repo.files("v2")) == EXPECTED_FILES and set(repo.files("main")) == {".gitattributes"}


def test_dry_run_lists_and_sends_nothing(hub, push, model):
    done = push(model, "--dry_run", token=None)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[-1] for line in done.stdout.splitlines() if re.match(r" +[\d,]+  \S+$", line)}
    assert listed == EXPECTED_FILES - {".gitattributes"}
    assert hub.requests == [] and hub.repos == {}


def test_onnx_and_an_evaluation_go_along_and_go_with_their_weights(hub, push, copy):
    (copy / "onnx").mkdir()
    (copy / "onnx/model.onnx").write_bytes(b"the graph")
    (copy / "evaluation_bound.png").write_bytes(b"the bound")
    evaluation = {"weights_sha256": weights_sha256(copy), "metrics": {}, "protocol": "", "texts": {}, "ci": {}}
    (copy / "evaluation.json").write_text(json.dumps(evaluation))
    push(copy)
    files = hub.repo("alice/digits").files()
    assert files["onnx/model.onnx"] == b"the graph" and files["evaluation_bound.png"] == b"the bound"
    (copy / "onnx/model.onnx").unlink()  # as the end of the next run does
    (copy / "evaluation.json").write_text(json.dumps(evaluation | {"weights_sha256": "of other weights"}))
    push(copy)
    left = hub.repo("alice/digits").files().keys()
    assert files.keys() - left == {"onnx/model.onnx", "evaluation.json", "evaluation_bound.png"}


def test_a_folder_that_stock_diffusers_cannot_load_is_not_pushed(hub, hub_here, copy, tmp_path):
    cut_off = copy / "unet/diffusion_pytorch_model.safetensors"
    cut_off.write_bytes(cut_off.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="stock diffusers cannot load"):
        push_model(PushConfig("alice/digits", str(copy)))
    (copy / "train_config.yaml").unlink()
    for folder, missing in (tmp_path, "model_index.json"), (copy, "train_config.yaml"):
        with pytest.raises(ConfigError, match=f"--model_dir {re.escape(str(folder))}: holds no {missing}"):
            validate_model(folder)
    assert hub.repos == {}


@posix
def test_a_push_looks_at_its_start_for_what_it_cannot_write(hub, push, copy, tmp_path):
    (copy / "README.md").unlink(missing_ok=True)
    (copy / "README.md").mkdir()
    done = push(copy)
    assert done.returncode == 2 and "README.md is a folder, but must be a file" in done.stderr
    (copy / "README.md").rmdir()
    copy.chmod(0o555)
    with as_nobody(tmp_path), pytest.raises(ConfigError, match="copy cannot be written"):
        push_model(PushConfig("alice/digits", str(copy), dry_run=True))
    assert not hub.repos


# ---- the card ------------------------------------------------------------------------------------------------------


def test_card(model):
    write_card(model, "alice/digits")
    read = ModelCard.load(model / "README.md")
    assert read.data.library_name == "diffusers" and read.data.license == "apache-2.0"
    assert read.data.pipeline_tag == "unconditional-image-generation"
    metadata = front_matter(read.content.encode())
    urls = [entry["output"]["url"] for entry in metadata["widget"]]
    assert len(urls) == 8 and all((model / url).is_file() for url in urls)
    (model / "gallery/0.png").rename(model / "gallery/other.png")
    assert gallery(model, 10)[0] == {"text": "class 1", "output": {"url": "gallery/1.png"}}
    (model / "gallery/other.png").rename(model / "gallery/0.png")
    parts = ['DiffusionPipeline.from_pretrained("alice/digits")', "ho2020denoising", "<Gallery />", "(trajectory.png)"]
    parts += ["(notebook.ipynb)", "(loss_curve.png)", "| updates | 8 |", "| the U-Net predicts | epsilon |"]
    assert not [part for part in parts if part not in read.text]
    logged = json.loads((model / "train_results.json").read_text())["metrics"]["held_out_ema/loss"]
    assert f"the mean squared error of the predicted noise is {round(logged, 6)}." in read.text
    assert Image.open(model / "loss_curve.png").size == (700, 350)


def test_the_card_of_a_model_with_the_larger_variance_skips_no_timesteps(copy):
    file = copy / "scheduler/scheduler_config.json"
    assert "pipe(batch_size=4, num_inference_steps=50)" in usage("alice/digits", copy)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"variance_type": "fixed_large"}))
    assert "pipe(batch_size=4, num_inference_steps=1000)" in usage("alice/digits", copy)
    file.write_text(json.dumps({"num_train_timesteps": 20}))
    assert "pipe(batch_size=4, num_inference_steps=20)" in usage("alice/digits", copy)


def test_a_card_has_only_figures_of_these_weights_and_not_half_of_what_it_needs(copy):
    def card(**evaluation) -> str:
        (copy / "evaluation.json").write_text(json.dumps(evaluation))
        write_card(copy, "alice/other")
        return (copy / "README.md").read_text(encoding="utf-8")

    sha = weights_sha256(copy)
    (copy / "evaluation.md").write_text("| | model |\n| --- | --- |\n| FID | 3.25 ± 0.1 |\n", encoding="utf-8")
    measured = {"weights_sha256": sha, "metrics": {"fid": 3.25, "nearest_ratio": 0.99}}
    assert "| FID | 3.25 ± 0.1 |" in (text := card(**measured)) and "not tested for memorised" not in text
    shutil.copy(copy / "checkpoint-4/unet/diffusion_pytorch_model.safetensors", copy / "unet")
    text = card(**measured)
    assert "3.25" not in text and "predicted noise is" not in text and "not tested" in text
    assert "evaluation.json" not in files_to_push(copy)
    (copy / "train_config.yaml").write_text("seed: 1", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=f"--model_dir {re.escape(str(copy))}: the model card cannot be written .* restore them"
    ):
        write_card(copy, "alice/a")


WRONG = [  # file of a run, what it holds besides
    *[("train_results.json", {name: 3}) for name in ("metrics", "versions", "dataset")],
    *[("train_results.json", {name: None}) for name in ("metrics", "versions", "dataset", "minutes_of_this_session")],
    ("train_results.json", {"metrics": {"held_out_ema/loss": "x"}}),
    ("evaluation.json", {"metrics": 3}),
    ("unet/config.json", {"num_class_embeds": "ten"}),
]


@pytest.mark.parametrize(("file", "wrong"), WRONG, ids=str)
def test_wrong_values_in_the_files_of_a_run_are_one_line(copy, file, wrong):
    known = (
        {"weights_sha256": weights_sha256(copy)} if file == "evaluation.json" else json.loads((copy / file).read_text())
    )
    (copy / file).write_text(json.dumps(known | wrong))
    with pytest.raises(
        ConfigError, match=f"^--model_dir {re.escape(str(copy))}: the model card cannot be written .* restore them$"
    ):
        write_card(copy, "alice/digits")


def test_the_card_links_a_dataset_of_the_hub(copy):
    results = json.loads((copy / "train_results.json").read_text())
    for dataset, local, linked in (("ylecun/mnist", False, ["ylecun/mnist"]), ("mnist", True, None)):
        changed = results | {"dataset": dataset, "dataset_is_local": local}
        (copy / "train_results.json").write_text(json.dumps(changed))
        write_card(copy, "alice/other")
        card = ModelCard.load(copy / "README.md")
        assert card.data.datasets == linked and f"| dataset | {dataset} |" in card.text


def test_a_card_edited_by_hand_stays_and_is_pushed_after_each_edit(hub, push, copy, capfd):
    path = copy / "README.md"
    write_card(copy, "alice/a")
    write_card(copy, "alice/b")
    assert "alice/b" in path.read_text() and "by hand" not in capfd.readouterr().out
    path.write_text(path.read_text().replace("## Limits", "## My limits"))
    write_card(copy, "alice/c")
    assert "## My limits" in path.read_text() and "alice/b" in path.read_text()
    assert "README.md was written or edited by hand" in capfd.readouterr().out
    for words in ("# First words", "# Second words"):
        path.write_text(words, encoding="utf-8")
        assert "edited on the Hub" not in push(copy).stdout
        assert hub.repo("alice/digits").files()["README.md"].decode() == words


def test_a_card_edited_on_the_hub_stays(hub, push, copy):
    push(copy)
    repo = hub.repo("alice/digits")
    mine = {"README.md": File(b"# my own words", False), "other.txt": File(b"mine", False)}
    repo.add("main", "edit on the website", dict(repo.at("main").files) | mine)
    assert "README.md of alice/digits was edited on the Hub: it stays" in push(copy).stdout
    assert repo.files()["README.md"] == b"# my own words" and repo.files()["other.txt"] == b"mine"


def test_no_path_or_user_name_leaves_the_machine(hub, push, tiny_dataset_dir, tmp_path, monkeypatch):
    """In whatever the run, its evaluation and the push write and send."""
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret-user"
    shutil.copytree(tiny_dataset_dir, secret / "data/mnist")
    cache = {"cache_dir": "secret-user/cache"}
    args = smoke_args("secret-user/data/mnist", "secret-user/out", max_train_steps=2, **cache)
    assert in_process(train_ddpm_mnist.main, *args) == 0
    options = ["--num_images", 20, "--num_inference_steps", 2, "--bound_images", 0, "--classifier_steps", 20]
    assert in_process(evaluate.main, "--model", "secret-user/out", *options) == 0
    done = push(secret / "out")
    assert done.returncode == 0, done.stderr
    files = hub.repo("alice/digits").files()
    assert {"evaluation.json", "train_config.yaml", "train_results.json"} < files.keys()
    for name, content in files.items():
        assert b"secret-user" not in content and str(tmp_path).encode() not in content, name
    (secret / "out/unet/notes.txt").write_text("secret-user")
    for name in ("model_index.json", "unet/config.json"):  # as diffusers' save_pretrained notes it
        config = json.loads((secret / "out" / name).read_text())
        (secret / "out" / name).write_text(json.dumps(config | {"_name_or_path": "/home/secret-user/out"}))
        assert json.loads(files_to_push(secret / "out")[name]) == config
    assert "unet/notes.txt" not in files_to_push(secret / "out")
    published = yaml.safe_load(files["train_config.yaml"])
    expected = {"dataset_name": "mnist", "output_dir": "out", "cache_dir": None}
    assert {name: published[name] for name in expected} == expected
    assert "datasets" not in front_matter(files["README.md"])  # a folder, whatever its name looks like
    named = {"dataset_name": "alice/set@refs/convert/parquet"}  # no path
    assert without_paths(named, local=False) == named | {"cache_dir": None}
    folder = {"dataset_name": "/Users/jane@corp.com/digits", "output_dir": "/Users/jane@corp.com/out"}
    assert without_paths(folder, local=True) == {"dataset_name": "digits", "output_dir": "out", "cache_dir": None}


# ---- trouble -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "token", "repo", "message"),
    [
        (None, "hf_" + "unknown" * 5, "alice/digits", "401: the Hub rejects this token"),
        (None, BOB, "alice/digits", "403: this token lacks the permission"),
        (None, None, "alice/digits", "no token: `hf auth login`"),
        (None, ALICE, "alice/a/b", "--hub_model_id alice/a/b: is not a repo id"),
        (None, ALICE, "digits", "--hub_model_id digits; write --hub_model_id USER/NAME"),
        ("license", ALICE, "alice/digits", 'the model card: Invalid metadata in README.md. - "license" must be'),
        ("404", ALICE, "alice/digits", "404: the repo does not exist"),
        ("409", ALICE, "alice/digits", "409: somebody else changed it"),
        ("429", ALICE, "alice/digits", "429: too many requests"),
        ("503", ALICE, "alice/digits", "503: the Hub has trouble"),
        ("cut before", ALICE, "alice/digits", "the connection to the Hub failed"),
    ],
)
def test_trouble_is_answered_in_one_line(hub, push, model, fault, token, repo, message):
    if fault == "409":  # at the commit; at the creation it says that the repo exists
        hub.fault = lambda number, request: fault if "/commit/" in request else None
    elif fault and fault != "license":
        hub.fault = lambda number, request: fault if "/repos/create" in request else None
    done = push(model, *(["--license", "Apache"] if fault == "license" else []), token=token, repo=repo)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr, done.stderr


def upload_alone(model: Path) -> None:
    """A push without the validation before it."""
    api = HfApi(token=ALICE)
    make_repo(api, "alice/digits", False)
    upload(api, PushConfig("alice/digits", str(model)), files_to_push(model))


@posix
@pytest.mark.parametrize("when", ["cut before", "cut after"])  # the server acts
def test_killed_at_each_request_in_turn(hub_here, copy, when):
    """The second run completes; until the commit itself the remote is as it was; one commit, never two."""
    hub, processes = hub_here, multiprocessing.get_context("fork")  # a fork need not import everything again
    shutil.rmtree(copy / "gallery")  # eight files like others, and so many requests
    write_card(copy, "alice/digits")
    upload_alone(copy)
    expected = {name for name in EXPECTED_FILES if not name.startswith("gallery/")}
    number_of_requests = len(hub.requests)
    assert number_of_requests >= 6
    for target in range(number_of_requests):
        hub.repos.clear(), hub.objects.clear(), hub.requests.clear()
        killed = processes.Process(target=upload_alone, args=(copy,))

        def fault(number, request, target=target, killed=killed):
            if number != target:
                return None
            killed.kill()
            multiprocessing.connection.wait([killed.sentinel])
            return when

        hub.fault = fault
        killed.start()
        killed.join(60)
        assert killed.exitcode == -signal.SIGKILL
        hub.fault = lambda number, request: None
        repo = hub.repos.get(("model", "alice/digits"))
        commits = len(repo.branches["main"]) if repo else 0
        assert commits <= 1 or set(repo.files()) == expected
        again = processes.Process(target=upload_alone, args=(copy,))
        again.start()
        again.join(60)
        repo = hub.repo("alice/digits")
        assert again.exitcode == 0 and set(repo.files()) == expected and len(repo.branches["main"]) == 2


def test_the_token_goes_nowhere_else(hub, push, model, tmp_path):
    done = push(model)
    assert done.returncode == 0, done.stderr
    hub.fault = lambda number, request: "500"
    failed = push_outside(hub, model, tmp_path, "--debug")
    assert failed.returncode != 0 and "Traceback" in failed.stderr
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr):
        assert ALICE not in text
    assert not [path for path, content in hub.repo("alice/digits").files().items() if ALICE.encode() in content]


def test_a_token_file(hub_here, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(f"{ALICE}\n")
    assert read_token() == ALICE
    for content in (b"hf_a\nand a comment", "hf_é".encode(), b"\xff\xfe", None):
        if content is None:
            monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))  # a folder
        else:
            (tmp_path / "token").write_bytes(content)
        with pytest.raises(ConfigError, match="HF_TOKEN_PATH, holds no valid token"):
            read_token()


def test_a_space_is_made_by_the_commands_in_the_docs(hub, tmp_path):
    """The folder that demo/serve.py writes: tests/test_demo.py."""
    (tmp_path / "my-space").mkdir()
    (tmp_path / "my-space/README.md").write_text("---\nsdk: static\n---\n# A page\n", encoding="utf-8")
    commands = re.findall(r"^    (hf .*)", (ROOT / "docs/running.md").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [command for command in commands if "space" in command]
    assert len(commands) == 2
    for command in commands:
        words = command.replace("USER/", "alice/").split()
        env = os.environ | client(hub, tmp_path / "home", ALICE)
        done = subprocess.run(
            [sys.executable, "-m", "huggingface_hub.cli.hf", *words[1:]], cwd=tmp_path, env=env, text=True
        )
        assert done.returncode == 0
    assert b"# A page" in hub.repo("alice/my-space", "space").files()["README.md"]
