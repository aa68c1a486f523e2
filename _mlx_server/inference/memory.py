"""How much memory there is, and how much a conversation takes of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StateSize:
    """What the state of a conversation takes: bytes for each token, and bytes that do not grow."""

    token: float
    fixed: int

    @classmethod
    def of(cls, cache: list[Any]) -> StateSize:
        """Measured on layers that have read something."""
        token, fixed = 0.0, 0
        layers = list(cache)
        for layer in layers:
            if isinstance(getattr(layer, "caches", None), (list, tuple)):
                layers += layer.caches
                continue
            keys = getattr(layer, "keys", None)
            rows = (
                (keys[0] if isinstance(keys, (list, tuple)) else keys).shape[-2]
                if keys is not None
                else 0
            )
            window = getattr(layer, "max_size", None)
            if rows and window is None:
                token += layer.nbytes / rows
            else:
                fixed += int(layer.nbytes / rows * window) if rows else layer.nbytes
        return cls(token, fixed)

    def nbytes(self, tokens: int) -> int:
        return int(self.token * tokens) + self.fixed

    def tokens(self, nbytes: int) -> int | None:
        """How many fit; None for any number."""
        return max(0, int((nbytes - self.fixed) / self.token)) if self.token else None


def gigabytes(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"


def usable_memory() -> int:
    """Bytes that the GPU may use; without one, all memory there is. Raises ImportError without
    MLX."""
    import mlx.core as mx

    device = mx.device_info() if mx.metal.is_available() else {}
    return device.get("max_recommended_working_set_size") or os.sysconf(
        "SC_PAGE_SIZE"
    ) * os.sysconf("SC_PHYS_PAGES")
