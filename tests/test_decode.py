"""What a viewer shows is what is trained on: every mode, depth, transparency and orientation; and what is refused."""

import io
import os
import random
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, blob, make_dataset
from PIL import Image

from ddpm_mnist import data, decode
from ddpm_mnist.errors import ConfigError
from ddpm_mnist.evaluation.classifier import labelled as labelled_images
from ddpm_mnist.training.config import parse_args

DISC = ((np.mgrid[:28, :28] - 13.5) ** 2).sum(0) < 60
RAMP = np.linspace(0, 255, 784).reshape(28, 28).round().astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content: bytes, channels: int = 1, paper: int | None = None, size: int = 28, crop: bool = False):
    return decode.decode(content, channels, size, crop, paper)[0]


def alpha(ink: int) -> np.ndarray:
    """Ink of that brightness on transparent paper."""
    rgba = np.full((28, 28, 4), ink, np.uint8)
    rgba[..., 3] = DISC * 255
    return rgba


def upside_down() -> Image.Image:
    """A ramp that is stored upside down, with the tag that says so."""
    image = Image.fromarray(RAMP[::-1, ::-1].copy())
    image.getexif()[0x0112] = 3
    return image


def tiff(image: Image.Image, **tags: int) -> bytes:
    """A TIFF with tags that Pillow does not write: `bits`, and `photometric` 0, where 0 is white."""
    content = bytearray(encode(image, "TIFF", tiffinfo={0x0112: tags.pop("orientation", 1)}))
    start = int.from_bytes(content[4:8], "little")
    for entry in range(start + 2, start + 2 + 12 * int.from_bytes(content[start : start + 2], "little"), 12):
        tag = int.from_bytes(content[entry : entry + 2], "little")
        for name, number in (("bits", 258), ("photometric", 262)):
            if tag == number and name in tags:
                content[entry + 8 : entry + 10] = tags[name].to_bytes(2, "little")
    return bytes(content)


def transparent_palette() -> Image.Image:
    image = Image.fromarray(DISC.astype(np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 0])
    return image


SHOWN = {  # name: (file, the grey pixels that a viewer shows)
    "1": (encode(Image.fromarray(DISC)), DISC * 255),
    "L": (encode(Image.fromarray(RAMP)), RAMP),
    "RGB": (encode(Image.fromarray(RAMP).convert("RGB")), RAMP),
    "P": (encode(Image.fromarray(RAMP).convert("P")), RAMP),
    "CMYK": (encode(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "TIFF"), RAMP),
    "opaque RGBA": (encode(Image.fromarray(RAMP).convert("RGBA")), RAMP),
    "I;16 PNG": (encode(Image.fromarray(RAMP.astype(np.uint16) * 257)), RAMP),
    "I;16 TIFF": (encode(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"), RAMP),
    "I;16 TIFF, 0 is white": (tiff(Image.fromarray(RAMP.astype(np.uint16) * 257), photometric=0), 255 - RAMP),
    "I;16 TIFF, turned": (tiff(Image.fromarray(RAMP[::-1, ::-1].astype(np.uint16) * 257), orientation=3), RAMP),
    "I;16 TIFF, 0 is white, turned": (
        tiff(Image.fromarray(RAMP[::-1, ::-1].astype(np.uint16) * 257), photometric=0, orientation=3),
        255 - RAMP,
    ),
    "L TIFF, 0 is white": (tiff(Image.fromarray(RAMP), photometric=0), 255 - RAMP),
    "F TIFF, 0 is white": (tiff(Image.fromarray(RAMP.astype(np.float32) / 255), photometric=0), 255 - RAMP),
    "I;16 PNG, turned": (
        encode(Image.fromarray(RAMP[::-1, ::-1].astype(np.uint16) * 257), exif=upside_down().getexif()),
        RAMP,
    ),
    "16-bit PGM": (b"P5 28 28 65535\n" + (RAMP.astype(">u2") * 257).tobytes(), RAMP),
    "4-bit PGM": (b"P5 28 28 15\n" + (RAMP // 17).tobytes(), RAMP // 17 * 17),
    "I of bytes": (encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), RAMP),
    "F in 0 ... 1": (encode(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"), RAMP),
    "black ink on transparent paper": (encode(Image.fromarray(alpha(0))), ~DISC * 255),
    "white ink on transparent paper": (encode(Image.fromarray(alpha(255))), DISC * 255),
    "LA": (encode(Image.fromarray(alpha(0)).convert("LA")), ~DISC * 255),
    "L with a transparent grey": (encode(Image.fromarray(DISC.astype(np.uint8) * 255), transparency=255), DISC * 255),
    "I;16 with a transparent grey": (
        encode(Image.fromarray(np.where(DISC, 0, 1).astype(np.uint16)), transparency=1),
        ~DISC * 255,
    ),
    "P with a transparent colour": (encode(transparent_palette(), transparency=0), ~DISC * 255),
    "turned by a tag": (encode(upside_down(), exif=upside_down().getexif()), RAMP),
    "turned by a tag, JPEG": (encode(upside_down(), "JPEG", exif=upside_down().getexif(), quality=100), RAMP),
    "animation": (
        encode(Image.fromarray(RAMP), "GIF", save_all=True, append_images=[Image.fromarray(255 - RAMP)]),
        RAMP,
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_viewer_shows_is_decoded(name, tmp_path):
    """From bytes, as in a parquet file, and from a file, as in a folder."""
    content, expected = SHOWN[name]
    (tmp_path / "image").write_bytes(content)
    for cell in (content, {"bytes": None, "path": str(tmp_path / "image")}):
        decoded = decode.decode(cell, 1, 28, False, None).pixels[0].astype(int)
        assert np.abs(decoded - expected.astype(int)).max() <= 3, (decoded[14, ::4], expected[14, ::4])


def test_the_deep_ramp_keeps_its_levels():
    deep = np.linspace(0, 65535, 784).reshape(28, 28).astype(np.uint16)
    decoded = pixels(encode(Image.fromarray(deep)))
    assert decoded.mean() == pytest.approx(127.5, abs=0.1) and len(np.unique(decoded)) == 256
    assert decoded.flat[0] == 0 and decoded.flat[-1] == 255


REFUSED = {
    "I out of range": (encode(Image.fromarray(RAMP.astype(np.int32) * 300), "TIFF"), "mode I with values"),
    "I, 0 is white": (tiff(Image.fromarray(RAMP.astype(np.int32)), photometric=0), "cannot identify"),
    "F out of range": (encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "mode F with values"),
    "F not a number": (encode(Image.fromarray(np.full((28, 28), np.nan, np.float32)), "TIFF"), "mode F"),
    "garbage": (b"not an image", "cannot identify"),
    "no bytes": (b"", "cannot identify"),
    "truncated": (encode(Image.fromarray(RAMP))[:60], "cannot be decoded"),
    "a bomb": (encode(Image.new("1", (20000, 20000))), "exceeds limit"),
    "an empty cell": (None, "empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(name):
    content, part = REFUSED[name]
    cells = [{"bytes": SHOWN["L"][0], "path": None}, content and {"bytes": content, "path": "b.tif"} or content]
    how = {"channels": 1, "size": 28, "center_crop": False, "paper": None}
    if content == b"":
        cells[1] = {"bytes": b"", "path": "b.tif"}
    with pytest.raises(ConfigError, match="image 8") as error:
        decode.decode_rows(cells, [7, 8], version="", **how)
    assert part in str(error.value) and "\n" not in str(error.value)


def folder(tmp_path, images: list[Image.Image], name: str = "set") -> str:
    (tmp_path / name / "train").mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(tmp_path / name / "train" / f"{i}.png")
    return str(tmp_path / name)


def load(name: str, *more: str, warn=print) -> data.Data:
    config = parse_args(["--config", str(ROOT / "configs/smoke.yaml"), f"--dataset_name={name}", *more])
    return data.load_data(config, config.image_shape, config.num_validation_samples, warn)


@pytest.mark.parametrize(("ink", "paper"), [(0, "white"), (255, "black"), (90, "white"), (200, "black")])
def test_a_transparent_set_is_put_on_the_paper_that_shows_its_ink(tmp_path, ink, paper):
    said = []
    images = load(folder(tmp_path, [Image.fromarray(alpha(ink))] * 6), warn=said.append).train.images
    assert abs(int(images[0, 0, 14, 14]) - ink) <= 1 and int(images[0, 0, 0, 0]) == (255 if paper == "white" else 0)
    assert [line for line in said if "paper" in line] == [said[0]] and f"put on {paper} paper" in said[0]


def test_one_paper_for_a_whole_set(tmp_path):
    """Even where a few images are of the other ink."""
    images = load(folder(tmp_path, [Image.fromarray(alpha(ink)) for ink in (0, 0, 0, 0, 0, 255, 0)])).train.images
    assert (images[:, 0, 0, 0] == 255).all()


def test_several_bad_files_are_named_together(tmp_path):
    name = folder(tmp_path, [Image.fromarray(RAMP)] * 9)
    for i in (1, 3, 4, 6, 7):
        (tmp_path / f"set/train/{i}.png").write_bytes(b"no image")
    with pytest.raises(ConfigError) as error:
        load(name)
    text = str(error.value)
    bad = [i for i in (1, 3, 4, 6, 7) if f"/{i}.png" in text]
    assert len(bad) == 3 and re.search("and [12] more", text) and "\n" not in text  # one may be held out


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_an_edited_decoder_is_not_answered_from_the_cache(tmp_path, dataset_dir):
    """Train twice on the same data, by a copy of this repo in which every image is then inverted."""
    shutil.copytree(ROOT / "ddpm_mnist", tmp_path / "ddpm_mnist")
    name = folder(tmp_path, [blob(i) for i in range(8)])
    code = (
        "from ddpm_mnist import data; x = data.load_data(data.DataOptions(dataset_name=NAME), data.ImageShape(1, 28))"
        ".train.images; print(x.float().mean().item())"
    ).replace("NAME", repr(name))

    def mean() -> float:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split()[-1])

    before = mean()
    assert mean() == before
    path = tmp_path / "ddpm_mnist/decode.py"
    source = path.read_text(encoding="utf-8")
    edited = source.replace("np.asarray(image).reshape(size", "255 - np.asarray(image).reshape(size")
    assert edited != source
    path.write_text(edited, encoding="utf-8")
    assert mean() == pytest.approx(255 - before)


# ---- sizes ---------------------------------------------------------------------------------------------------------

WIDE = [Image.fromarray(np.repeat(RAMP, 2, axis=1)) for _ in range(6)]
MIXED = [blob(i, size=28 + i) for i in range(6)]


@pytest.mark.parametrize("where", [[], ["--max_resident_gb=0"]], ids=["resident", "on the disk"])
@pytest.mark.parametrize(("images", "part"), [(WIDE, "images of 56x28"), (MIXED, "sizes, such as 28x28")])
def test_nothing_is_squashed_unasked(tmp_path, images, part, where):
    name = folder(tmp_path, images)
    with pytest.raises(ConfigError, match=part) as error:
        load(name, *where)
    assert "--center_crop" in str(error.value) and "--resolution" in str(error.value)
    assert len(load(name, "--center_crop", *where).train) == 5


def test_the_middle_is_cropped(tmp_path):
    bars = np.zeros((20, 60), np.uint8)
    bars[:, 20:40] = RAMP[:20, :20]
    images = load(folder(tmp_path, [Image.fromarray(bars)] * 4), "--center_crop", "--resolution=20").train.images
    assert images.shape == (3, 1, 20, 20) and np.array_equal(images[0, 0], RAMP[:20, :20])


# ---- any bytes -----------------------------------------------------------------------------------------------------


def mutated(content: bytes, chance: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(content) or 1)
        kind = chance.choice(("cut", "flip", "insert", "drop"))
        if kind == "cut":
            del content[place:]
        elif kind == "flip" and content:
            content[min(place, len(content) - 1)] ^= 1 << chance.randrange(8)
        elif kind == "insert":
            content[place:place] = chance.randbytes(chance.randint(1, 9))
        else:
            del content[place : place + chance.randint(1, 30)]
    return bytes(content)


@pytest.mark.parametrize("seed", range(2))
def test_any_bytes_are_pixels_or_one_line(seed):
    """Truncated, flipped, inserted, dropped: 100 mutations of each kind of file. Never another error, never a hang."""
    chance, decoded = random.Random(seed), 0
    how = {"channels": 1, "size": 28, "center_crop": True, "paper": None}
    for content, _ in SHOWN.values():
        for _ in range(25):
            try:
                rows = decode.decode_rows([{"bytes": mutated(content, chance), "path": None}], [0], version="", **how)
                assert len(rows["pixels"][0]) == 784
                decoded += 1
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
    assert 10 < decoded < 25 * len(SHOWN)


# ---- labels --------------------------------------------------------------------------------------------------------


def labelled(tmp_path, labels: list, test_labels: list | None = None, feature=None) -> str:
    feature = feature or datasets.ClassLabel(num_classes=10)
    for split, values in (("train", labels), ("test", test_labels)):
        if values is not None:
            features = datasets.Features({"image": datasets.Image(), "label": feature})
            rows = {"image": [blob(i) for i in range(len(values))], "label": values}
            datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    return str(tmp_path)


CONDITIONAL = "--unet.num_class_embeds=10"
LABELS = {  # name: (labels of the train split, of the test split, type, what a conditional run says)
    "one missing in the test split": ([1, 2], [0, None], None, "1 rows of the held-out split have no label (1)"),
    "one missing": ([0, 1, None, 3], [0], None, "1 rows of the train split have no label (2)"),
    "-1 for none": ([0, 1, -1, -1], [0], datasets.Value("int64"), "2 rows of the train split have no label (2, 3)"),
    "none at all": ([None, None], [0], None, "no row of the train split has a label"),
    "none but -1": ([-1, -1], [0], datasets.Value("int64"), "no row of the train split has a label"),
    "names": (["cat", "dog"], ["cat"], datasets.Value("string"), "class_encode_column"),
    "lists": ([[0, 1], [1, 0]], [[0, 1]], datasets.List(datasets.Value("int64")), "numpy.argmax"),
    "fractions": ([0.5, 1.5], [0.5], datasets.Value("float32"), "not whole numbers"),
    "negative": ([-2, 3], [1], datasets.Value("int64"), "labels from -2 to 3"),
    "too large": ([2, 10], [1], datasets.Value("int64"), "labels from 2 to 10"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_looked_at_only_where_they_are_used(tmp_path, name):
    labels, test_labels, feature, part = LABELS[name]
    name = labelled(tmp_path, labels, test_labels, feature)
    loaded = load(name, "--label_column=label")
    assert loaded.train.labels is None and len(loaded.train) == len(labels)
    with pytest.raises(ConfigError) as error:
        load(name, "--label_column=label", CONDITIONAL)
    assert "--label_column label" in str(error.value) and part in str(error.value) and "\n" not in str(error.value)


UNUSED = {  # name: what the npz holds beside x_train
    "several a image": {"y_train": np.zeros((20, 14), int)},
    "of other images": {"y_train": np.arange(3)},
    "names": {"y_train": np.array(["a", "b"] * 10)},
    "objects": {"y_train": np.array([None, 1] * 10, object)},
    "fractions": {"y_train": np.full(20, 0.5)},
}


@pytest.mark.parametrize("name", UNUSED)
def test_labels_in_arrays_are_looked_at_only_where_they_are_used(tmp_path, name):
    np.savez(tmp_path / "a.npz", x_train=np.stack([RAMP] * 20), **UNUSED[name])
    said = []
    assert len(load(str(tmp_path / "a.npz"), warn=said.append).train) == 19
    with pytest.raises(ConfigError, match="--label_column"):
        load(str(tmp_path / "a.npz"), "--unet.num_class_embeds=2")
    assert any("left out" in line for line in said) == (name in ("of other images", "objects"))


def test_labels_in_a_damaged_idx_file_stop_no_run_that_needs_none(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.stack([RAMP] * 20)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"garbage")
    said = []
    assert len(load(str(tmp_path), warn=said.append).train) == 19 and "The labels are left out" in said[0]


def test_whole_numbers_of_any_type_are_classes_in_arrays(tmp_path):
    for kind in (np.float64, np.uint8, np.int32):
        labels = (np.arange(20) % 10).astype(kind)
        np.savez(tmp_path / "a.npz", x_train=np.stack([RAMP] * 20), y_train=labels[:, None])
        assert set(load(str(tmp_path / "a.npz"), CONDITIONAL).train.labels.tolist()) <= set(range(10))


def test_images_that_are_black_to_the_eye_are_refused_and_blank_ones_said(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.stack([DISC * np.uint8(1)] * 20))
    with pytest.raises(ConfigError, match="between 0 and 1 of 255"):
        load(str(tmp_path / "a.npz"))
    said = []
    np.savez(tmp_path / "a.npz", x_train=np.zeros((20, 28, 28), np.uint8))
    load(str(tmp_path / "a.npz"), warn=said.append)
    assert said == [f"{tmp_path / 'a.npz'}: its images are blank, all of one grey."]


def test_class_folders_one_of_which_is_called_train_are_refused(tmp_path):
    for name in ("car", "plane", "train"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            blob(i).save(tmp_path / "set" / name / f"{i}.png")
    with pytest.raises(ConfigError, match="only 3 of its 9 images would be read"):
        load(str(tmp_path / "set"))


def test_labels_belong_to_the_images_of_their_form(tmp_path):
    labels, names = np.arange(20) % 10, np.array(["a"] * 20)
    np.savez(tmp_path / "a.npz", x_train=np.stack([RAMP] * 20), y_train=labels, labels=names)
    assert len(load(str(tmp_path / "a.npz"), CONDITIONAL).train.labels) == 19


def test_images_beside_idx_files_further_below_are_what_is_read(tmp_path):
    name = folder(tmp_path, [blob(i) for i in range(6)])
    (tmp_path / "set/old/MNIST/raw").mkdir(parents=True)
    (tmp_path / "set/old/MNIST/raw/train-images-idx3-ubyte").write_bytes(idx(np.stack([RAMP] * 9)))
    assert len(load(name).train) == 5


STRAY = ["train/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/train/0.png", "train/._0.png", "README.png"]


@pytest.mark.parametrize("stray", STRAY)
def test_stray_images_beside_a_good_set_are_in_nobodys_way(tmp_path, stray):
    name = folder(tmp_path, [blob(i) for i in range(6)])
    (tmp_path / "set" / stray).parent.mkdir(parents=True, exist_ok=True)
    blob(1).save(tmp_path / "set" / stray)
    assert len(load(name).train) == 5


def test_a_test_split_without_a_label_column_is_not_the_one_held_out(tmp_path):
    said, arrays = [], {"x_train": np.stack([RAMP] * 40), "y_train": np.arange(40) % 10, "x_test": np.stack([RAMP] * 5)}
    np.savez(tmp_path / "a.npz", **arrays)
    loaded = load(str(tmp_path / "a.npz"), CONDITIONAL, warn=said.append)
    assert (len(loaded.train), len(loaded.test), len(loaded.test.labels)) == (38, 2, 2)
    assert any("its test split has no labels" in line for line in said)


@pytest.mark.parametrize("hidden", [None, -1])
def test_hidden_test_labels_stop_only_runs_that_use_them(tmp_path, hidden):
    name = labelled(tmp_path, list(range(10)) * 4, [hidden] * 5, datasets.Value("int64"))
    with pytest.raises(ConfigError, match="no row of the held-out split has a label"):
        load(name, "--label_column=label", CONDITIONAL)
    unconditional = load(name, "--label_column=label")
    assert (len(unconditional.train), len(unconditional.test)) == (40, 5)
    judged = data.load_data(data.DataOptions(name, label_column="label"), data.ImageShape(1, 28), with_labels=True)
    assert len(judged.test) == 5 and judged.test.labels is None and len(judged.train.labels) == 40
    train, test = labelled_images(judged)  # what `evaluate` teaches and judges its classifier by
    assert (len(train), len(test), len(test.labels)) == (38, 2, 2)


def test_a_sorted_set_keeps_all_its_classes(tmp_path):
    """As class folders are: the last images of the train split, and the first of the test split, are of one class."""
    labels = sorted(list(range(10)) * 20)
    loaded = load(labelled(tmp_path, labels), CONDITIONAL)
    assert len(loaded.test) == 10 and len(set(loaded.test.labels.tolist())) > 4
    assert set(loaded.train.labels.tolist()) == set(range(10))
    more = load(labelled(tmp_path, labels, labels), CONDITIONAL, "--num_validation_samples=20")
    assert sorted(more.test.labels.tolist()) == sorted(list(range(10)) * 2)


def test_a_class_without_a_training_image_is_said(tmp_path):
    said = []
    load(labelled(tmp_path, [1, 2, 3, 4] * 5, [1]), CONDITIONAL, warn=said.append)
    assert any("no training image is of class 0, 5, 6, 7, 8, 9" in line for line in said)


# ---- forms ---------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


IDX_LAYOUTS = {  # folder: the path of a file in it
    "dotted": "{split}-{dotted}-ubyte",
    "torchvision": "MNIST/raw/{split}-{kind}-ubyte",
    "kaggle": "{split}-{kind}-ubyte/{split}-{kind}-ubyte",
    "by split": "{split}/{split}-{kind}-ubyte",
    "emnist": "emnist-digits-{split}-{kind}-ubyte",
    "EMNIST/raw": "{split}-{kind}-ubyte",
    "by kind": "{kind}/{split}-{kind}-ubyte",
    "by split too": "{split}_set/{split}-{kind}-ubyte",
}


def in_many_forms(tmp_path) -> dict[str, str]:
    """The same ten images in forms in which people keep them; path by form."""
    import gzip

    images = [blob(i) for i in range(10)]
    rows, stack = make_dataset(images, list(range(10))), np.stack([np.array(image) for image in images])
    labels = np.arange(10, dtype=np.uint8)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved dict")
    rows.to_parquet(tmp_path / "one.parquet")
    np.savez(tmp_path / "mnist.npz", x_train=stack, y_train=labels, x_test=stack, y_test=labels)
    for suffix, pack in (("", lambda b: b), (".gz", gzip.compress)):
        (tmp_path / f"idx{suffix}").mkdir()
        for split in ("train", "t10k"):
            (tmp_path / f"idx{suffix}/{split}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(stack)))
            (tmp_path / f"idx{suffix}/{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    for form, pattern in IDX_LAYOUTS.items():
        for split in ("train", "t10k"):
            for kind, array in (("images-idx3", stack), ("labels-idx1", labels)):
                file = tmp_path / form / pattern.format(split=split, kind=kind, dotted=kind.replace("-", "."))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(idx(array.swapaxes(1, 2) if "emnist" in form.lower() and array.ndim == 3 else array))
    bare = datasets.Dataset.from_dict({"image": [encode(image) for image in images], "label": list(range(10))})
    (tmp_path / "bytes").mkdir()
    bare.to_parquet(tmp_path / "bytes/train.parquet")
    forms = ("saved", "saved dict", "one.parquet", "mnist.npz", "idx", "idx.gz", "bytes", *IDX_LAYOUTS)
    return {form: str(tmp_path / form.split("/")[0]) for form in forms}


def test_the_forms_in_which_people_keep_images_are_read(tmp_path):
    for form, path in in_many_forms(tmp_path).items():
        loaded = load(path, "--label_column=label", CONDITIONAL)
        assert len(loaded.train) >= 9 and loaded.local, form  # one is held out where there is no test split
        for image, label in zip(loaded.train.images, loaded.train.labels):
            assert torch.equal(image[0], torch.from_numpy(np.array(blob(int(label))))), form


def class_zip(tmp_path):
    """A zip of class folders beside nothing else: `datasets` hides the cause of its error in a chain."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"{i % 2}/{i}.png", encode(blob(i)))
    return tmp_path


def names_as_splits(tmp_path):
    for name in ("test_1", "train", "a", "b", "c", "d"):
        blob(1).save(tmp_path / f"{name}.png")
    return tmp_path


def arrays(tmp_path):
    features = datasets.Features({"image": datasets.Array2D((28, 28), "uint8")})
    rows = datasets.Dataset.from_dict({"image": [RAMP] * 4}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    return tmp_path


def many_columns(tmp_path):
    header, row = ",".join(["label", *(f"pixel{i}" for i in range(784))]), ",".join(["1"] * 785)
    (tmp_path / "train.csv").write_text(f"{header}\n{row}\n{row}\n", encoding="utf-8")
    return tmp_path


def script(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mine.py").write_text("print('a loading script')", encoding="utf-8")
    return tmp_path / "mine"


def bracket(tmp_path):
    (tmp_path / "set[1]").mkdir()
    blob(1).save(tmp_path / "set[1]/a.png")
    return tmp_path / "set[1]"


def archive_file(tmp_path):
    return class_zip(tmp_path) / "train.zip"


def odd_npz(tmp_path):
    np.savez(tmp_path / "odd.npz", a=RAMP)
    return tmp_path / "odd.npz"


def npz_in_a_folder(tmp_path):
    odd_npz(tmp_path)
    return tmp_path


def lone_npy(tmp_path):
    np.save(tmp_path / "images.npy", RAMP[None])
    return tmp_path / "images.npy"


def npy_in_a_folder(tmp_path):
    return lone_npy(tmp_path).parent


def npz(name: str, **arrays):
    def make(tmp_path):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return make


def garbage(name: str):
    def make(tmp_path):
        (tmp_path / name).write_bytes(b"garbage")
        return tmp_path if "idx" in name else tmp_path / name

    return make


def empty_folders(tmp_path):
    (tmp_path / "train/0").mkdir(parents=True)
    return tmp_path


def linked_folder(tmp_path):
    if os.name != "posix":
        pytest.skip("links need rights there")
    (tmp_path / "set").mkdir()
    (tmp_path / "images").mkdir()
    blob(1).save(tmp_path / "images/a.png")
    (tmp_path / "set/train").symlink_to(tmp_path / "images")
    return tmp_path / "set"


def two_idx_sets(tmp_path):
    for name in ("MNIST", "FashionMNIST"):
        (tmp_path / name / "raw").mkdir(parents=True)
        (tmp_path / name / "raw/train-images-idx3-ubyte").write_bytes(idx(RAMP[None]))
    return tmp_path


IMAGES = np.stack([RAMP] * 4)
FORMS = {
    "a lone npy": (lone_npy, ["is a file, and not one of", 'numpy.savez("images.npz"']),
    "an npy in a folder": (npy_in_a_folder, ["name the .npy file itself"]),
    "garbage for an npz": (garbage("a.npz"), ["cannot be read as arrays", "`numpy.savez` makes"]),
    "objects in an npz": (npz("a.npz", x_train=np.array([RAMP, None], object)), ["cannot be read as arrays"]),
    "floats in an npz": (
        npz("a.npz", x_train=IMAGES / 255),
        ["train images are float64 [4, 28, 28]", "uint8 [N, H, W]"],
    ),
    "an empty npz": (npz("a.npz"), ["holds nothing"]),
    "garbage for an idx": (garbage("train-images-idx3-ubyte"), ["is no whole idx file", "download it again"]),
    "garbage for an idx.gz": (garbage("train-images-idx3-ubyte.gz"), ["is no whole idx file", "download it again"]),
    "garbage for a parquet": (garbage("a.parquet"), ["cannot be loaded", "make or download the file again"]),
    "empty folders": (empty_folders, ["holds no files", "put images into"]),
    "a link to a folder": (linked_folder, ["holds no files", "links to folders", "are not followed"]),
    "two sets of idx": (two_idx_sets, ["files of 2 sets", "FashionMNIST/raw", "name a folder with one"]),
    "names that count as splits": (names_as_splits, ["of its 6 images", "a folder named train"]),
    "arrays": (arrays, ["--image_column: no column holds images", "PIL.Image.fromarray"]),
    "a table of pixels": (many_columns, ["no column holds images", "and 777 more"]),
    "a loading script": (script, ["cannot be loaded"]),
    "a pattern for a name": (bracket, ["rename the folder"]),
    "a zip file": (archive_file, ["unpack it"]),
    "another npz": (odd_npz, ["holds a", "x_train"]),
    "a folder with an npz": (npz_in_a_folder, ["name the .npz file itself"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_get_a_line_with_a_way_out(tmp_path, name):
    make, parts = FORMS[name]
    with pytest.raises(ConfigError) as error:
        load(str(make(tmp_path)))
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text and len(text) < 600


def test_a_read_only_cache_is_answered_with_the_option_for_another(tmp_path, monkeypatch):
    from ddpm_mnist import sources

    name = folder(tmp_path, [blob(1)] * 4)
    error = PermissionError(13, "Permission denied", "/shared/hf/x.lock")
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(ConfigError, match="Permission denied.*--cache_dir FOLDER"):
        load(name)


def test_decoding_by_several_processes_is_the_same(tmp_path):
    name = folder(tmp_path, [blob(i) for i in range(20)])
    one, two = load(name), load(name, "--dataloader_num_workers=2", f"--cache_dir={tmp_path / 'other'}")
    assert torch.equal(one.train.images, two.train.images) and one.fingerprint == two.fingerprint
    (tmp_path / "set/train/3.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"3\.png.*cannot be decoded"):
        load(name, "--dataloader_num_workers=2")


def test_the_fingerprint_is_of_the_content(tmp_path):
    name = folder(tmp_path, [blob(i) for i in range(8)])
    shutil.copytree(name, tmp_path / "moved")
    os.utime(tmp_path / "moved/train/0.png")
    prints = [
        load(place, *more).fingerprint
        for place in (name, str(tmp_path / "moved"))
        for more in ([], ["--max_resident_gb=0"])
    ]
    assert len(set(prints)) == 1
    blob(9).save(tmp_path / "moved/train/0.png")
    assert load(str(tmp_path / "moved")).fingerprint != prints[0]
