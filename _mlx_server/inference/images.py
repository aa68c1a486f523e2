"""Images of a conversation: the marks that stand for them in its texts, and their pixels.

Only what Pillow's decoders of PNG, JPEG, GIF and WebP read is opened, and only after the size that
the file states was found to be reasonable. Files come from outside and may be anything."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import secrets
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from _mlx_server.inference.protocol import InvalidRequest

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

MAX_IMAGES = 100  # of a request
MAX_PIXELS = 32_000_000  # of a file: a 6K screen has 20 million, and each takes 4 bytes to decode
MAX_ASPECT = 200  # longer side by shorter side
FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
UNSEEN = "[image omitted: this model cannot see images]"

# Begins every mark. It is random, so that no text holds it by chance or by intent, and made of
# digits, which no template escapes, trims or changes.
_RANDOM = str(10**23 + secrets.randbelow(10**24))
MARK = re.compile(rf"{_RANDOM}(\d{{39}})")
"""Stands in a message for the image with this digest."""
PLACED = re.compile(rf"{_RANDOM}i(\d{{19}})x(\d{{5}})x(\d{{5}})")
"""Stands for an image whose token, negated, and whose rows and columns of tokens are known."""

_DECODING = threading.Lock()  # one image at a time: a large one takes 128 MB
_SIGNATURES = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP", re.DOTALL)


def has_pillow() -> bool:
    """Whether the package that reads images is installed."""
    return importlib.util.find_spec("PIL") is not None


def is_image(content: bytes) -> bool:
    """Whether a file begins like one of `FORMATS`."""
    return _SIGNATURES.match(content) is not None


def image_mark(content: bytes) -> str:
    """The mark for an image's file: the same one for the same bytes, as long as this process
    runs."""
    digest = int.from_bytes(hashlib.sha256(content).digest()[:16])
    return f"{_RANDOM}{digest:039d}"


def placed_mark(token: int, rows: int, columns: int) -> str:
    """A mark that `PLACED` matches."""
    return f"{_RANDOM}i{-token:019d}x{rows:05d}x{columns:05d}"


def lasting(text: str) -> str:
    """A text whose marks are the same in every process, and still no text from outside: those are
    UTF-8 and hold no half of a surrogate pair."""
    return text.replace(_RANDOM, "\udc80") if _RANDOM in text else text


def read_pixels(
    content: bytes, fit: Callable[[int, int], tuple[int, int]], filter: int
) -> numpy.ndarray:
    """An image's pixels, (height, width, 3) bytes, as it is to be seen: upright, what is
    transparent white, and resized, with one of Pillow's filters, to the width and height that `fit`
    makes of its own. Raises InvalidRequest for what is no image, or too large or too narrow a
    one."""
    import numpy
    from PIL import Image

    with _DECODING:
        image: Image.Image = _open(content)
        try:
            image.load()
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
            lies = turn in _SIDEWAYS
            width, height = fit(*(image.size[::-1] if lies else image.size))
            size = (height, width) if lies else (width, height)
            mode = "RGBA" if image.has_transparency_data else "RGB"
            if image.mode != mode:  # otherwise it would be copied
                image = image.convert(mode)
            image = image.resize(size, filter)
            if mode == "RGBA":
                white = Image.new("RGBA", size, "white")
                image = Image.alpha_composite(white, image).convert("RGB")
            return numpy.asarray(image if turn is None else image.transpose(Image.Transpose(turn)))
        except Exception as error:  # a stranger's file can cause almost any
            raise InvalidRequest("an image cannot be read: the file is damaged") from error


# https://www.cipa.jp/std/documents/e/DC-X008-Translation-2019-E.pdf, 4.6.5; by Pillow's numbers
_ORIENTATION = 0x0112
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_SIDEWAYS = (2, 4, 5, 6)


def _open(content: bytes) -> Image:
    """A file whose header is fine; its pixels are not decoded yet."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # it would warn of sizes that are refused below
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:
        raise InvalidRequest("an image cannot be read: the file is damaged") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InvalidRequest(
            f"an image is too large: {width} x {height} pixels, "
            f"where {MAX_PIXELS // 10**6} million are allowed"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequest(f"an image is too narrow: {width} x {height} pixels")
    return image
