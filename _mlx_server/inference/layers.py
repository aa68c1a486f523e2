"""Copying, cutting and joining the KV cache of one layer.

A *trimmable* layer (plain or quantised KV) can be cut back to any length. Sliding-window and
recurrent layers cannot: only a copy made in time brings back an earlier length."""

from __future__ import annotations

import copy
from typing import Any


def is_trimmable(layer: Any) -> bool:
    """Whether an mlx-lm cache can be cut back to any length."""
    return type(layer).__name__ in ("KVCache", "QuantizedKVCache", "ConcatenateKVCache")


def can_merge(cache: list[Any]) -> bool:
    """Whether the caches of several requests can become shared ones."""
    parts = [part for layer in cache for part in getattr(layer, "caches", [layer])]
    return all(hasattr(part, "merge") for part in parts)


def copy_layer(layer: Any, start: int = 0, end: int | None = None) -> Any:
    """A copy that shares no buffer with `layer`; of a trimmable one only the tokens from `start` to
    `end`."""
    import mlx.core as mx
    from mlx.utils import tree_map

    if not is_trimmable(layer) or end is None or layer.keys is None:
        return own_buffers(copy.deepcopy(layer))

    def cut(array: mx.array) -> mx.array:
        return mx.contiguous(array[..., start:end, :])

    new = copy.copy(layer)
    new.keys, new.values = tree_map(cut, (layer.keys, layer.values))
    new.offset = end - start
    return new


def own_buffers(layer: Any) -> Any:
    """The layer, with every array in a buffer of its own. A window into a larger array would hold
    all of that array in memory."""
    import mlx.core as mx
    from mlx.utils import tree_map

    def own(value: Any) -> Any:
        return mx.contiguous(value) if isinstance(value, mx.array) else value

    for part in getattr(layer, "caches", [layer]):
        for name, value in vars(part).items():
            setattr(part, name, tree_map(own, value))
    return layer


def concatenate_layers(parts: list[Any]) -> Any:
    """One layer out of consecutive parts of it: the opposite of `CacheEntry.layers`."""
    import mlx.core as mx
    from mlx.utils import tree_map

    if not is_trimmable(parts[-1]) or parts[-1].keys is None:
        return parts[-1]

    def join(*arrays: mx.array) -> mx.array:
        return mx.concatenate(list(arrays), axis=-2)

    new = copy.copy(parts[0])
    new.keys, new.values = tree_map(join, *((part.keys, part.values) for part in parts))
    new.offset = sum(part.offset for part in parts)
    return new
