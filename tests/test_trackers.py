"""Trackers, run for real: config, losses, pictures and final figures are in their files, in one run after a resume."""

import shutil

import pytest
from accelerate.tracking import TensorBoardTracker

from ddpm_mnist.errors import ConfigError


@pytest.fixture
def resumed(train, monkeypatch):
    """resumed(tracker) -> the folder of a run that was killed after step 6 and went on from its checkpoint 4."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Secret" * 6)

    def run(tracker: str):
        options = {"report_to": tracker, "lr_scheduler": "constant", "checkpointing_steps": 4}
        out = train("run", max_train_steps=6, **options)
        shutil.rmtree(out / "checkpoint-6")
        return train("run", resume_from_checkpoint="latest", **options)

    return run


def without_secrets(*folders) -> bool:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return not any(b"SecretSecret" in path.read_bytes() for path in files)


def test_tensorboard(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = resumed("tensorboard")
    events = EventAccumulator(str(out / "logs/ddpm-mnist"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]  # what came after checkpoint 4 only once
    assert [event.step for event in events.Images("samples")] == [4, 8]
    assert events.Scalars("final/held_out_ema/loss")[-1].step == 8 and events.Scalars("final/minutes")
    (settings,) = out.glob("logs/ddpm-mnist/*/hparams.yml")
    text = settings.read_text(encoding="utf-8")
    assert "unet.block_out_channels: '[8, 16]'" in text and "token_file" not in text and str(out.parent) not in text
    assert without_secrets(out)


def test_trackio(resumed, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    resumed("trackio")
    (run,) = trackio.Api().runs("ddpm-mnist")
    assert run.config["unet.block_out_channels"] == "[8, 16]" and run.config["learning_rate"] == 1e-3
    logged = SQLiteStorage.get_logs("ddpm-mnist", run.name)
    assert {row["step"] for row in logged if "loss" in row} == {2, 4, 6, 8}
    assert {row["step"] for row in logged if "samples" in row} == {4, 6, 8}
    assert logged[-1]["final/minutes"] > 0 and logged[-1]["final/held_out_ema/loss"] > 0
    assert len(list((tmp_path / "trackio/media/ddpm-mnist").rglob("*.png"))) == 3
    assert without_secrets(tmp_path)


def test_wandb(resumed, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = resumed("wandb")
    run_id = (out / "logs/run_id").read_text(encoding="utf-8").strip()
    first, second = sorted(out.glob("wandb/offline-run-*"))  # W&B's sync joins them: they have one id
    for folder, steps in ((first, (4, 6)), (second, (8,))):
        written = (folder / f"run-{run_id}.wandb").read_bytes()
        assert all(name in written for name in (b"unet.block_out_channels", b"held_out_ema/loss", b"final/minutes"))
        pictures = sorted(path.name.split("_")[1] for path in folder.glob("files/media/images/samples_*.png"))
        assert pictures == [str(step) for step in steps]
    assert without_secrets(out)


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(train, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no space left on its disk")

    for method in ("log_images", "finish"):
        with monkeypatch.context() as patched:
            patched.setattr(TensorBoardTracker, method, fail)
            out = train(method, report_to="tensorboard", validation_steps=4)
        assert "tensorboard failed (no space left on its disk); the run goes on without it." in capsys.readouterr().out
        assert (out / "model_index.json").is_file()


def test_trackio_logs_to_the_space_of_its_own_variable_which_must_be_reachable(train, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_SPACE_ID", "alice/dashboard")
    with pytest.raises(ConfigError, match="--report_to trackio: cannot start"):
        train("run", report_to="trackio")
