"""Where the images come from: the Hub, a folder, a file, or scikit-learn's wheel."""

import gzip
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

from .client import hub_or_cache
from .options import ConfigError, cause_of, shorten

DEFAULT_DATASET = "ylecun/mnist"
EMBEDDED_DATASET = "scikit-learn digits"
READERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_splits(
    name: str | None, config_name: str | None, cache_dir: str | None, warn: Callable[[str], object] = print
) -> tuple[str, datasets.DatasetDict, bool]:
    """The dataset's name, its splits, and whether it was read from this machine's disk and not from the Hub.

    Without a name: ylecun/mnist, from the cache where the Hub is out of reach, and otherwise, after a loud warning
    through `warn`, the embedded digits. A name that was given is never replaced.

    Raises:
        ConfigError: there is no such dataset or train split, or it cannot be reached or read; the message says why.
    """
    given, name = name, name or DEFAULT_DATASET
    option, path = f"--dataset_name {name}", Path(name)
    if name == EMBEDDED_DATASET:
        return name, embedded_digits(), False
    local = path.exists()
    if not local and (name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or path.is_absolute()):
        raise ConfigError(f"{option}: no such folder")
    missing = f"{option}: not on the Hub, or private; check the name, or log in with `hf auth login`"
    try:
        if local:
            found = read_local(path, config_name, cache_dir)
        else:
            with hub_or_cache(name, "dataset", missing):
                found = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except ConfigError:
        raise
    except ConnectionError:
        if given is None:
            warn(
                f"\n!!! The Hub cannot be reached and {name} is not in the cache: TRAINING ON {EMBEDDED_DATASET}"
                " INSTEAD (1,797 real digits, 8x8 upscaled to 28x28).\n!!! For MNIST, connect to the network, or name a"
                " local copy with --dataset_name.\n"
            )
            return EMBEDDED_DATASET, embedded_digits(), False
        raise ConfigError(
            f"{option}: the Hub cannot be reached and the cache does not have it; connect, or name a local folder"
        ) from None
    except Exception as error:  # `datasets` and what reads for it raise what they like
        raise ConfigError(f"{option}: cannot be loaded ({cause_of(error)}){cure(error, path)}") from error
    if isinstance(found, datasets.Dataset):
        found = datasets.DatasetDict(train=found)
    if not isinstance(found, datasets.DatasetDict) or "train" not in found:
        raise ConfigError(
            f"{option}: has no split named train, only {shorten(found)}; files and folders are taken for a split by "
            "their name: put the training images into a folder named train"
        )
    if local:
        check_all_files_are_read(path, found)
    return name, found, local


def read_local(path: Path, config_name: str | None, cache_dir: str | None):
    """A folder or a file, in any of the forms in which people keep small images."""
    if path.is_file():
        if path.suffix == ".npz":
            return from_npz(path)
        if path.suffix not in READERS:
            raise ConfigError(
                f"--dataset_name {path}: is a file, and not one of {', '.join([*READERS, '.npz'])}; unpack it, or name "
                "the folder that it lies in"
            )
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), cache_dir=cache_dir)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)
    if idx := find_idx(path):
        return from_idx(idx)
    return datasets.load_dataset(str(path), config_name, cache_dir=cache_dir)


def cure(error: Exception, path: Path) -> str:
    """What helps against the commonest failures of `load_dataset`, as the end of a message."""
    text = f"{type(error).__name__} {error}"
    if any(c in str(path) for c in "[]*?"):
        return "; rename the folder: `datasets` takes [ ] * ? in a path for a pattern"
    if "Permission" in text or "Read-only" in text:
        return "; --cache_dir FOLDER puts the cache of `datasets` where you may write"
    if "scripts are no longer supported" in text:
        return "; move the .py file out of the folder"
    if list(path.glob("*.npz")):
        return "; name the .npz file itself"
    return "" if path.exists() else "; check the name and the network"


def check_all_files_are_read(path: Path, found: datasets.DatasetDict) -> None:
    """Raise a ConfigError where an image folder has more images than the splits: some were taken for other splits."""
    if not path.is_dir() or list(path.rglob("*.parquet")) or list(path.rglob("*.arrow")):
        return
    files = sum(f.suffix.lower() in ImageFolder.EXTENSIONS for f in path.rglob("*") if f.is_file())
    rows = sum(split.num_rows for split in found.values())
    if 0 < rows < files:
        raise ConfigError(
            f"--dataset_name {path}: only {rows} of its {files} images would be read, since a file with train, test or "
            "valid in its name counts as a split; move the images into a folder named train"
        )


# ---- other forms than those of `datasets` --------------------------------------------------------------------------


def from_arrays(splits: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> datasets.DatasetDict:
    """Splits of `image` and `label` out of arrays: `[N, H, W]` or `[N, H, W, 3]` uint8, and `[N]` whole numbers."""
    made = {}
    for split, (pixels, labels) in splits.items():
        columns = {"image": [Image.fromarray(p.squeeze()) for p in pixels]}
        features = {"image": datasets.Image()}
        if labels is not None:
            columns["label"] = labels.reshape(-1).tolist()
            features["label"] = datasets.ClassLabel(num_classes=int(labels.max()) + 1)
        made[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict(made)


def from_npz(path: Path) -> datasets.DatasetDict:
    """Keras' mnist.npz and the like: x_train, y_train, x_test, y_test; or images and labels of one split."""
    arrays = dict(np.load(path, allow_pickle=False))
    splits = {
        split: (arrays[x], arrays.get(y))
        for x, y, split in (
            ("x_train", "y_train", "train"),
            ("x_test", "y_test", "test"),
            ("train_images", "train_labels", "train"),
            ("test_images", "test_labels", "test"),
            ("images", "labels", "train"),
        )
        if x in arrays
    }
    if "train" not in splits or any(x.dtype != np.uint8 or x.ndim not in (3, 4) for x, _ in splits.values()):
        raise ConfigError(
            f"--dataset_name {path}: holds {shorten(arrays)}; x_train (and y_train, x_test, y_test) are read, of uint8 "
            "and [N, H, W] or [N, H, W, 3]"
        )
    return from_arrays(splits)


def find_idx(path: Path) -> dict[tuple[str, str], Path]:
    """MNIST's own files in a folder, by (split, "images" or "labels"); empty where there are none."""
    names = {"train": "train", "t10k": "test"}
    found = {}
    for file in path.glob("*-idx?-ubyte*"):
        prefix, _, rest = file.name.partition("-")
        if prefix in names:
            found[names[prefix], rest.partition("-")[0]] = file
    return found


def from_idx(files: dict[tuple[str, str], Path]) -> datasets.DatasetDict:
    """The format of yann.lecun.com: a magic number whose last byte counts the dimensions, the sizes, the bytes."""

    def read(file: Path) -> np.ndarray:
        content = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
        if content[:3] != b"\0\0\x08":
            raise ConfigError(f"--dataset_name {file}: is no idx file of bytes; download it again")
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)

    splits = {split for split, kind in files if kind == "images"}
    labels = {split: read(files[split, "labels"]) if (split, "labels") in files else None for split in splits}
    return from_arrays({split: (read(files[split, "images"]), labels[split]) for split in splits})


def embedded_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits, real and in its wheel: 8x8, upscaled to 28x28; the last 297 for test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    eight = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = [Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in eight]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return datasets.DatasetDict(train=whole.select(range(1500)), test=whole.select(range(1500, 1797)))
