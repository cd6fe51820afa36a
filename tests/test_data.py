"""From a dataset to batches: what is read, held out, labelled and refused; the order of the images; no network."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, blob, make_dataset, posix
from huggingface_hub import constants
from PIL import Image

from ddpm_mnist.errors import ConfigError
from ddpm_mnist.images import decode
from ddpm_mnist.images.batches import Images, index_batches
from ddpm_mnist.images.dataset import Data, load_data
from ddpm_mnist.options import DataOptions

STACK = np.stack([np.array(blob(i)) for i in range(20)])
TEN = np.arange(20, dtype=np.uint8) % 10


def load(name, classes=None, said=None, size=28, held_out=32, with_labels=False, **options) -> Data:
    """As a run loads it; what it warns of goes into `said`."""
    options = DataOptions(dataset_name=str(name), **options)
    warn = ([] if said is None else said).append
    return load_data(options, None, size, classes, held_out, warn, with_labels)


def folder(path, images: list[Image.Image]):
    """An image folder."""
    (path / "train").mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(path / "train" / f"{i}.png")
    return path


def labelled(path, labels: list, test_labels: list | None = None, feature=None):
    """A folder of parquet files with these labels."""
    path.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.ClassLabel(num_classes=10)})
    for split, values in (("train", labels), ("test", test_labels)):
        if values is not None:
            rows = {"image": [blob(i) for i in range(len(values))], "label": values}
            datasets.Dataset.from_dict(rows, features=features).to_parquet(path / f"{split}.parquet")
    return path


# ---- pixels --------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_files_and_decoded_once(dataset_dir, monkeypatch):
    data, original = load(dataset_dir, classes=10), datasets.load_dataset(dataset_dir, split="train")
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape == (len(original), 1, 28, 28)
    for i in (0, 7, len(original) - 1):
        assert np.array_equal(data.train.images[i, 0], np.array(original[i]["image"]))
        assert data.train.labels[i] == original[i]["label"]
    assert len(data.test) == 32
    monkeypatch.setattr(decode, "decode", lambda *_, **__: pytest.fail("decoded again"))
    assert load(dataset_dir, classes=10).fingerprint == data.fingerprint


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux says which file memory is mapped from")
def test_a_set_may_be_larger_than_the_memory(tmp_path):
    """Its pixels are those of a file, which the system reads and drops as it likes."""
    place = load(folder(tmp_path / "set", [blob(i) for i in range(8)])).train.images.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= place < end:
            assert line.endswith("(deleted)")  # a temporary file


def test_an_edited_decoder_is_not_answered_from_the_cache(tmp_path):
    """The same data, loaded by a copy of this repo in which every image is inverted."""
    shutil.copytree(ROOT / "ddpm_mnist", tmp_path / "ddpm_mnist")
    name = folder(tmp_path / "set", [blob(i) for i in range(8)])
    path = tmp_path / "ddpm_mnist/images/decode.py"
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace("np.asarray(image).resh", "(255 - np.asarray(image)).resh"), encoding="utf-8")
    code = f"""from ddpm_mnist.images.dataset import *
print(load_data(DataOptions({str(name)!r}), 1, 28).train.images.float().mean().item())"""
    before = load(name).train.images.float().mean().item()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout.split()[-1]) == pytest.approx(255 - before), done.stderr


def test_the_fingerprint_is_of_the_content(tmp_path):
    """Not of where it lies, when it was touched, or how many processes decoded it."""
    name = folder(tmp_path / "set", [blob(i) for i in range(20)])
    shutil.copytree(name, tmp_path / "moved")
    os.utime(tmp_path / "moved/train/0.png")
    first = load(name).fingerprint
    assert load(tmp_path / "moved", cache_dir=str(tmp_path / "other"), dataloader_num_workers=2).fingerprint == first
    blob(9).save(tmp_path / "moved/train/0.png")
    assert load(tmp_path / "moved").fingerprint != first


def test_images_of_other_sizes_are_cropped_only_if_asked(tmp_path):
    bars = np.zeros((20, 60), np.uint8)
    bars[:, 20:40] = 10 * np.arange(20)
    wide = folder(tmp_path / "wide", [Image.fromarray(bars)] * 4)
    mixed = folder(tmp_path / "mixed", [blob(i, size=28 + i % 2) for i in range(6)])
    for name, part in ((wide, "60x20"), (mixed, "28x28, 29x29")):
        with pytest.raises(ConfigError, match=f"images of {part} are not squares of one size; --center_crop"):
            load(name)
    assert load(mixed, center_crop=True).train.images.shape == (5, 1, 28, 28)
    images = load(wide, center_crop=True, size=20).train.images
    assert images.shape == (3, 1, 20, 20) and np.array_equal(images[0, 0], bars[:, 20:40])


def test_bad_files_are_named_by_any_number_of_processes(tmp_path):
    name = folder(tmp_path / "set", [blob(i) for i in range(9)])
    for i in (1, 3, 4, 6, 7):
        (name / f"train/{i}.png").write_bytes(b"no image")
    for workers in (0, 2):
        with pytest.raises(ConfigError, match=r"cannot be decoded: image \d \(.*/\d.png\): cannot .*, image"):
            load(name, dataloader_num_workers=workers)


# ---- batches -------------------------------------------------------------------------------------------------------


def test_batches_are_scaled_to_minus_one_to_one():
    images = Images(torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.tensor([4, 5, 6]))
    batch, labels = next(images.batches(iter([torch.tensor([1, 0, 2])])))
    assert batch.dtype == torch.float32
    assert batch.flatten().tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert labels.tolist() == [5, 4, 6]


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    """What any sharing and any resume leave of it: test_lasting.py."""
    first, second = (next(index_batches(21, seed, 0, 168)).reshape(8, 21).tolist() for seed in (0, 1))
    assert len({tuple(epoch) for epoch in first + second}) == 16


# ---- held-out images and labels ------------------------------------------------------------------------------------


def test_held_out_images_are_of_all_classes_even_of_a_sorted_set(tmp_path):
    """As class folders are: the last images of the train split, and the first of the test split, are of one class."""
    labels = sorted(list(range(10)) * 20)
    data = load(labelled(tmp_path / "train only", labels), classes=10)
    assert (len(data.train), len(data.test)) == (190, 10) and len(set(data.test.labels.tolist())) > 4
    assert torch.cat([data.train.labels, data.test.labels]).sort().values.tolist() == labels
    said = []
    data = load(labelled(tmp_path / "both", labels, labels), classes=12, held_out=20, said=said)
    assert len(data.train) == 200 and sorted(data.test.labels.tolist()) == sorted(list(range(10)) * 2)
    assert said == ["both: no training image is of class 10, 11, which the U-Net cannot learn."]


WHOLE = datasets.Value("int64")
LABELS = {  # labels of the train split, their type, what a run with ten classes says
    "one missing": ([0, 1, None, 3], None, "row 2 of the training images holds None"),
    "-1 for none": ([0, 1, 2, -1], WHOLE, "row 3 of the training images holds -1"),
    "names": (["cat", "dog"] * 2, datasets.Value("string"), "row 0 of the training images holds 'cat'"),
    "lists": ([[0, 1]] * 4, datasets.List(WHOLE), r"row 0 of the training images holds \[0, 1\]"),
    "fractions": ([0.5, 1.5] * 2, datasets.Value("float32"), "row 0 of the training images holds 0.5"),
    "too large": ([2, 10, 3, 4], WHOLE, "row 1 of the training images holds 10, which is not a class number below 10"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_checked_only_if_they_are_used(tmp_path, name):
    labels, feature, part = LABELS[name]
    path = labelled(tmp_path / "set", labels, labels, feature)
    data = load(path, label_column="label")
    assert data.train.labels is None and len(data.train) == 4
    with pytest.raises(ConfigError, match=f"--label_column label: {part}"):
        load(path, classes=10, label_column="label")


@pytest.mark.parametrize("hidden", [None, -1])
def test_a_test_split_with_hidden_labels_is_refused_only_if_they_are_used(tmp_path, hidden):
    path = labelled(tmp_path / "set", list(range(10)) * 2, [hidden] * 5, WHOLE)
    data = load(path, label_column="label")
    assert (len(data.train), len(data.test)) == (20, 5) and data.test.labels is None
    for how in ({"classes": 10}, {"with_labels": True}):
        with pytest.raises(ConfigError, match=f"row 0 of the held-out images holds {hidden}"):
            load(path, label_column="label", **how)


def test_columns_are_guessed_only_if_one_suits(tmp_path):
    blobs = [blob(i) for i in range(20)]
    rows = datasets.Dataset.from_dict({"image": blobs, "label": TEN.tolist(), "mask": blobs[::-1]})
    rows.to_parquet(tmp_path / "two.parquet")
    rows.select_columns("image").to_parquet(tmp_path / "bare.parquet")
    assert len(load(tmp_path / "two.parquet", image_column="mask").train) == 19
    for options, part in (
        ({}, "--image_column: name the column to use as Image, one of image, label, mask"),
        ({"image_column": "other"}, "--image_column other: name"),
        ({"image_column": "label"}, "--image_column label: does not hold images"),
        ({"image_column": "image", "label_column": "digit"}, "--label_column digit: name"),
    ):
        with pytest.raises(ConfigError, match=part):
            load(tmp_path / "two.parquet", **options)
    assert load(tmp_path / "bare.parquet").train.labels is None
    for how in ({"classes": 10}, {"with_labels": True}):
        with pytest.raises(ConfigError, match="--label_column: name the column to use as ClassLabel, one of image"):
            load(tmp_path / "bare.parquet", **how)


# ---- where images come from ----------------------------------------------------------------------------------------


def test_without_network_nothing_stands_in_for_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    started = time.monotonic()
    assert DataOptions().dataset_name == "ylecun/mnist"
    for name in ("ylecun/mnist", "ylecun/mnist@main"):
        with pytest.raises(ConfigError, match="--dataset_name ylecun/mnist.*: the Hub cannot be reached"):
            load(name, cache_dir=str(tmp_path))
    assert time.monotonic() - started < 60  # minutes of retries is the fault this guards against
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # a push at the end asks the Hub again


def test_the_forms_in_which_people_keep_images_are_read(tmp_path):
    rows = make_dataset([blob(i) for i in range(20)], TEN.tolist())
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved dict")
    rows.to_parquet(tmp_path / "one.parquet")
    for path in ("saved", "saved dict", "one.parquet"):
        data = load(tmp_path / path, classes=10)
        assert len(data.train) >= 19 and data.local and data.name == path
        for image, label in zip(data.train.images, data.train.labels):
            assert any(np.array_equal(image[0], STACK[i]) for i in (label, label + 10)), path


def test_the_folder_where_one_is_and_one_of_several_configurations(tmp_path, monkeypatch):
    rows = make_dataset([blob(i) for i in range(20)], TEN.tolist())
    rows.to_parquet(tmp_path / "train.parquet")
    monkeypatch.chdir(tmp_path)
    assert len(load(".").train) == 19
    (tmp_path / "train.parquet").rename(tmp_path / "a.parquet")
    shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(ConfigError, match="Config name is missing.*choose one with --dataset_config_name"):
        load(tmp_path)
    assert len(load(tmp_path, dataset_config_name="a").train) == 19


def test_nothing_is_written_into_the_folder_of_the_images(tmp_path):
    """`datasets` would write decoded pixels beside what `save_to_disk` saved, and fail on a read-only disk."""
    rows = make_dataset([blob(i) for i in range(20)], TEN.tolist())
    rows.save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").rglob("*"))
    load(tmp_path / "saved", cache_dir=str(tmp_path / "cache"))
    assert sorted((tmp_path / "saved").rglob("*")) == before
    assert list((tmp_path / "cache/ddpm-mnist").glob("pixels-*.arrow"))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"garbage", lambda b: b[: len(b) // 2]])
def test_a_damaged_cache_is_decoded_again(tmp_path, damage):
    """Also of a column that has the name of one of ours."""
    images = make_dataset([blob(i) for i in range(20)], TEN.tolist())
    images.rename_column("image", "pixels").to_parquet(tmp_path / "one.parquet")
    first = load(tmp_path / "one.parquet", cache_dir=str(tmp_path / "cache")).train.images.clone()
    for file in (tmp_path / "cache/ddpm-mnist").glob("pixels-*.arrow"):
        content = file.read_bytes()
        file.unlink()  # and not overwritten in place: the images above are mapped from it
        file.write_bytes(damage(content))
    assert torch.equal(load(tmp_path / "one.parquet", cache_dir=str(tmp_path / "cache")).train.images, first)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


@pytest.mark.parametrize("file", ["train-00000-of-01.parquet", "train/0.png", "mnist.parquet"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(tmp_path, file):
    path = tmp_path / "set" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(POINTER)
    if path.suffix == ".png":
        shutil.copy(path, path.with_name("1.png"))
    with pytest.raises(ConfigError, match="is a git-lfs pointer and not the file; `git lfs pull`, or `hf download`"):
        load(path if file == "mnist.parquet" else tmp_path / "set")


def test_the_conversion_in_the_docs_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", STACK / 255)
    np.save("labels.npy", np.array(["cat", "dog"] * 10))
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs/running.md").read_text(encoding="utf-8"), re.DOTALL)[1], {})
    data = load(tmp_path / "my-images", classes=2)
    assert len(data.train) == 19 and sum(np.array_equal(image[0], STACK[1]) for image in data.train.images) >= 1


np.savez(KERAS := io.BytesIO(), x_train=STACK, y_train=TEN)
READ, JUNK = "cannot be loaded .*running.md", b"garbage"
BAD = {  # what is wrong: (a file, or one in the folder `set` that is named, its bytes or images, what is said)
    "garbage for a parquet": ("a.parquet", JUNK, READ),
    "arrays of Keras": ("a.npz", KERAS.getvalue(), READ),
    "the files of MNIST's page": ("set/train-images-idx3-ubyte", JUNK, "running.md"),
    "the same, compressed": ("set/train-images-idx3-ubyte.gz", JUNK, "running.md"),
    "zeros and ones": ("a.parquet", STACK // 255, "the pixels lie between 0 and 1; scale them"),
    "sixteen levels": ("a.parquet", STACK // 16, "the pixels lie between 0 and 15; scale them"),
    "one image": ("a.parquet", STACK[:1], "the train split has 1 images"),
    "a table of pixels": ("set/train.csv", b"label,pixel0\n1,2\n", "--image_column: name .*pixel0.*running.md"),
    "a test split alone": ("set/test.csv", b"label,pixel0\n1,2\n", "has no train split .test."),
    "a pattern": ("faces [28].parquet", STACK, r"reads \[, \* and \? in a path as a pattern; rename it"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(tmp_path, name):
    file, content, part = BAD[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True, parents=True)
    if isinstance(content, np.ndarray):
        datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in content]}).to_parquet(path)
    else:
        path.write_bytes(content)
    set_of_images = path.parent if path.parent.name == "set" else path
    with pytest.raises(ConfigError, match=part) as error:
        load(set_of_images)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@posix
@pytest.mark.parametrize("name", ["pipe", "pipe.npz", "/dev/null"])
def test_a_pipe_or_a_device_is_no_dataset_and_is_not_waited_for(tmp_path, name):
    if name != "/dev/null":
        os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="a pipe or a device, and neither a folder nor a file"):
        load(tmp_path / name)
