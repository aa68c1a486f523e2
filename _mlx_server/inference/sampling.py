"""How tokens are picked, and what they weighed."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

from _mlx_server.inference.protocol import Sampling, Token


def make_sampler(sampling: Sampling, vocabulary: int) -> Callable[[Any], Any]:
    """A sampler over log-probabilities with a random stream of its own, so that a seed gives the
    same text whatever else runs in the batch. On the MLX thread."""
    import mlx.core as mx
    from mlx_lm import sample_utils as kit

    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    if temperature <= 0:
        return kit.greedy_sampler
    top_k, top_p, min_p = sampling.top_k or 0, sampling.top_p or 1.0, sampling.min_p or 0.0
    key = mx.random.key(
        secrets.randbits(32) if sampling.seed is None else sampling.seed & 0xFFFFFFFF
    )

    def sample(logprobs: Any) -> Any:
        nonlocal key
        if 0 < top_p < 1:
            logprobs = kit.apply_top_p(logprobs, top_p)
        if 0 < min_p <= 1:
            logprobs = kit.apply_min_p(logprobs, min_p)
        if 0 < top_k < vocabulary:
            logprobs = kit.apply_top_k(logprobs, top_k)
        key, step = mx.random.split(key)
        return mx.random.categorical(logprobs * (1 / temperature), key=step)

    return sample


def make_penalties(sampling: Sampling) -> list[Callable[[Any, Any], Any]]:
    """mlx-lm's logits processors for the penalties and biases that are set. On the MLX thread."""
    from mlx_lm.sample_utils import make_logits_processors

    window = min(sampling.repetition_context or 64, 1 << 30)  # MLX counts in 32 bits
    repetition = sampling.repetition_penalty
    return make_logits_processors(
        sampling.logit_bias,
        repetition if repetition not in (None, 1.0) and repetition > 0 else None,
        window,
        sampling.presence_penalty,
        window,
        sampling.frequency_penalty,
        window,
    )


def token_logprobs(
    token: int, logprobs: Any, top: int, token_bytes: Callable[[int], bytes]
) -> Token:
    """A token among all there are, with the `top` likeliest beside it; `token_bytes` tells their
    bytes. On the MLX thread."""
    import mlx.core as mx

    def weighed(token: int) -> Token:
        written = token_bytes(token)
        return Token(
            written.decode("utf-8", "replace"), written, max(logprobs[token].item(), _IMPOSSIBLE)
        )

    best = mx.argpartition(-logprobs, top)[:top].tolist() if top else []
    return dataclasses.replace(
        weighed(token), top=sorted(map(weighed, best), key=lambda one: -one.logprob)
    )


_IMPOSSIBLE = -9999.0  # of what cannot be sampled at all: JSON has no infinity
