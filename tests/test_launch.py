"""What a launcher, the environment or another process does to a run; and a run as a function."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT, in_process, metrics, posix, python, smoke_args

import train_ddpm_mnist as script
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.training import hardware, setup, stop
from ddpm_mnist.training.checkpoint import list_checkpoints
from ddpm_mnist.training.config import TrainConfig, parse_args

LONG = {"max_train_steps": 100_000, "checkpointing_steps": 3, "validation_steps": 0, "logging_steps": 1}


def start(args: list[str], **env) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, text=True, env=os.environ | env, **pipes)


def wait_for_checkpoint(out, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not (out.exists() and list_checkpoints(out)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "error: " in line]


# ---- processes -----------------------------------------------------------------------------------------------------


def test_a_world_size_that_is_no_number_and_a_tracker_that_is_not_there_are_said(dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(ConfigError, match="^WORLD_SIZE is x"):
        script.train(parse_args(smoke_args(dataset_dir, tmp_path / "out")))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(hardware, "tracker_names", lambda name: (_ for _ in ()).throw(ConfigError("--report_to wandb")))
    with pytest.raises(ConfigError, match="^--report_to wandb$"):
        script.train(parse_args(smoke_args(dataset_dir, tmp_path / "out")))


def test_processes_that_do_not_know_of_each_other_are_refused(dataset_dir, tmp_path):
    """torchrun without a GPU and without ACCELERATE_USE_CPU: Accelerate makes two runs of one process each."""
    args = smoke_args(dataset_dir, tmp_path / "out")
    done = python("train_ddpm_mnist.py", *args, processes=2, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode != 0 and "error: WORLD_SIZE is 2, but the processes do not know of each other" in done.stderr
    assert not (tmp_path / "out").exists()


@posix
def test_two_runs_never_share_a_folder_and_a_dead_one_leaves_it_open(dataset_dir, tmp_path):
    out = tmp_path / "out"
    args = ["train_ddpm_mnist.py", *smoke_args(dataset_dir, out, resume_from_checkpoint="latest", **LONG)]
    first = start(args)
    wait_for_checkpoint(out, first)
    second = python(*args)
    assert second.returncode == 2 and first.poll() is None
    (line,) = errors(second.stderr)
    assert f"--output_dir {out}: another run is writing there" in line
    first.kill()
    first.communicate()
    step = max(int(path.name.split("-")[1]) for path in list_checkpoints(out))
    last = [a for a in args if not a.startswith("--max_train_steps")] + [f"--max_train_steps={step + 2}"]
    done = python(*last)
    assert done.returncode == 0 and "Resumed from" in done.stdout, done.stderr


@posix
def test_a_peer_that_vanishes_ends_the_run_with_its_last_checkpoint(dataset_dir, tmp_path):
    """A stopped process answers nothing and closes no connection, as when a cable is pulled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out, shared = tmp_path / "out", {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    args = smoke_args(dataset_dir, out, train_batch_size=8, process_timeout_minutes=0.2, **LONG)
    ranks = [start(["train_ddpm_mnist.py", *args], RANK=str(i), LOCAL_RANK=str(i), **shared) for i in (0, 1)]
    try:
        wait_for_checkpoint(out, ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        _, stderr = ranks[0].communicate(timeout=90)
    finally:
        for rank in ranks:
            rank.kill()
    assert time.monotonic() - started < 60
    (line,) = errors(stderr)
    assert "another process of the run is gone or stuck" in line and f"{out}/checkpoint-" in line, stderr
    assert ranks[0].returncode == 2 and "Traceback" not in stderr


def test_processes_whose_weights_differ_are_stopped_at_the_save(dataset_dir, tmp_path):
    """The second process damages its weights after three updates, as faulty memory might."""
    (tmp_path / "damaged.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_ddpm_mnist\n"
        "from ddpm_mnist.options import run_script\n"
        "from ddpm_mnist.training.setup import Run\n"
        "plain = Run.end_update\n"
        "def end_update(self, finite):\n"
        "    plain(self, finite)\n"
        "    if self.step == 3 and self.accelerator.process_index == 1:\n"
        "        self.bare_unet.conv_in.weight.data[0] += 1\n"
        "Run.end_update = end_update\n"
        "sys.exit(run_script(train_ddpm_mnist.main))\n",
        encoding="utf-8",
    )
    args = smoke_args(dataset_dir, tmp_path / "out", train_batch_size=8, checkpointing_steps=2, validation_steps=0)
    done = python(tmp_path / "damaged.py", *args, processes=2)
    assert done.returncode != 0
    assert "the processes hold different weights at step 4" in done.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]


@pytest.mark.slow
def test_resumed_on_one_two_four_and_one_process(train, dataset_dir, tmp_path):
    options = {"logging_steps": 1, "validation_steps": 0, "checkpointing_steps": 2}
    whole = metrics(train("whole", **options), "loss")
    for steps, processes in ((2, 1), (4, 2), (6, 4), (8, 1)):
        more = {"max_train_steps": steps, "train_batch_size": 16 // processes, "lr_scheduler": "constant_with_warmup"}
        args = smoke_args(dataset_dir, tmp_path / "chain", resume_from_checkpoint="latest", **options | more)
        done = python("train_ddpm_mnist.py", *args, processes=processes)
        assert done.returncode == 0, done.stderr
    constant = metrics(train("constant", lr_scheduler="constant_with_warmup", **options), "loss")
    assert metrics(tmp_path / "chain", "loss") == pytest.approx(constant, rel=1e-4)
    assert whole[8] != constant[8]


# ---- what the environment says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "launched", "hardware_has_it", "precision", "why"),
    [
        ("auto", None, True, "bf16", "--mixed_precision no turns it off"),
        ("auto", None, False, "no", ""),
        ("auto", "no", True, "bf16", "cannot be told from none"),
        ("auto", "no", False, "no", ""),
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
    monkeypatch.setattr(hardware, "computes_in_bf16", lambda cuda: hardware_has_it)
    found, said = hardware.resolve_mixed_precision(asked)
    assert found == precision and why in said and bool(why) == bool(said)


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED"),
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "ACCELERATE_USE_MEGATRON_LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "ACCELERATE_USE_PARALLELISM_CONFIG"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "ACCELERATE_MIXED_PRECISION fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO_SUCH", "Accelerate cannot start"),
    ],
)
def test_what_the_script_does_not_do_is_said_in_a_line(monkeypatch, variable, value, part):
    monkeypatch.setenv(variable, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match=part):
        hardware.start_accelerator(TrainConfig(report_to="none"))


@pytest.mark.parametrize(
    ("processes", "gpus", "use_cpu", "cure"),
    [
        ("2", 1, "", "start 1, or set ACCELERATE_USE_CPU=true and CUDA_VISIBLE_DEVICES=-1"),
        ("8", 4, "false", "start 4, or"),
        ("2", 1, "true", "set CUDA_VISIBLE_DEVICES=-1 too"),
        ("2", 1, "on", "set CUDA_VISIBLE_DEVICES=-1 too"),
        ("2", 2, "", None),
        ("2", 2, "true", None),
        ("2", 0, "", None),
        ("2", 0, "true", None),
        (None, 1, "", None),
    ],
)
def test_each_process_has_a_gpu_or_none_is_seen(monkeypatch, processes, gpus, use_cpu, cure):
    """Simulated: this machine has no GPU. On one H100 two processes ended in a traceback, on the CPU too."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    expected = f"^LOCAL_WORLD_SIZE is {processes}, and this machine has {gpus} GPU.s.; {cure}"
    with pytest.raises(ConfigError, match=expected) if cure else nullcontext():
        hardware.check_gpus()


@pytest.mark.parametrize(
    ("ranks", "said"),
    [({}, 1), ({"RANK": "0"}, 1), ({"RANK": "1"}, 0), ({"RANK": "2", "LOCAL_RANK": "0"}, 1), ({"LOCAL_RANK": "1"}, 0)],
)
def test_an_error_is_said_once_on_each_machine(monkeypatch, capsys, ranks, said):
    """The second machine may lack what the first one has."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert in_process(script.main, "--learning_rate=-1") == 2
    assert capsys.readouterr().err.count("error: --learning_rate") == said


def test_a_run_leaves_the_choice_of_kernels_as_it_was(dataset_dir, tmp_path):
    """In a notebook, what comes after it may want fast convolutions or exact products."""
    cuda = torch.backends.cuda.matmul
    for before in (False, True):
        cuda.allow_tf32 = torch.backends.cudnn.deterministic = before
        with setup.prepare(parse_args(smoke_args(dataset_dir, tmp_path / "run"))):
            assert cuda.allow_tf32 and torch.backends.cudnn.deterministic
        assert cuda.allow_tf32 == torch.backends.cudnn.deterministic == before
        cuda.allow_tf32 = torch.backends.cudnn.deterministic = False


def test_accumulation_set_in_the_environment_changes_nothing(train, monkeypatch):
    plain = metrics(train("plain", validation_steps=0), "loss")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert metrics(train("set", validation_steps=0), "loss") == plain


def test_the_cpu_config_of_this_repo_leaves_the_precision_to_the_script(dataset_dir, tmp_path):
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/cpu.yaml"]
    args = smoke_args(dataset_dir, tmp_path / "run", max_train_steps=1, validation_steps=0)
    done = python(*launch, "train_ddpm_mnist.py", *args)
    assert done.returncode == 0, done.stderr
    assert "(1 process(es) x 16 x 1) on cpu, mixed precision no" in done.stdout
    text = (ROOT / "configs/accelerate/cpu.yaml").read_text(encoding="utf-8")
    assert "mixed_precision" not in yaml.safe_load(text)


def test_a_folder_named_as_a_tracker_is_none(dataset_dir, tmp_path, monkeypatch):
    from ddpm_mnist.training import log

    installed = log.importlib.metadata.version

    def version(package: str) -> str:
        return installed("none-such" if "trackio" in package else package)  # CI has it

    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log.importlib.metadata, "version", version)
    tracker_names = log.tracker_names
    with pytest.raises(ConfigError, match="--report_to trackio: not installed; `pip install trackio`"):
        tracker_names("trackio")
    assert tracker_names("tensorboard") == "tensorboard" and tracker_names("none") is None


def test_a_tracker_that_cannot_start_is_said_in_a_line(dataset_dir, tmp_path, monkeypatch):
    from ddpm_mnist.training.log import MetricsLog

    class Refuses:
        is_main_process = True

        def init_trackers(self, *args, **kwargs):
            raise OSError("no account")

    with pytest.raises(ConfigError, match="--report_to tensorboard: cannot start .no account."):
        MetricsLog(Refuses(), TrainConfig(output_dir=str(tmp_path)), 0)


# ---- as a function -------------------------------------------------------------------------------------------------


def config(dataset_dir, out, **options) -> TrainConfig:
    return parse_args(smoke_args(dataset_dir, out, **{"max_train_steps": 2, "validation_steps": 0, **options}))


def test_train_can_be_called_twice_in_other_precisions_and_gives_everything_back(dataset_dir, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert script.train(config(dataset_dir, tmp_path / "a")) == 0
    assert script.train(config(dataset_dir, tmp_path / "b", mixed_precision="bf16")) == 0
    with pytest.raises(ConfigError):
        script.train(config(dataset_dir, tmp_path / "c", label_column="none"))
    assert script.train(config(dataset_dir, tmp_path / "a", overwrite_output_dir=True)) == 0  # its lock was released
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert AcceleratorState._shared_state == {}


def test_train_can_be_called_in_a_thread(dataset_dir, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(script.train(config(dataset_dir, tmp_path / "t"))))
    thread.start()
    thread.join(120)
    assert codes == [0] and (tmp_path / "t/model_index.json").exists()


def test_two_runs_in_one_process_take_turns(dataset_dir, tmp_path):
    """Accelerate's state belongs to the process: the first to end would take it from the other."""
    with setup.prepare(config(dataset_dir, tmp_path / "first")):
        with pytest.raises(ConfigError, match="another run is going on in this process"):
            script.train(config(dataset_dir, tmp_path / "second"))
        assert AcceleratorState._shared_state != {}
    assert not (tmp_path / "second").exists()
    assert script.train(config(dataset_dir, tmp_path / "second")) == 0
    with pytest.raises(ConfigError, match="--dataset_name"):
        script.train(config(tmp_path / "none", tmp_path / "third"))
    assert not setup.ONE_AT_A_TIME.locked()


# ---- signals -------------------------------------------------------------------------------------------------------


@posix
def test_every_signal_that_ends_a_job_is_taken():
    listener = stop.StopSignal(None)
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    try:
        listener.listen()
        assert all(signal.getsignal(getattr(signal, name)) == listener.receive for name in names)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert listener.exit_code == 128 + signal.SIGUSR2
    finally:
        listener.give_back()


@posix
def test_a_closed_terminal_leaves_a_checkpoint(dataset_dir, tmp_path):
    out, options = tmp_path / "out", LONG | {"checkpointing_steps": 100_000}
    process = start(["train_ddpm_mnist.py", *smoke_args(dataset_dir, out, **options)])
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and metrics(out, "loss")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, stderr
    assert len(list_checkpoints(out)) == 1 and "resume with --resume_from_checkpoint latest" in stdout


@posix
def test_an_ignored_hangup_stays_ignored():
    """nohup's way of keeping a run alive."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    listener = stop.StopSignal(None)
    try:
        listener.listen()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == listener.receive
    finally:
        listener.give_back()
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) != listener.receive


@posix
def test_ctrl_c_before_the_first_step_is_one_line(dataset_dir, tmp_path):
    process = start(["train_ddpm_mnist.py", *smoke_args(dataset_dir, tmp_path / "out")])
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # Python ends itself by the signal
    assert "Traceback" not in stderr and len(stderr.strip().splitlines()) <= 2, stderr


# ---- starting from another model -----------------------------------------------------------------------------------


def test_init_from_starts_from_the_weights_of_a_pipeline_or_checkpoint(train, model, tmp_path):
    own = metrics(train("own", logging_steps=1, validation_steps=0, max_train_steps=1), "loss")[1]
    for source in (model, model / "checkpoint-8"):
        out = train(f"from-{source.name}", init_from=source, logging_steps=1, validation_steps=0, learning_rate=1e-4)
        assert metrics(out, "loss")[1] < 0.9 * own
    resumed = train(f"from-{model.name}", init_from=model, learning_rate=1e-4, max_train_steps=10, validation_steps=0,
                    resume_from_checkpoint="latest")  # fmt: skip
    assert (resumed / "checkpoint-10").is_dir()


def test_init_from_takes_other_classes_and_refuses_other_shapes(train, model, conditional_model, capsys):
    train("classes", init_from=model, max_train_steps=1, validation_steps=0, **{"unet.num_class_embeds": 10})
    assert "class_embedding.weight starts anew" in capsys.readouterr().out
    train("none", init_from=conditional_model, max_train_steps=1, validation_steps=0)
    for options, part in (
        ({"unet.block_out_channels": "[8,8]"}, r"down_blocks\.1\.\S+ is \[.* there and \[.* here"),
        ({"unet.layers_per_block": 2}, "absent there"),
    ):
        with pytest.raises(ConfigError, match=part):
            train("other", init_from=model, **options)
    for source, part in (
        (ROOT / "configs", "holds no model_index.json"),
        ("no/such/model", "--init_from no/such/model"),
    ):
        with pytest.raises(ConfigError, match=part):
            train("other", init_from=source)


@pytest.mark.slow
def test_a_checkpoint_that_only_the_first_host_has_is_said(train, dataset_dir, tmp_path):
    """Two processes with two working directories stand for two hosts with separate disks."""
    out = train("run", max_train_steps=2, validation_steps=0)
    relative = os.path.relpath(out, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"os.chdir({str(tmp_path)!r} if os.environ['RANK'] == '0' else {str(tmp_path / 'elsewhere')!r})\n"
        "import train_ddpm_mnist\n"
        "from ddpm_mnist.options import run_script\n"
        "sys.exit(run_script(train_ddpm_mnist.main))\n"
    )
    (tmp_path / "hosts.py").write_text(code, encoding="utf-8")
    args = smoke_args(dataset_dir, relative, train_batch_size=8, max_train_steps=4, resume_from_checkpoint="latest")
    done = python(tmp_path / "hosts.py", *args, processes=2)
    assert done.returncode != 0 and "processes 1 do not see it; put --output_dir on a disk" in done.stderr
    shutil.copytree(out, tmp_path / "elsewhere" / relative)
    done = python(tmp_path / "hosts.py", *args, processes=2)
    assert done.returncode == 0, done.stderr


def test_results_say_whether_the_data_was_local(model):
    results = json.loads((model / "train_results.json").read_text(encoding="utf-8"))
    assert results["dataset_is_local"] is True and "/" not in results["dataset"]
