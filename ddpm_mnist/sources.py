"""Where the images come from: the Hub, a folder, a file, or scikit-learn's wheel."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

from .errors import ConfigError, cause_of, first_line, shorten
from .offline import hub_or_cache

DEFAULT_DATASET = "ylecun/mnist"
EMBEDDED_DATASET = "scikit-learn digits"
MOST_CLASSES = 100_000  # larger numbers are no classes, but names of something
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
            found = read_local(path, config_name, cache_dir, warn)
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


def read_local(path: Path, config_name: str | None, cache_dir: str | None, warn: Callable[[str], object] = print):
    """A folder or a file, in any of the forms in which people keep small images."""
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return from_npz(path, warn)
        if path.suffix.lower() not in READERS:
            kinds = f"is a file, and not one of {', '.join([*READERS, '.npz'])}"
            cure = f'`numpy.savez("images.npz", x_train=numpy.load("{path.name}"))` makes one of it'
            if path.suffix.lower() != ".npy":
                cure = "unpack it, or name the folder that it lies in"
            raise ConfigError(f"--dataset_name {path}: {kinds}; {cure}")
        return datasets.load_dataset(READERS[path.suffix.lower()], data_files=str(path), cache_dir=cache_dir)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)
    if idx := find_idx(path):
        return from_idx(path, idx, warn)
    if not any(file.is_file() for file in path.rglob("*")):
        link = next((file for file in path.rglob("*") if file.is_symlink()), None)
        cure = f"put images into {path / 'train'}" if link is None else f"links to folders, {link}, are not followed"
        raise ConfigError(f"--dataset_name {path}: the folder holds no files; {cure}")
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
    images = [f.relative_to(path).parts for f in path.rglob("*") if f.suffix.lower() in ImageFolder.EXTENSIONS]
    images = [parts for parts in images if not any(part.startswith((".", "__")) for part in parts)]
    if (path / "train").is_dir():
        images = [parts for parts in images if len(parts) > 1]  # folders name the splits: a picture beside them is none
    files = len(images)
    rows = sum(split.num_rows for split in found.values())
    if 0 < rows < files:
        raise ConfigError(
            f"--dataset_name {path}: only {rows} of its {files} images would be read, since a file with train, test or "
            "valid in its name counts as a split; move the images into a folder named train"
        )


# ---- other forms than those of `datasets` --------------------------------------------------------------------------


def from_arrays(
    path: Path, splits: dict[str, tuple[np.ndarray, np.ndarray | None]], warn: Callable[[str], object] = print
) -> datasets.DatasetDict:
    """Splits of `image` and `label` out of arrays.

    Args:
        path: where they are from.
        splits: images `[N, H, W]` or `[N, H, W, C]`, uint8, C = 1, 3 or 4; labels `[N]` or `[N, 1]`, whole numbers.
            Other labels become what they are, a column that only a run with classes looks at.
        warn: is told of labels that are left out, since they are of another number of images.

    Raises:
        ConfigError: the images are not that.
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
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image()}))
        if labels is not None and len(labels) != len(pixels):
            warn(f"{path}: {len(labels)} {split} labels are left out, since there are {len(pixels)} images.")
        elif labels is not None:
            labels = labels.squeeze(1) if labels.shape[1:] == (1,) else labels
            rows = rows.add_column("label", labels.tolist())
            whole = labels.ndim == 1 and labels.dtype.kind in "iuf" and (labels == labels.astype(np.int64)).all()
            if whole and labels.max(initial=0) < MOST_CLASSES:
                kind = datasets.ClassLabel(num_classes=max(1, int(labels.max(initial=0)) + 1))
                rows = rows.cast_column("label", datasets.Value("int64")).cast_column("label", kind)
        made[split] = rows
    return datasets.DatasetDict(made)


def from_npz(path: Path, warn: Callable[[str], object] = print) -> datasets.DatasetDict:
    """Keras' mnist.npz and the like: x_train, y_train, x_test, y_test; or images and labels of one split."""
    keys = (
        ("x_train", "y_train", "train"),
        ("x_test", "y_test", "test"),
        ("train_images", "train_labels", "train"),
        ("test_images", "test_labels", "test"),
        ("images", "labels", "train"),
    )
    try:
        with np.load(path, allow_pickle=False) as file:
            there = list(file)
            pairs = {split: (x, y) for x, y, split in keys[::-1] if x in there}  # the first form that is there
            images = {split: file[x] for split, (x, _) in pairs.items()}
            labels = {split: readable(file, y, warn) for split, (_, y) in pairs.items() if y in there}
    except Exception as error:  # of NumPy, zip and zlib; also where pickled objects are inside
        raise ConfigError(
            f"--dataset_name {path}: cannot be read as arrays ({first_line(error, 100)}); `numpy.savez` makes a file "
            "that can"
        ) from error
    if "train" not in images:
        raise ConfigError(
            f"--dataset_name {path}: holds {shorten(there) or 'nothing'}; x_train (y_train, x_test, y_test) are read"
        )
    return from_arrays(path, {split: (images[split], labels.get(split)) for split in images}, warn)


def readable(file, name: str, warn: Callable[[str], object]) -> np.ndarray | None:
    """An array of labels; None, which is said, where it cannot be read: not every run needs them."""
    try:
        return file[name]
    except Exception as error:  # pickled objects, a damaged part
        warn(f"{name} cannot be read ({first_line(error, 100)}), and is left out.")
        return None


# train-images-idx3-ubyte.gz as MNIST's page has it, train-images.idx3-ubyte as archives of it, and EMNIST's
# emnist-letters-train-images-idx3-ubyte.
IDX_NAME = re.compile(r"(?:(?P<set>.+)-)?(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?")


def find_idx(path: Path) -> dict[tuple[str, str], Path]:
    """MNIST's own files in a folder or below it, by (split, "images" or "labels"); empty where there are none.

    Raises:
        ConfigError: they are of several sets.
    """
    places: dict[tuple[str, str, str], dict[Path, Path]] = {}  # (set, split, kind): file by folder
    for file in sorted(path.rglob("*idx[13]-ubyte*"), key=lambda file: (len(file.parts), file.suffix == ".gz", file)):
        if (match := IDX_NAME.fullmatch(file.name)) and file.is_file():
            split = "train" if match["split"] == "train" else "test"
            home = file.parent
            if IDX_NAME.fullmatch(home.name) or home.name in ("train", "t10k", "test"):
                home = home.parent  # archives with a folder for each file
            places.setdefault((match["set"] or "", split, match["kind"]), {}).setdefault(home, file)
    if not any(home == path for found in places.values() for home in found):  # a folder of images may hold some too
        others = {*ImageFolder.EXTENSIONS, *READERS}
        if any(file.suffix.lower() in others for file in path.rglob("*")):
            return {}
    names = {name for name, _, _ in places}
    homes = [home.relative_to(path.parent).as_posix() for found in places.values() if len(found) > 1 for home in found]
    if len(names) > 1 or homes:
        several = sorted(names) if len(names) > 1 else sorted(set(homes))
        raise ConfigError(
            f"--dataset_name {path}: holds files of {len(several)} sets ({shorten(several)}); name a folder with one"
        )
    return {(split, kind): next(iter(found.values())) for (_, split, kind), found in places.items()}


def from_idx(
    path: Path, files: dict[tuple[str, str], Path], warn: Callable[[str], object] = print
) -> datasets.DatasetDict:
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
            file, labels = files[split, "images"], None
            if (split, "labels") in files:
                try:
                    labels = read(files[split, "labels"])
                except ConfigError as error:  # not every run needs them
                    warn(f"The labels are left out: {error}.")
            images = read(file)
            if "emnist" in file.resolve().relative_to(path.resolve().parent).as_posix().lower():
                warn(f"{file.name}: EMNIST keeps its images by columns; they are turned upright.")
                images = images.swapaxes(1, 2)
            splits[split] = (images, labels)
    return from_arrays(path, splits, warn)


def embedded_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits, real and in its wheel: 8x8, upscaled to 28x28; the last 297 for test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    eight = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = [Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in eight]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return datasets.DatasetDict(train=whole.select(range(1500)), test=whole.select(range(1500, 1797)))
