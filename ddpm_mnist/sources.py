"""Where the images come from: the Hub, a folder, a file, or scikit-learn's wheel."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

from .client import hub_or_cache
from .options import ConfigError, cause_of, first_line, shorten

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
            kinds = f"is a file, and not one of {', '.join([*READERS, '.npz'])}"
            cure = f'`numpy.savez("images.npz", x_train=numpy.load("{path.name}"))` makes one of it'
            if path.suffix != ".npy":
                cure = "unpack it, or name the folder that it lies in"
            raise ConfigError(f"--dataset_name {path}: {kinds}; {cure}")
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), cache_dir=cache_dir)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)
    if idx := find_idx(path):
        return from_idx(path, idx)
    if not any(file.is_file() for file in path.rglob("*")):
        raise ConfigError(f"--dataset_name {path}: the folder holds no files; put images into {path / 'train'}")
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
    for suffix in (".npz", ".npy"):
        if list(path.glob(f"*{suffix}")):
            return f"; name the {suffix} file itself"
    if path.is_dir():
        return f"; images, or files of {', '.join([*READERS, '.npz'])}, are read from a folder"
    return "; make or download the file again" if path.exists() else "; check the name and the network"


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


def from_arrays(path: Path, splits: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> datasets.DatasetDict:
    """Splits of `image` and `label` out of arrays.

    Args:
        path: where they are from.
        splits: images `[N, H, W]` or `[N, H, W, C]`, uint8, C = 1, 3 or 4; labels `[N]` or `[N, 1]`, whole numbers.

    Raises:
        ConfigError: they are not that.
    """
    made = {}
    for split, (pixels, labels) in splits.items():
        shape = list(pixels.shape)
        if pixels.dtype != np.uint8 or not (len(shape) == 3 or len(shape) == 4 and shape[3] in (1, 3, 4)):
            raise ConfigError(
                f"--dataset_name {path}: its {split} images are {pixels.dtype} {shape}; uint8 [N, H, W] or [N, H, W, 3]"
                " is read"
            )
        columns = {"image": [Image.fromarray(p.squeeze(-1) if p.shape[2:] == (1,) else p) for p in pixels]}
        features = {"image": datasets.Image()}
        if labels is not None:
            if labels.dtype.kind not in "iu" or labels.size != len(pixels) or len(labels) != len(pixels):
                raise ConfigError(
                    f"--dataset_name {path}: its {split} labels are {labels.dtype} {list(labels.shape)}, for "
                    f"{len(pixels)} images; whole numbers [N] are read (`y.argmax(1)` makes them of one-hot rows)"
                )
            columns["label"] = labels.reshape(-1).tolist()
            features["label"] = datasets.ClassLabel(num_classes=int(labels.max(initial=0)) + 1)
        made[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict(made)


def from_npz(path: Path) -> datasets.DatasetDict:
    """Keras' mnist.npz and the like: x_train, y_train, x_test, y_test; or images and labels of one split."""
    try:
        arrays = dict(np.load(path, allow_pickle=False))
    except Exception as error:  # of NumPy, zip and zlib; also where pickled objects are inside
        raise ConfigError(
            f"--dataset_name {path}: cannot be read as arrays ({first_line(error, 100)}); `numpy.savez` makes a file "
            "that can"
        ) from error
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
    if "train" not in splits:
        raise ConfigError(
            f"--dataset_name {path}: holds {shorten(arrays) or 'nothing'}; x_train (y_train, x_test, y_test) are read"
        )
    return from_arrays(path, splits)


# train-images-idx3-ubyte.gz as MNIST's page has it, train-images.idx3-ubyte as archives of it, and EMNIST's
# emnist-letters-train-images-idx3-ubyte.
IDX_NAME = re.compile(r"(?:(?P<set>.+)-)?(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?")


def find_idx(path: Path) -> dict[tuple[str, str], Path]:
    """MNIST's own files in a folder or below it, by (split, "images" or "labels"); empty where there are none.

    Raises:
        ConfigError: they are of several sets.
    """
    sets: dict[str, dict[tuple[str, str], Path]] = {}
    for file in sorted(path.rglob("*idx[13]-ubyte*"), key=lambda file: (len(file.parts), file.suffix == ".gz", file)):
        if (match := IDX_NAME.fullmatch(file.name)) and file.is_file():
            split = "train" if match["split"] == "train" else "test"
            home = file.parent
            if IDX_NAME.fullmatch(home.name) or home.name in ("train", "t10k", "test"):
                home = home.parent  # archives with a folder for each file
            name = match["set"] or home.relative_to(path.parent).as_posix()
            sets.setdefault(name, {}).setdefault((split, match["kind"]), file)
    if len(sets) > 1:
        raise ConfigError(
            f"--dataset_name {path}: holds the files of {len(sets)} sets ({shorten(sets)}); name a folder with one"
        )
    return next(iter(sets.values()), {})


def from_idx(path: Path, files: dict[tuple[str, str], Path]) -> datasets.DatasetDict:
    """The format of yann.lecun.com: a magic number whose last byte counts the dimensions, the sizes, the bytes."""

    def read(file: Path) -> np.ndarray:
        try:
            content = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
            if content[:3] != b"\0\0\x08":
                raise ValueError("the first bytes are not those of an idx file of bytes")
            dimensions = content[3]
            shape = np.frombuffer(content, ">u4", dimensions, offset=4)
            return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
        except Exception as error:  # of gzip, zlib, NumPy and the disk
            raise ConfigError(
                f"--dataset_name {file}: is no whole idx file ({first_line(error, 100)}); download it again"
            ) from error

    splits = {}
    for split in ("train", "test"):
        if (split, "images") in files:
            images = read(files[split, "images"])
            if "emnist" in files[split, "images"].name:
                images = images.swapaxes(1, 2)  # EMNIST keeps its images by columns
            splits[split] = (images, read(files[split, "labels"]) if (split, "labels") in files else None)
    return from_arrays(path, splits)


def embedded_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits, real and in its wheel: 8x8, upscaled to 28x28; the last 297 for test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    eight = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = [Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in eight]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return datasets.DatasetDict(train=whole.select(range(1500)), test=whole.select(range(1500, 1797)))
