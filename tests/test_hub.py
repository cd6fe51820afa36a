"""push_to_hub.py, the model card and loading, against a Hub on loopback, with unmodified clients in other processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
import yaml
from conftest import ROOT, as_nobody, blob, in_process, make_dataset, metrics, posix, python, same, smoke_args, weights
from hub_server import File, HubServer
from huggingface_hub import ModelCard, constants
from packaging.requirements import Requirement
from PIL import Image

import train_ddpm_mnist
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.hub import checkpoints
from ddpm_mnist.hub.card import write_card
from ddpm_mnist.hub.push import published_name, push_model, validate_model, without_this_repo
from ddpm_mnist.record import weights_sha256

ALICE, BOB = "hf_" + "AliceToken" * 3, "hf_" + "BobsToken" * 3
EXPECTED_FILES = {
    ".gitattributes",
    "README.md",
    "loss_curve.png",
    "metrics.jsonl",
    "model_index.json",
    "notebook.ipynb",
    "samples.png",
    "trajectory.png",
    *(f"gallery/{number}.png" for number in range(8)),
    "scheduler/scheduler_config.json",
    "train_config.yaml",
    "train_results.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


# The upload without the validation before it, which takes ten times as long; in a process that can be killed.
PUSH_ALONE = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from ddpm_mnist.hub.push import files_to_push, make_repo, read_token, upload

api, model = HfApi(token=read_token(None)), Path("MODEL")
upload(api, model, make_repo(api, "alice/digits", False, None), files_to_push(model, False, False))
"""


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


class Pushed(NamedTuple):
    """What a command in this process left, as a `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


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
    monkeypatch.setenv("HF_TOKEN", ALICE)
    return hub


@pytest.fixture
def push(hub_here, monkeypatch, capfd):
    """push(model, *args) -> `Pushed`; push_to_hub.py in this process, without the validation of the model."""
    import push_to_hub
    from ddpm_mnist.hub import push as module

    monkeypatch.setattr(module, "validate_model", lambda model_dir: None)

    def run(model, *args, token: str | None = ALICE, repo: str = "alice/digits") -> Pushed:
        monkeypatch.setenv("HF_TOKEN", token or "")
        capfd.readouterr()
        code = in_process(push_to_hub.main, "--model_dir", model, "--hub_model_id", repo, *args)
        return Pushed(code, *capfd.readouterr())

    return run


def elsewhere(hub, tmp_path, code: str, token=None, name="fresh") -> subprocess.CompletedProcess:
    """Run code in a folder and with a cache where nothing is, this repo neither."""
    (tmp_path / name).mkdir(exist_ok=True)
    check = "\nimport sys; assert not any(m.startswith('ddpm_mnist') for m in sys.modules)"
    return python("-c", code + check, cwd=tmp_path / name, **client(hub, tmp_path / name / "home", token))


def notebook_code(repo) -> str:
    """All the code of the notebook in a repo."""
    cells = nbformat.reads(repo.files()["notebook.ipynb"].decode(), as_version=4).cells
    return "\n" + "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


# ---- the whole trip ------------------------------------------------------------------------------------------------


def test_the_fresh_process_finds_packages_by_pythonpath_but_not_this_repo(model, tmp_path, monkeypatch):
    """On clusters, `module load` puts packages there."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, pathlib\n"
        "pathlib.Path(__file__).with_name('seen').write_text(str(importlib.util.find_spec('push_to_hub')))"
    )
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    validate_model(model)
    assert (tmp_path / "seen").read_text() == "None"


def test_checkouts_of_this_repo_are_left_out_of_pythonpath(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site/ddpm_mnist").mkdir(parents=True)  # installed beside diffusers
    given = ["site", "", str(ROOT), "absent", str(tmp_path)]
    assert without_this_repo(os.pathsep.join(given)).split(os.pathsep) == [
        str(tmp_path / "site"),
        str(tmp_path / "absent"),
        str(tmp_path),
    ]
    assert without_this_repo("") == ""


def test_train_push_load_generate(hub, model, tmp_path):
    done = push_outside(hub, model, tmp_path)
    assert done.returncode == 0, done.stderr
    repo = hub.repo("alice/digits")
    assert set(repo.files()) == EXPECTED_FILES
    assert [c.message for c in repo.branches["main"]] == ["initial commit", "Upload DDPM"]
    code = re.search(r"from diffusers import .*", done.stdout, re.DOTALL)[0]  # the lines that it prints
    code += notebook_code(repo)
    assert f"{hub.url}/alice/digits/commit/" in done.stdout
    fresh = elsewhere(hub, tmp_path, code)
    assert fresh.returncode == 0, fresh.stderr
    assert Image.open(tmp_path / "fresh/digit.png").size == (28, 28)
    generated = python(
        *["generate.py", "--model", "alice/digits", "--num_images", "2", "--num_inference_steps", "3"],
        *["--output", tmp_path / "grid.png"],
        **client(hub, tmp_path / "home2"),
    )
    assert generated.returncode == 0, generated.stderr


def test_conditional_trip(hub, conditional_model, tmp_path):
    done = push_outside(hub, conditional_model, tmp_path, repo="alice/seven")
    assert done.returncode == 0, done.stderr
    files = hub.repo("alice/seven").files()
    assert set(files) == EXPECTED_FILES | {"pipeline.py"}
    card = files["README.md"].decode()
    assert 'from_pretrained("alice/seven", trust_remote_code=True)' in card and 'revision="COMMIT"' in card
    assert [entry["text"] for entry in front_matter(card)["widget"]] == [f"digit {number}" for number in range(8)]
    code = """
from diffusers import DiffusionPipeline, UNet2DModel
repo = "alice/seven"
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe(class_labels=[7] * 3, guidance_scale=2.0, num_inference_steps=3).images
assert len(images) == 3
images[0].save("seven.png")
for labels in ([11], [10], [-1], [], ["7"]):
    try:
        pipe(class_labels=labels)
    except ValueError as e:
        assert "class_labels" in str(e) and "0 to 9" in str(e), e
    else:
        raise AssertionError(labels)
assert UNet2DModel.from_pretrained(repo, subfolder="unet").config.num_class_embeds == 11
"""
    fresh = elsewhere(hub, tmp_path, code + notebook_code(hub.repo("alice/seven")))
    assert fresh.returncode == 0, fresh.stderr
    assert Image.open(tmp_path / "fresh/seven.png").size == (28, 28)


def test_train_with_push_to_hub(hub, tiny_dataset_dir, tmp_path):
    args = smoke_args(
        tiny_dataset_dir, tmp_path / "run", max_train_steps=2, push_to_hub=True, hub_model_id="alice/trained"
    )
    done = python("train_ddpm_mnist.py", *args, **client(hub, tmp_path / "home", ALICE))
    assert done.returncode == 0, done.stderr
    assert "unet/diffusion_pytorch_model.safetensors" in hub.repo("alice/trained").files()
    args = smoke_args(tiny_dataset_dir, tmp_path / "no", push_to_hub=True, hub_model_id="alice/no")
    early = python("train_ddpm_mnist.py", *args, **client(hub, tmp_path / "home", None))
    assert early.returncode == 2 and "no token" in early.stderr and not (tmp_path / "no").exists()


def test_train_on_a_dataset_from_the_hub(hub, tmp_path):
    parquet = {}
    for split, n in (("train", 60), ("test", 20)):
        path = tmp_path / f"{split}.parquet"
        make_dataset([blob(i) for i in range(n)], [i % 10 for i in range(n)]).to_parquet(path)
        parquet[f"mnist/{split}-00000-of-00001.parquet"] = path.read_bytes()
    readme = "---\nconfigs:\n- config_name: mnist\n  data_files:\n  - split: train\n    path: mnist/train-*\n"
    readme += "  - split: test\n    path: mnist/test-*\n---\n"
    for name in ("ylecun/mnist", "alice/private-mnist"):
        files = {"README.md": readme.encode(), **parquet}
        hub.create(name, "dataset", private="private" in name, files=files)
    default = [a for a in smoke_args("", tmp_path / "default", max_train_steps=2) if "dataset_name" not in a]
    done = python("train_ddpm_mnist.py", *default, **client(hub, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "60 images of ylecun/mnist" in done.stdout
    private = smoke_args("alice/private-mnist", tmp_path / "private", max_train_steps=2)
    refused = python("train_ddpm_mnist.py", *private, **client(hub, tmp_path / "home"))
    assert refused.returncode == 2 and "not on the Hub, or private" in refused.stderr
    done = python("train_ddpm_mnist.py", *private, **client(hub, tmp_path / "home", ALICE))
    assert done.returncode == 0, done.stderr


# ---- what is pushed, and where -------------------------------------------------------------------------------------


def test_nothing_changed_makes_no_commit_and_a_change_makes_one(hub, push, model):
    for _ in range(2):
        done = push(model, "--commit_message", "first")
        assert done.returncode == 0, done.stderr
    history = hub.repo("alice/digits").branches["main"]
    assert [c.message for c in history] == ["initial commit", "first"]
    assert push(model, "--license", "apache-2.0", "--commit_message", "second").returncode == 0
    assert [c.message for c in history] == ["initial commit", "first", "second"]


def test_private_is_private(hub, push, model, tmp_path):
    assert push(model, "--private").returncode == 0
    assert hub.repo("alice/digits").private
    code = "from huggingface_hub import snapshot_download; snapshot_download('alice/digits')"
    assert elsewhere(hub, tmp_path, code, token=ALICE, name="alice").returncode == 0
    for token in (BOB, None):
        refused = elsewhere(hub, tmp_path, code, token=token, name=f"other{token}")
        assert refused.returncode != 0 and "RepositoryNotFoundError" in refused.stderr


def test_private_refuses_a_repo_that_is_public(hub, push, model):
    hub.create("alice/digits")
    done = push(model, "--private")
    assert done.returncode == 2 and "exists and is public" in done.stderr
    assert set(hub.repo("alice/digits").files()) == {".gitattributes"}


def test_revision_and_pull_request(hub, push, model):
    assert push(model, "--revision", "v2").returncode == 0
    repo = hub.repo("alice/digits")
    assert set(repo.files("v2")) == EXPECTED_FILES and set(repo.files("main")) == {".gitattributes"}
    done = push(model, "--create_pr")
    assert done.returncode == 0 and "/discussions/1" in done.stdout
    assert set(repo.files("refs/pr/1")) == EXPECTED_FILES and set(repo.files("main")) == {".gitattributes"}
    done = push(model, "--create_pr", "--revision", "v2")
    assert done.returncode == 2 and "--create_pr" in done.stderr


def test_dry_run_lists_and_sends_nothing(hub, push, model):
    done = push(model, "--dry_run", token=None)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[-1] for line in done.stdout.splitlines() if re.match(r" +[\d,]+  \S+$", line)}
    assert listed == EXPECTED_FILES - {".gitattributes"}
    assert hub.requests == [] and hub.repos == {}


def test_checkpoints_and_logs_go_only_when_asked(hub, push, model):
    assert push(model, "--include_checkpoints", "--tensorboard").returncode == 0
    more = set(hub.repo("alice/digits").files()) - EXPECTED_FILES
    assert "checkpoint-8/state.pt" in more and any(path.startswith("logs/") for path in more)


def test_a_folder_that_stock_diffusers_cannot_load_is_not_pushed(hub, model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "train_config.yaml").unlink()
    cases = ((broken, "stock diffusers cannot load"), (tmp_path, "no model_index.json"), (bare, "no train_config.yaml"))
    for folder, message in cases:
        done = push_outside(hub, folder, tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert hub.repos == {}


# ---- the card ------------------------------------------------------------------------------------------------------


def test_card(model, tmp_path):
    card = write_card(model, "alice/digits")
    read = ModelCard.load(model / "README.md")
    assert read.data.library_name == "diffusers" and read.data.license == "mit"
    assert read.data.pipeline_tag == "unconditional-image-generation"
    assert 'DDPMPipeline.from_pretrained("alice/digits")' in card.text and "ho2020denoising" in card.text
    metadata = front_matter((model / "README.md").read_text())
    urls = [entry["output"]["url"] for entry in metadata["widget"]]
    assert len(urls) == 8 and all((model / url).is_file() for url in urls)
    for part in ("<Gallery />", "(trajectory.png)", "(notebook.ipynb)", "| updates | 8 | 800000 |", "| hardware | "):
        assert part in card.text
    (metric,) = metadata["model-index"][0]["results"][0]["metrics"]
    logged = json.loads((model / "train_results.json").read_text())["metrics"]["held_out_ema/loss"]
    assert metric["value"] == pytest.approx(logged, abs=1e-6)
    assert Image.open(model / "loss_curve.png").size == (700, 350)


def test_a_card_edited_by_hand_stays(model, tmp_path):
    other, said = tmp_path / "other", []
    shutil.copytree(model, other)
    write_card(other, "alice/a", say=said.append)
    write_card(other, "alice/b", say=said.append)
    path = other / "README.md"
    assert "alice/b" in path.read_text() and not said
    path.write_text(path.read_text().replace("## Limits", "## My limits"))
    write_card(other, "alice/c", say=said.append)
    assert "## My limits" in path.read_text() and "alice/b" in path.read_text() and "by hand" in said[0]


def test_the_card_says_how_timesteps_and_loss_differ_from_the_paper(model, tmp_path):
    other = copy(model, tmp_path)
    settings = yaml.safe_load((other / "train_config.yaml").read_text(encoding="utf-8"))
    text = write_card(other, "alice/a").text
    assert "timesteps of a batch" not in text and "what was drawn" not in text  # as in the paper
    scheduler = json.loads((other / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    changed = json.dumps(scheduler | {"prediction_type": "v_prediction"})
    (other / "scheduler/scheduler_config.json").write_text(changed, encoding="utf-8")
    for weighting, there in (("noise", False), ("output", True)):
        more = {"uniform_timesteps": 0.25, "loss_weighting": weighting, "reference_images": 16384}
        (other / "train_config.yaml").write_text(yaml.safe_dump(settings | more), encoding="utf-8")
        text = write_card(other, "alice/a").text
        assert "| timesteps of a batch | uniform, 75% by log SNR ~ N(-1.75, 1.9^2) | uniform |" in text
        assert ("| weights of the loss | 1, for v_prediction | 1 |" in text) == there
        assert "| its mean, over 16,384 images | what was drawn |" in text
    (other / "train_config.yaml").write_text("seed: 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="train_config.yaml lacks train_batch_size"):
        write_card(other, "alice/a")


def test_card_has_only_figures_of_these_weights(model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    evaluation = {"weights_sha256": weights_sha256(other), "metrics": {"fid": 3.25}}
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    assert "3.25" in write_card(other, "alice/other").text and "not tested" in write_card(other, "alice/other").text
    evaluation["metrics"]["nearest_ratio"] = 0.99
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    (other / "evaluation.md").write_text("| | model |\n| --- | --- |\n| FID | 3.25 ± 0.1 |\n")
    card = write_card(other, "alice/other")
    assert "| FID | 3.25 ± 0.1 |" in card.text and "not tested for memorised" not in card.text
    (other / "unet/diffusion_pytorch_model.safetensors").write_bytes(
        (other / "checkpoint-4/unet/diffusion_pytorch_model.safetensors").read_bytes()
    )
    card = write_card(other, "alice/other")
    assert "3.25" not in card.text and card.data.eval_results is None and "not tested" in card.text


def test_a_bare_name_is_answered_by_the_hub_before_the_card_is_written(hub, push, model, tmp_path):
    said = push(copy(model, tmp_path), repo="digits").stdout
    card = hub.repo("alice/digits").files()["README.md"].decode()
    for text in (card, said):
        assert 'from_pretrained("alice/digits")' in text and 'from_pretrained("digits")' not in text
    done = push(model, "--dry_run", repo="digits")
    assert done.returncode == 2 and "--hub_model_id digits; write --hub_model_id USER/NAME" in done.stderr


def test_a_card_edited_on_the_hub_stays_and_it_is_said(hub, push, model, tmp_path):
    other = copy(model, tmp_path)
    push(other)
    repo = hub.repo("alice/digits")
    mine = {"README.md": File(b"# my own words", False), "other.txt": File(b"mine", False)}
    repo.add("main", "edit on the website", dict(repo.at("main").files) | mine)
    assert "README.md of alice/digits was edited on the Hub: it stays" in push(other).stdout
    assert repo.files()["README.md"] == b"# my own words" and repo.files()["other.txt"] == b"mine"


def test_a_card_edited_here_is_pushed_again_after_each_edit(hub, push, model, tmp_path):
    other = copy(model, tmp_path)
    for words in ("# First words", "# Second words"):
        (other / "README.md").write_text(words, encoding="utf-8")
        assert "edited on the Hub" not in push(other).stdout
        assert hub.repo("alice/digits").files()["README.md"].decode() == words


def copy(model, tmp_path) -> Path:
    shutil.copytree(model, tmp_path / "copy")
    return tmp_path / "copy"


def test_no_path_or_user_name_leaves_the_machine(hub, push, model, tiny_dataset_dir, tmp_path):
    """In whatever the run, its evaluation and the push write and send."""
    (tmp_path / "secret-user").mkdir()
    (tmp_path / "secret-user/token").write_text(ALICE, encoding="utf-8")
    data, out = tmp_path / "secret-user/data/mnist", tmp_path / "secret-user/out"
    shutil.copytree(tiny_dataset_dir, data)
    shutil.copytree(model, tmp_path / "secret-user/base")
    paths = {"cache_dir": "secret-user/cache", "init_from": "secret-user/base"}
    args = smoke_args("secret-user/data/mnist", "secret-user/out", max_train_steps=2, **paths)
    environment = client(hub, tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    done = python(ROOT / "train_ddpm_mnist.py", *args, "--token_file=secret-user/token", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    options = ["--num_images", 20, "--num_inference_steps", 2, "--bound_images", 0, "--classifier_steps", 20]
    options += ["--min_classifier_accuracy", 0]
    done = python(ROOT / "evaluate.py", "--model", "secret-user/out", *options, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    done = push(out, "--token_file", tmp_path / "secret-user/token", token=None)
    assert done.returncode == 0, done.stderr
    files = hub.repo("alice/digits").files()
    assert {"evaluation.json", "train_config.yaml", "train_results.json"} < files.keys()
    for name, content in files.items():
        assert b"secret-user" not in content and str(tmp_path).encode() not in content, name
    published = yaml.safe_load(files["train_config.yaml"])
    assert (
        published["init_from"] == "base"
        and published["dataset_name"] == "mnist"
        and published["output_dir"] == "out"
        and not published["cache_dir"]
    )
    metadata = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert "datasets" not in metadata  # a folder, whatever its name looks like, is no dataset of the Hub


@pytest.mark.parametrize(
    ("dataset", "local", "linked", "digits"),
    [
        ("ylecun/mnist", False, ["ylecun/mnist"], True),
        ("mnist", True, None, True),
        ("data/mnist", True, None, True),
        ("scikit-learn digits", False, None, True),
        ("zalando-datasets/fashion_mnist", False, ["zalando-datasets/fashion_mnist"], False),
        ("cats", True, None, False),
        ("C:\\Users\\ann\\cats", True, None, False),
    ],
)
def test_words_about_digits_are_for_digits(conditional_model, tmp_path, dataset, local, linked, digits):
    other = copy(conditional_model, tmp_path)
    results = json.loads((other / "train_results.json").read_text(encoding="utf-8"))
    results |= {"dataset": dataset, "dataset_is_local": local}
    (other / "train_results.json").write_text(json.dumps(results), encoding="utf-8")
    card = write_card(other, "alice/other")
    assert card.data.datasets == linked and ("mnist" in card.data.tags) == digits
    words = card.text.replace(dataset, "").lower()
    assert ("digit" in words) == digits and ("class_labels=[7]" in words) == digits and "ann" not in words.split()
    assert "Users" not in str(card)


@pytest.mark.parametrize(("name", "local"), [("ylecun/mnist", False), ("mine", True)])
def test_a_model_of_the_hub_is_evaluated_on_what_it_was_trained_on(hub_here, tmp_path, monkeypatch, name, local):
    import evaluate

    settings = yaml.safe_dump({"dataset_name": name, "image_column": "digit"}).encode()
    files = {"train_config.yaml": settings, "train_results.json": json.dumps({"dataset_is_local": local}).encode()}
    hub_here.create("alice/other", files=files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    if local:
        with pytest.raises(ConfigError, match="--dataset_name: the model was trained on mine, which is not here"):
            evaluate.parse_args(["--model", "alice/other"])
    config = evaluate.parse_args(["--model", "alice/other", *(["--dataset_name=there"] if local else [])])
    assert (config.dataset_name, config.image_column) == ("there" if local else name, "digit")
    assert evaluate.parse_args(["--model", "alice/none"]).image_column is None


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("logs/ddpm-mnist/events.out.tfevents.1732570000.anns-laptop.local.4242.0", "tfevents.1732570000.4242.0"),
        ("logs/ddpm-mnist/events.out.tfevents.1732570000.ip-10.0.0.5.4242.0", "tfevents.1732570000.4242.0"),
        ("logs/ddpm-mnist/events.out.tfevents.1732570000.host", "tfevents.1732570000"),
        ("unet/config.json", "unet/config.json"),
    ],
)
def test_the_name_of_the_machine_stays_there(name, published):
    assert published_name(Path(name)).endswith(published) and "ann" not in published_name(Path(name))


@posix
def test_a_push_looks_at_its_start_for_what_it_cannot_write(hub, push, model, tmp_path):
    other = copy(model, tmp_path)
    (other / "README.md").unlink(missing_ok=True)
    (other / "README.md").mkdir()
    done = push(other)
    assert done.returncode == 2 and "README.md is a folder, and a file goes there" in done.stderr
    (other / "README.md").rmdir()
    other.chmod(0o555)
    with as_nobody(tmp_path), pytest.raises(ConfigError, match="copy cannot be written"):
        push_model(other, "alice/digits", dry_run=True)
    assert not hub.repos


# ---- checkpoints, as the run goes ------------------------------------------------------------------------------------


class AtOnce:
    """A thread that is through when it has started."""

    def __init__(self, target, daemon):
        self.run = target

    def start(self):
        self.run()

    def is_alive(self) -> bool:
        return False

    def join(self, timeout) -> None:
        pass


PUSHED = {"push_checkpoints": True, "hub_model_id": "alice/run", "checkpointing_steps": 2, "validation_steps": 0}


def test_checkpoints_are_pushed_as_the_run_goes_and_it_resumes_from_them(hub_here, train, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "Thread", AtOnce)
    whole = train("whole", checkpoints_total_limit=1, report_to="tensorboard", **PUSHED)
    repo = hub_here.repo("alice/run")
    assert [c.message for c in repo.branches["main"][1:]] == [f"Add checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert {path.split("/")[0] for path in repo.files()} == {
        *(".gitattributes", "checkpoint-8", "logs", "metrics.jsonl", "train_config.yaml")
    }
    assert not [path for path, content in repo.files().items() if str(tmp_path).encode() in content]
    at_four = repo.branches["main"][2].files
    for path, file in at_four.items():  # another machine, where the job is started again
        (tmp_path / "again" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / path).write_bytes(file.content)
    again = train("again", resume_from_checkpoint="latest", validation_steps=0)
    assert same(weights(again / "unet"), weights(whole / "unet")) and metrics(again, "loss") == metrics(whole, "loss")
    assert (again / "logs/run_id").read_bytes() == (whole / "logs/run_id").read_bytes()


def test_what_is_being_pushed_when_a_run_fails_is_pushed(hub_here, train, monkeypatch):
    """The machine's disk may be lost as soon as the process has ended."""
    done = []

    def upload(self, checkpoint):
        time.sleep(1)
        done.append(checkpoint.name)

    def fail(run):
        raise ConfigError("the loss is no longer finite")

    monkeypatch.setattr(checkpoints.CheckpointPusher, "upload", upload)
    monkeypatch.setattr(train_ddpm_mnist, "validate", fail)
    with pytest.raises(ConfigError, match="no longer finite"):
        train("run", **(PUSHED | {"validation_steps": 3}))
    assert done == ["checkpoint-2"]


def test_a_checkpoint_that_cannot_be_pushed_ends_nothing(hub_here, train, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "Thread", AtOnce)
    commits = []

    def fault(number, request):
        if "/commit/" in request:
            commits.append(number)
            return "409" if len(commits) == 1 else None
        return None

    hub_here.fault = fault
    train("run", max_train_steps=4, **PUSHED)
    said = capsys.readouterr().out
    assert "checkpoint-2 was not pushed (--hub_model_id alice/run: 409: somebody else changed it" in said
    assert "checkpoint-4/manifest.json" in hub_here.repo("alice/run").files()
    hub_here.fault = lambda number, request: "cut before"
    assert (train("cut", max_train_steps=4, **PUSHED) / "model_index.json").is_file()
    assert capsys.readouterr().out.count("the Hub cannot be reached, or broke off") == 2


def test_training_does_not_wait_for_a_slow_hub_and_the_end_does(hub_here, train, capsys):
    hub_here.fault = lambda number, request: "slow 2" if "/create" in request else None
    train("run", **PUSHED)
    assert "checkpoint-2 was not pushed (newer ones have replaced it)." in capsys.readouterr().out
    pushed = hub_here.repo("alice/run")
    assert [c.message for c in pushed.branches["main"][1:]] == ["Add checkpoint-8"]
    assert {
        "checkpoint-8/manifest.json",
        "checkpoint-8/state.pt",
        "checkpoint-8/unet/config.json",
    } < pushed.files().keys()


# ---- trouble -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "token", "repo", "message"),
    [
        (None, "hf_" + "unknown" * 5, "alice/digits", "401: the Hub does not know this token"),
        (None, BOB, "alice/digits", "403: the token may not write there"),
        (None, None, "alice/digits", "no token: `hf auth login`"),
        (None, ALICE, "alice/a/b", "is no repo id"),
        (None, ALICE, "alice/-digits-", "is no repo id"),
        ("404", ALICE, "alice/digits", "404: there is no such repo"),
        ("409", ALICE, "alice/digits", "409: somebody else changed it"),
        ("429", ALICE, "alice/digits", "429: the Hub asks to wait"),
        ("500", ALICE, "alice/digits", "500: the Hub has trouble"),
        ("503", ALICE, "alice/digits", "503: the Hub has trouble"),
        ("cut before", ALICE, "alice/digits", "the Hub cannot be reached, or broke off"),
    ],
)
def test_trouble_is_answered_in_one_line(hub, push, model, fault, token, repo, message):
    if fault == "409":  # at the commit; at the creation it means that the repo is there
        hub.fault = lambda number, request: fault if "/commit/" in request else None
    elif fault:
        hub.fault = lambda number, request: fault if "/repos/create" in request else None
    done = push(model, token=token, repo=repo)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr, done.stderr


def test_no_network(model, tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": ALICE, "HF_HOME": str(tmp_path)}
    done = python("push_to_hub.py", "--model_dir", model, "--hub_model_id", "alice/digits", **env)
    assert done.returncode == 2 and "the Hub cannot be reached" in done.stderr and "Traceback" not in done.stderr


def test_short_faults_are_got_over(hub, push, model):
    """One 503, one 429 with Retry-After, a slow answer and a cut upload, each at a request that the client repeats."""
    seen = {}

    def fault(number, request):
        for part, kind in (("/preupload/", "503"), ("/objects/batch", "429"), ("/lfs-storage/", "cut after reading")):
            if part in request and not seen.get(part):
                seen[part] = kind
                return kind
        return "slow 0.5" if "/commit/" in request else None

    hub.fault = fault
    done = push(model)
    assert done.returncode == 0, done.stderr
    assert len(seen) == 3 and set(hub.repo("alice/digits").files()) == EXPECTED_FILES


def test_a_cut_download_goes_on_by_range(hub, tmp_path):
    big = bytes(range(256)) * 100_000  # more than two of the pieces in which the client writes a file
    hub.create("alice/big", files={"big.bin": big})
    cut = []

    def fault(number, request):
        if request.startswith("GET /lfs-storage/") and not cut:
            cut.append(number)
            return "cut half"
        return None

    hub.fault = fault
    code = "from huggingface_hub import hf_hub_download as d; print(d('alice/big', 'big.bin'))"
    fresh = elsewhere(hub, tmp_path, code)
    assert fresh.returncode == 0, fresh.stderr
    assert cut and [int(r.removeprefix("bytes=").split("-")[0]) > 0 for r in hub.ranges] == [True]
    assert Path(fresh.stdout.split()[-1]).read_bytes() == big


@posix
@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_each_request_in_turn(hub, model, tmp_path, both):
    """The second run completes; until the commit itself the remote is as it was; one commit, never two."""
    code = PUSH_ALONE.replace("MODEL", str(model))
    env = os.environ | client(hub, tmp_path / "home", ALICE) | {"PYTHONPATH": str(ROOT)}
    write_card(model, "alice/digits")
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
    number_of_requests = len(hub.requests)
    assert number_of_requests >= 6
    for target in range(number_of_requests):
        ways = ("cut before", "cut after")  # the server acts
        for when in ways if both else (ways[target % 2],):
            hub.repos.clear(), hub.objects.clear(), hub.requests.clear()
            running = {}

            def fault(number, request, target=target, when=when, running=running):
                if number != target:
                    return None
                running["process"].send_signal(signal.SIGKILL)
                running["process"].wait()
                return when

            hub.fault = fault
            running["process"] = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
            running["process"].wait(timeout=60)
            assert running["process"].returncode == -signal.SIGKILL
            hub.fault = lambda number, request: None
            repo = hub.repos.get(("model", "alice/digits"))
            commits = len(repo.branches["main"]) if repo else 0
            assert commits <= 1 or set(repo.files()) == EXPECTED_FILES
            again = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            assert again.returncode == 0, again.stderr
            repo = hub.repo("alice/digits")
            assert set(repo.files()) == EXPECTED_FILES and len(repo.branches["main"]) == 2


def test_the_token_goes_nowhere_else(hub, push, model, tmp_path):
    (tmp_path / "token").write_text(ALICE + "\n")
    done = push(model, "--token_file", tmp_path / "token", token=None)
    assert done.returncode == 0, done.stderr
    hub.fault = lambda number, request: "500"
    failed = push_outside(hub, model, tmp_path, "--debug")
    assert failed.returncode != 0 and "Traceback" in failed.stderr
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr):
        assert ALICE not in text
    assert not [path for path, content in hub.repo("alice/digits").files().items() if ALICE.encode() in content]
    missing = push(model, "--token_file", tmp_path / "none", token=None)
    assert missing.returncode == 2 and "--token_file" in missing.stderr


# ---- the Space -----------------------------------------------------------------------------------------------------

SPACE_FILES = {
    *(".gitattributes", "README.md", "model.txt", "requirements.txt", "page.css", "pipeline.py", "randomness.py"),
    *("app.py", "drawing.py", "film.js", "pad.js", "schedule.js"),
}


def test_a_space_holds_all_it_needs_and_is_made_once(hub, push, model, tmp_path):
    other = copy(model, tmp_path)
    said = push(other, "--space_id", "alice/watch", "--license", "apache-2.0")
    assert said.returncode == 0 and f"{hub.url}/spaces/alice/watch" in said.stdout
    assert ALICE not in said.stdout + said.stderr
    space, repo = hub.repo("alice/watch", "space"), hub.repo("alice/digits")
    files = space.files()
    assert set(files) == SPACE_FILES and files["model.txt"] == b"alice/digits\n"
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["license"] == "apache-2.0"
    assert front["models"] == ["alice/digits"] and len(front["short_description"]) <= 60
    bounds = next(line for line in files["requirements.txt"].decode().splitlines() if line.startswith("gradio"))
    assert Requirement(bounds).specifier.contains(front["sdk_version"])
    assert "https://huggingface.co/alice/digits" in card
    assert "https://huggingface.co/spaces/alice/watch" in repo.files()["README.md"].decode()
    for options in (["--space_id", "alice/watch", "--license", "apache-2.0"], ["--license", "apache-2.0"]):
        push(other, *options)  # the link stays, also without --space_id
        assert len(space.branches["main"]) == 2 and len(repo.branches["main"]) == 2
    push(other, "--space_id", "alice/watch", "--license", "mit")
    assert len(space.branches["main"]) == 3 and b"license: mit" in space.files()["README.md"]


def test_what_was_edited_in_a_space_stays_and_other_spaces_are_left_alone(hub, push, model, tmp_path):
    other = copy(model, tmp_path)
    push(other, "--space_id", "alice/watch")
    space = hub.repo("alice/watch", "space")
    mine = {"README.md": File(b"---\nsdk: gradio\n---\nmine", False), "extra.txt": File(b"mine", False)}
    space.add("main", "edit on the website", dict(space.at("main").files) | mine)
    assert "README.md of the Space alice/watch was edited" in push(other, "--space_id", "alice/watch").stdout
    assert space.files()["README.md"].endswith(b"mine") and space.files()["extra.txt"] == b"mine"
    hub.create("alice/chess", "space", files={"app.py": b"chess"})
    done = push(other, "--space_id", "alice/chess")
    assert done.returncode == 2 and "--space_id alice/chess: is a Space of another app" in done.stderr
    assert hub.repo("alice/chess", "space").files()["app.py"] == b"chess"


def test_a_space_that_cannot_be_is_one_line(hub, push, model, tmp_path):
    other = copy(model, tmp_path)
    for options, message in (
        (["bob/watch"], "--space_id bob/watch: 403"),
        (["a/b/c"], "--space_id a/b/c: is no repo id"),
        (["watch", "--dry_run"], "--space_id watch; write --space_id USER/NAME"),
        (["alice/watch", "--create_pr"], "--space_id alice/watch: a Space shows the model's main branch"),
        (["alice/watch", "--revision", "v2"], "--space_id alice/watch: a Space shows the model's main branch"),
    ):
        done = push(other, "--space_id", *options)
        assert done.returncode == 2 and f"error: {message}" in done.stderr and "Traceback" not in done.stderr
    assert not [repo for repo in hub.repos if repo[0] == "space"]
    said = push(other, "--space_id", "alice/watch", "--dry_run").stdout
    assert "drawing.py" in said and "the Space alice/watch" in said and "Nothing was sent" in said
    assert not [repo for repo in hub.repos if repo[0] == "space"]


def test_a_private_model_has_a_private_space(hub, push, model, tmp_path):
    other = copy(model, tmp_path)
    assert "a secret HF_TOKEN" in push(other, "--space_id", "alice/watch", "--private").stdout
    assert hub.repo("alice/watch", "space").private and hub.repo("alice/digits").private
    hub.create("alice/open", "space")
    done = push(other, "--space_id", "alice/open", "--private")
    assert done.returncode == 2 and "--private: alice/open exists and is public" in done.stderr
