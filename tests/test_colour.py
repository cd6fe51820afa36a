"""Any small images: channels from the data, and a set in colour from training to the push."""

import json

import numpy as np
import pytest
from conftest import in_process, make_dataset
from PIL import Image

import evaluate
import generate
import push_to_hub
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.images.dataset import load_data
from ddpm_mnist.options import DataOptions


def patch(i: int) -> Image.Image:
    """A square of one of three colours, somewhere on a dark ground; the colour is the class."""
    pixels = np.full((32, 32, 3), 20, np.uint8)
    x, y = 3 + i % 7, 2 + i % 11
    pixels[y : y + 14, x : x + 14, i % 3] = 230
    return Image.fromarray(pixels)


def save(folder, images: list, column: str = "image") -> str:
    """Two splits of parquet in a new folder, the last 24 images for test; returns its name."""
    folder.mkdir()
    rows = make_dataset(images, [i % 3 for i in range(len(images))]).rename_columns({"image": column})
    for split, part in (("train", range(len(images) - 24)), ("test", range(len(images) - 24, len(images)))):
        rows.select(part).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("mode", "stored", "asked", "channels"),
    [("L", "L", None, 1), ("L", "RGB", None, 1), ("RGB", "RGB", None, 3), ("RGB", "RGB", 1, 1), ("L", "L", 3, 3)],
)
def test_channels_are_those_of_the_images_unless_the_config_says(tmp_path, mode, stored, asked, channels):
    images = [patch(i).convert(mode).convert(stored) for i in range(40)]
    data = load_data(DataOptions(save(tmp_path / "set", images)), asked, 32)
    assert data.train.images.shape == (16, channels, 32, 32)
    expected = np.asarray(images[0].convert("L" if channels == 1 else "RGB")).reshape(32, 32, channels)
    assert np.array_equal(data.train.images[0].permute(1, 2, 0), expected)


def test_a_set_in_colour_from_training_to_the_push(tmp_path, train, monkeypatch, capsys):
    """Columns as in CIFAR-10; everything after the training finds out by itself that the images have colour."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    name = save(tmp_path / "squares", [patch(i) for i in range(90)], column="img")
    options = {"unet.num_class_embeds": 3, "unet.sample_size": 32}
    out = train("out", dataset_name=name, **options)
    grey = save(tmp_path / "grey", [patch(i).convert("L") for i in range(90)], column="img")
    with pytest.raises(ConfigError, match="it was trained with dataset = 66 images, .* this run has 66 images"):
        train("out", dataset_name=grey, resume_from_checkpoint="latest", **options)  # and not: another in_channels
    assert json.loads((out / "unet/config.json").read_text())["in_channels"] == 3
    assert Image.open(sorted((out / "samples").iterdir())[-1]).mode == "RGB"

    steps = ["--num_inference_steps", 3, "--scheduler", "ddim", "--guidance_scale", 1]
    drawn = [*steps, "--num_images", 4, "--save_trajectory", "--output", tmp_path / "grid.png"]
    assert in_process(generate.main, "--model", out, *drawn) == 0
    assert Image.open(tmp_path / "grid/00003.png").mode == "RGB"
    measured = [*steps, "--num_images", 24, "--bound_images", 0, "--classifier_steps", 10]
    assert in_process(evaluate.main, "--model", out, *measured) == 0
    table = (out / "evaluation.md").read_text(encoding="utf-8")
    assert "classified as the requested class" in table and "digit" not in table

    capsys.readouterr()
    assert in_process(push_to_hub.main, "--model_dir", out, "--hub_model_id", "alice/squares", "--dry_run") == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "trained on squares" in card and "digit" not in card and table in card
    assert not capsys.readouterr().err
