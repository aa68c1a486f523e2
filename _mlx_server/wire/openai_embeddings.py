"""OpenAI's embeddings: https://platform.openai.com/docs/api-reference/embeddings"""

from __future__ import annotations

import base64
import struct
from array import array
from typing import Any

from _mlx_server.wire.embeddings import Embeddings
from _mlx_server.wire.fields import Object, WireError, field, is_type, model_name

_MAX_TEXTS = 2048  # in one request, OpenAI's own limit


class OpenAIEmbeddings(Embeddings):
    """POST /v1/embeddings."""

    dialect = "openai"

    def __init__(self, body: Object):
        texts = _texts(body.get("input"))
        self._encoding = field(body, "encoding_format", str, default="float")
        if self._encoding not in ("float", "base64"):
            raise WireError(400, "encoding_format: Input should be 'float' or 'base64'")
        super().__init__(
            model_name(body),
            texts,
            truncate=False,
            dimensions=field(body, "dimensions", int, low=1),
        )

    def whole(self) -> Object:
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector if self._encoding == "float" else _packed(vector),
            }
            for index, vector in enumerate(self.vectors)
        ]
        return {
            "object": "list",
            "data": data,
            "model": self.request.model,
            "usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens},
        }


def _texts(value: Any) -> list[str | list[int]]:
    """The texts of `input`: a string, a list of strings, token ids or a list of such. Raises
    WireError 400."""
    texts = value
    if isinstance(value, str) or isinstance(value, list) and value and is_type(value[0], int):
        texts = [value]
    if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
        raise WireError(
            400,
            "input: Input should be a string, a list of strings, or one or more lists of token ids",
        )
    if len(texts) > _MAX_TEXTS:
        raise WireError(400, f"input: List should have at most {_MAX_TEXTS} items")
    return texts


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return all(is_type(token, int) for token in value)
    return isinstance(value, str)


def _packed(vector: array[float]) -> str:
    """A vector as little-endian floats of 32 bits, in base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
