"""What Qwen's models from 3 on need besides an image's features: positions in three directions
(interleaved M-RoPE) and features that are added behind the first layers (DeepStack).
https://arxiv.org/abs/2511.21631

mlx-lm's models know neither. A text's position is the same in all directions, so they are right
for text; here their rotary embeddings and first layers are replaced. On the MLX thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy

from _mlx_server.inference.images.tower_parts import rotate


class Positions:
    """Where the tokens of the model's next call stand. An image takes fewer positions than tokens:
    `shift` is what is added to a token's index behind it, one for all rows or one for each. Within
    an image `rotation` has the cosines and sines of all tokens of the call, (tokens, numbers), and
    `deep` what is added behind each of the first layers, (1, tokens, hidden size)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """For text alone."""
        self.shift: int | mx.array = 0
        self.rotation: tuple[mx.array, mx.array] | None = None
        self.deep: Sequence[mx.array] = ()

    @contextmanager
    def during(
        self,
        shift: int | mx.array = 0,
        rotation: tuple[mx.array, mx.array] | None = None,
        deep: Sequence[mx.array] = (),
    ) -> Iterator[None]:
        """Sets them for the calls within."""
        self.shift, self.rotation, self.deep = shift, rotation, deep
        try:
            yield
        finally:
            self.reset()


class MRope(nn.Module):
    """In place of a layer's rotary embedding."""

    def __init__(self, rope: nn.RoPE, positions: Positions):
        super().__init__()
        self._rope, self._positions = rope, positions

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        positions = self._positions
        if positions.rotation is not None:
            return rotate(x, *positions.rotation)
        return self._rope(x, offset=offset + positions.shift)


class DeepLayer(nn.Module):
    """In place of one of the first layers."""

    def __init__(self, layer: nn.Module, number: int, positions: Positions):
        super().__init__()
        self.layer = layer
        self._number, self._positions = number, positions

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        x, deep = self.layer(x, *args, **options), self._positions.deep
        return x + deep[self._number] if self._number < len(deep) else x


def install(layers: list[nn.Module], deep: int, positions: Positions) -> nn.RoPE:
    """Replaces the rotary embeddings of all layers, which must be plain ones, and the first `deep`
    layers; returns one of the former. Raises TypeError for others, and changes nothing then."""
    attentions = [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]
    ropes = [attention.rope for attention in attentions]
    for rope in ropes:
        if type(rope) is not nn.RoPE or rope.traditional or rope.scale != 1:
            raise TypeError(f"positions of the type {type(rope).__name__} are not known")
    for attention in attentions:
        attention.rope = MRope(attention.rope, positions)
    for number in range(deep):
        layers[number] = DeepLayer(layers[number], number, positions)
    return ropes[0]


def rotation(
    places: numpy.ndarray, rope: nn.RoPE, sections: Sequence[int]
) -> tuple[mx.array, mx.array]:
    """Cosines and sines for tokens with these `places`, (3, tokens): in time, down and across. The
    frequencies take turns in the three; `sections` says how many each has."""
    half = rope.dims // 2
    frequencies = rope.base ** (-numpy.arange(half, dtype=numpy.float32) / half)
    direction = numpy.zeros(half, dtype=int)
    for at in (1, 2):
        direction[at : 3 * sections[at] : 3] = at
    angles = mx.array((places[direction].T * frequencies).astype(numpy.float32))
    return mx.cos(angles), mx.sin(angles)
