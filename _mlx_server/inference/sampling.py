"""How tokens are sampled, and what is told about their probabilities."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.protocol import Sampling, Token

if TYPE_CHECKING:
    import mlx.core as mx

MIN_LOGPROB = -9999.0  # of tokens that cannot be sampled at all: JSON has no infinity
MAX_PENALTY_WINDOW = 1 << 30  # tokens: MLX counts in 32 bits


def make_sampler(sampling: Sampling, vocabulary: int) -> Callable[[mx.array], mx.array]:
    """A sampler from log-probabilities (batch, vocabulary) to tokens (batch). It has a random
    stream of its own, so that a seed gives the same text whatever else runs in the batch. On the
    MLX thread."""
    import mlx.core as mx
    from mlx_lm import sample_utils

    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    if temperature <= 0:
        return sample_utils.greedy_sampler
    top_k, top_p, min_p = sampling.top_k or 0, sampling.top_p or 1.0, sampling.min_p or 0.0
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed & 0xFFFFFFFF
    key = mx.random.key(seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if 0 < top_p < 1:
            logprobs = sample_utils.apply_top_p(logprobs, top_p)
        if 0 < min_p <= 1:
            logprobs = sample_utils.apply_min_p(logprobs, min_p)
        if 0 < top_k < vocabulary:
            logprobs = sample_utils.apply_top_k(logprobs, top_k)
        key, step = mx.random.split(key)
        return mx.random.categorical(logprobs * (1 / temperature), key=step)

    return sample


LogitsProcessor = Callable[["mx.array", "mx.array"], "mx.array"]  # of context and logits


def make_penalties(sampling: Sampling) -> list[LogitsProcessor]:
    """mlx-lm's logits processors for the penalties and biases that are set. On the MLX thread."""
    from mlx_lm.sample_utils import make_logits_processors

    window = min(sampling.repetition_context or 64, MAX_PENALTY_WINDOW)
    repetition = sampling.repetition_penalty
    if repetition is not None and (repetition == 1 or repetition <= 0):
        repetition = None
    processors: list[LogitsProcessor] = make_logits_processors(
        logit_bias=sampling.logit_bias,
        repetition_penalty=repetition,
        repetition_context_size=window,
        presence_penalty=sampling.presence_penalty,
        presence_context_size=window,
        frequency_penalty=sampling.frequency_penalty,
        frequency_context_size=window,
    )
    return processors


def token_logprobs(
    token: int, logprobs: mx.array, top: int, token_bytes: Callable[[int], bytes]
) -> Token:
    """A token with its log-probability among `logprobs` (vocabulary), and beside it the `top`
    likeliest tokens, those first. `token_bytes` tells a token's bytes. On the MLX thread."""
    import mlx.core as mx

    def described(token: int) -> Token:
        written = token_bytes(token)
        text = written.decode("utf-8", "replace")
        logprob: Any = logprobs[token].item()
        return Token(text, written, max(logprob, MIN_LOGPROB))

    best: Any = mx.argpartition(-logprobs, top)[:top].tolist() if top else []
    likeliest = sorted(map(described, best), key=lambda one: -one.logprob)
    return dataclasses.replace(described(token), top=likeliest)
