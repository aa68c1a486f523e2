"""Copying, cutting and joining the cache of one layer."""

from __future__ import annotations

import copy
from typing import Any


def is_trimmable(layer: Any) -> bool:
    return type(layer).__name__ in ("KVCache", "QuantizedKVCache", "ConcatenateKVCache")


def copy_layer(layer: Any, start: int = 0, end: int | None = None) -> Any:
    """A copy that shares no buffer with `layer`; of a cuttable one only the tokens from `start` to
    `end`."""
    import mlx.core as mx
    from mlx.utils import tree_map

    if is_trimmable(layer) and end is not None and layer.keys is not None:
        new = copy.copy(layer)
        new.keys, new.values = tree_map(
            lambda a: mx.contiguous(a[..., start:end, :]), (layer.keys, layer.values)
        )
        new.offset = end - start
        return new
    return own_buffers(copy.deepcopy(layer))


def own_buffers(layer: Any) -> Any:
    """The layer, of which no array is a window into a larger one any more: it would hold all of
    that in memory."""
    import mlx.core as mx
    from mlx.utils import tree_map

    for part in getattr(layer, "caches", [layer]):
        for name, value in vars(part).items():
            setattr(
                part,
                name,
                tree_map(lambda a: mx.contiguous(a) if isinstance(a, mx.array) else a, value),
            )
    return layer


def concatenate_layers(parts: list[Any]) -> Any:
    """One layer out of consecutive parts of it: the opposite of `CacheEntry.layers`."""
    import mlx.core as mx
    from mlx.utils import tree_map

    if not is_trimmable(parts[-1]) or parts[-1].keys is None:
        return parts[-1]
    new = copy.copy(parts[0])
    new.keys, new.values = tree_map(
        lambda *arrays: mx.concatenate(arrays, axis=-2), *((p.keys, p.values) for p in parts)
    )
    new.offset = sum(part.offset for part in parts)
    return new
