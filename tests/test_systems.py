"""Other systems than this one, simulated: Windows' rules for files, an ASCII locale, home folders, other devices."""

import errno
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import posix, python, smoke_args
from diffusers import DiffusionPipeline
from torch.overrides import TorchFunctionMode

from ddpm_mnist import DDPMScheduler, record
from ddpm_mnist.errors import ConfigError, writable_problem
from ddpm_mnist.evaluation.bound import variational_bound
from ddpm_mnist.images.batches import Images
from ddpm_mnist.loading import default_device
from ddpm_mnist.options import options_of, read_options
from ddpm_mnist.pipeline import apply_umask
from ddpm_mnist.training import checkpoint
from ddpm_mnist.training.config import TrainConfig
from ddpm_mnist.training.output_dir import lock_output_dir
from evaluate import EvaluateConfig
from generate import GenerateConfig
from push_to_hub import PushConfig

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
    replace, tried, pauses = Path.replace, Counter(), []

    def watched(path, target):
        """A virus scanner has each new file open, for a moment."""
        tried[path] += 1
        if tried[path] < 3:
            raise PermissionError(errno.EACCES, "Access is denied", str(path))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    monkeypatch.setattr(record.time, "sleep", pauses.append)
    out = train("run", max_train_steps=4, validation_steps=0)
    names = ("train_config.yaml", "metrics.jsonl", "manifest.json", "checkpoint-4", "train_results.json")
    assert pauses == [1, 4] * len(tried) and {path.name for path in tried} == {f".{name}.draft" for name in names}
    assert windows.synced >= 6  # two weights, two configs, state.pt, the manifest
    assert checkpoint.damage(out / "checkpoint-4") is None
    names = (out / "checkpoint-4/manifest.json").read_text(encoding="utf-8")
    assert "unet/config.json" in names and "\\" not in names


def test_a_disk_that_syncs_no_folders_keeps_checkpoints_and_one_that_syncs_no_files_is_an_error(train, monkeypatch):
    """Simulated: CIFS, sshfs and others answer EINVAL for a folder."""
    fsync, broken = os.fsync, [os.path.isdir]

    def refuse(descriptor):
        if any(is_kind(descriptor) for is_kind in broken):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    out = train("run", max_train_steps=2, validation_steps=0)
    assert checkpoint.damage(out / "checkpoint-2") is None
    broken.append(os.path.isfile)
    with pytest.raises(ConfigError, match="checkpoint-3 cannot be written .*Invalid argument"):
        train("run", max_train_steps=3, validation_steps=0, resume_from_checkpoint="latest")


@posix
def test_disks_without_locks_or_permissions(monkeypatch, tmp_path, capsys):
    """Simulated: Lustre and CIFS. A marker in place of a lock would outlive a run that is killed."""
    import fcntl

    def refuse(*args, **options):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    (tmp_path / "a.safetensors").touch()
    apply_umask(tmp_path)
    assert not any(lock_output_dir(tmp_path).is_locked for _ in range(2))
    assert capsys.readouterr().out.count("cannot be locked against a second run (") == 2


@posix
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_all_files_of_a_run_have_the_permissions_of_the_umask(train, umask):
    before = os.umask(umask)
    try:
        options = {"unet.num_class_embeds": 11, "class_dropout_prob": 0.1}
        out = train("run", max_train_steps=1, validation_steps=0, **options)
        DiffusionPipeline.from_pretrained(out, trust_remote_code=True).save_pretrained(out / "again")
    finally:
        os.umask(before)
    files = {path: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert len(files) > 12 and set(files.values()) == {0o666 & ~umask}, files


@pytest.mark.parametrize("command", ["train", "evaluate", "push"])
def test_commands_run_in_an_ascii_locale(command, model, tiny_dataset_dir, tmp_path):
    evaluate = ["--num_images", 20, "--num_inference_steps", 2, "--bound_images", 0, "--classifier_steps", 20]
    evaluate += ["--output_dir", tmp_path / "ergebnis-ä"]
    train = smoke_args(tiny_dataset_dir, tmp_path / "lauf-ä", max_train_steps=1)
    arguments = {
        "train": ["train_ddpm_mnist.py", *train],
        "evaluate": ["evaluate.py", "--model", model, "--dataset_name", tiny_dataset_dir, *evaluate],
        "push": ["push_to_hub.py", "--model_dir", model, "--hub_model_id", "a/b", "--dry_run"],
    }[command]
    done = python(*arguments, **ASCII, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    if command == "evaluate":
        text = (tmp_path / "ergebnis-ä/evaluation.md").read_bytes().decode("utf-8")
        assert "Fréchet" in text and "±" in text


@pytest.mark.parametrize(
    ("cls", "paths"),
    [
        (TrainConfig, {"dataset_name", "cache_dir", "output_dir", "resume_from_checkpoint"}),
        (EvaluateConfig, {"dataset_name", "cache_dir", "output_dir", "model"}),
        (GenerateConfig, {"model", "output"}),
        (PushConfig, {"model_dir"}),
    ],
)
def test_a_tilde_is_the_home_folder(cls, paths, tmp_path):
    assert {option.name for option in options_of(cls) if option.metadata["path"]} == paths
    for name in paths:
        options = [read_options(cls, [f"--{name}=~/here"], ""), read_options(cls, [], "", values={name: "~/here"})]
        assert [getattr(o, name) for o in options] == [os.path.expanduser("~/here")] * 2 != ["~/here"] * 2


def test_a_drive_that_is_not_there_is_a_problem_and_no_traceback(monkeypatch):
    """On Windows; here no folder exists at all."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert writable_problem(Path("Z:/run")).endswith("; name another")


class WithoutFloat64(TorchFunctionMode):
    """What leaves the U-Net is on a device without float64, as MPS, until it is copied to the CPU."""

    def __init__(self):
        super().__init__()
        self.on_device, self.checked = set(), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        on_device = any(id(a) in self.on_device for a in args if isinstance(a, torch.Tensor))
        if on_device and isinstance(result, torch.Tensor) and getattr(function, "__name__", "") != "cpu":
            self.checked += 1
            assert result.dtype != torch.float64, function
        return result


def test_the_bound_has_float64_on_the_cpu_only():
    mode, kept = WithoutFloat64(), []

    class Unet(torch.nn.Module):
        device, config = torch.device("cpu"), type("Config", (), {"num_class_embeds": None})

        def forward(self, sample, timestep, class_labels=None):
            output = sample.clone()
            kept.append(output)  # so that no other tensor gets its id
            mode.on_device.add(id(output))
            return type("Output", (), {"sample": output})

    images = Images(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), None)
    with mode:
        variational_bound(Unet(), DDPMScheduler(num_train_timesteps=50), images, per_timestep=2)
    assert mode.checked


def test_where_generate_and_evaluate_compute(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert default_device() == torch.device("mps")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert default_device() == torch.device("cpu")
