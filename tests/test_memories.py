"""What is kept between requests takes no more bytes than it is allowed, whatever clients send."""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import tracemalloc
from collections.abc import Iterator

import pytest

from _mlx_server.inference.bounded import BoundedMap, text_bytes
from _mlx_server.inference.catalog.library import Library
from _mlx_server.inference.prompt.chat_renderer import ChatRenderer
from _mlx_server.inference.prompt.conversations import ConversationMemory, Reading
from _mlx_server.inference.prompt.history import HistoryMemo
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import Message, Request
from _mlx_server.inference.speculation.quotable import Quotable
from _mlx_server.wire.documents import document_text

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


def test_a_pdf_that_cannot_be_read_is_not_kept():
    content = b"%PDF-1.4\n" + os.urandom(ROOM)
    data = base64.b64encode(content).decode()
    del content
    with growth() as left:
        for _ in range(2):
            said = document_text(data, "application/pdf", "file", None, None)
            assert "is damaged or no PDF" in said
    assert left[0] < ROOM / 4
