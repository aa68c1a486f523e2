"""Copying, cutting and joining the KV cache of one layer.

A *trimmable* layer (plain or quantised KV) can be cut back to any length. Sliding-window and
recurrent layers cannot: only a copy made in time brings back an earlier length."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Sequence
from typing import Any


def is_trimmable(layer: Any) -> bool:
    """Whether an mlx-lm cache can be cut back to any length."""
    return type(layer).__name__ in ("KVCache", "QuantizedKVCache", "ConcatenateKVCache")


def can_merge(cache: list[Any]) -> bool:
    """Whether the caches of several requests can become shared ones."""
    parts = [part for layer in cache for part in getattr(layer, "caches", [layer])]
    return all(hasattr(part, "merge") for part in parts)


def merge_caches(caches: Sequence[list[Any]]) -> list[Any]:
    """The shared caches of several requests, of which `can_merge` is true. Copies them."""
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


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


# A cache class of a model's own module; mlx-lm can write only those of its cache module
_OWN_CLASS = re.compile(r"mlx_lm\.models\.(?!cache:)(\w+):(\w+)")


def is_opaque(layer: Any) -> bool:
    """Whether the layer's cache is of a class that one model of mlx-lm has for itself."""
    return bool(_OWN_CLASS.fullmatch(_class_name(layer)))


def _class_name(layer: Any) -> str:
    return f"{type(layer).__module__}:{type(layer).__name__}"


def pack_layer(layer: Any) -> Any:
    """The layer in a form that mlx-lm's `save_prompt_cache` can write and its `load_prompt_cache`
    read: itself, or an ArraysCache with the class and the attributes of one that it does not know.
    Those are arrays, numbers and None."""
    from mlx_lm.models.cache import ArraysCache

    if not is_opaque(layer):
        return layer
    packed: Any = ArraysCache(0)
    packed.cache = [_class_name(layer), *(part for pair in vars(layer).items() for part in pair)]
    return packed


def unpack_layer(packed: Any) -> Any:
    """The layer that was packed. Raises ValueError if there is no such class."""
    parts = getattr(packed, "cache", None)
    if not parts or not isinstance(parts[0], str):
        return packed
    name, *pairs = parts
    found = _OWN_CLASS.fullmatch(name)
    if not found:
        raise ValueError(f"{name} is no class of a cache")
    kind = getattr(importlib.import_module(f"mlx_lm.models.{found[1]}"), found[2])
    layer = kind.__new__(kind)
    vars(layer).update(zip(pairs[::2], pairs[1::2], strict=True))
    return layer
