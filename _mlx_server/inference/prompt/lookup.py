"""What of a prompt was read before, as far as that is known at submission."""

from __future__ import annotations

from dataclasses import dataclass

from _mlx_server.inference.cache.disk_cache import DiskCache
from _mlx_server.inference.cache.prefix_cache import PrefixCache
from _mlx_server.inference.protocol import Miss
from _mlx_server.inference.sequence import Sequence


@dataclass(frozen=True)
class Parting:
    """Where a prompt and the cached one that is most like it part: behind their first `at`
    tokens."""

    cached: list[int]
    at: int


def look_up(
    sequence: Sequence, model: str, prefixes: PrefixCache, disk_cache: DiskCache | None
) -> Parting | None:
    """Sets `sequence.cached_tokens`, and tells where the prompt parts from what is cached, if it
    does. `model` is the fingerprint. From any thread."""
    tokens = sequence.prompt.tokens
    match = prefixes.find(model, tokens, sequence.request.owner)
    sequence.cached_tokens = match.length
    if disk_cache is not None:
        kept = disk_cache.find(model, tokens[:-1], sequence.request.owner)[1]
        if kept > match.length:
            sequence.cached_tokens = kept
            return None
    parts = 0 < match.shared < min(len(match.closest), len(tokens))
    return Parting(match.closest, match.shared) if parts else None


def describe_miss(sequence: Sequence, parting: Parting) -> Miss:
    """The message and the words in which a prompt parts. Renders parts of the conversation, which
    takes a while."""
    tokens, renderer = sequence.prompt.tokens[: sequence.prompt_tokens], sequence.renderer
    cached, at = parting.cached, parting.at
    decode = renderer.decode
    index, role = renderer.locate(sequence.request, decode(tokens[:at])) or (None, "")
    return Miss(at, index, role, decode(cached[at : at + 8]), decode(tokens[at : at + 8]))
