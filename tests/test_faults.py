"""What a run survives: being killed at any moment, full disks, damaged checkpoints, a process that dies."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import RECOMMENDED, ROOT, as_nobody, in_process, metrics, posix, python, same, smoke_args, weights

import train_ddpm_mnist
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.training.checkpoint import damage, find_checkpoint, list_checkpoints, load_state
from ddpm_mnist.training.config import parse_args
from ddpm_mnist.training.output_dir import check_output_dir

KILL_RUN = {
    "checkpointing_steps": 3,
    "validation_steps": 0,
    "logging_steps": 2,
    "checkpoints_total_limit": 2,
}


def start(args: list[str], processes: int = 1, **env) -> subprocess.Popen:
    command = [sys.executable, "train_ddpm_mnist.py", *args]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=os.environ | env, start_new_session=True, **pipes)


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        if process.poll() is not None:
            assert condition(), process.communicate()
            return
        time.sleep(0.005)


def survive(train, dataset_dir, tmp_path, kills: int, seed: int) -> None:
    """Kill a run so many times, at random moments, half of them while it saves; then compare with one never killed."""
    chance = random.Random(seed)
    steps = 30 * kills  # more than a run gets on between two kills, so that each finds it at work
    whole = train("whole", max_train_steps=steps, **KILL_RUN)
    out = tmp_path / "killed"
    args = smoke_args(dataset_dir, out, resume_from_checkpoint="latest", max_train_steps=steps, **KILL_RUN)
    for kill in range(kills):
        newest = max((int(p.name.split("-")[1]) for p in list_checkpoints(out)), default=0) if out.exists() else 0
        process = start(args)
        if kill % 2:  # while the next checkpoint is being written
            wait_until(lambda: list(out.glob(".checkpoint-*.draft")), process)
        else:  # somewhere after the next step that is logged
            wait_until(lambda n=newest: (out / "metrics.jsonl").exists() and newest_step(out) > n, process)
        time.sleep(chance.random() * 0.03)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert all(damage(p) is None for p in list_checkpoints(out)), "a checkpoint folder is whole or absent"
    assert newest_step(out) < steps
    done = python("train_ddpm_mnist.py", *args)
    assert done.returncode == 0, done.stderr
    for folder in ("unet", f"checkpoint-{steps}/unet", f"checkpoint-{steps}/unet_ema"):
        assert same(weights(out / folder), weights(whole / folder)), folder
    assert metrics(out, "loss") == metrics(whole, "loss")
    assert metrics(out, "lr") == metrics(whole, "lr")


def newest_step(out) -> int:
    lines = [line for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


@posix
def test_killed_a_few_times(train, dataset_dir, tmp_path):
    survive(train, dataset_dir, tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_killed_twenty_times(train, dataset_dir, tmp_path):
    survive(train, dataset_dir, tmp_path, kills=20, seed=1)


# ---- the same curve ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fifty_steps_on_one_process_on_two_and_accumulated(train, dataset_dir, tmp_path, optimizer):
    """1 x 64, 2 x 32 and 1 x 32 x 2: every loss the same to 1e-4, which is asked, and in fact far closer."""
    options = {"max_train_steps": 50, "logging_steps": 1, "validation_steps": 0, "optimizer": optimizer}
    one = metrics(train("one", train_batch_size=64, **options), "loss")
    accumulated = train("accumulated", train_batch_size=32, gradient_accumulation_steps=2, **options)
    args = smoke_args(dataset_dir, tmp_path / "two", train_batch_size=32, **options)
    assert python("train_ddpm_mnist.py", *args, processes=2).returncode == 0
    for name, folder in (("1 x 32 x 2", accumulated), ("2 x 32", tmp_path / "two")):
        other = metrics(folder, "loss")
        assert sorted(other) == list(range(1, 51))
        largest = max(abs(other[s] - one[s]) / one[s] for s in one)
        print(f"largest relative difference of a loss, {name} against 1 x 64: {largest:.1e}")
        assert largest < 1e-4


def test_resumed_on_another_number_of_processes(train, dataset_dir, tmp_path):
    options = {"logging_steps": 1, "validation_steps": 0}
    whole = metrics(train("whole", **options), "loss")
    train("moved", checkpointing_steps=4, **options)
    shutil.rmtree(tmp_path / "moved/checkpoint-8")
    args = smoke_args(dataset_dir, tmp_path / "moved", train_batch_size=8, resume_from_checkpoint="latest", **options)
    done = python("train_ddpm_mnist.py", *args, processes=2)
    assert done.returncode == 0, done.stderr
    assert "at step 4" in done.stdout and "(2 process(es) x 8 x 1)" in done.stdout
    assert metrics(tmp_path / "moved", "loss") == pytest.approx(whole, rel=1e-4)


def test_two_processes_resume_exactly(dataset_dir, tmp_path):
    options = {
        "train_batch_size": 8,
        "logging_steps": 3,
        "checkpointing_steps": 4,
        "validation_steps": 0,
        **RECOMMENDED,
    }
    done = python("train_ddpm_mnist.py", *smoke_args(dataset_dir, tmp_path / "whole", **options), processes=2)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoint-8")
    args = smoke_args(dataset_dir, tmp_path / "parts", resume_from_checkpoint="latest", **options)
    assert python("train_ddpm_mnist.py", *args, processes=2).returncode == 0
    assert same(weights(tmp_path / "whole/unet"), weights(tmp_path / "parts/unet"))
    assert metrics(tmp_path / "whole", "loss") == metrics(tmp_path / "parts", "loss")


# ---- damage --------------------------------------------------------------------------------------------------------


def truncate(checkpoint):
    path = checkpoint / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(checkpoint):
    path = checkpoint / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated": (truncate, "bytes instead of"),
    "a flipped bit": (flip_a_bit, "state.pt was altered"),
    "a missing file": (lambda c: (c / "unet/config.json").unlink(), "unet/config.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "no manifest"),
    "half a manifest": (lambda c: (c / "manifest.json").write_text('{"step": 8, "fi'), "manifest cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_latest_passes_over_a_damaged_checkpoint_and_says_so(name, train, tmp_path):
    spoil, problem = DAMAGE[name]
    out = train("run", validation_steps=0)
    spoil(out / "checkpoint-8")
    said = []
    assert find_checkpoint("latest", out, said.append) == out / "checkpoint-4"
    assert len(said) == 1 and "checkpoint-8" in said[0] and problem in said[0]
    with pytest.raises(ConfigError, match=f"--resume_from_checkpoint checkpoint-8: .*{problem}"):
        find_checkpoint("checkpoint-8", out)
    spoil(out / "checkpoint-4")
    with pytest.raises(ConfigError, match="every checkpoint in .* is damaged"):
        find_checkpoint("latest", out, said.append)


@posix
def test_a_full_disk_is_said_and_the_earlier_checkpoint_stays(train, dataset_dir, tmp_path):
    """A limit on file sizes stands in for the disk: writing past it fails as writing to a full one does."""
    import resource  # POSIX only

    args = smoke_args(dataset_dir, tmp_path / "run", max_train_steps=4, validation_steps=0)
    train("run", max_train_steps=4, validation_steps=0)
    before = {p: p.read_bytes() for p in (tmp_path / "run/checkpoint-4").rglob("*") if p.is_file()}
    more = [*args, "--resume_from_checkpoint=latest", "--max_train_steps=8"]
    done = subprocess.run(
        [sys.executable, "train_ddpm_mnist.py", *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "checkpoint-8 cannot be written" in error and "make room" in error and "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "run/checkpoint-4").rglob("*") if p.is_file()} == before
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-4"]
    train("run", max_train_steps=8, validation_steps=0, resume_from_checkpoint="latest")


@posix
def test_a_read_only_folder_is_said_before_anything_is_done(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    config = parse_args(["--config", str(ROOT / "configs/smoke.yaml"), "--output_dir", str(tmp_path / "locked/out")])
    with as_nobody(tmp_path), pytest.raises(ConfigError, match="locked cannot be written"):
        check_output_dir(config)


def test_a_run_of_another_folder_does_not_replace_one(train, dataset_dir, tmp_path):
    """--resume_from_checkpoint names a checkpoint elsewhere, and output_dir is forgotten, or another run's."""
    there, here = train("there", max_train_steps=4, validation_steps=0), train("here", max_train_steps=4, seed=5)
    before = weights(here / "unet")
    more = {"resume_from_checkpoint": there / "checkpoint-4", "max_train_steps": 6, "validation_steps": 0}
    with pytest.raises(ConfigError, match="here: holds another run than .*checkpoint-4, which would replace it"):
        train("here", **more)
    assert same(weights(here / "unet"), before) and "seed: 5" in (here / "train_config.yaml").read_text()
    new = train("new", **more)
    assert metrics(new, "loss").keys() == {6}
    for path in new.iterdir():  # as if it had been killed before its first checkpoint, and were started again
        if path.name not in ("train_config.yaml", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert same(weights(train("new", **more) / "unet"), weights(here.parent / "new/unet"))


def test_between_two_runs_in_a_folder_there_are_no_results(train, tmp_path):
    """Else a push would tell of the old weights what the new run was set to."""
    from ddpm_mnist.hub.push import validate_model
    from ddpm_mnist.training.setup import prepare

    out = train("run", max_train_steps=2, validation_steps=0)
    config = parse_args([*smoke_args("none", out, validation_steps=0, max_train_steps=2), "--overwrite_output_dir"])
    config.dataset_name = yaml.safe_load((out / "train_config.yaml").read_text(encoding="utf-8"))["dataset_name"]
    with prepare(config) as run:
        run.begin()
        assert (out / "model_index.json").exists() and not (out / "train_results.json").exists()
        with pytest.raises(ConfigError, match="holds no train_results.json; .*finish it with --resume_from_checkpoint"):
            validate_model(out)
        run.finish()
    train("run", max_train_steps=2, validation_steps=0, overwrite_output_dir=True)
    assert (out / "train_results.json").exists()
    train("run", max_train_steps=2, validation_steps=0, resume_from_checkpoint="latest")  # nothing more to train
    assert (out / "train_results.json").exists()


OCCUPIED = {  # what stands where a run writes later: (make it, what is said)
    "a file for the weights": (lambda out: (out / "unet").write_text(""), "unet is a file; name a folder"),
    "a folder for a picture": (lambda out: (out / "trajectory.png").mkdir(), "is a folder, and a file goes there"),
    "a folder for the weights' file": (
        lambda out: (out / "unet/config.json").mkdir(parents=True),
        "is a folder, and a file goes there",
    ),
    "a link to nothing": (lambda out: (out / "unet").symlink_to(out / "gone"), "unet is a link to nothing"),
    "a link to no file": (lambda out: (out / "train_results.json").symlink_to(out / "gone"), "is a link to nothing"),
    "a folder for the results": (
        lambda out: (out / "train_results.json").mkdir(),
        "is a folder, and a file goes there",
    ),
    "samples of another user": (lambda out: (out / "samples").mkdir(mode=0o555), "samples cannot be written"),
    "a log of another user": (lambda out: (out / "metrics.jsonl").touch(mode=0o444), "metrics.jsonl cannot be written"),
}


@posix
@pytest.mark.parametrize("name", OCCUPIED)
def test_what_stands_in_the_way_of_the_end_is_said_at_the_start(name, tmp_path):
    make, part = OCCUPIED[name]
    (tmp_path / "out").mkdir(mode=0o777)
    (tmp_path / "out").chmod(0o777)
    make(tmp_path / "out")
    config = parse_args([*smoke_args("none", tmp_path / "out"), "--overwrite_output_dir"])
    with as_nobody(tmp_path), pytest.raises(ConfigError, match=part) as error:
        check_output_dir(config)
    assert "--output_dir" in str(error.value)


def test_old_checkpoints_go_only_after_the_new_one_is_whole(train, monkeypatch):
    """Should the new one not come into place, all old ones are still there."""
    import ddpm_mnist.training.checkpoint as module

    out = train("run", checkpointing_steps=2, checkpoints_total_limit=2, validation_steps=0)
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-6", "checkpoint-8"]
    monkeypatch.setattr(module.torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="No space left on device"):
        train("run", checkpointing_steps=2, checkpoints_total_limit=2, max_train_steps=10, validation_steps=0,
              resume_from_checkpoint="latest")  # fmt: skip
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-6", "checkpoint-8"]
    assert not list(out.glob(".checkpoint*"))


def test_what_a_kill_left_in_the_first_save_is_in_nobodys_way(train, tmp_path):
    draft = tmp_path / "run/.checkpoint-4.draft"
    draft.mkdir(parents=True)
    (draft / "state.pt").write_text("half")
    out = train("run", resume_from_checkpoint="latest", max_train_steps=4, validation_steps=0)
    assert [p.name for p in out.glob("*checkpoint*")] == ["checkpoint-4"]


def test_checkpoint_state_runs_no_code(tmp_path):
    """What is not plain tensors and numbers is refused by the loader, not executed."""
    import torch

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"run": {}, "step": Payload()}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match="state.pt cannot be read"):
        load_state(tmp_path, {})
    assert not (tmp_path / "pwned").exists()


# ---- several processes ---------------------------------------------------------------------------------------------


@posix
def test_when_one_of_two_processes_dies_the_other_ends(dataset_dir, tmp_path):
    args = smoke_args(dataset_dir, tmp_path / "run", max_train_steps=100_000, train_batch_size=8, validation_steps=0)
    process = start(args, processes=2, ACCELERATE_USE_CPU="true")
    wait_until(lambda: (tmp_path / "run/checkpoint-4").exists(), process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert find_checkpoint("latest", tmp_path / "run") is not None


@posix
def test_a_signal_to_two_processes_leaves_one_checkpoint(dataset_dir, tmp_path):
    options = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "logging_steps": 1, "validation_steps": 0}
    process = start(
        smoke_args(dataset_dir, tmp_path / "run", train_batch_size=8, **options), processes=2, ACCELERATE_USE_CPU="true"
    )
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists() and newest_step(tmp_path / "run") >= 3, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate(timeout=60)
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert damage(checkpoint) is None


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_no_token_is_printed_logged_or_saved(dataset_dir, tmp_path):
    secrets = {
        "HF_TOKEN": "hf_" + "Secret" * 6,
        "HUGGING_FACE_HUB_TOKEN": "hf_" + "Hidden" * 6,
        "WANDB_API_KEY": "f00dbabe" * 5,
    }
    args = smoke_args(dataset_dir, tmp_path / "run", report_to="tensorboard", max_train_steps=4)
    done = python("train_ddpm_mnist.py", *args, **secrets)
    assert done.returncode == 0, done.stderr
    bad = python("train_ddpm_mnist.py", *smoke_args("some/dataset", tmp_path / "no"), "--debug", **secrets)
    assert bad.returncode != 0
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 10
    texts = [done.stdout, done.stderr, bad.stdout, bad.stderr]
    for secret in secrets.values():
        assert not [p for p in files if secret.encode() in p.read_bytes()]
        assert not any(secret in text for text in texts)


# ---- --check ---------------------------------------------------------------------------------------------------------


def test_check_reports_and_does_not_train(dataset_dir, tmp_path, capfd):
    assert in_process(train_ddpm_mnist.main, *smoke_args(dataset_dir, tmp_path / "run"), "--check") == 0
    report = capfd.readouterr().out
    for part in (
        "44,969 parameters, 28x28x8 -> 14x14x16",
        "noise in float32: 0 of 1000",
        "noise in bfloat16: ",
        "terminal SNR: 4.0",
        "learning rate over the run: 0% 0.0e+00",
        "averaged weights: ",
        "memory: ",
        "time: ",
        "sampling: ",
        "8 steps of 16 images",
    ):
        assert part in report, report
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["--lr_warmup_steps=8"], "--lr_warmup_steps 8: the run has only 8 steps"),
        (["--scheduler.num_train_timesteps=50"], "x_T still holds"),
        (["--unet.norm_num_groups=5"], "unet.norm_num_groups=5"),
        (["--init_from=no/such"], "--init_from no/such"),
        (["--push_to_hub"], "--hub_model_id: missing"),
    ],
)
def test_check_exits_with_2_on_a_problem(extra, problem, dataset_dir, tmp_path, capfd):
    assert in_process(train_ddpm_mnist.main, *smoke_args(dataset_dir, tmp_path / "run"), "--check", *extra) == 2
    said = capfd.readouterr()
    assert problem in said.out + said.err and "Traceback" not in said.err


def test_check_says_that_a_checkpoint_is_of_another_run(train, dataset_dir, tmp_path, capfd):
    train("run", max_train_steps=2, validation_steps=0)
    args = [*smoke_args(dataset_dir, tmp_path / "run", resume_from_checkpoint="latest", seed=77), "--check"]
    assert in_process(train_ddpm_mnist.main, *args) == 2
    assert "it was trained with seed = 0, this run has 77" in capfd.readouterr().err


def test_half_precision_would_silence_the_first_timesteps():
    from ddpm_mnist import DDPMScheduler
    from ddpm_mnist.training.check import noise_report

    lines, problems = noise_report(DDPMScheduler())
    silent = {line.split()[2].rstrip(":"): int(line.split()[3]) for line in itertools.islice(lines, 3)}
    assert silent["float32"] == 0 and silent["bfloat16"] >= 10 and not problems
