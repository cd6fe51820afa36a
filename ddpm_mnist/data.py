"""The training images: from the Hub, a folder or scikit-learn's wheel to batches of x_0 in [-1, 1].

Images are decoded once (`datasets` caches the result) into one uint8 tensor, so that a batch costs an index and not a
decode. A set too large for that is decoded by DataLoader workers as it goes. Either way the images of global batch n
are a function of the seed and n alone: batches are cut from an endless row of epochs, each a fresh permutation, and
every process takes its share. No epoch has a last, smaller batch: a batch that reaches its end goes on in the next.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .client import go_offline, hub_status
from .options import ConfigError, first_line, opt
from .randomness import seeded_generator

DEFAULT_DATASET = "ylecun/mnist"
EMBEDDED_DATASET = "scikit-learn digits"


@dataclass
class DataOptions:
    """Data"""

    dataset_name: str | None = opt(
        None,
        "Hub id or local folder. Default: ylecun/mnist, or scikit-learn's digits where the Hub is out of reach.",
        path=True,
    )
    dataset_config_name: str | None = opt(None, "The dataset's configuration, where it has several.")
    image_column: str | None = opt(None, "Column of images. Default: the only one there is.")
    label_column: str | None = opt(None, "Column of class labels. Default: the only ClassLabel column, if any.")
    max_resident_gb: float = opt(
        2.0, "A larger training set is streamed by workers instead of held as one tensor.", at_least=0
    )
    dataloader_num_workers: int = opt(2, "Workers for a streamed set.", at_least=0)
    cache_dir: str | None = opt(None, "Where `datasets` keeps its cache.", path=True)


@dataclass(frozen=True)
class ImageShape:
    """What a U-Net takes: images `[channels, size, size]`, and labels 0 ... num_classes - 1 (None: no labels)."""

    channels: int
    size: int
    num_classes: int | None = None


# ---- where the images come from ------------------------------------------------------------------------------------


def load_embedded() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits, real and in its wheel: 8x8, upscaled to 28x28; the last 297 for test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    eight = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = [Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in eight]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return datasets.DatasetDict(train=whole.select(range(1500)), test=whole.select(range(1500, 1797)))


def load(options: DataOptions, warn=print) -> tuple[str, datasets.DatasetDict]:
    """The name and the splits of the dataset that `options` ask for.

    Without a name: ylecun/mnist, from the cache where the Hub is out of reach, and else, after a loud warning through
    `warn`, the embedded digits. A name that was given is never replaced.

    Raises:
        ConfigError: there is no such dataset, configuration or train split, or it cannot be reached or read.
    """
    name = options.dataset_name or DEFAULT_DATASET
    if name == EMBEDDED_DATASET:
        return name, load_embedded()
    option = f"--dataset_name {name}"
    local = Path(name).exists()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"{option}: no such folder")
    if not local:
        status = hub_status(name, "dataset")
        if status == "missing":
            raise ConfigError(f"{option}: not on the Hub, or private; check the name, or log in with `hf auth login`")
        if status == "unreachable":
            go_offline()
    try:
        found = datasets.load_dataset(name, options.dataset_config_name, cache_dir=options.cache_dir)
    except ConnectionError:
        if options.dataset_name is None:
            warn(
                f"\n!!! The Hub cannot be reached and {name} is not in the cache: TRAINING ON {EMBEDDED_DATASET}"
                " INSTEAD (1,797 real digits, 8x8 upscaled to 28x28).\n!!! For MNIST, connect to the network, or name a"
                " local copy with --dataset_name.\n"
            )
            return EMBEDDED_DATASET, load_embedded()
        raise ConfigError(
            f"{option}: the Hub cannot be reached and the cache does not have it; connect, or name a local folder"
        ) from None
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as e:
        raise ConfigError(f"{option}: cannot be loaded ({first_line(e)})") from None
    if not isinstance(found, datasets.DatasetDict) or "train" not in found:
        raise ConfigError(f"{option}: has no split named train, only {', '.join(found)}")
    return name, found


# ---- from files to bytes -------------------------------------------------------------------------------------------


def choose_columns(dataset: datasets.Dataset, options: DataOptions, shape: ImageShape) -> tuple[str, str | None]:
    """The image column and the label column (None where there is none), named or guessed.

    Raises:
        ConfigError: a named column is missing or of the wrong kind, or there is nothing, or too much, to guess from.
    """
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image_column = options.image_column
    if image_column is None:
        if len(images) != 1:
            raise ConfigError(
                f"--image_column: the dataset has {len(images)} image columns among {', '.join(features)}; name the one"
            )
        image_column = images[0]
    elif image_column not in images:
        raise ConfigError(f"--image_column {image_column}: no image column; there are: {', '.join(images) or 'none'}")

    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    label_column = options.label_column or (labels[0] if len(labels) == 1 else None)
    if label_column is not None and label_column not in features:
        raise ConfigError(f"--label_column {label_column}: no such column; there are: {', '.join(features)}")
    if label_column is None and shape.num_classes is not None:
        raise ConfigError("--label_column: unet.num_class_embeds needs labels, but no column is a ClassLabel; name it")
    return image_column, label_column


def decode(cell: dict, index: int, mode: str, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """One undecoded image of `datasets` -> pixels `[C, size, size]` uint8, and the (width, height) that it had."""
    try:
        image = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError) as e:
        raise ConfigError(f"--dataset_name: image {index} cannot be decoded ({first_line(e)}); remove it") from None
    original = image.size
    image = image.convert(mode)
    if original != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1), original


def decode_rows(cells: list[dict], indices: list[int], mode: str, size: int) -> dict[str, list]:
    """`decode` for `datasets.map`, which caches the result on disk by a fingerprint of data, code and arguments."""
    decoded = [decode(cell, index, mode, size) for cell, index in zip(cells, indices)]
    return {"pixels": [pixels.tobytes() for pixels, _ in decoded], "size": [list(original) for _, original in decoded]}


@dataclass
class Images:
    """`images`: `[N, C, H, W]` uint8; `labels`: `[N]` int64, or None."""

    images: Tensor
    labels: Tensor | None
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Images":
        """Batches come on `device`. So do all the images, unless they would take half of a GPU's free memory."""
        self.device = device
        if device.type != "cuda" or self.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images = self.images.to(device)
            self.labels = None if self.labels is None else self.labels.to(device)
        return self

    def batches(self, index_batches: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """x_0 `[B, C, H, W]` float32 in [-1, 1], and labels `[B]`, for each tensor of indices."""
        for indices in index_batches:
            if self.images.is_cuda:  # from pinned memory, so that the host need not wait for the GPU
                indices = indices.pin_memory().to(self.images.device, non_blocking=True)
            labels = None if self.labels is None else self.labels[indices].to(self.device)
            yield scale(self.images[indices].to(self.device)), labels


def scale(pixels: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float32 -1 ... 1, the range in which x_T ~ N(0, I) has about the scale of the data."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `scale`: [-1, 1] (clamped to it) -> uint8 0 ... 255, rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def decode_split(dataset: datasets.Dataset, options: DataOptions, shape: ImageShape, what: str) -> Images:
    """A split as one tensor. ConfigError: it is empty, has a corrupt image, or images of several sizes."""
    image_column, label_column = choose_columns(dataset, options, shape)
    channels, size = shape.channels, shape.size
    if len(dataset) == 0:
        raise ConfigError(f"--dataset_name: the {what} split is empty")
    rows = dataset.cast_column(image_column, datasets.Image(decode=False)).map(
        partial(decode_rows, mode="L" if channels == 1 else "RGB", size=size),
        with_indices=True,
        batched=True,
        input_columns=[image_column],
        remove_columns=[name for name in dataset.column_names if name != label_column],
        features=datasets.Features(
            {
                "pixels": datasets.Value("binary"),
                "size": datasets.List(datasets.Value("int32")),
                **({label_column: dataset.features[label_column]} if label_column else {}),
            }
        ),
        desc=f"decoding the {what} images (once)",
    )
    sizes = np.unique(np.array(rows["size"]), axis=0)
    if len(sizes) > 1:
        raise ConfigError(
            f"--dataset_name: images of {len(sizes)} sizes, such as {'x'.join(map(str, sizes[0]))} and"
            f" {'x'.join(map(str, sizes[-1]))}; bring them to one size first, cropped as you want them"
        )
    pixels = np.frombuffer(bytearray(b"".join(rows["pixels"])), np.uint8).reshape(-1, channels, size, size)
    return Images(torch.from_numpy(pixels), read_labels(rows, label_column, shape))


def read_labels(dataset: datasets.Dataset, label_column: str | None, shape: ImageShape) -> Tensor | None:
    """`[N]` int64. ConfigError: some are no class numbers, or a conditional U-Net has no embedding for some."""
    if label_column is None:
        return None
    try:
        labels = torch.tensor(np.array(dataset[label_column], dtype=np.int64))
    except (ValueError, TypeError):
        raise ConfigError(f"--label_column {label_column}: not whole numbers; name the column of classes") from None
    classes = shape.num_classes
    if classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ConfigError(
            f"--label_column {label_column}: labels from {int(labels.min())} to {int(labels.max())}, but "
            f"the U-Net has the classes 0 to {classes - 1}; raise unet.num_class_embeds"
        )
    return labels


# ---- a set that does not fit ---------------------------------------------------------------------------------------


class StreamedImages(torch.utils.data.Dataset):
    """A split that stays in its files; the same `len` and `batches` as `Images`, decoded by DataLoader workers."""

    def __init__(self, dataset: datasets.Dataset, options: DataOptions, shape: ImageShape):
        image_column, label_column = choose_columns(dataset, options, shape)
        self.cells = dataset.cast_column(image_column, datasets.Image(decode=False)).select_columns(image_column)
        self.image_column, self.labels = image_column, read_labels(dataset, label_column, shape)
        self.mode, self.size = "L" if shape.channels == 1 else "RGB", shape.size
        self.num_workers = options.dataloader_num_workers

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
        pixels, _ = decode(self.cells[index][self.image_column], index, self.mode, self.size)
        return torch.from_numpy(pixels.copy()), 0 if self.labels is None else self.labels[index]

    def to(self, device: torch.device) -> "StreamedImages":
        self.device = device
        return self

    def batches(self, index_batches: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=(indices.tolist() for indices in index_batches),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        for pixels, labels in loader:
            pixels, labels = (x.to(self.device, non_blocking=True) for x in (pixels, labels))  # pinned by the loader
            yield scale(pixels), None if self.labels is None else labels


# ---- what a run trains and validates on ----------------------------------------------------------------------------


@dataclass
class Data:
    """`train`: endless batches through `index_batches`; `test`: held-out images; `fingerprint`: what was read."""

    name: str
    train: Images | StreamedImages
    test: Images
    fingerprint: str


def load_data(options: DataOptions, shape: ImageShape, num_held_out: int | None = None, warn=print) -> Data:
    """Everything that a run reads: the train split, and held-out images from the test (or validation) split.

    Where there is neither, the last twentieth of the train split, but at least one image, is held out of the training.

    Raises:
        ConfigError: see `load`, `choose_columns` and `decode_split`.
    """
    name, splits = load(options, warn)
    train = splits["train"]
    held_out = next((splits[s] for s in ("test", "validation") if s in splits and len(splits[s])), None)
    if held_out is None:
        if len(train) < 2:
            raise ConfigError(f"--dataset_name {name}: the train split has {len(train)} images; training needs some")
        cut = len(train) - max(1, len(train) // 20)
        train, held_out = train.select(range(cut)), train.select(range(cut, len(train)))
    held_out = held_out.select(range(min(len(held_out), num_held_out or len(held_out))))

    gigabytes = len(train) * shape.channels * shape.size**2 / 1e9
    if gigabytes > options.max_resident_gb:
        warn(f"{name}: {gigabytes:.1f} GB of pixels, over --max_resident_gb {options.max_resident_gb}: streamed")
        images = StreamedImages(train, options, shape)
    else:
        images = decode_split(train, options, shape, "train")
    return Data(name, images, decode_split(held_out, options, shape, "test"), fingerprint(images))


def fingerprint(images: Images | StreamedImages) -> str:
    """A short text that differs when the training images or their labels do: a run goes on only with the same."""
    if isinstance(images, StreamedImages):
        return f"{len(images)} images, {images.cells._fingerprint}"
    digest = hashlib.sha256(images.images.numpy())
    if images.labels is not None:
        digest.update(images.labels.numpy())
    return f"{len(images)} images, {digest.hexdigest()[:16]}"


def index_batches(
    num_images: int, seed: int, first: int, batch_size: int, accumulation: int, rank: int, num_processes: int
) -> Iterator[Tensor]:
    """This process's indices `[batch_size]`, micro-batch after micro-batch, from global batch number `first` on."""
    permutations: dict[int, Tensor] = {}
    position = first * batch_size * accumulation * num_processes
    while True:
        for micro_step in range(accumulation):
            start = position + (micro_step * num_processes + rank) * batch_size
            places = torch.arange(start, start + batch_size)
            indices = torch.empty_like(places)
            for epoch in (places // num_images).unique().tolist():
                if epoch not in permutations:
                    permutations = {e: p for e, p in permutations.items() if e == epoch - 1}  # forget the past
                    generator = seeded_generator(seed, "epoch", epoch)
                    permutations[epoch] = torch.randperm(num_images, generator=generator)
                here = places // num_images == epoch
                indices[here] = permutations[epoch][places[here] - epoch * num_images]
            yield indices
        position += batch_size * accumulation * num_processes
