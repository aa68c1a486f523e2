"""What is kept between requests takes no more bytes than it is allowed, whatever clients send."""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import platform
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import until

from _mlx_server.inference.bounded import BoundedMap, text_bytes
from _mlx_server.inference.catalog.library import Library
from _mlx_server.inference.prompt import template
from _mlx_server.inference.prompt.chat_renderer import ChatRenderer
from _mlx_server.inference.prompt.conversations import ConversationMemory, Reading
from _mlx_server.inference.prompt.history import HistoryMemo
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.inference.prompt.template import speed_up
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import Message, PromptTooLong, Request
from _mlx_server.inference.speculation.quotable import Quotable
from _mlx_server.wire.documents import document_text
from engine import Engine

ROOM = 1 << 20  # bytes of each memory here, so that it is soon full


@contextlib.contextmanager
def growth() -> Iterator[list[int]]:
    """The list gets the bytes that what was made within is left with."""
    found: list[int] = []
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield found
        gc.collect()
        found.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    return PromptRenderer(Library([]).resolve("demo", trusted=True))


def calls(number: int, count: int) -> list[Message]:
    """A conversation of short messages, as new objects."""
    asked: list[Message] = [{"role": "user", "content": f"conversation {number}"}]
    for at in range(count):
        function = {"name": "Bash", "arguments": {"a": at}}
        call = {"id": f"c{number}_{at}", "type": "function", "function": function}
        asked.append({"role": "assistant", "content": "", "tool_calls": [call]})
    return json.loads(json.dumps(asked))


@pytest.mark.parametrize("count", [0, 5, 200])
def test_short_messages_count_with_what_is_made_of_them(
    count: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(HistoryMemo, "REMEMBERED", ROOM)
    memo, memory = HistoryMemo(lambda message: json.loads(json.dumps(message))), []
    with growth() as left:
        for number in range(2000 // (count + 1)):
            history = memo.prepare(calls(number, count))
            memory = ConversationMemory().follow("root", history.messages)
            memo.keep(history)
        del history, memory
    assert ROOM / 10 < left[0] < 1.5 * ROOM


@pytest.mark.parametrize("tokens, names", [(3, 0), (3, 4), (300, 4), (3000, 300)])
def test_short_readings_count_with_their_names(
    tokens: int, names: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ConversationMemory, "MOST", ROOM)
    memory = ConversationMemory()
    with growth() as left:
        for number in range(8000 // (names + 1)):
            key = f"{number:032x}"
            led = {f"{number:020x}{at:012x}": f"{number:020x}{at // 2:012x}" for at in range(names)}
            memory.learn({key: Reading("", [1] * tokens, led)})
    assert ROOM / 4 < left[0] < 1.5 * ROOM
    assert memory.tokens(key) == [1] * tokens


def test_texts_count_with_their_keys():
    for length in (1, 100, 10_000):
        kept: BoundedMap[str] = BoundedMap(ROOM, text_bytes)
        with growth() as left:
            for number in range(8000 if length < 1000 else 200):
                kept.put(f"{number:032x}", str(number % 10) * length)
        assert ROOM / 4 < left[0] < 1.5 * ROOM


def test_thoughts_take_bounded_room(renderer: PromptRenderer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ChatRenderer, "TEXTS", ROOM)
    monkeypatch.setattr(ConversationMemory, "MOST", ROOM)
    request = Request("demo", [{"role": "user", "content": "hi"}], owner="thinks much")
    prompt = renderer.prompt(request)
    with growth() as left:
        for number in range(300):
            called = [(f"call {number}", "Bash", {})]
            renderer.remember(request, prompt, [1], "", f"{number} " * 10_000, called)
    assert left[0] < 3 * ROOM


def test_results_spelt_for_drafts_take_bounded_room(
    renderer: PromptRenderer, monkeypatch: pytest.MonkeyPatch
):
    room = ROOM // 8
    monkeypatch.setattr(Quotable, "REMEMBERED", room)
    monkeypatch.setattr(TextTokenizer, "REMEMBERED", 0)
    prompt = renderer.prompt(Request("demo", [{"role": "user", "content": "hi"}]))
    quoting = PromptRenderer(Library([]).resolve("demo", trusted=True))
    with growth() as left:
        for number in range(10):
            result = "".join(f"{at}\t{number} {at % 7}\n" for at in range(1, 1500))
            messages = [{"role": "tool", "content": result}]
            assert quoting.drafters(Request("demo", messages), prompt)
    assert left[0] < 2 * room


def parameters(count: int) -> Any:
    return {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(count)}}


@pytest.mark.parametrize(
    "value",
    [{}, [], {"a": 1}, [{}] * 300, [[]] * 300, [1001] * 300, parameters(50), ["a b " * 5000]],
    ids=lambda value: json.dumps(value)[:12],
)
def test_the_json_of_calls_and_tools_counts_with_what_it_is_of(
    value: Any, monkeypatch: pytest.MonkeyPatch
):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    monkeypatch.setattr(template, "JSON_KEPT", ROOM)
    text = json.dumps(value)
    environment = _compile_jinja_template(f"counts {text[:50]}").environment
    speed_up(environment)
    with growth() as left:
        for _ in range(350_000 // (len(text) + 60)):
            assert environment.filters["tojson"](json.loads(text)) == text
    assert ROOM / 10 < left[0] < 1.5 * ROOM


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("count", [10, 500])
def test_tools_count_with_what_is_made_of_them(
    monkeypatch: pytest.MonkeyPatch, count: int, refused: bool
):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    room = ROOM // 4
    monkeypatch.setattr(ChatRenderer, "ROOTS", room)
    monkeypatch.setattr(ConversationMemory, "MOST", 0)
    monkeypatch.setattr(ChatRenderer, "TEXTS", 0)
    monkeypatch.setattr(HistoryMemo, "REMEMBERED", 0)
    monkeypatch.setattr(TextTokenizer, "REMEMBERED", 0)
    monkeypatch.setattr(template, "JSON_KEPT", 0)
    _compile_jinja_template.cache_clear()  # or JSON would be kept by an earlier test's template
    renderer = PromptRenderer(Library([]).resolve("demo", trusted=True))
    _compile_jinja_template.cache_clear()
    most = 10 if refused else 1_000_000
    with growth() as left:
        for number in range(2000 // count + 20):
            tool = {"function": {"name": "a", "description": "", "parameters": [{}] * count}}
            turns = [{"role": "system", "content": f"{number}"}, {"role": "user", "content": "hi"}]
            request = Request("demo", turns, tools=json.loads(json.dumps([tool])))
            with contextlib.suppress(PromptTooLong):
                renderer.prompt(request, most=most)
    assert left[0] < (room / 2 if refused else 1.5 * room)


@pytest.mark.parametrize("refused", [True, False])
def test_the_json_of_a_refused_prompts_calls_is_not_kept(
    renderer: PromptRenderer, refused: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(HistoryMemo, "REMEMBERED", 0)
    monkeypatch.setattr(ConversationMemory, "MOST", 0)
    owner = f"refused {refused}"
    renderer.prompt(Request("demo", calls(0, 1), owner=owner))
    with growth() as left:
        for number in range(5):
            request = Request("demo", calls(number, 500), owner=owner)
            with contextlib.suppress(PromptTooLong):
                renderer.prompt(request, most=10 if refused else 1_000_000)
        del request
    assert (left[0] < ROOM / 8) == refused


def test_an_idle_engine_keeps_no_freed_buffers():
    import mlx.core as mx

    with Engine("demo") as engine:
        assert list(engine.chat("say hi", max_tokens=1))
        until(lambda: not engine.stats().unmeasured)
        assert list(engine.chat("count to 20", max_tokens=40))
        until(lambda: mx.get_cache_memory() == 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_an_idle_engine_gives_back_what_is_free_between_blocks_in_use():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with Engine("demo") as engine:
        assert list(engine.chat("say hi", max_tokens=1))
        until(lambda: not engine.stats().unmeasured)
        blocks = [b"x" * 100_000 for _ in range(1000)]  # fewer bytes than would be a mapping
        kept, most = blocks[::10], resident()
        del blocks
        assert list(engine.chat("say yes", max_tokens=1))
        until(lambda: resident() < most - (60 << 20))
    assert len(kept) == 100


def test_a_pdf_that_cannot_be_read_is_not_kept():
    content = b"%PDF-1.4\n" + os.urandom(ROOM)
    data = base64.b64encode(content).decode()
    del content
    with growth() as left:
        for _ in range(2):
            said = document_text(data, "application/pdf", "file", None, None)
            assert "is damaged or no PDF" in said
    assert left[0] < ROOM / 4
