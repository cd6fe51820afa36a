"""The exported folder in the hands of stock diffusers, and `python -m ddpm_mnist.generate`."""

import json

import diffusers
import pytest
import torch
from conftest import ROOT, python, same, weights
from PIL import Image

from ddpm_mnist import DDPMScheduler, UNet2DModel
from ddpm_mnist.sampling import grid, sample_images, to_pil

THREE_LINES = """
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained("MODEL")
pipe(batch_size=4).images[0].save("digit.png")
"""


def test_three_lines_with_this_repo_absent(model, tmp_path):
    check = "\nimport sys; assert not any(m.startswith('ddpm_mnist') for m in sys.modules)"
    done = python("-c", THREE_LINES.replace("MODEL", str(model)) + check, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    image = Image.open(tmp_path / "digit.png")
    assert image.size == (28, 28) and image.mode == "L"


def test_the_index_names_stock_classes_and_the_weights_are_the_average(model):
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert same(weights(model / "unet"), weights(model / "checkpoint-8/unet_ema"))
    assert not same(weights(model / "unet"), weights(model / "checkpoint-8/unet"))
    assert "ddpm_mnist" not in "".join(p.read_text() for p in model.glob("*/*config.json"))


@pytest.mark.parametrize("pipeline", ["DiffusionPipeline", "DDIMPipeline"])
def test_other_pipelines_load_it(model, pipeline):
    pipe = getattr(diffusers, pipeline).from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(batch_size=2, num_inference_steps=3).images) == 2


def test_another_scheduler_takes_its_config(model):
    pipe = diffusers.DDPMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.beta_end == 0.02
    sample = torch.randn(1, 1, 28, 28)
    pipe.scheduler.set_timesteps(5)
    for t in pipe.scheduler.timesteps:
        sample = pipe.scheduler.step(pipe.unet(sample, t).sample, t, sample).prev_sample
    assert torch.isfinite(sample).all()


def test_in_repo_classes_load_it_and_predict_the_same(model):
    ours = UNet2DModel.from_pretrained(model, subfolder="unet")
    stock = diffusers.UNet2DModel.from_pretrained(model, subfolder="unet")
    assert type(ours) is UNet2DModel
    sample = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(ours(sample, 10).sample, stock(sample, 10).sample, rtol=1e-5, atol=1e-5)
    assert DDPMScheduler.from_pretrained(model, subfolder="scheduler").config.variance_type == "fixed_small"


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_sampling_is_that_of_the_stock_pipeline(model):
    """One image of seed s: the stock pipeline, given that image's generator, draws the same."""
    from ddpm_mnist.draws import seeded_generator

    pipe = diffusers.DDPMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(generator=seeded_generator(5, "sample", 2), num_inference_steps=20, output_type="pt").images
    unet = UNet2DModel.from_pretrained(model, subfolder="unet").eval()
    drawn = sample_images(unet, DDPMScheduler.from_pretrained(model, subfolder="scheduler"), 5, [2], 20)
    torch.testing.assert_close((drawn / 2 + 0.5).clamp(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch(model):
    unet = UNet2DModel.from_pretrained(model, subfolder="unet").eval()
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    together = sample_images(unet, scheduler, 0, range(3), 10)
    alone = torch.cat([sample_images(unet, scheduler, 0, [i], 10) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_to_pil_and_grid():
    images = to_pil(torch.tensor([-1.0, 1.0, 0.0, 9.0, -9.0]).reshape(5, 1, 1, 1))
    assert [image.getpixel((0, 0)) for image in images] == [0, 255, 128, 255, 0]
    picture = grid(images, zoom=2)
    assert picture.size == (6, 4) and picture.mode == "L"
    assert [picture.getpixel((x, y)) for y in (0, 2) for x in (0, 2, 4)] == [0, 255, 128, 255, 0, 0]
    assert to_pil(torch.zeros(1, 3, 2, 2))[0].mode == "RGB"


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver"])
def test_generate(model, tmp_path, scheduler):
    args = ["--model", model, "--scheduler", scheduler, "--num_images", 5, "--batch_size", 2, "--save_trajectory"]
    done = python("-m", "ddpm_mnist.generate", *args, "--num_inference_steps", 12, "--output", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    assert "36/36" in done.stderr  # the progress bar: three batches of twelve steps
    assert Image.open(tmp_path / "grid.png").size == (3 * 56, 2 * 56)
    assert len(list((tmp_path / "grid").glob("*.png"))) == 5
    assert Image.open(tmp_path / "grid_trajectory.png").size == (10 * 56, 4 * 56)


def test_generate_is_seeded_and_overwrites_only_when_asked(model, tmp_path):
    args = ["-m", "ddpm_mnist.generate", "--model", model, "--num_images", 2, "--num_inference_steps", 3]
    a, b, again = tmp_path / "a.png", tmp_path / "b.png", [*args, "--output", tmp_path / "a.png"]
    assert python(*args, "--output", a).returncode == python(*args, "--batch_size", 1, "--output", b).returncode == 0
    assert a.read_bytes() == b.read_bytes()
    refused = python(*again, "--seed", 1)
    assert refused.returncode == 2 and "give --overwrite" in refused.stderr and a.read_bytes() == b.read_bytes()
    assert python(*again, "--seed", 1, "--overwrite").returncode == 0
    assert a.read_bytes() != b.read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "no/such-model"], "--model no/such-model: cannot be loaded"),
        (["--model", str(ROOT / "configs")], "holds no model_index.json"),
        (["--num_images", "0"], "--num_images 0: must be at least 1"),
        (["--num_inference_steps", "1001"], "--num_inference_steps 1001"),
        (["--class_label", "3"], "--class_label 3: the model has no classes"),
        (["--output", "grid.gif"], "--output grid.gif: must end in .png"),
        (["--scheduler", "euler"], "--scheduler"),
        (["--modl", "x"], "--modl"),
    ],
)
def test_generate_answers_bad_input_in_one_line(model, tmp_path, args, message):
    done = python("-m", "ddpm_mnist.generate", "--model", model, *args, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
