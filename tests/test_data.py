"""Images from files to batches; the order in which a run sees them; no network."""

import io
import itertools
import time

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, blob, make_dataset, python, smoke_args

from ddpm_mnist import data, decode, sources
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.training.config import TrainConfig, parse_args


def config(dataset_name=None, **options) -> TrainConfig:
    args = [f"--{k}={v}" for k, v in options.items()] + ([f"--dataset_name={dataset_name}"] if dataset_name else [])
    return parse_args(["--config", str(ROOT / "configs/smoke.yaml"), *args])


TEN = {"unet.num_class_embeds": 10}


def load_data(config: TrainConfig, warn=print) -> data.Data:
    """As a training run loads it."""
    return data.load_data(config, config.image_shape, config.num_validation_samples, warn)


def folder(tmp_path, rows: datasets.Dataset, test: datasets.Dataset | None = None) -> str:
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    if test is not None:
        test.to_parquet(tmp_path / "set/test-00000-of-00001.parquet")
    return str(tmp_path / "set")


def test_images_are_those_of_the_files(dataset_dir):
    loaded = load_data(config(dataset_dir, **TEN))
    original = datasets.load_dataset(dataset_dir, split="train")
    assert loaded.train.images.dtype == torch.uint8 and loaded.train.images.shape == (len(original), 1, 28, 28)
    for i in (0, 7, len(original) - 1):
        assert np.array_equal(loaded.train.images[i, 0], np.array(original[i]["image"]))
        assert loaded.train.labels[i] == original[i]["label"]
    assert len(loaded.test) == 32


def test_batches_are_scaled_to_minus_one_to_one():
    images = data.Images(torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.tensor([4, 5, 6]))
    batch, labels = next(images.batches(iter([torch.tensor([1, 0, 2])])))
    assert batch.dtype == torch.float32
    assert batch.flatten().tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert labels.tolist() == [5, 4, 6]


def test_decoded_once(dataset_dir, monkeypatch):
    load_data(config(dataset_dir))
    monkeypatch.setattr(decode, "decode", lambda *_, **__: pytest.fail("decoded again"))
    load_data(config(dataset_dir))


def test_channels_and_size_are_those_of_the_unet(tmp_path):
    name = folder(tmp_path, make_dataset([blob(i, size=20, mode="RGB") for i in range(40)], [0] * 40))
    rgb = load_data(config(name, **{"unet.in_channels": 3, "unet.out_channels": 3, "unet.sample_size": 16}))
    assert rgb.train.images.shape == (38, 3, 16, 16)
    assert load_data(config(name)).train.images.shape == (38, 1, 28, 28)


def test_a_twentieth_is_held_out_where_there_is_no_test_split(tmp_path):
    name = folder(tmp_path, make_dataset([blob(i) for i in range(100)], list(range(10)) * 10))
    loaded = load_data(config(name, **TEN))
    assert (len(loaded.train), len(loaded.test)) == (95, 5)
    together = torch.cat([loaded.train.labels, loaded.test.labels]).sort().values
    assert torch.equal(together, torch.arange(10).repeat_interleave(10)) and len(set(loaded.test.labels.tolist())) > 2


def test_a_large_set_is_streamed_and_gives_the_same_batches(dataset_dir):
    said = []
    resident = load_data(config(dataset_dir, **TEN)).train.to(torch.device("cpu"))
    streamed = load_data(config(dataset_dir, max_resident_gb=0.0, **TEN), said.append).train.to(torch.device("cpu"))
    assert isinstance(streamed, data.DiskImages) and "left on the disk" in said[0]
    batches = [
        itertools.islice(s.batches(data.index_batches(len(s), 0, 2, 16, 1, 0, 1)), 3) for s in (resident, streamed)
    ]
    for (images, labels), (other_images, other_labels) in zip(*batches):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


# ---- order ---------------------------------------------------------------------------------------------------------


def indices(num_images, seed, first, count, batch_size=8, accumulation=1, rank=0, num_processes=1) -> list[int]:
    batches = data.index_batches(num_images, seed, first, batch_size, accumulation, rank, num_processes)
    return torch.cat(list(itertools.islice(batches, count))).tolist()


def test_every_epoch_has_every_image_once_and_no_batch_is_short():
    order = indices(21, seed=0, first=0, count=21)  # 8 epochs of 21 in batches of 8
    epochs = [order[i : i + 21] for i in range(0, 168, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert indices(21, seed=1, first=0, count=3) != order[:24]


def test_the_order_is_a_function_of_the_batch_number():
    order = indices(21, seed=0, first=0, count=30)
    for first in (1, 5, 13, 29):
        assert indices(21, seed=0, first=first, count=1) == order[first * 8 : first * 8 + 8]


def test_processes_and_micro_batches_share_one_global_batch():
    whole = indices(50, seed=3, first=0, count=10, batch_size=12)
    for number in range(10):
        for size, accumulation, processes in ((3, 2, 2), (4, 3, 1), (6, 1, 2)):
            shares = [
                indices(50, 3, number, accumulation, size, accumulation, rank, processes) for rank in range(processes)
            ]
            micro = [s[i * size : (i + 1) * size] for i in range(accumulation) for s in shares]
            assert sum(micro, []) == whole[number * 12 : number * 12 + 12]


def test_a_set_smaller_than_a_batch_goes_round():
    assert sorted(indices(3, seed=0, first=0, count=1, batch_size=6)) == [0, 0, 1, 1, 2, 2]


# ---- no network ----------------------------------------------------------------------------------------------------


def test_without_network_and_name_the_embedded_digits_are_used_and_said(tmp_path):
    args = smoke_args("unused", tmp_path / "run", max_train_steps=2)
    args = [a for a in args if not a.startswith("--dataset_name")]
    started = time.monotonic()
    done = python("train_ddpm_mnist.py", *args, HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert "TRAINING ON scikit-learn digits INSTEAD" in done.stdout
    assert "1,500 images of scikit-learn digits" in done.stdout
    assert time.monotonic() - started < 60  # minutes of retries is the fault this guards against


def test_the_hub_is_asked_again_after_it_was_away():
    """Offline lasts while a dataset is looked for in the cache; a push at the end of the run finds the Hub again."""
    from huggingface_hub import constants

    with pytest.raises(ConfigError, match="--dataset_name some/dataset: the Hub cannot be reached"):
        sources.load_splits("some/dataset", None, None)
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_without_network_a_named_dataset_is_not_replaced(tmp_path):
    done = python("train_ddpm_mnist.py", *smoke_args("ylecun/mnist", tmp_path / "run"), HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --dataset_name ylecun/mnist: the Hub cannot be")
    assert not (tmp_path / "run").exists()


def test_embedded_digits():
    loaded = sources.embedded_digits()
    assert (len(loaded["train"]), len(loaded["test"])) == (1500, 297)
    image = loaded["train"][0]["image"]
    assert image.size == (28, 28) and image.mode == "L" and np.array(image).max() > 200
    assert sorted(set(loaded["train"]["label"])) == list(range(10))


# ---- bad data ------------------------------------------------------------------------------------------------------


def test_images_of_several_sizes(tmp_path):
    name = folder(tmp_path, make_dataset([blob(i, size=28 + i % 2) for i in range(10)], [0] * 10))
    with pytest.raises(ConfigError, match="2 sizes, such as 28x28 and 29x29"):
        load_data(config(name))


@pytest.mark.parametrize("content", [b"not an image", b"", None], ids=["garbage", "no bytes", "truncated"])
def test_corrupt_image(tmp_path, content):
    if content is None:
        buffer = io.BytesIO()
        blob(3).save(buffer, "PNG")
        content = buffer.getvalue()[:60]
    cells = [{"bytes": content if i == 6 else png(i), "path": None} for i in range(10)]
    rows = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
    name = folder(tmp_path, rows, rows.select(range(5)))
    with pytest.raises(ConfigError, match="image 6 cannot be decoded"):
        load_data(config(name))


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    blob(i).save(buffer, "PNG")
    return buffer.getvalue()


def test_columns_are_guessed_only_when_there_is_one(tmp_path):
    rows = make_dataset([blob(i) for i in range(20)], [0] * 20)
    rows = rows.add_column("mask", [{"bytes": png(i), "path": None} for i in range(20)])
    rows = rows.cast_column("mask", datasets.Image())
    name = folder(tmp_path, rows)
    with pytest.raises(ConfigError, match="--image_column: the dataset has 2 image columns among image, label, mask"):
        load_data(config(name))
    assert len(load_data(config(name, image_column="mask")).train) == 19
    with pytest.raises(ConfigError, match="--image_column label"):
        load_data(config(name, image_column="label"))
    with pytest.raises(ConfigError, match="--label_column digit"):
        load_data(config(name, image_column="image", label_column="digit"))


def test_a_conditional_unet_needs_labels_in_range(tmp_path):
    rows = make_dataset([blob(i) for i in range(20)], [i % 10 for i in range(20)])
    name = folder(tmp_path, rows)
    with pytest.raises(ConfigError, match="labels from 0 to 9, but the U-Net has the classes 0 to 4; raise unet"):
        load_data(config(name, **{"unet.num_class_embeds": 5}))
    (tmp_path / "b").mkdir()
    bare = folder(tmp_path / "b", rows.remove_columns("label"))
    assert load_data(config(bare)).train.labels is None
    with pytest.raises(ConfigError, match="--label_column: classes, and evaluation, need labels"):
        load_data(config(bare, **{"unet.num_class_embeds": 10}))
