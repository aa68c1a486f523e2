"""The model's own MTP head: where it is found, what it computes, what its guesses are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mtp_models
import mtp_reference
import numpy as np
import pytest
from mtp_models import FORMS, KINDS
from speculating import tokens

from _mlx_server.inference.group import Group
from _mlx_server.inference.models import describe
from _mlx_server.inference.mtp_files import find_head
from _mlx_server.inference.weights import Weights


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def loaded(model: Any) -> Weights:
    weights = Weights(model, None, Group(), find_head(model))
    assert weights.has_head
    return weights


def said(model: Any, prompt: list[int], chunks: list[int], guesses: int) -> list[Any]:
    """The log-probabilities of a head's guesses behind a prompt that was read in chunks, up to its
    last token."""
    import mlx.core as mx

    from _mlx_server.inference.mtp import guess

    cache, heard, start = model.make_cache(), [], 0
    for end in [*chunks, len(prompt) - 1]:
        model(mx.array([prompt[start:end]]), cache=cache)
        start = end

    def pick(logprobs: Any, at: int) -> Any:
        heard.append(np.array(logprobs[0]))
        return logprobs.argmax(-1)

    read = [layer.offset for layer in cache if hasattr(layer, "offset")]
    guess(model, cache, prompt[-1], guesses, pick)
    assert [layer.offset for layer in cache if hasattr(layer, "offset")] == read
    return heard


def logprobs(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


@pytest.mark.parametrize("kind", ["qwen3_5", *map(slow, ["qwen3_5_moe", "qwen3_next"])])
def test_the_head_computes_what_the_formulas_say(tmp_path: Path, kind: str):
    import mlx.core as mx

    weights = loaded(mtp_models.build(tmp_path, kind, "raw"))
    prompt, model = tokens(23), weights.model
    hidden = np.array(weights.body(mx.array([prompt[:-1]]), cache=model.make_cache())[0])
    held = mtp_models.weights(kind)
    numbers = {name: np.array(array, np.float64) for name, array in held.items()}
    before = "" if kind == "qwen3_next" else "language_model."
    head = mtp_models.raw(kind, {n: a for n, a in held.items() if n.startswith("mtp.")})
    expected = mtp_reference.logits(
        mtp_models.text_config(kind),
        {name.removeprefix("mtp."): np.array(array, np.float64) for name, array in head.items()},
        numbers[f"{before}model.embed_tokens.weight"],
        numbers[f"{before}lm_head.weight"],
        hidden.astype(np.float64),
        prompt,
        guesses=3,
    )
    for chunks in ([], [1], [1, 2, 9]):
        for one, other in zip(said(model, prompt, chunks, 3), expected, strict=True):
            assert np.abs(one - logprobs(other)).max() < 1e-4


@pytest.mark.parametrize(
    "kind", [*map(slow, [kind for kind in KINDS if kind != "qwen3_5"]), "qwen3_5"]
)
def test_a_head_is_found_in_every_form(tmp_path: Path, kind: str):
    prompt, heard = tokens(12), {}
    for form in FORMS:
        model = mtp_models.build(tmp_path / form, kind, form)
        heard[form] = np.array(said(loaded(model).model, prompt, [], 2))
        if form == "quantised":
            assert "scales" in loaded(model).model.mtp.fc
    for form in FORMS:
        most = 0.5 if form == "quantised" else 1e-4
        assert np.abs(heard[form] - heard["raw"])[0].max() < most, form
