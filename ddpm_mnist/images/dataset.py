"""The data of a run: where its images come from, which are held out, and their labels."""

import glob
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from ..errors import ConfigError, cause_of, check_lfs, first_line, shorten
from ..offline import hub_folder
from ..options import DataOptions
from ..randomness import seeded_generator
from .batches import Images, memory_mapped
from .decode import decode_column, open_image

DOCS = 'see "Other images" in docs/running.md'
MOST_CLASSES = 100_000  # larger numbers identify something else
LOOKED_AT = 256  # images that decide whether a set has colour
MIN_CONTRAST = 32  # of 255; a smaller range means unscaled pixels, such as 0 and 1, or 0 to 16


@dataclass
class Data:
    """`train`: images to train on; `test`: held-out images; `fingerprint`: a hash of the training set."""

    name: str  # the Hub id, or the name of the local folder without its path
    train: Images
    test: Images
    fingerprint: str
    local: bool = False  # read from this machine's disk: its name says nothing elsewhere
    commit: str | None = None  # of a dataset of the Hub, by which its folder in the cache is named


def load_data(
    options: DataOptions,
    channels: int | None,
    size: int,
    num_classes: int | None = None,
    num_held_out: int | None = None,
    warn=print,
    with_labels: bool = False,
) -> Data:
    """Everything that a run reads: images `[channels, size, size]` to train on, and at most `num_held_out` others.

    `channels` None: 1 or 3, as the images have. Labels, 0 ... num_classes - 1, are read only if there are classes, or
    `with_labels`. What cannot be loaded or used is a ConfigError that says what to do.
    """
    with_labels = with_labels or num_classes is not None
    named = options.dataset_name
    option, local = f"--dataset_name {named}", Path(named).exists()
    folder = Path(named) if local else hub_folder("--dataset_name", named, "dataset")
    name = folder.resolve().name if local else named.partition("@")[0]  # a path may hold a user name
    splits = load_splits(option, folder, options)
    column = column_of(splits, "--image_column", options.image_column, datasets.Image, needed=True)
    label_column = column_of(splits, "--label_column", options.label_column, datasets.ClassLabel, needed=with_labels)
    parts = hold_out(splits, num_held_out)
    labels, test_labels = (
        read_labels(part, label_column, num_classes, which) if with_labels else None
        for part, which in zip(parts, ("training", "held-out"))
    )
    if num_classes and (absent := sorted(set(range(num_classes)) - set(labels.tolist()))):
        warn(f"{name}: no training image is of class {shorten(absent)}, which the U-Net cannot learn.")

    files = [undecoded(part, column) for part in parts]
    channels = channels or channels_of(files[0], column)
    how = {"channels": channels, "size": size, "center_crop": options.center_crop}
    rows, test_rows = (decode_column(part, options.dataloader_num_workers, options.cache_dir, **how) for part in files)
    images, test_images = (memory_mapped(part, (channels, size, size)) for part in (rows, test_rows))
    low, high = images.aminmax()
    if high - low < MIN_CONTRAST:
        raise ConfigError(f"--dataset_name: the pixels lie between {low} and {high}; scale them to 0 ... 255")
    train, test = Images(images, labels), Images(test_images, test_labels)
    return Data(name, train, test, fingerprint(images, labels), local, None if local else folder.name)


def column_of(splits: DatasetDict, option: str, named: str | None, feature_type, needed: bool) -> str | None:
    """The named column, or the only one of that type, else None. ConfigError: it is named or needed, and absent."""
    features = splits["train"].features
    columns = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    if named in features or (named is None and len(columns) == 1):
        return named or columns[0]
    if named or needed:
        use = f"name the column to use as {feature_type.__name__}, one of {shorten(features)}"
        raise ConfigError(f"{option}{f' {named}' if named else ''}: {use}; or {DOCS}")
    return None


def hold_out(splits: DatasetDict, count: int | None) -> list[Dataset]:
    """The images to train on, and at most `count` others: of the test or validation split, else a twentieth of train.

    ConfigError: the train split is too small.
    """
    train, others = splits["train"], [split for split in ("test", "validation") if len(splits.get(split, ()))]
    if others:
        held_out = splits[others[0]]
    else:  # drawn, since a set may be sorted by class
        order = torch.randperm(len(train), generator=seeded_generator(0, "subset"))
        cut = max(1, len(order) // 20)
        train, held_out = (train.select(sorted(rows.tolist())) for rows in (order[cut:], order[:cut]))
    if len(train) == 0:
        raise ConfigError(f"--dataset_name: the train split has {len(splits['train'])} images; give it more")
    return [train, held_out.select(spread(len(held_out), count))]


def spread(length: int, count: int | None) -> np.ndarray:
    """`count` of the numbers 0 ... length - 1, evenly spread, since a set may be sorted; all if it is None or more."""
    return np.linspace(0, length - 1, min(length, count or length)).round().astype(int)


def read_labels(dataset: Dataset, column: str, num_classes: int | None, which: str) -> Tensor:
    """`[N]` int64. ConfigError: a row without a label, or with one that is not a class of the U-Net."""
    values = dataset[column][:] if column in dataset.features else [None]  # a test split may have hidden labels
    end = num_classes or MOST_CLASSES
    for row, value in enumerate(values):
        if not isinstance(value, (int, float)) or value % 1 != 0 or not 0 <= value < end:
            problem = f"row {row} of the {which} images holds {value!r:.40}, which is not a class number below {end}"
            raise ConfigError(f"--label_column {column}: {problem} (unet.num_class_embeds); {DOCS}")
    return torch.tensor(values, dtype=torch.int64)


def undecoded(dataset: Dataset, column: str) -> Dataset:
    """The image column alone, as the files in it. ConfigError: it holds something else."""
    try:
        return dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of `datasets` and of Arrow
        raise ConfigError(f"--image_column {column}: does not hold images ({first_line(error)}); {DOCS}") from error


def channels_of(dataset: Dataset, column: str) -> int:
    """1 if all images that are looked at are grey, however they are stored, else 3."""
    for row in dataset.select(spread(len(dataset), LOOKED_AT)):
        with suppress(Exception):  # decoding all of them, later, names those that cannot be decoded
            if len({channel.tobytes() for channel in open_image(row[column]).split()}) > 1:  # not all grey
                return 3
    return 1


def fingerprint(images: Tensor, labels: Tensor | None) -> str:
    """A short hash of the training pixels and labels, wherever they are kept."""
    digest = hashlib.sha256(images.numpy())
    if labels is not None:
        digest.update(labels.numpy())
    return f"{len(images)} images, {digest.hexdigest()[:16]}"


def load_splits(option: str, folder: Path, options: DataOptions) -> DatasetDict:
    """The splits of the dataset in a folder or file. ConfigError: it has no train split, or cannot be loaded."""
    try:
        splits = read_local(folder, options)
    except Exception as error:  # `datasets` and what reads for it raise what they like
        check_lfs(option, folder)
        if isinstance(error, ConfigError):
            raise
        advice = "choose one with --dataset_config_name" if "Config name is missing" in str(error) else DOCS
        raise ConfigError(f"{option}: cannot be loaded ({cause_of(error)}); {advice}") from error
    if "train" not in splits:
        raise ConfigError(f"{option}: has no train split ({shorten(splits)}); put images into a folder named train")
    return splits.with_format(None)


def read_local(path: Path, options: DataOptions) -> DatasetDict:
    """A folder or a file: what `save_to_disk` saved, or what `load_dataset` reads."""
    if not path.is_dir() and not path.is_file():
        raise ValueError("a pipe or a device, and neither a folder nor a file")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(path)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    if glob.has_magic(str(path.absolute())):
        raise ConfigError(f"--dataset_name {path}: `datasets` reads [, * and ? in a path as a pattern; rename it")
    folder, file = (path.absolute(), None) if path.is_dir() else (path.absolute().parent, path.name)
    return datasets.load_dataset(str(folder), options.dataset_config_name, data_files=file, cache_dir=options.cache_dir)
