"""How the models of each family take images: their sizes, and the tokens that stand for them."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_TOKENS = 1280  # of an image at most: 1.3 megapixels for most models
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
_TOWER_NAMES = ("vision_tower.vision_model.", "vision_tower.", "visual.")
_PROJECTORS = ("multi_modal_projector.", "embed_vision.")
_SQUARE = 0.5, 0.5, 0.5
_CLIP_MEAN = 0.48145466, 0.4578275, 0.40821073
_CLIP_STD = 0.26862954, 0.26130258, 0.27577711


@dataclass(frozen=True)
class Placement:
    """What an image is resized to, in pixels, and how many rows and columns of tokens it takes."""

    width: int
    height: int
    rows: int
    columns: int


class ImageLayout(ABC):
    """How a family's models take images: each square of `merge` by `merge` patches of `patch`
    pixels is one token. `token` stands for any part of any image; `mean` and `std` are those of the
    colours, from 0 to 1. `around` is text on both sides of an image. In all layers or in those with
    a `sliding` window, or in none, what `both_ways` says, the tokens of an image attend to all of
    it; then it is read as a whole.

    `config` is the model's config.json, `settings` its preprocessor_config.json, `names` has the
    ids of its special tokens by their texts; an image has at most `most` tokens. Making one raises
    KeyError, TypeError or ValueError if they do not fit together."""

    filter = BICUBIC
    patch: int
    merge: int
    token: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    around = ""
    both_ways: Literal["all", "sliding", "none"] = "none"
    _start: int  # the tokens in front of an image and behind it
    _end: int

    @abstractmethod
    def __init__(
        self, config: dict[str, Any], settings: dict[str, Any], names: Mapping[str, int], most: int
    ): ...

    @abstractmethod
    def place(self, width: int, height: int) -> Placement:
        """What becomes of an image of this size."""

    def tokens(self, token: int, rows: int, columns: int) -> list[int]:
        """The tokens of an image, in which `token` stands for each of its parts."""
        return [self._start, *[token] * (rows * columns), self._end]

    def _set_colours(
        self, settings: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        """Takes `mean` and `std` where the settings have none."""
        self.mean = tuple(map(float, settings.get("image_mean") or mean))
        self.std = tuple(map(float, settings.get("image_std") or std))


class QwenLayout(ImageLayout):
    """Qwen3-VL and, with the same tower, Qwen3.5 and its successors: an image keeps its
    proportions, and a small one is made larger. https://arxiv.org/abs/2511.21631"""

    def __init__(
        self, config: dict[str, Any], settings: dict[str, Any], names: Mapping[str, int], most: int
    ):
        tower = config["vision_config"]
        self.patch, self.merge = int(tower["patch_size"]), int(tower["spatial_merge_size"])
        self.frames = int(tower["temporal_patch_size"])
        self.side = self.patch * self.merge  # pixels that a token stands for, across and down
        size = settings.get("size") or {}
        least_pixels = settings.get("min_pixels") or size.get("shortest_edge") or 65536
        most_pixels = settings.get("max_pixels") or size.get("longest_edge") or 16777216
        self._most = max(self.side**2, min(int(most_pixels), most * self.side**2))
        self._least = min(int(least_pixels), self._most)
        self._set_colours(settings, _SQUARE, _SQUARE)
        self.token = int(config["image_token_id"])
        self._start = int(config["vision_start_token_id"])
        self._end = int(config["vision_end_token_id"])

    def place(self, width: int, height: int) -> Placement:
        side, pixels = self.side, width * height
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side**2 > self._most:
            scale = math.sqrt(self._most / pixels) / side
            rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
        elif rows * columns * side**2 < self._least:
            scale = math.sqrt(self._least / pixels) / side
            rows, columns = math.ceil(height * scale), math.ceil(width * scale)
        return Placement(columns * side, rows * side, rows, columns)


class MistralLayout(ImageLayout):
    """Pixtral, and with the same tower Mistral Small from 3.1 on, Devstral and their like: an image
    keeps its size if it is not too large, and a token stands behind each row of its tokens.
    https://arxiv.org/abs/2410.07073"""

    def __init__(
        self, config: dict[str, Any], settings: dict[str, Any], names: Mapping[str, int], most: int
    ):
        self.patch = int(config["vision_config"]["patch_size"])
        self.merge = int(config.get("spatial_merge_size") or 1)
        if config.get("vision_feature_layer", -1) not in (-1, [-1]):
            raise ValueError("only the last layer of the tower is known")
        size = settings.get("size") or {}
        edge = size.get("longest_edge") or min(size.get("height", 1024), size.get("width", 1024))
        self._edge = int(edge)
        self._most = most
        self._set_colours(settings, _CLIP_MEAN, _CLIP_STD)
        self.token = int(config.get("image_token_index") or config["image_token_id"])
        self._row_end, self._end = names["[IMG_BREAK]"], names["[IMG_END]"]

    def place(self, width: int, height: int) -> Placement:
        def count(edge: int) -> int:
            placed = self._within(width, height, edge)
            return placed.rows * (placed.columns + 1)

        fit = bisect.bisect_right(range(1, self._edge + 1), self._most, key=count)
        return self._within(width, height, max(1, fit))

    def _within(self, width: int, height: int, edge: int) -> Placement:
        """What becomes of an image whose longer side has at most `edge` pixels."""
        side, ratio = self.patch * self.merge, max(width / edge, height / edge)
        if ratio > 1:
            width, height = math.floor(width / ratio), math.floor(height / ratio)
        rows, columns = max(1, math.ceil(height / side)), max(1, math.ceil(width / side))
        return Placement(columns * side, rows * side, rows, columns)

    def tokens(self, token: int, rows: int, columns: int) -> list[int]:
        return [*([*[token] * columns, self._row_end] * rows)[:-1], self._end]


class Gemma3Layout(ImageLayout):
    """Gemma 3: every image is made a square of one size, `side` patches across and down.
    https://arxiv.org/abs/2503.19786"""

    around = "\n\n"
    both_ways = "all"

    def __init__(
        self, config: dict[str, Any], settings: dict[str, Any], names: Mapping[str, int], most: int
    ):
        tower = config["vision_config"]
        self._pixels, self.patch = int(tower["image_size"]), int(tower["patch_size"])
        self._rows = math.isqrt(int(config.get("mm_tokens_per_image", 256)))
        self.side = self._pixels // self.patch
        self.merge = self.side // self._rows
        if self._rows * self.merge != self.side:
            raise ValueError(f"{self.side} patches do not make {self._rows} tokens")
        self.filter = int(settings.get("resample") or BILINEAR)
        self._set_colours(settings, _SQUARE, _SQUARE)
        self.token = _token(config, "image")
        self._start, self._end = _token(config, "boi"), _token(config, "eoi")

    def place(self, width: int, height: int) -> Placement:
        return Placement(self._pixels, self._pixels, self._rows, self._rows)


class Gemma4Layout(ImageLayout):
    """Gemma 4: an image keeps its proportions, and takes as many tokens as it may."""

    def __init__(
        self, config: dict[str, Any], settings: dict[str, Any], names: Mapping[str, int], most: int
    ):
        tower, text = config["vision_config"], config["text_config"]
        self.patch, self.merge = int(tower["patch_size"]), int(tower["pooling_kernel_size"])
        self._most = max(1, min(int(settings.get("max_soft_tokens") or 280), most))
        self.filter = int(settings.get("resample") or BICUBIC)
        known = settings if settings.get("do_normalize") else {}
        self._set_colours(known, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        if text.get("use_bidirectional_attention") == "vision":
            self.both_ways = "sliding"
        self.token = int(text.get("pad_token_id") or 0)  # its embedding for layers is used, too
        self._start, self._end = _token(config, "boi"), _token(config, "eoi")

    def place(self, width: int, height: int) -> Placement:
        side = self.patch * self.merge
        scale = math.sqrt(self._most * side**2 / (width * height))
        rows, columns = int(scale * height / side), int(scale * width / side)
        if rows == 0:
            rows, columns = 1, min(max(1, width // height), self._most)
        elif columns == 0:
            rows, columns = min(max(1, height // width), self._most), 1
        return Placement(columns * side, rows * side, rows, columns)


def _token(config: dict[str, Any], name: str) -> int:
    return int(config.get(f"{name}_token_index") or config[f"{name}_token_id"])


_LAYOUTS: dict[str, type[ImageLayout]] = {
    "gemma3": Gemma3Layout,
    "gemma4": Gemma4Layout,
    "qwen3_vl": QwenLayout,
    "qwen3_vl_moe": QwenLayout,
    "qwen3_5": QwenLayout,
    "qwen3_5_moe": QwenLayout,
    "mistral3": MistralLayout,
    "pixtral": MistralLayout,
    "llava": MistralLayout,  # with Pixtral's tower
}


def make_layout(
    config: dict[str, Any], settings: dict[str, Any], names: Mapping[str, int], most: int
) -> ImageLayout:
    """The layout of a model that `has_tower`. Raises as its class does."""
    return _LAYOUTS[config["model_type"]](config, settings, names, most)


def has_tower(config: dict[str, Any], weights: Iterable[str]) -> bool:
    """Whether a model of a family that is known here has what it sees with among its weights, whose
    names are given: conversions for text alone keep the config and drop these. A Qwen whose
    positions are stretched (YaRN and the like) does not see: where they put an image is not known.
    """
    kind, tower = config.get("model_type"), config.get("vision_config")
    layout = _LAYOUTS.get(kind) if isinstance(kind, str) else None
    if layout is None or not isinstance(tower, dict):
        return False
    if layout is QwenLayout and _stretches_positions(config):
        return False
    if kind == "llava" and tower.get("model_type") != "pixtral":
        return False
    return any(name.removeprefix("model.").startswith(_TOWER_NAMES) for name in weights)


def _stretches_positions(config: dict[str, Any]) -> bool:
    text = config.get("text_config")
    rope = (
        text.get("rope_parameters") or text.get("rope_scaling") if isinstance(text, dict) else None
    )
    kind = rope.get("type") or rope.get("rope_type") if isinstance(rope, dict) else None
    return kind not in (None, "default", "mrope")


def tower_name(name: str) -> str | None:
    """The name within the tower of a weight of a checkpoint; None if it is none of the tower's."""
    name = name.removeprefix("model.")
    if name.startswith(_PROJECTORS):
        return name
    prefix = next((prefix for prefix in _TOWER_NAMES if name.startswith(prefix)), None)
    return None if prefix is None else name.removeprefix(prefix)
