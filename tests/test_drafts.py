"""Requests that decode with drafts, through the engine: ends, states, company, figures. Each answer
is compared with that of an engine without speculation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_copy import TABLES
from conftest import kinds
from phases import Phases
from speculating import FREE, FixedCosts, Oracle
from test_engine import answer, cold, user

from _mlx_server.front.cli import parse_arguments
from _mlx_server.front.metrics import Metrics
from _mlx_server.front.request_log import RequestLog
from _mlx_server.inference.decoding.runner import ModelRunner
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.inference.sequence import State
from engine import Done, Engine, Generation, Priority, Request, Sampling, Text, Token, ToolInput

GREEDY = Sampling(temperature=0.0)
QUESTION = "words " * 40
WORDS = "alpha river seven maple stone cloud tiger window paper candle yellow mountain"
TOOL = {
    "type": "function",
    "function": {
        "name": "Look",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["here", "there"]}},
            "required": ["at"],
        },
    },
}


class Pair:
    """An engine that decodes with drafts and one that does not, of the same model. What the first
    one drafts is known beforehand from the second."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any):
        self.expected: dict[str, list[int]] = {}  # answers by the last message
        self.oracles: list[Oracle] = []
        self.plain = Engine(str(path), speculation=False, **options)
        self.drafting = Engine(str(path), **options)
        monkeypatch.setattr(PromptRenderer, "drafters", self._drafters)
        for engine in (self.plain, self.drafting):
            list(engine.chat("", max_tokens=0))
        assert self.runner.speculation is not None
        self.runner.speculation.costs = FREE

    @property
    def runner(self) -> ModelRunner:
        assert self.drafting.default is not None
        return self.drafting.pool.runners[self.drafting.default.name]

    def close(self) -> None:
        self.plain.close()
        self.drafting.close()

    def _drafters(self, request: Request, prompt: Any) -> list[Any]:
        last = request.messages[-1]["content"] if request.messages else ""
        if not request.speculate or last not in self.expected:
            return []
        self.oracles.append(Oracle(self.expected[last], len(prompt.tokens)))
        return self.oracles[-1:]

    def learn(self, messages: Any, **fields: Any) -> list[int]:
        """The tokens of an answer without speculation, which drafts are taken from later on."""
        generation = self.plain.chat(messages, **{"sampling": GREEDY, "max_tokens": 60, **fields})
        done = [event for event in generation if isinstance(event, Done)][0]
        tokens = done.tokens[generation.prompt_tokens :]
        last = messages if isinstance(messages, str) else messages[-1]["content"]
        self.expected[last] = tokens
        return tokens

    def both(self, messages: Any, **fields: Any) -> tuple[Generation, Generation]:
        """The request on both engines, which must answer and keep the same."""
        fields = {"sampling": GREEDY, "max_tokens": 60, **fields}
        told, generations = [], []
        for engine in (self.plain, self.drafting):
            assert engine.default is not None
            prefixes = engine.pool.prefixes
            prefixes.drop(engine.pool.runners[engine.default.name].fingerprint)
            generation = engine.chat(messages, **fields)
            events = list(generation)
            done = events[-1]
            assert isinstance(done, Done)
            [entry] = prefixes.entries()
            read = [layer.offset for layer in entry.cache if hasattr(layer, "offset")]
            told.append((done.reason, done.tokens, spelt(events), entry.tokens, read))
            assert set(read) == {len(entry.tokens)}
            generations.append(generation)
        assert told[0] == told[1]
        plain, drafting = generations
        assert plain.usage.completion_tokens == drafting.usage.completion_tokens
        return plain, drafting


def spelt(events: list[Any]) -> str:
    """What is told, however it came in pieces; numbers are rounded, since layers with a window
    compute in another order."""
    parts = []
    for event in events:
        if isinstance(event, Text):
            parts += [event.text, *map(rounded, event.tokens)]
        elif isinstance(event, ToolInput):
            parts.append(event.json)
    return "".join(part for part in parts if isinstance(part, str)) + repr(
        [part for part in parts if not isinstance(part, str)]
    )


def rounded(token: Token) -> tuple[str, float, list[Any]]:
    return token.text, round(token.logprob, 2), list(map(rounded, token.top))


@pytest.fixture(params=kinds("hybrid"))
def pair(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pair]:
    pair = Pair(folder / request.param, monkeypatch)
    yield pair
    pair.close()


@pytest.mark.slow
def test_an_answer_ends_inside_a_draft_as_it_does_without(pair: Pair):
    length = len(pair.learn(QUESTION))
    whole = pair.both(QUESTION)[0].sequence.visible
    assert pair.oracles[0].accepted
    for at in (len(whole) // 3, len(whole) // 2):
        plain, drafting = pair.both(QUESTION, stop=[whole[at : at + 3]])
        assert plain.sequence.ending == "stop_sequence"
    for limit in (1, 2, length // 3, length // 2):
        assert pair.both(QUESTION, max_tokens=limit)[0].sequence.ending == "length"
    # The next turn goes on from the states that were kept.
    messages = [user(QUESTION), {"role": "assistant", "content": whole}, user("go on")]
    warm, generation = answer(pair.drafting, messages)
    assert warm == cold(pair.plain, messages)
    assert generation.usage.cached_tokens > 0


@pytest.mark.slow
def test_an_answer_ends_with_a_call_inside_a_draft(pair: Pair):
    fields: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": "Look",
        "parallel_tool_calls": False,
        "max_tokens": 400,
        "sampling": Sampling(temperature=1.0, seed=1),
    }
    pair.learn(QUESTION, **fields)
    plain, _ = pair.both(QUESTION, **fields)
    assert plain.sequence.ending == "tool_calls" and pair.oracles[-1].accepted


@pytest.mark.slow
def test_a_turn_ends_inside_a_draft(pair: Pair):
    """The model's end token comes behind a draft, never within it."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x" * 30]}}, "required": ["a"]}
    fields = {"format": schema | {"additionalProperties": False}}
    pair.learn(QUESTION, **fields)
    plain, drafting = pair.both(QUESTION, **fields)
    assert plain.sequence.ending == "stop"
    assert drafting.usage.decode_passes < plain.usage.decode_passes


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"format": {"type": "array", "items": {"enum": ["ab", "cd"]}, "maxItems": 9}},
        {"logprobs": 3},
        {"sampling": Sampling(temperature=1.0, seed=5)},
        {"sampling": Sampling(temperature=1.0, top_p=0.9, top_k=30, seed=5), "logprobs": 2},
        {"sampling": Sampling(temperature=0.0, repetition_penalty=1.2, presence_penalty=0.4)},
        {"stop": ["e"], "sampling": Sampling(temperature=1.0, seed=7)},
    ],
    ids=str,
)
def test_what_a_request_asks_for_comes_out_the_same(pair: Pair, fields: dict):
    pair.learn(QUESTION, **{**fields, "stop": []})
    pair.both(QUESTION, **fields)
    assert pair.oracles[-1].drafted


@pytest.mark.slow
def test_a_cancelled_request_keeps_whole_tokens(pair: Pair):
    pair.learn(QUESTION)
    generation = pair.drafting.chat(QUESTION, sampling=GREEDY, max_tokens=60)
    next(iter(generation))
    generation.cancel()
    while generation.sequence.state is not State.ENDED:
        pass
    messages = [user(QUESTION)]
    assert answer(pair.drafting, messages, max_tokens=60)[0] == cold(
        pair.plain, messages, max_tokens=60
    )


@pytest.mark.slow
def test_a_draft_that_fails_to_be_read_costs_no_answer(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    expected = pair.learn(QUESTION)
    begin, failures = pair.runner.speculation.rollback.begin, []

    def fail(*args: Any) -> None:
        begin(*args)
        if len(failures) < 1:
            failures.append(1)
            raise RuntimeError("a pass that fails")

    monkeypatch.setattr(pair.runner.speculation.rollback, "begin", fail)
    generation = pair.drafting.chat(QUESTION, sampling=GREEDY, max_tokens=60)
    done = list(generation)[-1]
    assert failures and done.tokens[generation.prompt_tokens :] == expected


@pytest.mark.slow
def test_who_joins_and_leaves_changes_no_answer(pair: Pair):
    first = pair.learn(QUESTION, max_tokens=120)
    second = pair.learn("other " * 30, max_tokens=20)
    one = pair.drafting.chat(QUESTION, sampling=GREEDY, max_tokens=120)
    next(iter(one))
    other = pair.drafting.chat("other " * 30, sampling=GREEDY, max_tokens=20)
    for generation, tokens in ((other, second), (one, first)):
        done = list(generation)[-1]
        assert done.tokens[generation.prompt_tokens :] == tokens
    if len(first) > 100:  # it goes on alone
        assert one.usage.decode_passes < one.usage.completion_tokens


@pytest.mark.slow
def test_a_paused_request_goes_on_with_the_same_tokens(pair: Pair):
    endless = Sampling(temperature=0.0, logit_bias={2: -1e9})  # without an end token
    expected = pair.learn(QUESTION, sampling=endless, max_tokens=300)
    decode, paused = pair.runner.decode, []

    def pausing(alone: bool) -> None:
        decode(alone)
        if not paused:
            [sequence] = pair.runner.decoding()
            paused.append(pair.runner.pause(sequence))
            pair.runner.admit(sequence)

    pair.runner.decode = pausing
    generation = pair.drafting.chat(QUESTION, sampling=endless, max_tokens=300)
    done = list(generation)[-1]
    assert paused == [True] and done.tokens[generation.prompt_tokens :] == expected
    assert len(expected) == 300


def test_a_seed_gives_one_text_in_company_too(folder: Path):
    sampling = Sampling(temperature=1.0, seed=3)
    with Engine(str(folder / "qwen2")) as engine:
        alone = answer(engine, QUESTION, sampling=sampling, max_tokens=20)[0]
        neighbour = engine.chat("x", max_tokens=40)
        assert answer(engine, QUESTION, sampling=sampling, max_tokens=20)[0] == alone
        list(neighbour)


@pytest.mark.slow
def test_what_drafts_bring_is_told(pair: Pair, caplog: pytest.LogCaptureFixture):
    pair.learn(QUESTION)
    _, generation = pair.both(QUESTION)
    oracle, usage = pair.oracles[-1], generation.usage
    figures = Metrics().text(pair.drafting.stats(), True)
    for figure in (
        f'draft_tokens_total{{drafter="oracle"}} {oracle.drafted}',
        f'accepted_tokens_total{{drafter="oracle"}} {oracle.accepted}',
        f"decode_passes_total {usage.decode_passes}",
        f"tokens_per_pass {round(usage.completion_tokens / usage.decode_passes, 2)}",
    ):
        assert f"\nmlx_server_{figure}\n" in figures
    assert usage.completion_tokens - usage.decode_passes == oracle.accepted
    with caplog.at_level("INFO", "mlx_server"):
        RequestLog("route", "id", "dialect").generation(generation)
    assert f"a pass, oracle {oracle.accepted} of {oracle.drafted} right)" in caplog.text


@pytest.mark.slow
def test_a_request_may_do_without(pair: Pair):
    pair.learn(QUESTION)
    generation = pair.drafting.chat(QUESTION, max_tokens=9, speculate=False)
    list(generation)
    assert generation.usage.decode_passes == 9 and not pair.oracles
    assert not parse_arguments(["--no-speculation"]).speculation


@pytest.mark.slow
def test_the_demo_model_repeats_what_it_was_told_in_few_passes():
    with Engine("demo") as engine:
        list(engine.chat("", max_tokens=0))
        [runner] = engine.pool.runners.values()
        assert runner.speculation is not None
        runner.speculation.costs = FixedCosts(TABLES["M3 or later"])
        tokens = passes = 0
        for question in (f"say {WORDS}", "count to 9", "think then say alpha"):
            generation = engine.chat(question, sampling=GREEDY)
            "".join(generation.text())
            tokens += generation.usage.completion_tokens
            passes += generation.usage.decode_passes
            if question.startswith("say"):
                assert tokens >= 3 * passes
        assert tokens > passes


@pytest.mark.slow
def test_a_request_that_may_not_load_its_model_yet_costs_no_drafts(folder: Path, phases: Phases):
    with Engine("demo", models_dirs=[folder]) as engine:
        list(engine.chat("", max_tokens=0))
        [runner] = engine.pool.runners.values()
        assert runner.speculation is not None
        runner.speculation.costs = FixedCosts(TABLES["M3 or later"])
        held = phases.hold(State.DECODE)
        high = engine.chat(f"say {WORDS}", sampling=GREEDY)
        with held:
            low = engine.chat("hi", model="qwen2", max_tokens=1, priority=Priority.LOW)
        list(high)
        assert high.usage.completion_tokens >= 3 * high.usage.decode_passes
        list(low)
