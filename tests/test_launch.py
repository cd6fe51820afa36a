"""What a launcher or the environment does to a run; a run as a function."""

import signal
import threading
from contextlib import nullcontext

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from conftest import ROOT, in_process, metrics, python, smoke_args

import train_ddpm_mnist as script
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.training import hardware
from ddpm_mnist.training.config import TrainConfig, parse_args
from ddpm_mnist.training.run import prepare

# ---- what the environment says -------------------------------------------------------------------------------------


def test_processes_that_do_not_know_of_each_other_are_refused(dataset_dir, tmp_path):
    """torchrun without a GPU and without ACCELERATE_USE_CPU: Accelerate makes two runs of one process each."""
    args = smoke_args(dataset_dir, tmp_path / "out")
    done = python("train_ddpm_mnist.py", *args, processes=2, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode != 0 and "error: WORLD_SIZE is 2, but the processes are not connected" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "launched", "hardware_has_it", "precision", "why"),
    [
        ("auto", None, True, "bf16", "--mixed_precision no turns it off"),
        ("auto", None, False, "no", ""),
        ("auto", "no", True, "bf16", "--mixed_precision no turns it off"),
        ("auto", "bf16", False, "bf16", "as accelerate was told"),
        ("no", "bf16", True, "no", ""),
        ("no", "fp8", True, "no", ""),
        ("bf16", "no", False, "bf16", ""),
    ],
)
def test_the_precision_is_what_was_asked_or_the_run_says_why(
    monkeypatch, asked, launched, hardware_has_it, precision, why
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(hardware, "computes_in_bf16", lambda: hardware_has_it)
    resolved, reason = hardware.resolve_mixed_precision(asked)
    assert resolved == precision and why in reason and bool(why) == bool(reason)


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("WORLD_SIZE", "x", "^WORLD_SIZE is x"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "^ACCELERATE_USE_DEEPSPEED"),
        ("ACCELERATE_USE_FSDP", "true", "^ACCELERATE_USE_FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "^ACCELERATE_USE_MEGATRON_LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "^ACCELERATE_USE_PARALLELISM_CONFIG"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "^Accelerate cannot start .*--mixed_precision fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO_SUCH", "^Accelerate cannot start"),
    ],
)
def test_what_the_script_does_not_support_is_one_line(monkeypatch, variable, value, part):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=part):
        hardware.start_accelerator(TrainConfig(report_to="none"))


@pytest.mark.parametrize(
    ("processes", "gpus", "use_cpu", "advice"),
    [
        ("2", 1, "", "start 1, or, .*set ACCELERATE_USE_CPU=true and CUDA_VISIBLE_DEVICES=-1"),
        ("8", 4, "false", "start 4, or"),
        ("2", 1, "true", ".*CUDA_VISIBLE_DEVICES=-1"),
        ("2", 1, "on", ".*CUDA_VISIBLE_DEVICES=-1"),
        ("2", 2, "", None),
        ("x", 1, "", None),  # no number: one process
        ("2", 2, "true", None),
        ("2", 0, "", None),
        (None, 1, "", None),
    ],
)
def test_each_process_has_a_gpu_or_none_is_seen(monkeypatch, processes, gpus, use_cpu, advice):
    """Simulated: this machine has no GPU. On one H100 two processes ended in a traceback, on the CPU too."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    expected = f"^LOCAL_WORLD_SIZE is {processes}, and this machine has {gpus} GPU.s.; {advice}"
    with pytest.raises(ConfigError, match=expected) if advice else nullcontext():
        hardware.check_gpus()


@pytest.mark.parametrize(
    ("ranks", "times"),
    [({}, 1), ({"RANK": "0"}, 1), ({"RANK": "1"}, 1), ({"RANK": "2", "LOCAL_RANK": "0"}, 1), ({"LOCAL_RANK": "1"}, 0)],
)
def test_an_error_is_printed_once_on_each_machine(monkeypatch, capsys, ranks, times):
    """The second machine may lack what the first one has."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert in_process(script.main, "--learning_rate=-1") == 2
    assert capsys.readouterr().err.count("error: --learning_rate") == times

    def fail(_):
        raise OSError("the disk of this process is full")  # others may go on, so that it must say it itself

    assert in_process(fail) == 2
    assert "error: the disk of this process is full" in capsys.readouterr().err


def test_accumulation_set_in_the_environment_changes_nothing(train, monkeypatch):
    plain = metrics(train("plain", validation_steps=0), "loss")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert metrics(train("set", validation_steps=0), "loss") == plain


def test_the_launch_configs_are_valid_and_two_leave_the_precision_to_the_script():
    for path in (ROOT / "configs/accelerate").glob("*.yaml"):
        load_config_from_file(str(path))
    for name in ("cpu", "multi_gpu"):  # "auto" finds what the hardware computes in
        text = (ROOT / f"configs/accelerate/{name}.yaml").read_text(encoding="utf-8")
        assert "mixed_precision" not in yaml.safe_load(text)


def test_a_folder_with_the_name_of_a_tracker_is_not_one(tmp_path, monkeypatch):
    (tmp_path / "aim").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--report_to aim: not installed; `pip install aim`"):
        hardware.tracker_names("aim")
    assert hardware.tracker_names("tensorboard") == "tensorboard" and hardware.tracker_names("none") is None


# ---- as a function -------------------------------------------------------------------------------------------------


def config(dataset_dir, out, **options) -> TrainConfig:
    return parse_args(smoke_args(dataset_dir, out, **{"max_train_steps": 2, "validation_steps": 0, **options}))


def test_train_can_be_called_twice_in_other_precisions_and_restores_everything(dataset_dir, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert script.train(config(dataset_dir, tmp_path / "a")) == 0
    assert script.train(config(dataset_dir, tmp_path / "b", mixed_precision="bf16")) == 0
    with pytest.raises(ConfigError):
        script.train(config(dataset_dir, tmp_path / "c", label_column="none"))
    assert script.train(config(dataset_dir, tmp_path / "a", overwrite_output_dir=True)) == 0  # its lock was released
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert AcceleratorState._shared_state == {}


def test_train_can_be_called_in_a_thread(dataset_dir, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(script.train(config(dataset_dir, tmp_path / "t"))))
    thread.start()
    thread.join(120)
    assert codes == [0] and (tmp_path / "t/model_index.json").exists()


@pytest.mark.parametrize("before", [False, True])
def test_a_run_restores_the_choice_of_kernels(before, dataset_dir, tmp_path):
    """In a notebook, later cells may want fast convolutions or exact products."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = cudnn.deterministic = before
    try:
        with prepare(config(dataset_dir, tmp_path / "run")):
            assert matmul.allow_tf32 and cudnn.deterministic
        assert matmul.allow_tf32 == cudnn.deterministic == before
    finally:
        matmul.allow_tf32 = cudnn.deterministic = False
