"""What a run survives: kills, signals, damaged checkpoints, full disks, a second run, a process that dies."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from traceback import format_exception
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, as_nobody, blob, in_process, make_dataset, metrics, posix, python, same, smoke_args, weights

import train_ddpm_mnist
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.record import read_metrics, sample_grids, sha256
from ddpm_mnist.training import stop
from ddpm_mnist.training.checkpoint import damage, find_checkpoint, list_checkpoints, load_checkpoint
from ddpm_mnist.training.config import parse_args
from ddpm_mnist.training.output_dir import check_output_dir, lock_output_dir
from ddpm_mnist.training.run import prepare

KILL_RUN = {"checkpointing_steps": 3, "validation_steps": 0, "logging_steps": 2}
STARTED: list[subprocess.Popen] = []  # by `start`, in this test
LONG = {"max_train_steps": 100_000, "checkpointing_steps": 3, "validation_steps": 0, "logging_steps": 1}


def start(args: list[str], processes: int = 1, **env) -> subprocess.Popen:
    """The training script, or torchrun with several processes of it, in the background."""
    command = [sys.executable, "train_ddpm_mnist.py", *args]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        env["ACCELERATE_USE_CPU"] = "true"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, env=os.environ | env, start_new_session=True, **pipes)
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    """A test that fails would leave a long run behind, which slows down all later ones."""
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            process.kill()  # workers of torchrun see that it is gone, and end


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        if process.poll() is not None:
            assert condition(), process.communicate()
            return
        time.sleep(0.005)


def newest_step(out: Path) -> int:
    return max((line["step"] for line in read_metrics(out / "metrics.jsonl")), default=0)


def checkpoints(out: Path) -> list[str]:
    """Names of all checkpoints, half-written ones included."""
    return sorted(p.name for p in out.glob("*checkpoint-*"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- kills and signals ---------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("kills", "seed"), [(3, 0), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_never_was(train, dataset_dir, tmp_path, kills, seed):
    """Killed at random moments, every second time during a save."""
    chance = random.Random(seed)
    steps = 30 * kills  # more than a run can do between two kills, so that each hits it at work
    whole = train("whole", max_train_steps=steps, **KILL_RUN)
    out = tmp_path / "killed"
    args = smoke_args(dataset_dir, out, resume_from_checkpoint="latest", max_train_steps=steps, **KILL_RUN)
    for kill in range(kills):
        newest = newest_step(out)
        process = start(args)
        if kill % 2:  # while the next checkpoint is being written
            wait_until(lambda: list(out.glob(".checkpoint-*.draft")), process)
        else:  # somewhere after the next step that is logged
            wait_until(lambda n=newest: newest_step(out) > n, process)
        time.sleep(chance.random() * 0.03)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert all(damage(p) is None for p in list_checkpoints(out)), "a checkpoint folder is complete or absent"
    assert newest_step(out) < steps
    train("killed", resume_from_checkpoint="latest", max_train_steps=steps, **KILL_RUN)
    for folder in ("unet", f"checkpoint-{steps}/unet", f"checkpoint-{steps}/unet_ema"):
        assert same(weights(out / folder), weights(whole / folder)), folder
    for key in ("loss", "lr"):
        assert metrics(out, key) == metrics(whole, key)


def test_a_draft_of_a_killed_save_and_bad_lines_in_the_log_are_ignored(train, tmp_path):
    draft = tmp_path / "run/.checkpoint-4.draft"
    draft.mkdir(parents=True)
    (draft / "state.pt").write_text("half")
    out = train("run", resume_from_checkpoint="latest", max_train_steps=4, validation_steps=0)
    assert checkpoints(out) == ["checkpoint-4"]
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('not json\n[1]\n{"loss": 3}\n{"step": 4, "lo')
    train("run", max_train_steps=6, validation_steps=0, resume_from_checkpoint="latest")
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


@posix
def test_a_run_whose_launcher_is_gone_saves_and_ends(dataset_dir, tmp_path):
    """Accelerate's launcher passes no signal on."""
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--cpu"]
    command = [*launch, "train_ddpm_mnist.py", *smoke_args(dataset_dir, out, **LONG)]
    launcher = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        wait_until(lambda: newest_step(out) > 0, launcher)
        launcher.terminate()
        launcher.wait()
        deadline = time.monotonic() + 60
        while True:  # the lock of the folder is released when the run has ended
            with contextlib.suppress(ConfigError):
                lock_output_dir(out).release()
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    newest = list_checkpoints(out)[-1]
    assert damage(newest) is None and int(newest.name.split("-")[1]) == newest_step(out)


@posix
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_to_resume_from(train, dataset_dir, tmp_path, signum, code):
    options = {"max_train_steps": 30, "validation_steps": 0, "checkpointing_steps": 1000, "logging_steps": 1}
    out = tmp_path / "stopped"
    process = start(smoke_args(dataset_dir, out, **options))
    wait_until(lambda: newest_step(out) >= 3, process)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "resume with --resume_from_checkpoint latest" in stdout and "Traceback" not in stderr
    assert "an unfinished run is saved first" in stderr
    (checkpoint,) = list_checkpoints(out)
    assert 3 <= int(checkpoint.name.split("-")[1]) < 30
    assert not (out / "model_index.json").exists()
    train("stopped", resume_from_checkpoint="latest", **options)
    whole = train("whole", **options)
    assert same(weights(out / "unet"), weights(whole / "unet"))
    assert metrics(out, "loss") == metrics(whole, "loss")


@posix
def test_ctrl_c_leaves_a_checkpoint_when_it_ends_the_reader_of_the_output_too(dataset_dir, tmp_path):
    """As in `python train_ddpm_mnist.py 2>&1 | tee log`."""
    process = start(smoke_args(dataset_dir, tmp_path, **LONG | {"checkpointing_steps": 100_000}))
    wait_until(lambda: newest_step(tmp_path) >= 3, process)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    (checkpoint,) = list_checkpoints(tmp_path)
    assert damage(checkpoint) is None


@posix
@pytest.mark.parametrize("hangup", ["default", "ignored"])
def test_signals_that_end_a_job_are_handled_and_restored(hangup):
    """Real ones end runs above. nohup keeps a run alive by ignoring SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if hangup == "ignored" else signal.SIG_DFL)
    listener = stop.StopSignal(None)
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    try:
        listener.listen()
        handled = {name for name in names if signal.getsignal(getattr(signal, name)) == listener.receive}
        assert handled == set(names) - ({"SIGHUP"} if hangup == "ignored" else set())
        os.kill(os.getpid(), signal.SIGUSR2)
        assert listener.signum == signal.SIGUSR2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a second Ctrl-C stops at once
    finally:
        listener.restore()
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) != listener.receive


def test_a_signal_while_the_processes_agree_is_not_lost():
    """It comes during a simulated gather: too late for this agreement, in time for the next."""
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    listener, before = stop.StopSignal(accelerator), signal.getsignal(signal.SIGINT)
    try:
        accelerator.gather = lambda signums: listener.receive(signal.SIGTERM, None) or signums
        assert not listener.requested()
        accelerator.gather = lambda signums: signums
        assert listener.requested() and listener.signum == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_ctrl_c_before_the_first_step_is_one_line(dataset_dir, tmp_path):
    """While torch is imported, which takes the most time."""
    process = start(smoke_args(dataset_dir, tmp_path / "out"))
    wait_until(lambda: b"libtorch" in Path(f"/proc/{process.pid}/maps").read_bytes(), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "Interrupted.\n")


@posix
def test_a_signal_to_two_processes_leaves_one_checkpoint(dataset_dir, tmp_path):
    out, options = tmp_path / "run", LONG | {"checkpointing_steps": 100_000, "train_batch_size": 8}
    process = start(smoke_args(dataset_dir, out, **options), processes=2)
    wait_until(lambda: newest_step(out) >= 3, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate(timeout=60)
    (checkpoint,) = list_checkpoints(out)
    assert damage(checkpoint) is None


# ---- several processes ---------------------------------------------------------------------------------------------


@posix
def test_when_one_of_two_processes_dies_the_other_ends(dataset_dir, tmp_path):
    process = start(smoke_args(dataset_dir, tmp_path / "run", train_batch_size=8, **LONG), processes=2)
    wait_until(lambda: list_checkpoints(tmp_path / "run"), process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert not any(worker.is_running() for worker in workers)
    assert find_checkpoint("latest", tmp_path / "run") is not None


@posix
def test_two_runs_never_share_a_folder_and_a_killed_one_releases_it(dataset_dir, tmp_path, capfd):
    out = tmp_path / "out"
    args = smoke_args(dataset_dir, out, resume_from_checkpoint="latest", **LONG)
    first = start(args)
    wait_until(lambda: list_checkpoints(out), first)
    assert in_process(train_ddpm_mnist.main, *args) == 2 and first.poll() is None
    stderr = capfd.readouterr().err
    assert f"error: --output_dir {out}: another run is writing there" in stderr and stderr.count("error: ") == 1
    first.kill()
    first.communicate()
    step = max(int(path.name.split("-")[1]) for path in list_checkpoints(out))
    assert in_process(train_ddpm_mnist.main, *args, f"--max_train_steps={step + 2}") == 0
    assert "Resumed from" in capfd.readouterr().out


# ---- damage --------------------------------------------------------------------------------------------------------


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "state.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (checkpoint / "state.pt").write_bytes(content)


DAMAGE = {
    "truncated": (truncate, "safetensors was altered"),
    "a flipped bit": (flip_a_bit, "state.pt was altered"),
    "a missing file": (lambda c: (c / "unet/config.json").unlink(), "cannot be read .*No such file.*config.json"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "cannot be read .*No such file.*manifest.json"),
    "half a manifest": (
        lambda c: (c / "manifest.json").write_text('{"step": 8, "fi'),
        "cannot be read .*Unterminated string",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_latest_skips_a_damaged_checkpoint_with_a_warning(name, model, tmp_path):
    spoil, problem = DAMAGE[name]
    out = shutil.copytree(model, tmp_path / "run")
    spoil(out / "checkpoint-8")
    warnings = []
    assert find_checkpoint("latest", out, warnings.append) == out / "checkpoint-4"
    assert len(warnings) == 1 and "checkpoint-8" in warnings[0] and re.search(problem, warnings[0])
    with pytest.raises(ConfigError, match=f"--resume_from_checkpoint checkpoint-8: .*{problem}"):
        find_checkpoint("checkpoint-8", out)
    spoil(out / "checkpoint-4")
    with pytest.raises(ConfigError, match="every checkpoint in .* is damaged"):
        find_checkpoint("latest", out, warnings.append)


@pytest.mark.parametrize("name", ["state.pt", "unet/diffusion_pytorch_model.safetensors"])
def test_a_checkpoint_whose_manifest_fits_garbage_is_one_line(name, train, model, tmp_path):
    """As a hostile or a broken tool might leave it: the manifest is made anew after the damage."""
    checkpoint = shutil.copytree(model, tmp_path / "run") / "checkpoint-8"
    (checkpoint / name).write_bytes(b"garbage")
    listed = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    listed["files"][name] = sha256(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(ConfigError, match="--resume_from_checkpoint .*cannot be loaded"):
        train("run", max_train_steps=10, resume_from_checkpoint="latest")


def test_checkpoint_state_runs_no_code(tmp_path):
    """Only tensors, numbers and strings are loaded; anything else is refused, not executed."""
    import torch

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"run": {}, "step": Payload()}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=f"--resume_from_checkpoint {re.escape(str(tmp_path))}: cannot be loaded"):
        load_checkpoint(tmp_path, {}, {})
    assert not (tmp_path / "executed").exists()


@posix
def test_a_full_disk_is_one_line_and_all_checkpoints_stay(train, tmp_path):
    """A limit on file sizes stands in for the disk: writing past it fails as writing to a full one does."""
    import resource  # POSIX only

    (tmp_path / "few").mkdir()  # images that stay below the limit
    for split in ("train", "test"):
        make_dataset([blob(i) for i in range(60)], [0] * 60).to_parquet(
            tmp_path / f"few/{split}-00000-of-00001.parquet"
        )
    options = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "validation_steps": 0}
    options["dataset_name"] = tmp_path / "few"
    out = train("run", **options)
    before = contents(out / "checkpoint-6") | contents(out / "checkpoint-8")
    options["resume_from_checkpoint"] = "latest"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match="--output_dir .*: checkpoint-10 cannot be written .*make room"):
            train("run", max_train_steps=10, **options)
        with pytest.raises(ConfigError, match="the pipeline cannot be written .*--resume_from_checkpoint latest"):
            train("run", **options)  # nothing to train: the export is the first to write
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(out) == ["checkpoint-6", "checkpoint-8"]
    assert contents(out / "checkpoint-6") | contents(out / "checkpoint-8") == before
    train("run", max_train_steps=10, **options)
    assert checkpoints(out) == ["checkpoint-10", "checkpoint-8"] and damage(out / "checkpoint-10") is None


# ---- the output folder ---------------------------------------------------------------------------------------------


OCCUPIED = {  # what blocks a file that a run writes: (make it, the message)
    "a read-only folder": (lambda out: out.chmod(0o555), "out cannot be written"),
    "a file for the weights": (lambda out: (out / "unet").write_text(""), "unet is a file; name a folder"),
    "a broken link to a folder": (lambda out: (out / "unet").symlink_to(out / "gone"), "unet is a broken link"),
    "samples of another user": (lambda out: (out / "samples").mkdir(mode=0o555), "samples cannot be written"),
}


@posix
@pytest.mark.parametrize("name", OCCUPIED)
def test_what_blocks_the_end_of_a_run_is_refused_at_its_start(name, tmp_path):
    make, part = OCCUPIED[name]
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    make(tmp_path / "out")
    config = parse_args([*smoke_args("none", tmp_path / "out"), "--overwrite_output_dir"])
    with as_nobody(tmp_path), pytest.raises(ConfigError, match=f"--output_dir .*{part}"):
        check_output_dir(config)


@posix
def test_overwriting_deletes_only_what_a_run_writes(train, tmp_path):
    """Also where names that look like a run's are files or links."""
    out = train("run", max_train_steps=1, validation_steps=0)
    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "elsewhere/thesis.txt", out / "thesis.txt", out / "checkpoint-notes.txt"):
        path.write_text("mine", encoding="utf-8")
    for name in ("logs", "checkpoint-7"):
        (out / name).symlink_to(tmp_path / "elsewhere")
    (out / "checkpoint-mine").mkdir()
    train("run", max_train_steps=2, validation_steps=0, overwrite_output_dir=True)
    assert (tmp_path / "elsewhere/thesis.txt").exists() and (out / "thesis.txt").exists()
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-mine", "checkpoint-notes.txt"]


def test_what_the_end_of_a_run_could_not_write_comes_with_its_resumption(train):
    out = train("run")
    results = json.loads((out / "train_results.json").read_text())
    (out / "train_results.json").unlink()
    shutil.copy(ROOT / "ddpm_mnist/pipeline.py", out)  # of a conditional model that was here
    train("run", resume_from_checkpoint="latest")
    assert json.loads((out / "train_results.json").read_text())["metrics"] == results["metrics"] != {}
    assert not (out / "pipeline.py").exists()
    (out / "pipeline.py").write_text("# mine", encoding="utf-8")
    train("run", resume_from_checkpoint="latest", max_train_steps=10, validation_steps=0)
    metrics_of_8_steps = {key for key in results["metrics"] if key.startswith("held_out")}
    assert not metrics_of_8_steps & json.loads((out / "train_results.json").read_text())["metrics"].keys()
    assert (out / "pipeline.py").exists()


def test_a_resumed_run_has_no_pictures_of_later_updates(train):
    """Those of the run that was killed: the card would show them as this one's."""
    out = train("run", max_train_steps=6, validation_steps=2, checkpointing_steps=2, checkpoints_total_limit=3)
    for name in ("mine.png", "step-1000000.png"):
        (out / "samples" / name).touch()
    assert [path.name for path in sample_grids(out).values()][-2:] == ["step-000006.png", "step-1000000.png"]
    train("run", max_train_steps=4, validation_steps=0, resume_from_checkpoint="checkpoint-2")
    assert {path.name for path in (out / "samples").iterdir()} == {"step-000002.png", "mine.png"}
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]  # "latest" does not lead back to 6


def test_a_checkpoint_on_a_larger_disk_behind_a_link_is_of_this_folder(train, tmp_path):
    out = train("run", max_train_steps=4, validation_steps=0)
    shutil.move(out / "checkpoint-4", tmp_path / "large-disk")
    (out / "checkpoint-4").symlink_to(tmp_path / "large-disk")
    train("run", max_train_steps=5, validation_steps=0, resume_from_checkpoint="latest")
    train("run", max_train_steps=7, validation_steps=0, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert checkpoints(out) == ["checkpoint-7"] and (tmp_path / "large-disk/state.pt").exists()
    with pytest.raises(ConfigError, match="--max_train_steps 3: .*checkpoint-7 is past it"):
        train("run", max_train_steps=3, validation_steps=0, resume_from_checkpoint="latest")


def test_a_checkpoint_that_another_program_reads_may_stay(train, monkeypatch):
    """Windows and NFS do not delete it; simulated."""
    monkeypatch.setattr("ddpm_mnist.training.checkpoint.remove", lambda path: path.rename("/no/such/folder"))
    out = train("run", max_train_steps=4, validation_steps=0, checkpointing_steps=2, checkpoints_total_limit=1)
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]


def test_a_run_of_another_folder_does_not_replace_one(train):
    """--resume_from_checkpoint names a checkpoint elsewhere, and output_dir is forgotten, or another run's."""
    other, here = train("other", max_train_steps=4, validation_steps=0), train("here", max_train_steps=4, seed=5)
    before = contents(here)
    more = {"resume_from_checkpoint": other / "checkpoint-4", "max_train_steps": 6, "validation_steps": 0}
    with pytest.raises(ConfigError, match="here: holds a run that resuming from .*checkpoint-4 would replace"):
        train("here", **more)
    assert contents(here) == before
    new = train("new", **more)
    assert metrics(new, "loss").keys() == {6}
    first = weights(new / "unet")
    for path in new.iterdir():  # as if it had been killed before its first checkpoint, and were started again
        if path.name not in ("train_config.yaml", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert same(weights(train("new", **more) / "unet"), first)


def test_between_two_runs_in_a_folder_it_holds_no_results(train, dataset_dir):
    """Else a push would describe the old weights by the settings of the new run."""
    from ddpm_mnist.hub.push import validate_model

    options = {"max_train_steps": 2, "validation_steps": 0}
    out = train("run", **options)
    with prepare(parse_args(smoke_args(dataset_dir, out, overwrite_output_dir=True, **options))) as run:
        run.begin()
        assert (out / "model_index.json").exists() and not (out / "train_results.json").exists()
        with pytest.raises(ConfigError, match="train_results.json"):
            validate_model(out)
    for more in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):  # then nothing is left to train
        train("run", **options, **more)
        assert (out / "train_results.json").exists()


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_no_token_is_printed_logged_or_saved(dataset_dir, tmp_path, monkeypatch, capfd):
    secrets = {
        "HF_TOKEN": "hf_" + "Secret" * 6,
        "HUGGING_FACE_HUB_TOKEN": "hf_" + "Hidden" * 6,
        "WANDB_API_KEY": "f00dbabe" * 5,
    }
    args = smoke_args(dataset_dir, tmp_path / "run", report_to="tensorboard", max_train_steps=4)
    done = python("train_ddpm_mnist.py", *args, **secrets)
    assert done.returncode == 0, done.stderr
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_ddpm_mnist.py", "--debug"])
    with pytest.raises(ConfigError) as bad:
        in_process(train_ddpm_mnist.main, *smoke_args("some/dataset", tmp_path / "no"))
    traceback = "".join(format_exception(bad.value))
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 10
    texts = [done.stdout, done.stderr, traceback, *capfd.readouterr()]
    for secret in secrets.values():
        assert not [p for p in files if secret.encode() in p.read_bytes()]
        assert not any(secret in text for text in texts)
