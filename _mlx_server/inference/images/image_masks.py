"""Attention both ways within an image, for models of mlx-lm, which read from left to right. On the
MLX thread.

Such a model asks the caches of its layers for the masks of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx


@contextmanager
def both_ways(cache: list[Any], images: Sequence[tuple[int, int]], sliding: bool) -> Iterator[None]:
    """Lets the tokens of an image attend to all tokens of it in the call within. `images` are their
    first tokens and their ends, counted from the call's first token; with `sliding` it is so in
    layers with a sliding window alone."""
    layers = [layer for layer in cache if not sliding or hasattr(layer, "max_size")]
    for layer in layers:
        layer.make_mask = functools.partial(_mask, layer.make_mask, images)
    try:
        yield
    finally:
        for layer in layers:
            del layer.make_mask


def _mask(
    make: Callable[..., Any], images: Sequence[tuple[int, int]], tokens: int, **options: Any
) -> Any:
    """The mask that a cache makes for so many tokens, in which those of images see what comes
    later. How far back they see, a window may still bound."""
    import mlx.core as mx

    if tokens == 1:
        return make(tokens, **options)
    mask: mx.array = make(tokens, **{**options, "return_array": True})
    before = mask.shape[-1] - tokens
    places = mx.arange(tokens)
    for begin, end in images:
        within = mask[begin:end, before + begin : before + end]
        later = places[begin:end, None] < places[begin:end]
        mask[begin:end, before + begin : before + end] = within | later
    return mask
