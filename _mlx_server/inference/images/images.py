"""Images of a conversation: the marks that stand for them in its texts, and their pixels.

Only what Pillow's decoders of PNG, JPEG, GIF and WebP read is opened, and only after the size that
the file states was found to be reasonable. Files come from outside and may be anything."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import math
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from _mlx_server.inference.images.pdf import IS_CLIENT_GONE
from _mlx_server.inference.protocol import InvalidRequest, Request

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

MAX_IMAGES = 100  # that are shown of a conversation
MAX_PIXELS = 32_000_000  # of a file: a 6K screen has 20 million, and each takes 4 bytes to decode
MAX_WEBP_PIXELS = 8_500_000  # each takes 16 bytes; a 4K screen has 8.3 million
TILE = 1024  # pixels on a side of what is resized at once
MAX_ASPECT = 200  # longer side by shorter side
# Parts of a file: for a few bytes of each, Pillow copies all that came before, or libjpeg goes
# through the whole image once more. A photo has a hundred at most, a PNG of 24 MB a few thousand
MAX_JPEG_SEGMENTS = 256
MAX_READS = 100_000
FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
UNSEEN = "[image omitted: this model cannot see images]"
OLD = "[image omitted: only newer ones are shown]"
UNREADABLE = "[image omitted: its file cannot be read]"

# Begins every mark. It is random, so that no text holds it by chance or by intent, and made of
# digits, which no template escapes, trims or changes.
_RANDOM = str(10**23 + secrets.randbelow(10**24))
MARK = re.compile(rf"{_RANDOM}(\d{{39}})")
"""Stands in a message for the image with this digest."""
PLACED = re.compile(rf"{_RANDOM}i(\d{{19}})x(\d{{5}})x(\d{{5}})")
"""Stands for an image whose token, negated, and whose rows and columns of tokens are known."""

IMAGE_TURN: contextvars.ContextVar[Callable[[], contextlib.AbstractContextManager[None]]] = (
    contextvars.ContextVar("IMAGE_TURN", default=contextlib.nullcontext)
)
"""In a thread that answers a client, what makes a context within which an image is decoded: it
waits for the request's turn to do so, and lets others go on between two images."""

# So many images at a time, as a large one takes 128 MB. Requests with keys for low priority have
# their turn one after the other, and so leave a place
_DECODING = threading.Semaphore(2)
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # of what has a length, or the end
_SCAN, _END = 0xDA, 0xD9
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


def replace_marks(request: Request, texts: dict[str, str], other: str | None = None) -> Request:
    """The request with texts in place of marks, by mark, and with `other` in place of those that
    have none; without it they stay."""
    return _replaced(request, lambda mark: texts.get(mark, mark if other is None else other))


def replace_oldest(request: Request, note: str, count: int) -> Request:
    """The request with a note in place of each of its first `count` marks."""
    places = itertools.count()
    return _replaced(request, lambda mark: note if next(places) < count else mark)


def _replaced(request: Request, text: Callable[[str], str]) -> Request:
    """The request with what `text` makes of each mark, in their order."""
    messages = [
        {**message, "content": MARK.sub(lambda found: text(found[0]), message["content"])}
        for message in request.messages
    ]
    return dataclasses.replace(request, messages=messages)


def marks_in(text: str) -> list[str]:
    """The marks of a text, in their order."""
    return [found[0] for found in MARK.finditer(text)]


def read_pixels(
    content: bytes, fit: Callable[[int, int], tuple[int, int]], filter: int
) -> numpy.ndarray:
    """An image's pixels, (height, width, 3) bytes, as it is to be seen: upright, what is
    transparent white, and resized, with one of Pillow's filters, to the width and height that `fit`
    makes of its own. Raises InvalidRequest for what is no image, or too large or too narrow a
    one, and ConnectionAbortedError if nobody waits for it any more."""
    import numpy
    from PIL import Image

    if IS_CLIENT_GONE.get()():
        raise ConnectionAbortedError("the client has gone")
    with IMAGE_TURN.get()(), _DECODING:
        image: Image.Image = _open(content)
        try:
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
            lies = turn in _SIDEWAYS
            width, height = fit(*(image.size[::-1] if lies else image.size))
            size = (height, width) if lies else (width, height)
            if width * height > MAX_PIXELS:  # by the numbers of a model's files
                raise ValueError(f"{width} x {height} pixels are wanted")
            image.draft(None, (2 * size[0], 2 * size[1]))  # of a large JPEG not every pixel
            image.load()
            image = _resized(image, size, filter)
            return numpy.asarray(image if turn is None else image.transpose(Image.Transpose(turn)))
        except Exception as error:  # a stranger's file can cause almost any
            raise InvalidRequest("an image cannot be read: the file is damaged") from error


def _resized(image: Image, size: tuple[int, int], filter: int) -> Image:
    """An image in RGB, on white, resized as a whole would be, but tile by tile: a copy of all of a
    large image would take as much memory as the image itself."""
    from PIL import Image

    whole = Image.new("RGB", size)
    spans = _spans(image.height, size[1]), _spans(image.width, size[0])
    for (top, bottom, upper, lower), (left, right, first, last) in itertools.product(*spans):
        tile = image.crop((first, upper, last, lower))
        if image.has_transparency_data:
            tile = tile.convert("RGBA")
            if tile.getchannel("A").getextrema() != (255, 255):  # screenshots are opaque
                tile = Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile)
        scale = image.width / size[0], image.height / size[1]
        box = (
            left * scale[0] - first,
            top * scale[1] - upper,
            right * scale[0] - first,
            bottom * scale[1] - upper,
        )
        tile = tile.convert("RGB").resize((right - left, bottom - top), filter, box)
        whole.paste(tile, (left, top))
    return whole


def _spans(old: int, new: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts a side of `new` pixels that is made of `old` ones: beginning and end of each part, and
    those of the old pixels that a filter looks at for it."""
    scale = old / new
    margin = math.ceil(_REACH * max(1, scale))
    step = max(1, int((TILE - 2 * margin) / scale))
    for start in range(0, new, step):
        end = min(start + step, new)
        first, last = math.floor(start * scale) - margin, math.ceil(end * scale) + margin
        yield start, end, max(0, first), min(old, last)


_REACH = 3  # pixels to each side that Pillow's widest filter looks at, more where it makes smaller

# https://www.cipa.jp/std/documents/e/DC-X008-Translation-2019-E.pdf, 4.6.5; by Pillow's numbers
_ORIENTATION = 0x0112
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_SIDEWAYS = (2, 4, 5, 6)


def _open(content: bytes) -> Image:
    """A file whose header is fine; its pixels are not decoded yet."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # it would warn of sizes that are refused below
    if content.startswith(b"\xff\xd8"):
        _check_segments(content)
    try:
        image = Image.open(_BoundedFile(content), formats=FORMATS)
    except Exception as error:
        raise InvalidRequest("an image cannot be read: the file is damaged") from error
    width, height = image.size
    most = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
    if width * height > most:
        raise InvalidRequest(
            f"an image is too large: {width} x {height} pixels, "
            f"where {most / 10**6:g} million are allowed"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequest(f"an image is too narrow: {width} x {height} pixels")
    return image


class _BoundedFile(io.BytesIO):
    """A file of which at most MAX_READS parts can be read."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise ValueError("the file has too many parts")
        return super().read(size)


def _check_segments(content: bytes) -> None:
    """Raises InvalidRequest for a JPEG with too many segments."""
    at, scanned, count = 2, False, 0
    while found := _JPEG_MARKER.search(content, at):
        at, marker = found.end(), found[1][0]
        # Pillow reads on where an end comes before the first scan
        if marker == _END and scanned:
            break
        if marker != _END:
            at += max(2, int.from_bytes(content[at : at + 2]))
            scanned |= marker == _SCAN
            count += 1
        if count > MAX_JPEG_SEGMENTS:
            raise InvalidRequest(f"an image has more than {MAX_JPEG_SEGMENTS} segments or scans")
