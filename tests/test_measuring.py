"""What passes cost is measured a pass at a time, while nobody waits: what a request sees of it, and
what becomes of it if requests never cease, the model goes, or a pass fails."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from mlx_lm.models import llama, qwen2
from speculating import until_measured

from _mlx_server.inference.decoding.runner import ModelRunner
from _mlx_server.inference.sequence import State
from _mlx_server.inference.speculation.pass_costs import ROWS
from engine import Engine, Generation, Request, Sampling

WIDTHS = [rows for rows in ROWS if rows != 3]  # tokens of the passes that are measured
# An answer that does not end, and repeats itself
ENDLESS = Sampling(temperature=0.0, logit_bias=dict.fromkeys((10, 11, 12), 100.0))


class Passes:
    """Notes the passes of models: how many tokens each reads, and whether it is one by which costs
    are measured. Those `begin` and wait until they may `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.all: list[tuple[int, bool]] = []
        self.before: Callable[[int, bool], None] = lambda length, measured: None
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.go.set()
        self._measuring = False
        measure = ModelRunner.measure

        def measured(runner: ModelRunner) -> None:
            self._measuring = True
            measure(runner)
            self._measuring = False

        monkeypatch.setattr(ModelRunner, "measure", measured)
        for kind in (llama.Model, qwen2.Model):
            monkeypatch.setattr(kind, "__call__", self._noting(kind.__call__))

    @property
    def measured(self) -> list[int]:
        """How many tokens those read by which costs are measured."""
        return [length for length, measured in self.all if measured]

    def _noting(self, call: Any) -> Any:
        def read(model: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            self.all.append((tokens.shape[1], self._measuring))
            if self._measuring:
                self.begun.release()
                assert self.go.wait(60)
            self.before(*self.all[-1])
            return call(model, tokens, *args, **kwargs)

        return read


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def ask(engine: Engine, length: int = 32, limit: int = 4, **fields: Any) -> Generation:
    """A request to the model `qwen2` with a prompt that repeats itself."""
    prompt = [10 + at % 8 for at in range(length)]
    fields.setdefault("sampling", ENDLESS)
    return engine.submit(Request("qwen2", prompt=prompt, max_tokens=limit, **fields))


def until_decoding(generation: Generation) -> None:
    until(lambda: generation.sequence.decoding)


def written(generation: Generation) -> list[int]:
    *_, done = generation
    tokens: list[int] = done.tokens[generation.prompt_tokens :]
    return tokens


def test_a_request_that_waits_for_the_model_waits_for_no_measuring(folder: Path, passes: Passes):
    with Engine(models_dirs=[folder]) as engine:
        passes.go.clear()
        generation = ask(engine)
        assert len(written(generation)) == 4 and not generation.usage.draft_tokens
        assert engine.stats().unmeasured == 1
        passes.go.set()
        until_measured(engine)
    assert list(dict.fromkeys(passes.measured)) == WIDTHS


def test_measuring_is_broken_off_for_a_request_and_goes_on_afterwards(folder: Path, passes: Passes):
    passes.go.clear()
    with Engine(str(folder / "qwen2")) as engine:
        assert passes.begun.acquire(timeout=60)
        generation, held = ask(engine), len(passes.all)
        passes.go.set()
        assert len(written(generation)) == 4
        until_measured(engine)
    assert passes.all[held - 1] == (1, True)
    assert [measured for _, measured in passes.all[held : held + 4]] == [False] * 4
    assert list(dict.fromkeys(passes.measured)) == WIDTHS


def test_what_costs_are_known_changes_no_answer_but_brings_drafts(folder: Path, passes: Passes):
    passes.before = lambda length, measured: time.sleep(0.005)  # so that all cost about the same
    with Engine(models_dirs=[folder]) as engine:
        first = ask(engine, limit=60)
        expected = written(first)
        until_measured(engine)
        second = ask(engine, limit=60)
        assert written(second) == expected
    assert not first.usage.draft_tokens and first.usage.decode_passes == 60
    assert second.usage.draft_tokens and second.usage.decode_passes < 60


def test_where_requests_never_cease_each_that_ends_leaves_time_for_a_pass(
    folder: Path, passes: Passes
):
    with Engine(models_dirs=[folder]) as engine:
        endless, ended = ask(engine, limit=3000), 0
        until_decoding(endless)
        while engine.stats().unmeasured:
            assert len(written(ask(engine))) == 4
            ended += 1
            assert len(passes.measured) <= ended <= 9 * len(WIDTHS)
        assert endless.sequence.state is State.DECODE
        endless.cancel()
    assert list(dict.fromkeys(passes.measured)) == WIDTHS


def test_a_pass_that_fails_costs_the_drafts_of_its_model_and_nothing_else(
    folder: Path, passes: Passes, caplog: pytest.LogCaptureFixture
):
    def fail(length: int, measured: bool) -> None:
        if measured and len(passes.measured) == 1:
            raise RuntimeError("no such pass")

    passes.before = fail
    with Engine(models_dirs=[folder]) as engine:
        company = ask(engine, 40, 200)
        until_decoding(company)
        while engine.stats().unmeasured:
            assert len(written(ask(engine))) == 4
        told = written(company)
        alone = ask(engine, 40, 200)
        assert written(alone) == told and not alone.usage.draft_tokens
        assert passes.measured == [1]
        list(engine.submit(Request("llama_sliding", prompt=[10], max_tokens=1)))
        until_measured(engine)
    [record] = [one for one in caplog.records if one.levelname == "WARNING"]
    assert "qwen2 decodes without drafts" in record.getMessage() and record.exc_info
    assert list(dict.fromkeys(passes.measured)) == WIDTHS


def test_a_model_may_go_before_it_is_measured(folder: Path, passes: Passes):
    with Engine(models_dirs=[folder]) as engine:
        running = ask(engine, limit=3000, keep_alive=0.0)
        until_decoding(running)
        model = weakref.ref(engine.pool.runners["qwen2"].model)
        running.cancel()
        until(lambda: not engine.stats().loaded)
        assert not passes.measured and not engine.stats().unmeasured
        del running
        gc.collect()
        assert model() is None
        list(ask(engine, keep_alive=60.0))
        until_measured(engine)


def test_each_of_several_models_is_measured(folder: Path, passes: Passes):
    with Engine(models_dirs=[folder]) as engine:
        for name in ("qwen2", "llama_sliding"):
            list(engine.submit(Request(name, prompt=[10, 11], max_tokens=2)))
        assert engine.stats().loaded == 2
        until_measured(engine)
    assert sorted(set(passes.measured)) == WIDTHS and passes.measured.count(32) >= 2


def test_without_speculation_nothing_is_measured(folder: Path, passes: Passes):
    with Engine(models_dirs=[folder], speculation=False) as engine:
        for _ in range(2):
            assert len(written(ask(engine))) == 4
            assert not engine.stats().unmeasured
    assert not passes.measured


def test_a_pass_that_hangs_is_noticed(
    folder: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Engine, "STUCK", 0.0)
    passes.go.clear()
    with Engine(str(folder / "qwen2")) as engine:
        assert passes.begun.acquire(timeout=60)
        assert engine.hangs
        passes.go.set()
        until_measured(engine)
        until(lambda: not engine.hangs)
