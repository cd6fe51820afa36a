"""What later versions must keep: the numbers of a run, files of this release, the order of images."""

import itertools
import json
import shutil

import pytest
import torch
from conftest import ROOT, in_process, metrics, same, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import train_ddpm_mnist
from ddpm_mnist.images.batches import index_batches
from ddpm_mnist.images.dataset import EMBEDDED_DATASET
from ddpm_mnist.loading import load_model
from ddpm_mnist.sampling import sample_images
from ddpm_mnist.training.checkpoint import damage
from ddpm_mnist.training.config import parse_args

RELEASE = ROOT / "tests/release-0.1"
# A U-Net of 6,000 parameters on scikit-learn's digits, which are in its wheel: the same data everywhere.
ARGUMENTS = [
    *(
        f"--config={ROOT / 'configs/smoke.yaml'}",
        f"--dataset_name={EMBEDDED_DATASET}",
        "--logging_steps=1",
        "--validation_steps=0",
    ),
    *("--unet.block_out_channels=[4,8]", "--unet.norm_num_groups=2", "--unet.num_class_embeds=11"),
    *("--class_dropout_prob=0.1", "--optimizer=muon", "--timestep_sampling=stratified", "--ddpm_num_inference_steps=4"),
]


def golden() -> dict:
    return json.loads((RELEASE / "golden.json").read_text(encoding="utf-8"))


def test_the_losses_of_the_first_steps_are_those_of_the_release(tmp_path):
    """Float32 on other hardware differs by 1e-6; another seed, order or formula by 1e-3 and more."""
    more = [f"--output_dir={tmp_path / 'run'}", "--checkpointing_steps=100"]
    assert in_process(train_ddpm_mnist.main, *ARGUMENTS, *more) == 0
    expected = {int(step): loss for step, loss in golden()["loss"].items()}
    assert metrics(tmp_path / "run", "loss") == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_of_the_release_resumes_to_the_same_end(tmp_path, capsys):
    shutil.copytree(RELEASE / "checkpoint-4", tmp_path / "run/checkpoint-4")
    assert damage(tmp_path / "run/checkpoint-4") is None
    more = [f"--output_dir={tmp_path / 'run'}", "--resume_from_checkpoint=latest", "--checkpointing_steps=100"]
    assert in_process(train_ddpm_mnist.main, *ARGUMENTS, *more) == 0
    assert "at step 4" in capsys.readouterr().out
    expected = {int(step): loss for step, loss in golden()["loss"].items() if int(step) > 4}
    assert metrics(tmp_path / "run", "loss") == pytest.approx(expected, rel=1e-4)
    ours, released = weights(tmp_path / "run/unet"), weights(RELEASE / "pipeline/unet")
    assert ours.keys() == released.keys()
    assert all(torch.allclose(ours[key], released[key], rtol=1e-3, atol=1e-5) for key in ours)


@pytest.mark.parametrize(
    ("option", "before", "now"),
    [("uniform_timesteps", 1.0, 0.25), ("reference_images", 0, 9), ("momentum_warmup_steps", 0, 3)],
)
def test_a_checkpoint_from_before_an_option_is_of_a_run_without_it(tmp_path, capsys, option, before, now):
    shutil.copytree(RELEASE / "checkpoint-4", tmp_path / "run/checkpoint-4")
    more = [f"--output_dir={tmp_path / 'run'}", "--resume_from_checkpoint=latest", f"--{option}={now}"]
    assert in_process(train_ddpm_mnist.main, *ARGUMENTS, *more) == 2
    assert f"it was trained with {option} = {before}, this run has {now}" in capsys.readouterr().err


def test_the_settings_of_a_run_from_before_an_option_train_without_it(tmp_path):
    config = RELEASE / "pipeline/train_config.yaml"
    assert "uniform_timesteps" not in config.read_text(encoding="utf-8")
    before = parse_args([f"--config={config}"])
    assert (before.uniform_timesteps, before.reference_images, before.momentum_warmup_steps) == (1, 0, 0)
    assert parse_args([f"--config={config}", "--uniform_timesteps=0.5"]).uniform_timesteps == 0.5


def test_a_pipeline_of_the_release_loads_and_draws_the_same(tmp_path):
    import diffusers

    model = load_model(str(RELEASE / "pipeline"))
    sampler, steps = model.sampler("ddim", 4)
    guided = {"class_labels": torch.tensor([7]), "guidance_scale": 2.0, "null_class_label": model.null_class_label}
    drawn = sample_images(model.unet, sampler, [0], steps, seed=0, **guided)
    assert drawn.mean().item() == pytest.approx(golden()["sample_mean"], abs=1e-4)
    pipe = diffusers.DiffusionPipeline.from_pretrained(RELEASE / "pipeline", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(class_labels=[1, 2], num_inference_steps=2).images) == 2
    assert same(weights(RELEASE / "pipeline/unet"), dict(model.unet.state_dict()))


def test_a_model_with_the_pipeline_of_the_release_can_be_pushed_with_what_guides_otherwise_today():
    from ddpm_mnist.hub.push import validate_model

    assert "guidance_min_log_snr" not in (RELEASE / "pipeline/pipeline.py").read_text(encoding="utf-8")
    validate_model(RELEASE / "pipeline")


# ---- the order of images -------------------------------------------------------------------------------------------


@st.composite
def ways_to_share(draw) -> tuple[int, int, list[tuple[int, int, int]]]:
    """A number of images, a global batch, and ways to share it: (images a micro-batch, micro-batches, processes)."""
    global_batch = draw(st.integers(1, 24))
    divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
    ways = []
    for _ in range(3):
        processes = draw(st.sampled_from(divisors))
        size = draw(st.sampled_from([d for d in divisors if global_batch // processes % d == 0]))
        ways.append((size, global_batch // processes // size, processes))
    return draw(st.integers(1, 60)), global_batch, ways


@settings(max_examples=60, deadline=None)
@given(ways_to_share(), st.integers(0, 2**31), st.integers(0, 40))
def test_any_sharing_and_any_resume_point_gives_the_same_global_batches(shared, seed, first):
    num_images, global_batch, ways = shared
    updates = 4
    everything = next(index_batches(num_images, seed, 0, (first + updates) * global_batch, 1, 0, 1)).tolist()
    expected = everything[first * global_batch :]
    for size, accumulation, processes in ways:
        shares = [
            list(
                itertools.islice(
                    index_batches(num_images, seed, first, size, accumulation, rank, processes), updates * accumulation
                )
            )
            for rank in range(processes)
        ]
        order = [shares[rank][micro].tolist() for micro in range(updates * accumulation) for rank in range(processes)]
        assert sum(order, []) == expected
    whole_epochs = len(everything) // num_images
    for epoch in range(whole_epochs):
        assert sorted(everything[epoch * num_images : (epoch + 1) * num_images]) == list(range(num_images))
