"""One stored image to pixels: 8 or 16 bits; grey, colour or a palette; transparency becomes white.

`datasets` decodes the file: its format, its orientation, the first frame of an animation.
"""

import hashlib
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import PIL
from PIL import Image

from ..errors import LFS_ADVICE, LFS_POINTER, ConfigError, first_line, shorten

# Part of the key of the cached pixels: changes with this file and with Pillow.
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16] + PIL.__version__


def open_image(cell: dict | None) -> Image.Image:
    """The image in an undecoded cell of `datasets`, mode L or RGB; what is transparent is put on white.

    Raises whatever the decoder does, and ValueError for pixels whose range is not known.
    """
    if cell is None:
        raise ValueError("the cell is empty")
    path = Path(cell["path"] or "")
    if (cell["bytes"] or (path.read_bytes() if path.is_file() else b"")).startswith(LFS_POINTER):
        raise ValueError(LFS_ADVICE)
    image = datasets.Image().decode_example(cell)
    if image.mode.startswith("I;16") and not image.has_transparency_data:
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} and not 8 or 16 bits; docs/running.md converts it")
    if not image.has_transparency_data:
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def decode(cell: dict | None, channels: int, size: int, center_crop: bool) -> dict[str, bytes | str]:
    """One cell -> uint8 `[channels, size, size]` as bytes, and "WIDTHxHEIGHT" before the resizing."""
    image = open_image(cell)
    if center_crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    shape = f"{image.width}x{image.height}"
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
    return {"pixels": pixels.tobytes(), "shape": shape}


def decode_rows(cells: list, indices: list[int], version: str, **how) -> dict[str, list]:
    """`decode` for `datasets.map`; `version` is part of the cache's key. ConfigError: names images that are bad."""
    rows, problems = [], []
    for cell, index in zip(cells, indices):
        try:
            rows.append(decode(cell, **how))
        except Exception as error:  # whatever a decoder raises on whatever a file holds
            path = f" ({cell['path']})" if cell and cell["path"] else ""
            problems.append(f"image {index}{path}: {first_line(error, 160)}")
    if problems:
        raise ConfigError(f"--dataset_name: remove or replace images that cannot be decoded: {shorten(problems, 3)}")
    return {name: [row[name] for row in rows] for name in rows[0]}


def decode_column(images: datasets.Dataset, num_proc: int, cache_dir: str | None, **how) -> datasets.Dataset:
    """What `decode` makes of a column of undecoded images, or the cache has. ConfigError: see `decode_rows`; sizes."""
    key = hashlib.sha256(f"{images._fingerprint}, {VERSION}, {how}".encode()).hexdigest()[:16]
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm-mnist"  # never in the folder of the images
    cache.mkdir(parents=True, exist_ok=True)
    decoded = partial(
        images.map,
        partial(decode_rows, version=VERSION, **how),
        with_indices=True,
        batched=True,
        input_columns=images.column_names,
        remove_columns=images.column_names,
        features=datasets.Features(pixels=datasets.Value("binary"), shape=datasets.Value("string")),
        num_proc=num_proc or None,
        cache_file_name=str(cache / f"pixels-{key}.arrow"),
        desc="decoding the images (once)",
    )
    try:
        rows = decoded()
        shapes = sorted(rows.unique("shape"))
    except ConfigError:
        raise
    except Exception:  # the cache is damaged, as by a power cut: decode again
        rows = decoded(load_from_cache_file=False)
        shapes = sorted(rows.unique("shape"))
    if not how["center_crop"] and (len(shapes) > 1 or len(set(shapes[0].split("x"))) > 1):
        problem = f"images of {shorten(shapes, 3)} are not squares of one size"
        raise ConfigError(f"--dataset_name: {problem}; --center_crop takes the square in the middle of each")
    return rows
