"""How the models of each family take images: their sizes, and the tokens that stand for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DEFAULT_TOKENS = 1280  # of an image at most: 1.3 megapixels for most models
BICUBIC = 3  # Pillow's number
_TOWER_NAMES = ("vision_tower.", "visual.", "model.visual.")
_SQUARE = 0.5, 0.5, 0.5


@dataclass(frozen=True)
class Placement:
    """What an image is resized to, in pixels, and how many rows and columns of tokens it takes."""

    width: int
    height: int
    rows: int
    columns: int


class QwenLayout:
    """Qwen3-VL and, with the same tower, Qwen3.5 and its successors: an image keeps its
    proportions, and each square of `merge` by `merge` patches is one token.
    https://arxiv.org/abs/2511.21631

    `config` is the model's config.json, `settings` its preprocessor_config.json; an image has at
    most `most` tokens. Raises KeyError, TypeError or ValueError if they do not fit together."""

    filter = BICUBIC

    def __init__(self, config: dict[str, Any], settings: dict[str, Any], most: int):
        tower = config["vision_config"]
        self.patch, self.merge = int(tower["patch_size"]), int(tower["spatial_merge_size"])
        self.frames = int(tower["temporal_patch_size"])
        self.side = self.patch * self.merge  # pixels that a token stands for, across and down
        size = settings.get("size") or {}
        least_pixels = settings.get("min_pixels") or size.get("shortest_edge") or 65536
        most_pixels = settings.get("max_pixels") or size.get("longest_edge") or 16777216
        self._most = max(self.side**2, min(int(most_pixels), most * self.side**2))
        self._least = min(int(least_pixels), self._most)
        self.mean = tuple(map(float, settings.get("image_mean") or _SQUARE))
        self.std = tuple(map(float, settings.get("image_std") or _SQUARE))
        self.token = int(config["image_token_id"])
        self._start = int(config["vision_start_token_id"])
        self._end = int(config["vision_end_token_id"])

    def place(self, width: int, height: int) -> Placement:
        """What becomes of an image of this size."""
        side, pixels = self.side, width * height
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side**2 > self._most:
            scale = math.sqrt(self._most / pixels) / side
            rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
        elif rows * columns * side**2 < self._least:
            scale = math.sqrt(self._least / pixels) / side
            rows, columns = math.ceil(height * scale), math.ceil(width * scale)
        return Placement(columns * side, rows * side, rows, columns)

    def tokens(self, token: int, rows: int, columns: int) -> list[int]:
        """The tokens of an image, in which `token` stands for each of its parts."""
        return [self._start, *[token] * (rows * columns), self._end]

    def length(self, placement: Placement) -> int:
        """The positions that an image takes, where a text takes one for each token."""
        return max(placement.rows, placement.columns)


_LAYOUTS = {
    "qwen3_vl": QwenLayout,
    "qwen3_vl_moe": QwenLayout,
    "qwen3_5": QwenLayout,
    "qwen3_5_moe": QwenLayout,
}


def make_layout(config: dict[str, Any], settings: dict[str, Any], most: int) -> QwenLayout:
    """The layout of a model that `has_tower`. Raises as its class does."""
    return _LAYOUTS[config["model_type"]](config, settings, most)


def has_tower(config: dict[str, Any], weights: Iterable[str]) -> bool:
    """Whether a model of a family that is known here has what it sees with among its weights, whose
    names are given: conversions for text alone keep the config and drop these. A model whose
    positions are stretched (YaRN and the like) does not see: where they put an image is not known.
    """
    known = config.get("model_type") in _LAYOUTS and isinstance(config.get("vision_config"), dict)
    return (
        known
        and not _stretches_positions(config)
        and any(name.startswith(_TOWER_NAMES) for name in weights)
    )


def _stretches_positions(config: dict[str, Any]) -> bool:
    text = config.get("text_config")
    rope = (
        text.get("rope_parameters") or text.get("rope_scaling") if isinstance(text, dict) else None
    )
    kind = rope.get("type") or rope.get("rope_type") if isinstance(rope, dict) else None
    return kind not in (None, "default", "mrope")


def tower_name(name: str) -> str | None:
    """The name within the tower of a weight of a checkpoint; None if it is none of the tower's."""
    prefix = next((prefix for prefix in _TOWER_NAMES if name.startswith(prefix)), None)
    return None if prefix is None else name.removeprefix(prefix)
