"""What of a prompt was read before, as far as that is known at submission."""

from __future__ import annotations

from _mlx_server.inference.disk_cache import DiskCache
from _mlx_server.inference.prefix_cache import PrefixCache
from _mlx_server.inference.protocol import Miss
from _mlx_server.inference.sequence import Sequence


def look_up(
    sequence: Sequence, model: str, prefixes: PrefixCache, disk_cache: DiskCache | None
) -> Miss | None:
    """Sets `sequence.cached_tokens`, and tells where the prompt and the cached one that is most
    like it part, if they do. `model` is the fingerprint. From any thread."""
    tokens = sequence.prompt.tokens
    sequence.cached_tokens = prefixes.find(model, tokens)[1]
    if disk_cache is not None:
        kept = disk_cache.find(model, tokens[:-1])[1]
        if kept > sequence.cached_tokens:
            sequence.cached_tokens = kept
            return None
    return _miss(sequence, *prefixes.closest(model, tokens))


def _miss(sequence: Sequence, cached: list[int], at: int) -> Miss | None:
    """`at` is how many tokens the prompt shares with the cached ones."""
    tokens, renderer = sequence.prompt.tokens, sequence.renderer
    if not 0 < at < min(len(cached), len(tokens)):
        return None
    decode = renderer.tokenizer.decode
    index, role = renderer.locate(sequence.request, decode(tokens[:at])) or (None, "")
    return Miss(at, index, role, decode(cached[at : at + 8]), decode(tokens[at : at + 8]))
