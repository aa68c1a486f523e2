"""From the states that an embedding model computes to one vector."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.catalog.models import LocalModel, read_json_file

if TYPE_CHECKING:
    import mlx.core as mx


def pooling_mode(local: LocalModel) -> str:
    """Which of a model's states is the embedding: "lasttoken", "cls" (the first) or their "mean".

    The model's folder names it or, in older folders, has a flag for each:
    https://sbert.net/docs/package_reference/sentence_transformer/models.html
    Raises ValueError for any other mode."""
    file = local.path / "1_Pooling" / "config.json"
    config = read_json_file(file) if file.is_file() else {"pooling_mode": "lasttoken"}
    flags = [key for key in config if key.startswith("pooling_mode_") and config[key]]
    named = " and ".join(re.sub("^pooling_mode_|_tokens?$", "", flag) for flag in flags)
    mode = config.get("pooling_mode") or named
    if mode not in ("lasttoken", "cls", "mean"):
        raise ValueError(f"its pooling '{mode}' is not supported")
    return mode


class Pooler:
    """Reads a text of `total` tokens in chunks and pools the states. On the MLX thread.

    `cache` are mlx-lm's caches, one a layer; `length` is how many tokens were read."""

    def __init__(self, mode: str, total: int, cache: list[Any]):
        self.cache, self.length = cache, 0
        self._mode, self._total = mode, total
        self._pooled: mx.array | None = None

    def add(self, states: mx.array) -> None:
        """Takes the states (tokens, width) of the next chunk."""
        import mlx.core as mx

        states = states.astype(mx.float32)
        if self._mode == "lasttoken":
            self._pooled = states[-1]
        elif self._mode == "cls":
            self._pooled = states[0] if self._pooled is None else self._pooled
        else:
            part = states.sum(0) / self._total
            self._pooled = part if self._pooled is None else self._pooled + part
        mx.eval(self._pooled, [layer.state for layer in self.cache])
        self.length += states.shape[0]

    def vector(self) -> list[float]:
        """The embedding, once all is read. Raises ArithmeticError if it is not made of numbers."""
        vector: Any = self._pooled.tolist() if self._pooled is not None else []
        if not all(map(math.isfinite, vector)):
            raise ArithmeticError("the model's output is not a number")
        return list(vector)
