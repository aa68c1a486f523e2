"""The vision tower of Qwen3-VL and Qwen3.5: https://arxiv.org/abs/2511.21631

Its patches are in the order of the tokens that they make: four of a square, then the next square.
On the MLX thread."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy

from _mlx_server.inference.images.image_layout import QwenLayout
from _mlx_server.inference.images.tower_parts import attend, colours, rotate, with_flat_kernel

_THETA = 10000.0


class QwenTower(nn.Module):
    """From an image's pixels to what the language model reads in place of its tokens. `config` is
    the model's."""

    def __init__(self, config: dict[str, Any], layout: QwenLayout):
        super().__init__()
        config = config["vision_config"]
        size, channels = config["hidden_size"], config.get("in_channels", 3)
        square = layout.merge**2
        self.patch_embed = _PatchEmbed(channels * layout.frames * layout.patch**2, size)
        self.pos_embed = nn.Embedding(config["num_position_embeddings"], size)
        self.blocks = [_Block(config) for _ in range(config["depth"])]
        self.merger = _Merger(size, square, config["out_hidden_size"], joined=False)
        self._deep = list(config.get("deepstack_visual_indexes") or [])
        if self._deep:
            self.deepstack_merger_list = [
                _Merger(size, square, config["out_hidden_size"], joined=True) for _ in self._deep
            ]
        self._heads, self._layout = config["num_heads"], layout
        self._side = math.isqrt(config["num_position_embeddings"])

    def __call__(self, pixels: numpy.ndarray) -> tuple[mx.array, list[mx.array]]:
        """What is read in place of an image's tokens, (tokens, hidden size), and what is added
        there behind each of the first layers. `pixels` are (height, width, 3) bytes."""
        rows, columns = _places(pixels.shape, self._layout)
        x = self.patch_embed(self._patches(pixels)) + self._positions(rows, columns)
        size = x.shape[-1] // self._heads
        frequencies = _THETA ** (-numpy.arange(0, size // 2, 2, dtype=numpy.float32) / (size // 2))
        angles = [place[:, None] * frequencies for place in (rows, columns)]
        rotation = mx.array(numpy.concatenate(angles, axis=-1, dtype=numpy.float32))
        deep = []
        for number, block in enumerate(self.blocks):
            x = block(x, mx.cos(rotation), mx.sin(rotation))
            if number in self._deep:
                deep.append(self.deepstack_merger_list[len(deep)](x))
        return self.merger(x), deep

    @property
    def patch_nbytes(self) -> int:
        """About how many bytes a patch takes while it is read."""
        block = self.blocks[0]
        return 4 * (8 * block.norm1.weight.size + 2 * block.mlp.linear_fc1.bias.size)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights of a checkpoint as they are here."""
        return with_flat_kernel(weights, "patch_embed.proj.weight")

    def _patches(self, pixels: numpy.ndarray) -> mx.array:
        """(patches, numbers of a patch): an image is a film of one picture that stands still."""
        patch, merge, frames = self._layout.patch, self._layout.merge, self._layout.frames
        height, width, channels = pixels.shape
        x = colours(pixels, self._layout)
        squares = height // patch // merge, merge, patch, width // patch // merge, merge, patch
        x = x.reshape(*squares, channels).transpose(0, 3, 1, 4, 6, 2, 5)
        x = mx.repeat(x[:, :, :, :, :, None], frames, axis=5)
        return x.reshape(height * width // patch**2, -1)

    def _positions(self, rows: numpy.ndarray, columns: numpy.ndarray) -> mx.array:
        """The learned positions, which are those of a square, stretched over the image."""
        side, total = self._side, 0
        for row, row_share in _neighbours(rows, side):
            for column, column_share in _neighbours(columns, side):
                places = mx.array(row * side + column)
                total = total + self.pos_embed(places) * mx.array(row_share * column_share)[:, None]
        return total


class _PatchEmbed(nn.Module):
    def __init__(self, numbers: int, size: int):
        super().__init__()
        self.proj = nn.Linear(numbers, size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x.astype(self.proj.bias.dtype))


class _Block(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        size = config["hidden_size"]
        self.norm1, self.norm2 = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.attn = _Attention(size, config["num_heads"])
        self.mlp = _MLP(size, config["intermediate_size"], config["hidden_act"])

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self._heads = heads

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        patches, size = x.shape
        head = size // self._heads
        queries, keys, values = (
            self.qkv(x).reshape(patches, 3, self._heads, head).transpose(1, 2, 0, 3)
        )
        x = attend(rotate(queries, cos, sin), rotate(keys, cos, sin), values)
        return self.proj(x.transpose(1, 0, 2).reshape(patches, size))


class _MLP(nn.Module):
    def __init__(self, size: int, inner: int, activation: str):
        super().__init__()
        self.linear_fc1, self.linear_fc2 = nn.Linear(size, inner), nn.Linear(inner, size)
        self._activation = {"gelu_pytorch_tanh": nn.gelu_approx, "gelu": nn.gelu}[activation]

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_fc2(self._activation(self.linear_fc1(x)))


class _Merger(nn.Module):
    """Makes one token of the patches of a square, which are normed one by one or `joined`."""

    def __init__(self, size: int, square: int, out: int, joined: bool):
        super().__init__()
        self._joined = size * square
        self.norm = nn.LayerNorm(self._joined if joined else size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self._joined, self._joined)
        self.linear_fc2 = nn.Linear(self._joined, out)

    def __call__(self, x: mx.array) -> mx.array:
        x = x.reshape(-1, self.norm.weight.size)
        x = self.norm(x).reshape(-1, self._joined)
        return self.linear_fc2(nn.gelu(self.linear_fc1(x)))


def _places(shape: tuple[int, ...], layout: QwenLayout) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The row and the column of each patch."""
    merge = layout.merge
    height, width = shape[0] // layout.patch, shape[1] // layout.patch
    places = numpy.indices((height, width)).reshape(
        2, height // merge, merge, width // merge, merge
    )
    rows, columns = places.swapaxes(2, 3).reshape(2, -1)
    return rows, columns


def _neighbours(places: numpy.ndarray, side: int) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """The two nearest of `side` places for each of some places on a line from 0 to their largest,
    and what each of the two counts."""
    stretched = places.astype(numpy.float32) * (side - 1) / max(1, int(places.max()))
    low = numpy.floor(stretched).astype(numpy.int32)
    share = stretched - low
    return [(low, 1 - share), (numpy.minimum(low + 1, side - 1), share)]
