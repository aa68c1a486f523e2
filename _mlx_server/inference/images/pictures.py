"""A request's images, and what stands for them in the prompt."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.catalog.models import LocalModel, read_json_file
from _mlx_server.inference.images.image_layout import ImageLayout, Placement, make_layout
from _mlx_server.inference.images.images import (
    MAX_IMAGES,
    OLD,
    UNREADABLE,
    UNSEEN,
    has_pillow,
    marks_in,
    placed_mark,
    read_pixels,
    replace_marks,
    replace_oldest,
)
from _mlx_server.inference.images.scans import unfold_scans
from _mlx_server.inference.protocol import InvalidRequest, Message, Request

if TYPE_CHECKING:
    import numpy

log = logging.getLogger("mlx_server")

VERSION = 2  # of how images are prepared: states that were made with another one are not reused


@dataclass(eq=False)
class Picture:
    """An image of a request. `token` stands for each of its parts in the prompt: it is negative and
    differs for another file, size or preparation, so that equal tokens are equal images.

    The MLX thread keeps `features`, the tower's output, while the prompt is within the image."""

    token: int
    placement: Placement
    content: bytes
    filter: int
    pixels: numpy.ndarray | None = None
    features: Any = None

    @property
    def count(self) -> int:
        """How many tokens stand for its parts."""
        return self.placement.rows * self.placement.columns

    def load(self) -> numpy.ndarray:
        """Its pixels, resized: (height, width, 3) bytes."""
        if self.pixels is None:
            size = self.placement.width, self.placement.height
            self.pixels = read_pixels(self.content, lambda width, height: size, self.filter)
        return self.pixels


class PictureFinder:
    """Finds the images of requests to one model, or says in their place that it cannot see.

    Sizes are remembered by the images' digests: a conversation comes with every request, and what
    it holds is decoded once. Thread-safe."""

    REMEMBERED = 4096  # images

    def __init__(self, local: LocalModel, names: Mapping[str, int], most: int):
        """`names` has the ids of the model's special tokens by their texts; an image has at most
        `most` tokens."""
        self.layout: ImageLayout | None = None
        self._local, self._identity = local, ""
        self._known: BoundedMap[tuple[int, Placement]] = BoundedMap(self.REMEMBERED)
        if "vision" in local.capabilities:
            self._set_up(names, most)

    def _set_up(self, names: Mapping[str, int], most: int) -> None:
        try:
            settings = read_settings(self._local)
            self.layout = make_layout(self._local.config, settings, names, most)
        except (KeyError, TypeError, ValueError, OSError) as error:
            log.warning("%s cannot see images: its files: %r", self._local.name, error)
        else:
            self._identity = repr((VERSION, sorted(settings.items(), key=str)))

    def find(self, request: Request) -> tuple[Request, dict[int, Picture]]:
        """The request with a mark for each image that tells its tokens, and the images by their
        tokens. Raises InvalidRequest for a file that is no image, and for too many images, if the
        user has just sent them; what stands further back, or what a tool has read, comes with every
        request from then on, so a note takes its place."""
        said = marks_in(_last_words(request.messages))
        asked = sum(isinstance(request.images.get(mark), bytes) for mark in said)
        request, files = unfold_scans(request, sees=self.layout is not None)
        if not files:
            return request, {}
        if self.layout is None:
            self._log_unseen()
            return replace_marks(request, dict.fromkeys(files, UNSEEN), UNSEEN), {}
        if asked > MAX_IMAGES:
            raise InvalidRequest(f"at most {MAX_IMAGES} images are allowed, and there are {asked}")
        request = self._without_oldest(request, files)
        shown = {mark for one in request.messages for mark in marks_in(one["content"])}
        pictures: dict[int, Picture] = {}
        marks: dict[str, str] = {}
        for mark, content in files.items():
            if mark not in shown:
                continue
            try:
                one = self._picture(self.layout, mark, content)
            except InvalidRequest as error:
                if mark in _last_words(request.messages):
                    raise
                log.info("%s is not shown an image: %s", self._local.name, error)
                marks[mark] = UNREADABLE
            else:
                marks[mark] = placed_mark(one.token, one.placement.rows, one.placement.columns)
                pictures[one.token] = one
        return replace_marks(request, marks, UNSEEN), pictures

    def _without_oldest(self, request: Request, files: Mapping[str, bytes]) -> Request:
        """The request with at most MAX_IMAGES of its `files`, counting each place where one stands.
        Notes take the places of the oldest: of half of MAX_IMAGES at once, so that a session that
        grows reads its images anew only now and then."""
        texts = [message["content"] for message in request.messages]
        places = [mark in files for text in texts for mark in marks_in(text)]
        excess = sum(places) - MAX_IMAGES
        if excess <= 0:
            return request
        half = max(1, MAX_IMAGES // 2)
        dropped = math.ceil(excess / half) * half
        new = sum(mark in files for mark in marks_in(_last_words(request.messages)))
        if new <= MAX_IMAGES:
            dropped = min(dropped, sum(places) - new)
        log.info("%s is not shown the oldest %d images", self._local.name, dropped)
        counts = list(itertools.accumulate(places))
        return replace_oldest(request, OLD, bisect.bisect_left(counts, dropped) + 1)

    def _picture(self, layout: ImageLayout, mark: str, content: bytes) -> Picture:
        if known := self._known.get(mark):
            return Picture(*known, content, layout.filter)
        placement = Placement(0, 0, 0, 0)

        def fit(width: int, height: int) -> tuple[int, int]:
            nonlocal placement
            placement = layout.place(width, height)
            return placement.width, placement.height

        pixels = read_pixels(content, fit, layout.filter)
        identity = hashlib.sha256(content + repr((placement, self._identity)).encode()).digest()
        token = -1 - (int.from_bytes(identity[:8]) >> 2)
        self._known.put(mark, (token, placement))
        return Picture(token, placement, content, layout.filter, pixels)

    def _log_unseen(self) -> None:
        name = self._local.name
        if isinstance(self._local.config.get("vision_config"), dict) and not has_pillow():
            log.info("%s is not shown images: pip install 'mlx-server[vision]'", name)
        else:
            log.info("%s cannot see images: a note stands in their place", name)


def _last_words(messages: Sequence[Message]) -> str:
    """What the user has said since the model's last answer."""
    new = itertools.takewhile(lambda one: one["role"] != "assistant", reversed(messages))
    return "\n".join(one["content"] for one in new if one["role"] == "user")


def read_settings(local: LocalModel) -> dict[str, Any]:
    """How a model wants its images prepared, from its files; {} if these say nothing. Raises
    OSError and ValueError."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (local.path / name).is_file():
            found = read_json_file(local.path / name)
            return dict(found.get("image_processor") or found)
    return {}
