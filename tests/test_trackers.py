"""Trackers, run for real: settings, losses and pictures are in their files, and no secrets."""

import shutil
import sys

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from ddpm_mnist.errors import ConfigError


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A token that no tracker may write down, and trackio on this machine alone."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Secret" * 6)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:  # it reads its folder once
        monkeypatch.delitem(sys.modules, name)
    yield
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"SecretSecret" in path.read_bytes() for path in files)


def test_tensorboard_shows_a_resumed_run_as_one(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": "tensorboard", "lr_scheduler": "constant", "checkpointing_steps": 4}
    out = train("run", max_train_steps=6, **options)
    shutil.rmtree(out / "checkpoint-6")
    train("run", resume_from_checkpoint="latest", **options)
    events = EventAccumulator(str(out / "logs/ddpm-mnist"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]  # what came after checkpoint 4 only once
    assert [event.step for event in events.Images("samples")] == [4, 8]
    assert [event.step for event in events.Scalars("held_out_ema/loss")] == [4, 8]
    (settings,) = out.glob("logs/ddpm-mnist/*/hparams.yml")
    text = settings.read_text(encoding="utf-8")
    assert "unet.block_out_channels: '[8, 16]'" in text and str(out.parent) not in text


def test_trackio(train, tmp_path):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    train("run", report_to="trackio")
    (run,) = trackio.Api().runs("ddpm-mnist")
    assert run.config["unet.block_out_channels"] == "[8, 16]" and run.config["learning_rate"] == 1e-3
    logged = SQLiteStorage.get_logs("ddpm-mnist", run.name)
    assert {row["step"] for row in logged if "loss" in row} == {2, 4, 6, 8}
    assert {row["step"] for row in logged if "samples" in row} == {4, 8}
    assert len(list((tmp_path / "trackio/media/ddpm-mnist").rglob("*.png"))) == 2


def test_trackio_logs_to_the_space_of_its_own_variable_which_must_be_reachable(train, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "alice/dashboard")
    with pytest.raises(ConfigError, match="--report_to trackio: cannot start"):
        train("run", report_to="trackio")


def test_a_tracker_that_cannot_start_costs_no_file(train, monkeypatch):
    out = train("run", max_train_steps=2, validation_steps=0)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "logs" not in path.parts}
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigError, match="--report_to tensorboard: cannot start .*division"):
        train("run", report_to="tensorboard", overwrite_output_dir=True)
    assert before.items() <= {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}.items()


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(train, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no space left on its disk")

    for method in ("log_images", "finish"):
        with monkeypatch.context() as patched:
            patched.setattr(TensorBoardTracker, method, fail)
            out = train(method, report_to="tensorboard", validation_steps=4)
        assert "tensorboard failed (no space left on its disk); the run goes on without it." in capsys.readouterr().out
        assert (out / "model_index.json").is_file()
