"""One stored image to the pixels that a viewer would show.

`datasets` decodes the file (format, orientation, first frame of an animation). What it leaves to its user is done here:
transparency, depth, colour, and the size. Decoded pixels are cached on disk under a key that holds `VERSION`.
"""

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import PIL
from datasets.utils.file_utils import xopen
from PIL import Image

from .errors import ConfigError, first_line

# Changes with this file and with Pillow, so that a cache of another decoder is not read.
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16] + PIL.__version__
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
SHOWN = 3  # problems in one message


class UnusableImage(ValueError):
    """An image whose pixels cannot be told; the message says why and what to do."""


def open_image(cell: dict | bytes | None) -> Image.Image:
    """The image in an undecoded cell of `datasets`, loaded and turned upright; raises whatever the decoder does."""
    if cell is None:
        raise UnusableImage("the cell is empty")
    cell = {"bytes": cell, "path": None} if isinstance(cell, bytes) else cell
    image = datasets.Image().decode_example(cell)
    image.load()
    if image.format is None and image.mode[0] in "IF":  # turned upright: a copy, without what the file says of depth
        with (
            io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else xopen(cell["path"], "rb") as file,
            Image.open(file) as stored,
        ):
            image.format = stored.format
            if stored.format == "TIFF":
                image.tag_v2 = stored.tag_v2
    return image


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Mode L, RGB, LA or RGBA, by what the mode means. Raises UnusableImage for pixels without a known range."""
    mode, tags = image.mode, image.tag_v2 if image.format == "TIFF" else {}
    inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO  # which Pillow minds up to eight bits only
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        top = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
        pixels = np.asarray(image).astype(np.float64) * (255 / top)
        grey = Image.fromarray((255 - pixels if inverted else pixels).round().astype(np.uint8))
        transparent = image.info.get("transparency")  # of PNG: the one grey that is
        if not isinstance(transparent, int):
            return grey
        return Image.merge("LA", (grey, Image.fromarray((np.asarray(image) != transparent).astype(np.uint8) * 255)))
    if mode in ("I", "F"):
        pixels = np.asarray(image)
        top = 255 if mode == "I" else 1  # what such pixels mean where they have a range at all
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= top):
            raise UnusableImage(
                f"mode {mode} with values from {pixels.min():.4g} to {pixels.max():.4g}, of which none is known to be "
                "white; save it with 8 or 16 bits"
            )
        pixels = pixels * (255 / top)
        return Image.fromarray((255 - pixels if inverted else pixels).round().astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("LA" if mode in ("LA", "La") else "RGBA")
    return image if mode in ("L", "RGB") else image.convert("L" if mode == "1" else "RGB")


def ink_of(image: Image.Image) -> float | None:
    """The mean brightness of what is not transparent, 0 to 255; None for an opaque or an empty image."""
    image = to_eight_bits(image)
    if image.mode not in ("LA", "RGBA"):
        return None
    alpha = np.asarray(image.getchannel("A"), dtype=np.float64)
    grey = np.asarray(image.convert("RGBA").convert("RGB").convert("L"), dtype=np.float64)
    return float((grey * alpha).sum() / alpha.sum()) if alpha.any() else None


def paper_for(ink: float) -> int:
    """Black paper for bright ink, white for dark."""
    return 0 if ink >= 128 else 255


def flatten(image: Image.Image, paper: int | None) -> Image.Image:
    """A transparent image on paper of that brightness; None: of the one on which its own ink is seen."""
    if image.mode not in ("LA", "RGBA"):
        return image
    if paper is None:
        ink = ink_of(image)
        paper = 255 if ink is None else paper_for(ink)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (paper, paper, paper, 255)), image).convert("RGB")


def crop_to_square(image: Image.Image) -> Image.Image:
    """The middle of the image, as wide as its shorter side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def has_colour(image: Image.Image) -> bool:
    """Whether an image of mode L, LA, RGB or RGBA is not all grey."""
    if image.mode not in ("RGB", "RGBA"):
        return False
    red, green, blue = (image.getchannel(name) for name in "RGB")
    return red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes()


class Decoded(NamedTuple):
    """What became of one cell."""

    pixels: np.ndarray  # [channels, size, size], uint8
    shape: tuple[int, int]  # width and height before the resizing
    colour: bool  # whether the file's image is not all grey


def decode(cell, channels: int, size: int, center_crop: bool, paper: int | None) -> Decoded:
    """One cell -> pixels."""
    image = flatten(to_eight_bits(open_image(cell)), paper)
    if center_crop:
        image = crop_to_square(image)
    shape, colour = image.size, has_colour(image)
    image = image.convert("L" if channels == 1 else "RGB")
    if shape != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return Decoded(np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1), shape, colour)


def decode_rows(cells: list, indices: list[int], version: str, **how) -> dict[str, list]:
    """`decode` for `datasets.map`. `version` is part of the cache's key.

    Raises:
        ConfigError: some cannot be used; the message names them.
    """
    decoded, problems = [], []
    for cell, index in zip(cells, indices):
        try:
            decoded.append(decode(cell, **how))
        except Exception as error:  # whatever a decoder raises on whatever a file holds
            path = cell.get("path") if isinstance(cell, dict) else None
            name = f"image {index}" + (f" ({path})" if path else "")
            problems.append(f"{name} cannot be decoded ({first_line(error, 160)})")
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ConfigError(f"--dataset_name: {'; '.join(problems[:SHOWN])}{more}; remove or replace them")
    return {
        "pixels": [image.pixels.tobytes() for image in decoded],
        "shape": [list(image.shape) for image in decoded],
        "colour": [image.colour for image in decoded],
    }
