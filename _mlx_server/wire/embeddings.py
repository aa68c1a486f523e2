"""The part of an embeddings answer that OpenAI's and Ollama's endpoints share."""

from __future__ import annotations

import math
from array import array

from _mlx_server.inference.protocol import Done, Embedding, Event, Request, Usage
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.reply import Frames, Reply

MOST_TEXTS = 10_000  # in one request


class Embeddings(Reply):
    """The vectors of `texts`, each of which is a string or token ids and makes one request. Without
    texts the model is only loaded. A vector is cut to `dimensions` numbers if that is given. With
    `truncate` a text that is too long is cut, else it is refused. `keep_alive` is in seconds and
    applies after the last text."""

    stream = False

    def __init__(
        self,
        name: str,
        texts: list[str] | list[list[int]] | list[str | list[int]],
        *,
        truncate: bool,
        dimensions: int | None = None,
        keep_alive: float | None = None,
    ):
        if not all(texts):
            raise WireError(400, "input: an empty text has no embedding")
        if len(texts) > MOST_TEXTS:
            raise WireError(400, f"input: List should have at most {MOST_TEXTS} items")
        self.request = Request(name, keep_alive=keep_alive)
        self._requests = [
            Request(name, prompt=text, embed=True, truncate=truncate, max_tokens=0)
            for text in texts
        ] or [self.request]
        self._requests[-1].keep_alive = keep_alive
        # As the model gives numbers, in 32 bits: lists of them would take eight times as much
        self.vectors: list[array[float]] = []
        self.usages: list[Usage] = []
        self._dimensions = dimensions

    @property
    def requests(self) -> list[Request]:
        return self._requests

    def event(self, event: Event) -> Frames:
        match event:
            case Embedding(vector):
                self.vectors.append(array("f", self.shaped(vector)))
                self.held += self.vectors[-1].itemsize * len(vector)
            case Done():
                self.usages.append(event.usage)
        return []

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(usage.prompt_tokens for usage in self.usages)

    def shaped(self, vector: list[float]) -> list[float]:
        """A vector as it is sent: cut and then scaled to length 1."""
        vector = vector[: self._dimensions]
        length = math.hypot(*vector) or 1.0
        return [number / length for number in vector]
