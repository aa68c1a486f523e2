"""How much memory there is, how much a conversation takes of it, and giving it back."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class StateSize:
    """What the state of a conversation takes."""

    STEP: ClassVar[int] = 256  # tokens by which mlx-lm's caches grow

    token: float  # bytes for each token
    fixed: int  # bytes that do not grow

    @classmethod
    def of(cls, cache: list[Any], growth: float = 0.0) -> StateSize:
        """Measured on mlx-lm's cache layers, which have read something. `growth` is what those
        layers that do not show it take for each token."""
        token, fixed = growth, 0
        layers = list(cache)
        for layer in layers:
            if isinstance(getattr(layer, "caches", None), (list, tuple)):
                layers += layer.caches
                continue
            rows = _rows(layer)
            window = getattr(layer, "max_size", None)  # tokens that a sliding window keeps
            if not rows:
                fixed += layer.nbytes
            elif window is None:
                token += layer.nbytes / rows
            else:
                fixed += int(layer.nbytes / rows * window)
        return cls(token, fixed)

    def nbytes(self, tokens: int, coming: int = 0) -> int:
        """Bytes of a state of so many tokens, and of `coming` ones, for which mlx-lm's caches make
        room in steps."""
        room = -(-coming // self.STEP) * self.STEP
        return int(self.token * (tokens + room)) + self.fixed

    def tokens(self, nbytes: int) -> int | None:
        """How many tokens' state fits into so many bytes; None for any number."""
        return max(0, int((nbytes - self.fixed) / self.token)) if self.token else None


def _rows(layer: Any) -> int:
    """For how many tokens a cache layer has room now; 0 for one without keys."""
    keys = getattr(layer, "keys", None)
    if isinstance(keys, (list, tuple)):  # quantised: weights, scales, biases
        keys = keys[0]
    return 0 if keys is None else keys.shape[-2]


def gigabytes(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"


def usable_memory() -> int:
    """Bytes that the GPU may use; without one, all memory there is. Raises ImportError without
    MLX."""
    import mlx.core as mx

    if mx.metal.is_available():
        gpu = mx.device_info().get("max_recommended_working_set_size")
        if gpu:
            return int(gpu)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _trimmer() -> Callable[[], object]:
    """Gives free memory back to the system where the allocator does not by itself: glibc keeps what
    lies between blocks in use, and macOS until memory is short."""
    libc = ctypes.CDLL(None)
    if trim := getattr(libc, "malloc_trim", None):
        return functools.partial(trim, 0)
    if relieve := getattr(libc, "malloc_zone_pressure_relief", None):
        relieve.argtypes = ctypes.c_void_p, ctypes.c_size_t
        return functools.partial(relieve, None, 0)  # all zones, as much as possible
    return lambda: None


release_free_memory = _trimmer()
