"""The training images: from a dataset to batches of x_0 in [-1, 1].

Images are decoded once, into a file of the cache of `datasets`, and held in memory as one uint8 tensor, so that a batch
costs an index and not a decode. A set too large for that stays in the file. Either way the images of global batch n are
a function of the seed and n alone: batches are cut from an endless sequence of epochs, each a fresh permutation, and
every process takes its share. No epoch has a last, smaller batch: it is filled from the next epoch.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from .decode import VERSION, decode_rows, has_colour, ink_of, open_image, paper_for, to_eight_bits
from .errors import ConfigError, shorten
from .options import DataOptions
from .randomness import seeded_generator
from .sources import load_splits

DARK = 3  # of 255: a set whose pixels differ by no more was meant otherwise, such as 0 and 1 for black and white
LOOKED_AT = 64  # images that decide what paper a transparent set is put on, and whether a set has colour


@dataclass(frozen=True)
class ImageShape:
    """What a U-Net takes: images `[channels, size, size]`, and labels 0 ... num_classes - 1 (None: no labels).

    `channels` None: 1 or 3, as the images have.
    """

    channels: int | None
    size: int
    num_classes: int | None = None


# ---- columns -------------------------------------------------------------------------------------------------------


def is_encoded_image(feature) -> bool:
    """Whether a column holds files of images, with or without the metadata that says so."""
    names = set(feature) if isinstance(feature, dict) else set()
    return isinstance(feature, datasets.Image) or feature == datasets.Value("binary") or names == {"bytes", "path"}


def image_column_of(dataset: datasets.Dataset, options: DataOptions) -> str:
    """The image column, named or the only one. ConfigError: there is no such, or several."""
    features = dataset.features
    encoded = [name for name, feature in features.items() if is_encoded_image(feature)]
    images = [name for name in encoded if isinstance(features[name], datasets.Image)] or encoded
    named = options.image_column
    if named is not None and named not in features:
        raise ConfigError(f"--image_column {named}: no image column; there are: {shorten(images) or 'none'}")
    if named is None and len(images) == 1:
        return images[0]
    if named is not None and named in encoded:
        return named
    if named is not None or not images:
        what = f"--image_column {named}: no image column" if named else "--image_column: no column holds images"
        raise ConfigError(
            f"{what}, among {shorten(features)}; pixels in lists or arrays become images by `dataset.map(lambda row: "
            '{"image": PIL.Image.fromarray(numpy.uint8(row[COLUMN]))})`'
        )
    raise ConfigError(
        f"--image_column: the dataset has {len(images)} image columns among {shorten(features)}; name the one"
    )


def label_column_of(dataset: datasets.Dataset, options: DataOptions) -> str | None:
    """The label column, named or the only ClassLabel; None where there is none. ConfigError: a named one is missing."""
    features, named = dataset.features, options.label_column
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if named is not None and named not in features:
        raise ConfigError(f"--label_column {named}: no such column; there are: {shorten(features)}")
    return named or (labels[0] if len(labels) == 1 else None)


def labels_are_hidden(
    dataset: datasets.Dataset, train: datasets.Dataset, options: DataOptions, by_row: bool = True
) -> bool:
    """Whether a split has no label column although the train split has one; or, `by_row`, -1 or nothing in each row."""
    column = label_column_of(train, options)
    if column is None or column not in dataset.features:
        own = None if options.label_column else label_column_of(dataset, options)  # by another name
        return column is not None and own is None
    return by_row and all(label in (None, -1) for label in dataset.with_format(None)[column][:])


def cut_off_a_twentieth(dataset: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The set without one image in twenty, but at least one, and those; drawn, since a set may be sorted by class."""
    order = torch.randperm(len(dataset), generator=seeded_generator(0, "subset"))
    cut = max(1, len(dataset) // 20)
    return dataset.select(sorted(order[cut:].tolist())), dataset.select(sorted(order[:cut].tolist()))


def read_labels(dataset: datasets.Dataset, column: str | None, num_classes: int | None, what: str) -> Tensor:
    """`[N]` int64. ConfigError: rows without a label, labels that are no class numbers, or out of range."""
    if column is None:
        raise ConfigError(
            "--label_column: classes, and evaluation, need labels, but no column is a ClassLabel; name one of "
            f"{shorten(dataset.features)} (folders are read as classes only where all splits have them)"
        )
    option, values = f"--label_column {column}", dataset.with_format(None)[column][:]
    none = [row for row, value in enumerate(values) if value is None or value == -1]
    if none:
        problem = f"{len(none)} rows of the {what} split have no label ({shorten(none)}); remove them"
        if len(none) == len(values):
            problem = (
                f"no row of the {what} split has a label; classes, and evaluation, need them; name a column with "
                "labels, or put the images of each class into a folder of its own, in every split"
            )
        raise ConfigError(f"{option}: {problem}")
    try:
        labels = np.array(values)
        whole = labels.astype(np.int64)
        if labels.ndim != 1 or labels.dtype.kind not in "iufb" or not (whole == labels).all():
            raise ValueError
    except (ValueError, TypeError):
        cure = f'`dataset.class_encode_column("{column}")` makes class numbers of names'
        if isinstance(values[0], (list, tuple, dict)):
            cure = "an image needs one class number; numpy.argmax makes it of a one-hot row"
        raise ConfigError(f"{option}: holds {repr(values[0])[:40]} and not whole numbers; {cure}") from None
    low, high = int(whole.min()), int(whole.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise ConfigError(
            f"{option}: labels from {low} to {high}, but the U-Net has the classes 0 to {(num_classes or 1) - 1}; "
            + ("raise unet.num_class_embeds" if low >= 0 else "a class number cannot be negative")
        )
    return torch.from_numpy(whole)


# ---- images --------------------------------------------------------------------------------------------------------


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


def to_tensor(pixels: list[bytes], shape: ImageShape) -> Tensor:
    """`[N, C, H, W]` uint8 out of the bytes of N images."""
    array = np.frombuffer(bytearray(b"".join(pixels)), np.uint8)
    return torch.from_numpy(array.reshape(-1, shape.channels, shape.size, shape.size))


def scale(pixels: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float32 -1 ... 1, the range in which x_T ~ N(0, I) has about the scale of the data."""
    return pixels.float() / 127.5 - 1


def look_at(dataset: datasets.Dataset, image_column: str) -> tuple[int | None, int, bool]:
    """What a set is like, by `LOOKED_AT` images, evenly spread.

    Raises:
        ConfigError: their greys differ, but not to the eye.

    Returns:
        The brightness of the paper that transparent images are put on: the one on which ink is seen. None where all
        are opaque. The channels: 1 where all images are grey, however they are stored, else 3. Whether all are blank.
    """
    inks, colour, low, high = [], False, 255, 0
    for row in np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).astype(int).tolist():
        try:
            image = open_image(dataset[row][image_column])
            inks.append(ink_of(image))
            channels = to_eight_bits(image).convert("RGBA").getextrema()
            for dark, bright in channels if inks[-1] is not None else channels[:3]:
                low, high = min(low, dark), max(high, bright)
            colour = colour or has_colour(to_eight_bits(image))
        except Exception:  # decoding all of them, later, names the ones that cannot be decoded
            continue
    if 0 < high - low <= DARK:
        raise ConfigError(
            f"--dataset_name: the pixels of its column {image_column} lie between {low} and {high} of 255, which is "
            "one grey to the eye; scale them"
        )
    inks = [ink for ink in inks if ink is not None]
    return paper_for(sum(inks) / len(inks)) if inks else None, 3 if colour else 1, high == low


def decode_split(
    dataset: datasets.Dataset, options: DataOptions, shape: ImageShape, paper: int | None, what: str
) -> datasets.Dataset:
    """The decoded pixels of a split, a row `pixels` of bytes for each image, in the cache on the disk.

    Raises:
        ConfigError: the split is empty, has images that cannot be decoded, or of several sizes or shapes.
    """
    if len(dataset) == 0:
        raise ConfigError(f"--dataset_name: the {what} split is empty")
    column = image_column_of(dataset, options)
    rows = undecoded(dataset, column).map(
        partial(
            decode_rows,
            version=VERSION,
            channels=shape.channels,
            size=shape.size,
            center_crop=options.center_crop,
            paper=paper,
        ),
        with_indices=True,
        batched=True,
        input_columns=[column],
        remove_columns=[column],
        features=datasets.Features(
            {
                "pixels": datasets.Value("binary"),
                "shape": datasets.List(datasets.Value("int32")),
                "colour": datasets.Value("bool"),
            }
        ),
        num_proc=options.dataloader_num_workers or None,
        desc=f"decoding the {what} images (once)",
    )
    shapes = np.unique(np.array(rows["shape"]), axis=0)
    several = len(shapes) > 1
    if not options.center_crop and (several or shapes[0][0] != shapes[0][1]):
        first, last = ("x".join(map(str, s)) for s in (shapes[0], shapes[-1]))
        found = f"images of {len(shapes)} sizes, such as {first} and {last}" if several else f"images of {first}"
        raise ConfigError(
            f"--dataset_name: {found}, which are not resized to {shape.size}x{shape.size} unasked; --center_crop takes "
            "the square in the middle of each (--resolution sets another size)"
        )
    return rows


def undecoded(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The image column alone, as the files in it."""
    return dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))


# ---- what a run trains and validates on ----------------------------------------------------------------------------


@dataclass
class Data:
    """`train`: endless batches through `index_batches`; `test`: held-out images; `fingerprint`: what was read."""

    name: str  # the Hub id, or the name of the local folder without its path
    train: Images
    test: Images
    fingerprint: str
    local: bool = False  # read from this machine's disk: its name means nothing elsewhere

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.test.images.shape[1]

    @property
    def pixels(self) -> int:
        """Numbers in an image: channels times height times width."""
        return self.test.images[0].numel()


def load_data(
    options: DataOptions,
    shape: ImageShape,
    num_held_out: int | None = None,
    warn=print,
    with_labels: bool = False,
) -> Data:
    """Everything that a run reads: the train split, and held-out images from the test (or validation) split.

    Where there is neither, one image in twenty of the train split is held out of the training.
    Labels are read only where they are needed: for the classes in `shape`, or `with_labels`, where those of held-out
    images may be hidden: None.

    Raises:
        ConfigError: the data cannot be found, read or used; the message says why, and what to do.
    """
    name, splits, local = load_splits(options.dataset_name, options.dataset_config_name, options.cache_dir, warn)
    train = splits["train"]
    conditional = shape.num_classes is not None
    there = [split for split in ("test", "validation") if len(splits.get(split, ()))]
    hidden = []
    if conditional or with_labels:
        hidden = [s for s in there if labels_are_hidden(splits[s], train, options, by_row=not conditional)]
    if hidden and conditional:  # whose held-out loss needs labels; rows without one are named below
        warn(f"{name}: its {hidden[0]} split has no labels, so that other images are held out.")
        there = [split for split in there if split not in hidden]
    there.sort(key=lambda split: split in hidden)
    if there:
        held_out = splits[there[0]]
    elif len(train) < 2:
        raise ConfigError(f"--dataset_name {name}: the train split has {len(train)} images; training needs some")
    else:
        train, held_out = cut_off_a_twentieth(train)
    wanted = min(len(held_out), num_held_out or len(held_out))
    held_out = held_out.select(np.linspace(0, len(held_out) - 1, wanted).round().astype(int))  # it may be sorted
    if len(train) == 0:
        raise ConfigError(f"--dataset_name {name}: the train split is empty")

    column = image_column_of(train, options)
    paper, channels, blank = look_at(undecoded(train, column), column)
    if blank:
        warn(f"{name}: its images are blank, all of one grey.")
    if shape.channels is None:
        shape = replace(shape, channels=channels)
    if paper is not None:
        warn(f"{name}: transparent images are put on {'white' if paper else 'black'} paper.")
    label_column, labels = label_column_of(train, options), [None, None]  # a wrong name is an error in any run
    if conditional or with_labels:
        labels[0] = read_labels(train, label_column, shape.num_classes, "train")
        if not there or there[0] not in hidden:
            own = label_column if label_column in held_out.features else label_column_of(held_out, options)
            labels[1] = read_labels(held_out, own, shape.num_classes, "held-out")
    if conditional and (absent := sorted(set(range(shape.num_classes)) - set(labels[0].tolist()))):
        warn(f"{name}: no training image is of class {shorten(absent)}, which the U-Net cannot learn.")
    rows = [decode_split(split, options, shape, paper, what) for split, what in ((train, "train"), (held_out, "test"))]
    if said := change_of_colour(rows[0], shape.channels):
        warn(f"{name}: {said}.")
    images = Images(to_tensor(rows[0]["pixels"][:], shape), labels[0])
    test = Images(to_tensor(rows[1]["pixels"][:], shape), labels[1])
    shown = Path(name).resolve().name if local else name  # a path is nobody else's business
    return Data(shown, images, test, fingerprint(rows[0], labels[0]), local)


def change_of_colour(rows: datasets.Dataset, channels: int) -> str | None:
    """What is to be said of images that lose their colour, or that are grey and get three equal channels."""
    coloured = sum(rows["colour"][:])
    if channels == 1 and coloured:
        return f"{coloured:,} of {len(rows):,} images have colour and are made grey (unet.in_channels is 1; 3 keeps it)"
    if channels == 3 and not coloured:
        return "the images are grey and get three equal channels (unet.in_channels is 3; 1 is enough)"
    return None


def fingerprint(rows: datasets.Dataset, labels: Tensor | None) -> str:
    """A short text that differs when the pixels or the labels that are trained on do, wherever they are kept."""
    digest = hashlib.sha256()
    for batch in rows.select_columns("pixels").iter(1000):
        digest.update(b"".join(batch["pixels"]))
    if labels is not None:
        digest.update(labels.numpy())
    return f"{len(rows)} images, {digest.hexdigest()[:16]}"


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
