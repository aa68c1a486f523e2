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


class Sampler:
    """Picks tokens at random. The draw for a token depends on the seed and on the token's place in
    the answer alone, so that a seed gives the same text whatever else is computed beside it, and in
    whatever portions. On the MLX thread.

    `place` is that of the token to be picked next: how many tokens of the answer precede it."""

    def __init__(self, sampling: Sampling, vocabulary: int):
        self._temperature = 1.0 if sampling.temperature is None else sampling.temperature
        self._top_k, self._vocabulary = sampling.top_k or 0, vocabulary
        self._top_p, self._min_p = sampling.top_p or 1.0, sampling.min_p or 0.0
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._seed = seed & 0xFFFFFFFF
        self.place = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        """The next token (1) from log-probabilities (1, vocabulary)."""
        token = self.pick(logprobs, self.place)
        self.place += 1
        return token

    def pick(self, logprobs: mx.array, place: int) -> mx.array:
        """The tokens (length) from log-probabilities (length, vocabulary) of a place and of those
        behind it."""
        import mlx.core as mx
        from mlx_lm import sample_utils

        if 0 < self._top_p < 1:
            logprobs = sample_utils.apply_top_p(logprobs, self._top_p)
        if 0 < self._min_p <= 1:
            logprobs = sample_utils.apply_min_p(logprobs, self._min_p)
        if 0 < self._top_k < self._vocabulary:
            logprobs = sample_utils.apply_top_k(logprobs, self._top_k)
        logits = logprobs * (1 / self._temperature)
        draws = []
        for row in range(logits.shape[0]):
            key = mx.array([self._seed, place + row], mx.uint32)
            draws.append(mx.random.categorical(logits[row : row + 1], key=key))
        return draws[0] if len(draws) == 1 else mx.concatenate(draws)


def make_sampler(sampling: Sampling, vocabulary: int) -> Callable[[mx.array], mx.array]:
    """A sampler from log-probabilities (batch, vocabulary) to tokens (batch): mlx-lm's greedy one,
    which requests share, or a `Sampler`, which is one request's own. On the MLX thread."""
    from mlx_lm import sample_utils

    if sampling.temperature is not None and sampling.temperature <= 0:
        greedy: Callable[[mx.array], mx.array] = sample_utils.greedy_sampler
        return greedy
    return Sampler(sampling, vocabulary)


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
