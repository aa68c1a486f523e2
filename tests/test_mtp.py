"""The model's own MTP head: where it is found, what it computes, what its guesses are worth."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mtp_models
import mtp_reference
import mtp_toy
import numpy as np
import pytest
from mtp_models import FORMS, KINDS
from speculating import FREE, tokens, until_measured

from _mlx_server.inference.catalog.models import describe
from _mlx_server.inference.catalog.mtp_files import find_head
from _mlx_server.inference.decoding.prefill import PromptReader
from _mlx_server.inference.decoding.runner import ModelRunner
from _mlx_server.inference.decoding.sampling import Sampler
from _mlx_server.inference.decoding.weights import Weights
from _mlx_server.inference.group import Group
from _mlx_server.inference.pool import ModelPool
from _mlx_server.inference.protocol import ModelLoadError, Usage
from _mlx_server.inference.speculation.head_drafter import HeadDrafter
from _mlx_server.inference.speculation.prompt_lookup import PromptLookup
from engine import Engine, Generation, Request, Sampling


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

    from _mlx_server.inference.speculation.mtp import guess

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


def test_a_head_in_a_folder_of_its_own_counts_before_it_is_loaded(tmp_path: Path):
    model = mtp_models.build(tmp_path, "qwen3_5", "sidecar")
    head = (tmp_path / "Some-1B-MTP-bf16" / "model.safetensors").stat().st_size
    for memory, speculation, fits in (
        (model.size + head, True, True),
        (model.size + head - 1, True, False),
        (model.size + head - 1, False, True),
    ):
        pool = ModelPool(memory, 0, None, None, None, Group(), speculates=speculation)
        if fits:
            pool.check_size(model, lambda: [])
        else:
            with pytest.raises(ModelLoadError, match="needs .* of memory"):
                pool.check_size(model, lambda: [])


# ------------------------------------------------------------------ what guesses are worth

PAIRS, ANSWER = 30, 25
TEXTS = [mtp_toy.text(PAIRS, seed) for seed in range(8)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, with its head in its checkpoint."""
    return mtp_toy.build(tmp_path_factory.mktemp("toy") / "toy", mtp_toy.trained())


@pytest.fixture
def one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head alone drafts, now and then and a single token: if it always did, it would guess
    letters alone, or values alone, since each right guess skips one."""
    coin = random.Random(3)
    monkeypatch.setattr(PromptLookup, "chances", lambda self: [])
    monkeypatch.setattr(HeadDrafter, "chances", lambda self: [1.0] if coin.random() < 0.7 else [])


@contextmanager
def started(path: Path, **options: Any) -> Iterator[Engine]:
    """An engine whose passes cost the same, however wide they are."""
    with Engine(str(path), **options) as engine:
        list(engine.chat("", max_tokens=0))
        if speculation := runner(engine).speculation:
            speculation.costs = FREE
        yield engine


def runner(engine: Engine) -> ModelRunner:
    assert engine.default is not None
    return engine.pool.runners[engine.default.name]


def ask(engine: Engine, text: str, seed: int, length: int = ANSWER) -> Generation:
    # Other tokens than those of the language were not in the training
    sampling = Sampling(temperature=1.0, top_k=len(mtp_toy.KEYS), seed=seed)
    return engine.submit(Request("default", prompt=text, sampling=sampling, max_tokens=length))


def answers(engine: Engine) -> tuple[list[list[int]], float, int]:
    """What the model answers to all texts, how much of the head's drafts is right, and how many
    tokens were read before."""
    told, used = [], Usage()
    for seed, text in enumerate(TEXTS):
        generation = ask(engine, text, seed)
        *_, done = generation
        told.append(done.tokens)
        used.draft_tokens += done.usage.draft_tokens
        used.accepted_tokens += done.usage.accepted_tokens
        used.cached_tokens += done.usage.cached_tokens
    drafted = used.draft_tokens["mtp"]
    return told, used.accepted_tokens["mtp"] / max(1, drafted), used.cached_tokens


@pytest.fixture(scope="module")
def expected(toy: Path) -> list[list[int]]:
    """The answers without drafts."""
    with started(toy, speculation=False) as engine:
        assert not runner(engine).weights.has_head
        return answers(engine)[0]


@pytest.mark.slow
def test_guesses_are_as_good_with_a_restored_prefix(
    toy: Path, tmp_path: Path, expected: list[list[int]], one_ahead: None
):
    right = []
    for restart in (False, True):
        with started(toy, cache_dir=tmp_path) as engine:
            for again in (False, True):
                told, accepted, cached = answers(engine)
                assert told == expected
                assert cached == (0 if not restart and not again else len(TEXTS) * (2 * PAIRS - 1))
                right.append(accepted)
    cold, memory, disk, _ = right
    # A head that has read the prompt knows all that can be known: the sampler's draws are shared.
    assert cold > 0.9 and abs(memory - cold) < 0.02 and abs(disk - cold) < 0.02, right


def before_the_norm(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    body, seen, read = model.language_model.model, [], type(model.mtp).read
    norm = body.norm
    body.norm = lambda x: seen.append(x) or norm(x)
    monkeypatch.setattr(
        type(model.mtp), "read", lambda self, tokens, _, cache: read(self, tokens, seen[-1], cache)
    )


def one_token_off(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    kind = type(model.mtp.before)
    before = kind.__call__

    def same(self: Any, hidden: Any, cache: Any) -> Any:
        before(self, hidden, cache)
        return hidden

    monkeypatch.setattr(kind, "__call__", same)


def without_history(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    from mlx.utils import tree_map

    from _mlx_server.inference.speculation import mtp

    fetch = mtp.Seen.update_and_fetch

    def last(self: Any, keys: Any, values: Any) -> Any:
        return tree_map(lambda array: array[..., -1:, :], fetch(self, keys, values))

    monkeypatch.setattr(mtp.Seen, "update_and_fetch", last)


def norms_shifted_twice(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    import mlx.core as mx

    for norm in (model.mtp.pre_fc_norm_embedding, model.mtp.pre_fc_norm_hidden):
        norm.weight = norm.weight + 1
        mx.eval(norm.weight)


def other_draws(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    pick, draft = Sampler.pick, HeadDrafter.draft

    def drafted(self: Any, row: Any, length: int) -> list[int]:
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "pick", lambda *args: pick(*args[:2], args[2] + 1000))
            return draft(self, row, length)

    monkeypatch.setattr(HeadDrafter, "draft", drafted)


WRONG = [before_the_norm, one_token_off, without_history, norms_shifted_twice, other_draws]


@pytest.mark.slow
@pytest.mark.parametrize("spoil", WRONG)
def test_a_wrong_input_changes_no_answer_but_spoils_guesses(
    toy: Path,
    expected: list[list[int]],
    one_ahead: None,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch, Any], None],
):
    with started(toy) as engine:
        spoil(monkeypatch, runner(engine).model)
        told, accepted, _ = answers(engine)
    assert told == expected
    assert accepted < 0.85, accepted


def test_several_guesses_change_no_answer_either(toy: Path, expected: list[list[int]]):
    with started(toy) as engine:
        told, accepted, _ = answers(engine)
        passes = engine.stats().totals.decode_passes
    assert told == expected and accepted > 0.7
    assert passes < 0.5 * ANSWER * len(TEXTS)


def test_what_a_guess_takes_is_measured(toy: Path):
    with Engine(str(toy)) as engine:
        until_measured(engine)
        speculation = runner(engine).speculation
    assert speculation is not None
    gain = {name: speculation.costs.best_draft([1.0] * 31, 0, name)[1] for name in ("", "mtp")}
    assert gain["mtp"] < gain[""]


def state(cache: list[Any]) -> list[Any]:
    """The head's: the last hidden state, keys and values."""
    last, history = cache[-2:]
    pairs = (array[..., : history.offset, :] for array in (history.keys, history.values))
    return [np.array(one) for one in (last[0], *pairs)]


@pytest.mark.parametrize("bits", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_what_the_head_has_read_is_what_the_model_has_read(
    toy: Path, monkeypatch: pytest.MonkeyPatch, bits: int | None
):
    """Also if requests were read and have decoded together, in chunks, with drafts that were right
    and wrong."""
    import mlx.core as mx

    monkeypatch.setattr(PromptReader, "CHUNK", 40)
    with started(toy, kv_bits=bits) as engine:
        told = []
        for texts in (TEXTS[:3], TEXTS[3:4], [TEXTS[4], TEXTS[4][:40]]):
            together = [
                ask(engine, text, seed, ANSWER + 20 * seed) for seed, text in enumerate(texts)
            ]
            told += [list(generation)[-1].tokens for generation in together]
        entries = engine.pool.prefixes.entries()
        assert engine.stats().totals.accepted_tokens["mtp"] > 0
    assert {tuple(entry.tokens) for entry in entries} <= {
        tuple(one[: len(entry.tokens)]) for one in told for entry in entries
    }
    model = describe("toy", toy)
    weights = Weights(model, bits, Group(), find_head(model))
    for entry in entries:
        cache = weights.new_cache()
        weights.model(mx.array([entry.tokens]), cache=cache)
        if bits:
            assert cache[-1].offset == entry.cache[-1].offset == len(entry.tokens)
            continue
        for one, other in zip(state(entry.cache), state(cache), strict=True):
            assert one.shape == other.shape and np.abs(one - other).max() < 1e-4
