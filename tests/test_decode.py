"""What a viewer shows, on white, is what is trained on; anything else is refused by name."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_mnist.errors import ConfigError
from ddpm_mnist.images.decode import decode_rows

DISC = ((np.mgrid[:28, :28] - 13.5) ** 2).sum(0) < 60
RAMP = np.linspace(0, 255, 784).reshape(28, 28).round().astype(np.uint8)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(content: bytes | None, path: str | None = None, channels: int = 1) -> np.ndarray:
    """Pixels `[channels, 28, 28]`, as `datasets.map` decodes image 8."""
    cell = None if content is None and path is None else {"bytes": content, "path": path}
    rows = decode_rows([cell], [8], version="", channels=channels, size=28, center_crop=True)
    return np.frombuffer(rows["pixels"][0], np.uint8).reshape(channels, 28, 28)


def disc(brightness: int) -> Image.Image:
    """A disc of that brightness on a transparent ground."""
    return Image.fromarray(np.dstack([np.full((28, 28, 3), brightness), DISC * 255]).astype(np.uint8))


def upside_down(array: np.ndarray) -> Image.Image:
    """A ramp that is stored upside down, with the tag that says so."""
    image = Image.fromarray(array[::-1, ::-1].copy())
    image.getexif()[0x0112] = 3
    return image


RGB, DEEP = Image.fromarray(RAMP).convert("RGB"), RAMP.astype(np.uint16) * 257
GREY = Image.fromarray(~DISC * np.uint8(99))  # a black disc
TURNED, TURNED_DEEP = upside_down(RAMP), upside_down(DEEP)
SHOWN = {  # name: (file, the grey pixels that a viewer shows)
    "1": (encode(Image.fromarray(DISC)), DISC * 255),
    "L": (encode(Image.fromarray(RAMP)), RAMP),
    "RGB": (encode(RGB), RAMP),
    "P": (encode(RGB.convert("L").convert("P")), RAMP),
    "CMYK": (encode(RGB.convert("CMYK"), "TIFF"), RAMP),
    "opaque RGBA": (encode(RGB.convert("RGBA")), RAMP),
    "16 bits": (encode(Image.fromarray(DEEP)), RAMP),
    "16 bits, TIFF": (encode(Image.fromarray(DEEP), "TIFF"), RAMP),
    "16 bits, turned": (encode(TURNED_DEEP, exif=TURNED_DEEP.getexif()), RAMP),
    "black, transparent": (encode(disc(0)), ~DISC * 255),
    "white, transparent": (encode(disc(255)), RAMP * 0 + 255),
    "LA, transparent": (encode(disc(0).convert("LA")), ~DISC * 255),
    "L, a transparent grey": (encode(GREY, transparency=99), ~DISC * 255),
    "P, a transparent colour": (encode(GREY.convert("P"), transparency=99), ~DISC * 255),
    "turned": (encode(TURNED, exif=TURNED.getexif()), RAMP),
    "turned, JPEG": (encode(TURNED, "JPEG", exif=TURNED.getexif(), quality=100), RAMP),
    "animation": (encode(Image.fromarray(RAMP), "GIF", save_all=True, append_images=[GREY]), RAMP),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_viewer_shows_is_decoded(name, tmp_path):
    """From bytes, as in a parquet file, and from a file, as in a folder; in grey and in colour."""
    content, expected = SHOWN[name]
    file = tmp_path / "image"
    file.write_bytes(content)
    for pixels in (decoded(content), decoded(content, channels=3), decoded(None, str(file))):
        assert np.abs(pixels.astype(int) - expected).max() <= 3


def test_sixteen_bits_keep_all_their_levels():
    pixels = decoded(encode(Image.fromarray(np.linspace(0, 65535, 784).reshape(28, 28).astype(np.uint16))))
    assert pixels.mean() == pytest.approx(127.5, abs=0.1) and len(np.unique(pixels)) == 256
    assert pixels.flat[0] == 0 and pixels.flat[-1] == 255


BOMB = bytearray(encode(Image.new("1", (1, 1))))  # a PNG that says it has 20,000 x 20,000 pixels
BOMB[16:24] = struct.pack(">II", 20000, 20000)
BOMB[29:33] = zlib.crc32(BOMB[12:29]).to_bytes(4, "big")
REFUSED = {
    "32 bits": (encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "mode I and not 8 or 16 bits"),
    "floats": (encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "mode F and not 8 or 16 bits"),
    "16 bits, transparent": (encode(Image.fromarray(DEEP), transparency=1), "mode I;16"),
    "garbage": (b"not an image", "cannot identify"),
    "no bytes": (b"", "cannot identify"),
    "truncated": (encode(Image.fromarray(RAMP))[:60], "image 8 (b.tif)"),
    "a bomb": (bytes(BOMB), "exceeds limit"),
    "an empty cell": (None, "image 8: the cell is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_pixels_are_refused_by_name(name):
    content, part = REFUSED[name]
    with pytest.raises(ConfigError, match="image 8") as error:
        decoded(content, path=None if content is None else "b.tif")
    assert part in str(error.value) and "\n" not in str(error.value)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """With some bytes inserted, replaced or dropped, or all to the end."""
    start = chance.randrange(len(content))
    end = chance.choice((start, start + 1, start + 9, len(content)))
    return content[:start] + chance.randbytes(chance.choice((0, 1, 9))) + content[end:]


@pytest.mark.parametrize("seed", range(2))
def test_any_bytes_are_pixels_or_one_line(seed):
    """Never another error, never a hang."""
    chance, count = random.Random(seed), 0
    for content, _ in SHOWN.values():
        for _ in range(25):
            try:
                assert decoded(mutated(content, chance)).shape == (1, 28, 28)
                count += 1
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
    assert 10 < count < 25 * len(SHOWN)
