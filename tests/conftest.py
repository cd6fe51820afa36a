"""Shared by all tests: a dataset folder, and the training script run in this process or as real other ones.

DDPM_MNIST_DATASET names a local copy of MNIST in the layout of the Hub's `ylecun/mnist`. Without it the tests make a
set of 300 images, so that they pass on any machine. No test needs a network.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN"):  # before the libraries read them
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")  # else two workers write the same file

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

# Started by `nohup` or with `&`, this process ignores them, and so would the runs that the tests stop by them.
for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), usual)

ROOT = Path(__file__).parent.parent
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):  # `-n 2`: a core for each worker
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1)
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the numbers compared here are a CPU's
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there: whoever asks the Hub fails at once
datasets.disable_progress_bars()
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, limits or users")


def reset_accelerate() -> None:
    """Forget the precision and the processes of the run before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def accelerate_anew() -> None:
    reset_accelerate()


def make_dataset(images: list, labels: list[int]) -> datasets.Dataset:
    """Rows of `image` and `label`, as on the Hub."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def blob(i: int, size: int = 28, mode: str = "L") -> Image.Image:
    """A small deterministic picture: a bright disc whose place and radius follow i."""
    y, x = np.mgrid[:size, :size]
    disc = (x - size * (0.3 + 0.04 * (i % 10))) ** 2 + (y - size / 2) ** 2 < (size * (0.15 + 0.01 * (i % 7))) ** 2
    return Image.fromarray((disc * 255).astype(np.uint8)).convert(mode)


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory) -> str:
    """A folder for --dataset_name: real MNIST where the environment names it, else a tiny set in the same layout."""
    real = os.environ.get("DDPM_MNIST_DATASET")
    return str(Path(real).resolve()) if real else tiny_dataset(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_dataset_dir(tmp_path_factory) -> str:
    """The tiny set, for processes with an empty cache, which would take seconds to decode all of MNIST again."""
    return tiny_dataset(tmp_path_factory)


def tiny_dataset(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "mnist"
    folder.mkdir()
    for split, n in (("train", 250), ("test", 50)):
        rows = make_dataset([blob(i) for i in range(n)], [i % 10 for i in range(n)])
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def few_held_out_images() -> None:
    """Runs in this process measure the held-out loss on 32 images: on 1,024, that would take most of a test's time."""
    from ddpm_mnist.training import run

    run.HELD_OUT_IMAGES = 32


def smoke_args(dataset_dir: str, output_dir: Path, **options) -> list[str]:
    """Arguments of a run of seconds; options by name override."""
    given = {"config": ROOT / "configs/smoke.yaml", "dataset_name": dataset_dir, "output_dir": output_dir, **options}
    return [f"--{name}={value}" for name, value in given.items()]


# What the recommended run trains by; smoke.yaml is Algorithm 1 to the letter.
RECOMMENDED = {
    "scheduler.prediction_type": "v_prediction",
    "uniform_timesteps": 0.25,
    "reference_images": 100,
    "guide_scale": 1.5,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory, dataset_dir) -> Path:
    """The folder of a finished run, with averaged weights that differ from the raw ones."""
    return trained(dataset_dir, tmp_path_factory.mktemp("model") / "run", report_to="tensorboard")


@pytest.fixture(scope="session")
def conditional_model(tmp_path_factory, dataset_dir) -> Path:
    """The folder of a finished run with labels, one in ten of which was dropped, by the recommended recipe."""
    options = {"unet.num_class_embeds": 11, "class_dropout_prob": 0.1, **RECOMMENDED}
    return trained(dataset_dir, tmp_path_factory.mktemp("model") / "conditional", **options)


def trained(dataset_dir: str, output_dir: Path, **options) -> Path:
    import train_ddpm_mnist

    assert in_process(train_ddpm_mnist.main, *smoke_args(dataset_dir, output_dir, **options)) == 0
    return output_dir


@pytest.fixture
def train(dataset_dir, tmp_path):
    """train("name", **options) -> output folder; runs in this process."""
    import train_ddpm_mnist
    from ddpm_mnist.training.config import parse_args

    def run(name: str, **options) -> Path:
        reset_accelerate()
        code = train_ddpm_mnist.train(parse_args(smoke_args(dataset_dir, tmp_path / name, **options)))
        assert code == 0
        return tmp_path / name

    return run


def python(*args, processes: int = 1, cwd: Path = ROOT, **env) -> subprocess.CompletedProcess:
    """Run Python, or torchrun with N processes, in a real subprocess; text output is captured."""
    command = [sys.executable, *map(str, args)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        env.setdefault("ACCELERATE_USE_CPU", "true")
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def in_process(main, *args) -> int:
    """The exit code of a command's `main`, run in this process as a script: seconds of imports are saved."""
    from ddpm_mnist.options import run_script

    return run_script(lambda _: main([str(arg) for arg in args]))


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """As a user who may write only where everyone may: root, as whom CI runs, may write anywhere. He may look."""
    for path in (folder, *folder.parents):
        mine = path.stat().st_uid == 0 and path.is_relative_to(tempfile.gettempdir())
        if mine and path.stat().st_mode & 0o055 != 0o055:
            path.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


def metrics(output_dir: Path, key: str) -> dict[int, float]:
    """step -> value of one metric of a run."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
