"""Ollama's two embeddings endpoints:
https://github.com/ollama/ollama/blob/main/docs/api.md#generate-embeddings"""

from __future__ import annotations

from _mlx_server.wire.embeddings import Embeddings
from _mlx_server.wire.fields import Object, WireError, field
from _mlx_server.wire.ollama_request import ollama_model_name, ollama_options, parse_keep_alive


class OllamaEmbed(Embeddings):
    """POST /api/embed."""

    dialect = "ollama"

    def __init__(self, body: Object):
        texts = body.get("input") or []
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise WireError(400, "invalid input type")
        ollama_options(body)
        super().__init__(
            ollama_model_name(body, 404, "model '' not found"),
            texts,
            truncate=field(body, "truncate", bool, default=True),
            dimensions=field(body, "dimensions", int, low=0) or None,
            keep_alive=parse_keep_alive(body.get("keep_alive")),
        )

    def whole(self) -> Object:
        total = sum(usage.total_seconds for usage in self.usages)
        load = sum(usage.load_seconds for usage in self.usages[:1])
        return {
            "model": self.request.model,
            "embeddings": self.vectors,
            "prompt_eval_count": self.tokens,
            "total_duration": int(total * 1e9),
            "load_duration": int(load * 1e9),
        }


class OllamaEmbeddings(Embeddings):
    """POST /api/embeddings, the older one: a single vector, not scaled."""

    dialect = "ollama"

    def __init__(self, body: Object):
        prompt = field(body, "prompt", str, default="")
        ollama_options(body)
        super().__init__(
            ollama_model_name(body, 400, "model is required"),
            [prompt] if prompt else [],
            truncate=True,
            keep_alive=parse_keep_alive(body.get("keep_alive")),
        )

    def shaped(self, vector: list[float]) -> list[float]:
        return vector

    def whole(self) -> Object:
        return {"embedding": self.vectors[0] if self.vectors else []}
