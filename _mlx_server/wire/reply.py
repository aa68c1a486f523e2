"""The interface that every dialect's answer implements."""

from __future__ import annotations

from typing import Protocol

from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.protocol import Event, Request, Token
from _mlx_server.wire.fields import Object

Frames = list[Object | str]
"""What a stream sends: JSON objects, or strings that are server-sent events already."""

MAX_LOGPROBS = 1 << 18  # of all tokens of an answer, those that are only likely included
LOGPROB_BYTES = 1024  # that one of them takes until the answer is sent, at most


class Accepted(Protocol):
    """What an answer reads from the generation that the engine has accepted: a unique id, and the
    prompt's tokens and how many of them are in the cache."""

    @property
    def id(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...


class Reply:
    """The answer to one HTTP request in one dialect, made from the request's body.

    `stream` is whether the client asked for a stream. `framing` is how the objects of a stream are
    sent: "events" (server-sent events, named by the object's "type"), "data" (server-sent events
    without names) or "lines" (NDJSON). With `unload` nothing is generated: the model is to be
    unloaded, and `whole` is the answer. Every event of the generations goes through `event`, even
    if the answer is not streamed. `held` is about how many bytes it keeps of them beside texts."""

    request: Request
    dialect: str
    stream: bool
    framing: str
    unload = False
    held = 0

    @property
    def requests(self) -> list[Request]:
        """What is to be generated, one after the other."""
        return [self.request]

    def check(self, model: LocalModel) -> None:
        """Called with the resolved model before anything is queued. Raises WireError if the model
        cannot do what is asked."""

    def hide_prompt(self) -> None:
        """Leaves out of the answer what tells the text of the prompt. Called before anything is
        generated."""

    def open(self, generation: Accepted) -> Frames:
        """What to send as soon as the engine has accepted the request."""
        return []

    def event(self, event: Event) -> Frames:
        """What to send for one event. The frames for `Done` close the answer."""
        raise NotImplementedError

    def ping(self, lull: float = 0.0) -> Frames:
        """What to send to show that the server is alive. `lull` is the time in seconds since a
        frame was sent that was no ping."""
        return []

    def failure(self, error: Exception) -> Frames:
        """What to send at the end of a stream whose generation failed."""
        raise NotImplementedError

    def whole(self) -> Object:
        """The body of an answer that is not streamed, in which arrays stand for lists. Complete
        after the last `Done`."""
        raise NotImplementedError

    def bound_logprobs(self, answers: int = 1) -> None:
        """Lets each of the request's answers end before their log probabilities are too many: those
        of a token take thousands of bytes, where its text takes four."""
        request = self.request
        if request.logprobs is not None:
            most = max(1, MAX_LOGPROBS // (answers * (1 + request.logprobs)))
            given = request.max_tokens
            request.max_tokens = most if given is None else min(given, most)

    def hold_logprobs(self, tokens: list[Token]) -> None:
        """Counts the log probabilities of tokens as kept."""
        self.held += LOGPROB_BYTES * sum(1 + len(token.top) for token in tokens)


def token_objects(tokens: list[Token]) -> list[Object]:
    """Log probabilities as OpenAI and Ollama write them."""

    def token_object(token: Token) -> Object:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}

    return [
        {**token_object(token), "top_logprobs": [token_object(other) for other in token.top]}
        for token in tokens
    ]
