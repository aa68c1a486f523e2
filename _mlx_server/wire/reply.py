"""What every dialect's answer can do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from _mlx_server.inference.models import LocalModel
from _mlx_server.inference.protocol import Done, Embedding, Event, Request, Token, Usage
from _mlx_server.wire.fields import Object, WireError


class Reply:
    """One request's answer in one dialect. One instance per HTTP request, made from the request's
    body.

    `dialect` is its name, `stream` says what the client asked for, `framing` how objects are framed
    then: "events" (server-sent events, named by the object's "type"), "data" (the same without
    names) or "lines" (NDJSON); what is text already goes out as a frame of its own. With `unload`
    set the model is to be unloaded, not asked, and `whole` is the answer. Streaming or not, every
    event of the generations goes through `event`."""

    request: Request
    dialect: str
    stream: bool
    framing: str
    unload = False

    @property
    def requests(self) -> list[Request]:
        """What is to be generated. The events of one follow those of the other in this order."""
        return [self.request]

    def check(self, model: LocalModel) -> None:
        """Called with the resolved model before anything is queued. Raises WireError if the model
        cannot do this."""

    def open(self, generation: Any) -> list[Object]:
        """Objects to send at once when the engine has accepted the request."""
        return []

    def event(self, event: Event) -> list[Object | str]:
        """Objects for one event; for `Done` the closing ones."""
        raise NotImplementedError

    def ping(self, lull: float = 0.0) -> list[Object | str]:
        """Objects that mean nothing but that the server is alive, when for `lull` seconds nothing
        else was to be said."""
        return []

    def failure(self, error: Exception) -> list[Object]:
        """Objects that end a stream whose generation failed."""
        raise NotImplementedError

    def whole(self) -> Object:
        """The body of an answer that is not streamed."""
        raise NotImplementedError


class Embeddings(Reply):
    """The vectors of some texts, or token ids, one request for each; with none of them the model is
    only loaded. `dimensions` is how many numbers of a vector are kept."""

    stream = False

    def __init__(
        self,
        name: str,
        texts: list[str] | list[list[int]],
        *,
        truncate: bool,
        dimensions: int | None = None,
        keep_alive: float | None = None,
    ):
        if not all(texts):
            raise WireError(400, "input: an empty text has no embedding")
        self.request = Request(name, keep_alive=keep_alive)
        self._requests = [
            Request(name, prompt=text, embed=True, truncate=truncate, max_tokens=0)
            for text in texts
        ]
        self._requests[-1:] = [
            replace(one, keep_alive=keep_alive) for one in self._requests[-1:]
        ] or [self.request]
        self.vectors: list[list[float]] = []
        self.usages: list[Usage] = []
        self._dimensions = dimensions

    def event(self, event: Event) -> list[Object | str]:
        match event:
            case Embedding(vector):
                self.vectors.append(vector)
            case Done():
                self.usages.append(event.usage)
        return []

    @property
    def requests(self) -> list[Request]:
        return self._requests

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(usage.prompt_tokens for usage in self.usages)

    def unit_vectors(self) -> list[list[float]]:
        """The vectors, cut and then of length 1."""
        cut = [vector[: self._dimensions] for vector in self.vectors]
        return [[number / (math.hypot(*vector) or 1.0) for number in vector] for vector in cut]


def token_objects(tokens: list[Token]) -> list[Object]:
    """Log probabilities as OpenAI and Ollama write them."""

    def weight(token: Token) -> Object:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}

    return [
        {**weight(token), "top_logprobs": [weight(one) for one in token.top]} for token in tokens
    ]
