"""What is told of a request: its line in the log and the header on prompt reuse."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field

from _mlx_server.front.logs import shortened
from _mlx_server.inference.generation import Generation
from _mlx_server.inference.protocol import Miss, Usage
from _mlx_server.wire.embeddings import Embeddings
from _mlx_server.wire.fields import WireError

log = logging.getLogger("mlx_server")


@dataclass
class RequestLog:
    """One request: the id that its answer has, its generations as soon as the engine has them,
    times in monotonic seconds, and how its answer ended. It is logged as one line, and with
    `--log-json` as fields. `cancelled` may be set by any thread."""

    route: str
    id: str
    dialect: str
    model: str = ""
    generations: list[Generation] = field(default_factory=list)
    cancelled: bool = False
    started: float = field(default_factory=time.monotonic)
    first_event: float | None = None
    ending: str = "client went away"

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds from the request to its answer's first event, None if there was none."""
        return None if self.first_event is None else self.first_event - self.started

    @property
    def seconds(self) -> float:
        """Seconds since the request."""
        return time.monotonic() - self.started

    def check(self) -> None:
        """Raises WireError if the request was cancelled."""
        if self.cancelled:
            # nginx's status for a request that nobody waits for; no client tries again
            raise WireError(499, "the request was cancelled at the server")

    def fail(self, error: Exception) -> None:
        """Notes why the answer has ended."""
        self.ending = "cancelled" if self.cancelled else f"failed: {shortened(str(error))}"

    def generation(self, generation: Generation) -> None:
        """Logs one generation of the answer; texts of prompts only with --verbose, or as fields."""
        usage, miss, wait = generation.usage, generation.miss, self.first_token_seconds
        verbose = log.isEnabledFor(logging.DEBUG)
        rate = usage.completion_tokens / usage.decode_seconds if usage.decode_seconds else None
        parted = ""
        if miss:
            texts = f": {miss.now!r} was {miss.was!r}" if verbose else ""
            parted = f" (parts at {miss.at} in {_place(miss)}{texts})"
        drafted = {name: [usage.accepted_tokens[name], n] for name, n in usage.draft_tokens.items()}
        figures = {
            "route": self.route,
            "dialect": self.dialect,
            "model": generation.model.name,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "decode_passes": usage.decode_passes,
            "drafted": drafted,
            "first_token_seconds": wait,
            "tokens_per_second": rate,
            "seconds": self.seconds,
            "ending": self.ending,
            "miss": miss and dataclasses.asdict(miss),
        }
        log.info(
            "%s %s: prompt %d, reused %d%s, generated %d%s, %s, %s, %s",
            self.route,
            generation.model.name,
            usage.prompt_tokens,
            usage.cached_tokens,
            parted,
            usage.completion_tokens,
            _speculated(usage, drafted),
            "no token" if wait is None else f"first token {wait:.2f} s",
            f"{rate:.1f} tokens/s" if rate else "- tokens/s",
            self.ending,
            extra={"figures": figures},
        )

    def embeddings(self, model: str, reply: Embeddings) -> None:
        """Logs an answer that consists of embeddings."""
        figures = {
            "route": self.route,
            "dialect": self.dialect,
            "model": model,
            "texts": len(reply.vectors),
            "prompt_tokens": reply.tokens,
            "seconds": self.seconds,
        }
        log.info(
            "%s %s: embedded %d of %d texts, %d tokens, %.2f s",
            self.route,
            model,
            len(reply.vectors),
            len(reply.requests),
            reply.tokens,
            figures["seconds"],
            extra={"figures": figures},
        )

    def relay(self, model: str | None, upstream: str, status: int) -> None:
        """Logs a relayed answer; `status` is 0 if there was none."""
        figures = {
            "route": self.route,
            "dialect": self.dialect,
            "model": model,
            "upstream": upstream,
            "status": status,
            "seconds": self.seconds,
            "ending": self.ending,
        }
        log.info(
            "%s %s: relayed to %s -> %d, %.2f s, %s",
            self.route,
            model,
            upstream,
            status,
            figures["seconds"],
            self.ending,
            extra={"figures": figures},
        )


def _speculated(usage: Usage, drafted: dict[str, list[int]]) -> str:
    """What speculation has brought: nothing, where nothing was drafted."""
    if not drafted:
        return ""
    who = ", ".join(f"{name} {right} of {all}" for name, (right, all) in drafted.items())
    return f" ({usage.completion_tokens / max(1, usage.decode_passes):.2f} a pass, {who} right)"


def prompt_cache_header(generation: Generation, cached_tokens: int | None = None) -> dict[str, str]:
    """The header x-prompt-cache: how many tokens of the prompt were reused and, if the prompt
    differs from a cached one, where. `cached_tokens` is by default what is known at the start."""
    cached = generation.cached_tokens if cached_tokens is None else cached_tokens
    value = f"reused={cached}; prompt={generation.prompt_tokens}"
    if generation.miss:
        value += f"; parts-at={generation.miss.at}; in={_place(generation.miss)}"
    return {"x-prompt-cache": value}


def _place(miss: Miss) -> str:
    return "the prompt" if miss.message is None else f"message {miss.message} ({miss.role})"
