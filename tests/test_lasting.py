"""What later versions must keep: the numbers of a run, files of this release (tests/release/README.md), the order of
images."""

import itertools
import shutil

import diffusers
import pytest
import torch
from conftest import ROOT, in_process, metrics, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

import generate
import train_ddpm_mnist
from ddpm_mnist.images.batches import index_batches

RELEASE = ROOT / "tests/release/run"


@pytest.mark.parametrize("first", [0, 4])
def test_losses_and_weights_are_those_of_the_release_from_the_start_and_from_its_checkpoint(
    first, tmp_path, tiny_dataset_dir, capsys
):
    """Float32 on other hardware differs by 1e-6; another seed, order or formula by 1e-3 and more."""
    args = [f"--config={RELEASE / 'train_config.yaml'}", f"--output_dir={tmp_path}"]
    args += [f"--dataset_name={tiny_dataset_dir}", "--resume_from_checkpoint=latest"]
    if first:
        shutil.copytree(RELEASE / "checkpoint-4", tmp_path / "checkpoint-4")
    assert in_process(train_ddpm_mnist.main, *args) == 0
    assert ("at step 4" in capsys.readouterr().out) == bool(first)
    expected = {step: loss for step, loss in metrics(RELEASE, "loss").items() if step > first}
    assert len(expected) == 8 - first and metrics(tmp_path, "loss") == pytest.approx(expected, rel=1e-4)
    ours, released = weights(tmp_path / "unet"), weights(RELEASE / "unet")
    assert ours.keys() == released.keys()
    assert all(torch.allclose(ours[key], released[key], rtol=1e-3, atol=1e-5) for key in ours)


def test_a_pipeline_of_the_release_loads_and_draws_the_same(tmp_path):
    args = ["--class_label", 7, "--num_images", 4, "--num_inference_steps", 10, "--output", tmp_path / "sevens.png"]
    assert in_process(generate.main, "--model", RELEASE, *args) == 0
    pictures = [Image.open(folder / "sevens.png") for folder in (RELEASE.parent, tmp_path)]
    assert max(ImageChops.difference(*pictures).getextrema()) <= 2
    folder = shutil.copytree(RELEASE, tmp_path / "run")
    shutil.copy(ROOT / "ddpm_mnist/pipeline.py", folder)  # it has not changed since
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(class_labels=[1, 2], num_inference_steps=2).images) == 2


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
    everything = next(index_batches(num_images, seed, 0, (first + updates) * global_batch)).tolist()
    expected = everything[first * global_batch :]
    for size, accumulation, processes in ways:
        count = updates * accumulation
        streams = [
            index_batches(num_images, seed, first, size, accumulation, rank, processes) for rank in range(processes)
        ]
        shares = [[batch.tolist() for batch in itertools.islice(stream, count)] for stream in streams]
        assert sum((share[micro] for micro in range(count) for share in shares), []) == expected
    for epoch in range(len(everything) // num_images):
        assert sorted(everything[epoch * num_images : (epoch + 1) * num_images]) == list(range(num_images))
