"""Other systems than this one, simulated: Windows' rules for files, an ASCII locale, home folders, other devices."""

import errno
import os

import pytest
import torch
from conftest import ROOT, python, smoke_args
from torch.overrides import TorchFunctionMode

from ddpm_mnist import DDPMScheduler
from ddpm_mnist.evaluation.bound import variational_bound
from ddpm_mnist.images.batches import Images
from ddpm_mnist.options import DataOptions, options_of, read_options
from ddpm_mnist.training import checkpoint
from ddpm_mnist.training.config import TrainConfig, parse_args

ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "LANG": "C"}


class Windows:
    """`os` as it is on Windows: folders cannot be opened, and only files open for writing can be synced."""

    name = "nt"

    def __init__(self):
        self.flags, self.synced = {}, 0

    def open(self, path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = os.open(path, flags, *args, **kwargs)
        self.flags[descriptor] = flags
        return descriptor

    def fsync(self, descriptor):
        if self.flags[descriptor] & 3 == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self.synced += 1
        os.fsync(descriptor)

    def __getattr__(self, name):
        return getattr(os, name)


def test_checkpoints_are_written_by_windows_rules(train, monkeypatch):
    windows = Windows()
    monkeypatch.setattr(checkpoint, "os", windows)
    out = train("run", max_train_steps=4, validation_steps=0)
    assert windows.synced >= 5  # two weights, two configs, state.pt, the manifest
    assert checkpoint.damage(out / "checkpoint-4") is None
    names = (out / "checkpoint-4/manifest.json").read_text(encoding="utf-8")
    assert "unet/config.json" in names and "\\" not in names


@pytest.mark.parametrize("command", ["evaluate", "push"])
def test_every_command_runs_in_an_ascii_locale(command, model, tiny_dataset_dir, tmp_path):
    evaluate = ["--num_images", 20, "--num_inference_steps", 2, "--bound_images", 0, "--classifier_steps", 20]
    evaluate += ["--min_classifier_accuracy", 0, "--output_dir", tmp_path / "ergebnis-ä"]
    arguments = {
        "evaluate": ["evaluate.py", "--model", model, "--dataset_name", tiny_dataset_dir, *evaluate],
        "push": ["push_to_hub.py", "--model_dir", model, "--hub_model_id", "a/b", "--dry_run"],
    }[command]
    done = python(*arguments, **ASCII, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    if command == "evaluate":
        text = (tmp_path / "ergebnis-ä/evaluation.md").read_bytes().decode("utf-8")
        assert "Fréchet" in text and "±" in text


PATHS = {option.name for cls in (TrainConfig, DataOptions) for option in options_of(cls) if option.metadata["path"]}


def test_every_option_that_is_a_path_is_known():
    assert {"dataset_name", "cache_dir", "output_dir", "resume_from_checkpoint", "token_file", "init_from"} == PATHS


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_tilde_is_the_home_folder_in_files_and_on_the_command_line(name, tmp_path):
    expanded = os.path.expanduser("~/here")
    assert expanded != "~/here"
    assert getattr(parse_args([f"--{name}=~/here"]), name) == expanded
    (tmp_path / "a.yaml").write_text(f"{name}: ~/here\n", encoding="utf-8")
    assert getattr(parse_args([f"--config={tmp_path / 'a.yaml'}"]), name) == expanded


def test_a_tilde_in_the_options_of_the_other_commands(monkeypatch):
    import evaluate
    import generate
    import push_to_hub

    for cls in (generate.GenerateConfig, evaluate.EvaluateConfig, push_to_hub.PushConfig):
        paths = [option.name for option in options_of(cls) if option.metadata["path"]]
        options, _ = read_options(cls, [f"--{name}=~/here" for name in paths], "")
        assert paths and {getattr(options, name) for name in paths} == {os.path.expanduser("~/here")}


def test_a_run_in_a_home_folder_by_tilde(tiny_dataset_dir, tmp_path):
    args = smoke_args(tiny_dataset_dir, "~/runs/x", max_train_steps=1, validation_steps=0)
    done = python(ROOT / "train_ddpm_mnist.py", *args, cwd=tmp_path, HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home/runs/x/model_index.json").exists() and not (tmp_path / "~").exists()


class WithoutFloat64(TorchFunctionMode):
    """What leaves the U-Net is on a device without float64, as MPS, until it is copied to the CPU."""

    def __init__(self):
        super().__init__()
        self.there, self.checked = set(), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        on_device = any(id(a) in self.there for a in args if isinstance(a, torch.Tensor))
        if on_device and isinstance(result, torch.Tensor) and getattr(function, "__name__", "") != "cpu":
            self.checked += 1
            assert result.dtype != torch.float64, function
        return result


def test_the_bound_has_float64_on_the_cpu_only():
    mode = WithoutFloat64()

    class Unet(torch.nn.Module):
        device, config = torch.device("cpu"), type("Config", (), {"num_class_embeds": None})

        def forward(self, sample, timestep, class_labels=None):
            output = sample.clone()
            kept.append(output)  # so that no other tensor gets its id
            mode.there.add(id(output))
            return type("Output", (), {"sample": output})

    kept = []
    images = Images(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), None)
    with mode:
        variational_bound(Unet(), DDPMScheduler(num_train_timesteps=50), images, per_timestep=2)
    assert mode.checked


def test_a_dead_draft_of_another_run_and_links_are_removed_and_nothing_else(train, tmp_path):
    """--overwrite_output_dir, where names that look like a run's are files or links."""
    out = train("run", max_train_steps=1, validation_steps=0)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.txt").write_text("mine", encoding="utf-8")
    (out / "logs").symlink_to(tmp_path / "elsewhere")
    (out / "checkpoint-7").symlink_to(tmp_path / "elsewhere")
    (out / "checkpoint-notes.txt").write_text("mine", encoding="utf-8")
    (out / "checkpoint-mine").mkdir()
    train("run", max_train_steps=1, validation_steps=0, overwrite_output_dir=True)
    assert (tmp_path / "elsewhere/thesis.txt").exists() and not (out / "checkpoint-7").exists()
    assert (out / "checkpoint-notes.txt").exists() and (out / "checkpoint-mine").is_dir()


def test_where_generate_and_evaluate_compute(monkeypatch):
    from ddpm_mnist import sampling

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert sampling.device() == torch.device("mps")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert sampling.device() == torch.device("cpu")
