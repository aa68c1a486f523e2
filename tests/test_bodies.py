"""What one body can make of itself: values, nesting, what it refers to, what is told of it."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Server
from test_http import ask

import dialects
from _mlx_server.front.body import parse_json
from _mlx_server.front.budget import BUDGET, BodyBudget, BodyClaim
from _mlx_server.inference.constrained.schema import ToolTypes
from _mlx_server.inference.constrained.schema_limits import MAX_SCHEMAS, check_enforceable
from _mlx_server.inference.output.marks import Beginnings
from _mlx_server.inference.prompt.conversations import ConversationMemory, Reading
from _mlx_server.inference.protocol import InvalidRequest
from _mlx_server.wire.chat_messages import chat_turns
from _mlx_server.wire.documents import file_text
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.images import Images
from _mlx_server.wire.json_text import FEW, MAX_VALUES, without_strings
from _mlx_server.wire.ollama_request import image_texts
from _mlx_server.wire.reply import Reply
from _mlx_server.wire.tools import MAX_TOOLS, PastArguments

HI = {"role": "user", "content": "hi"}


def parsed(text: bytes) -> dict:
    return parse_json(text, True, BodyClaim(BodyBudget(), BUDGET))


def reply_of(path: str, body: dict) -> Reply:
    return dialects.ENDPOINTS[path].reply({"model": "demo", "max_tokens": 1, **body}, "id")


def peak(work: Callable[[], object]) -> int:
    """Bytes of Python objects that something takes at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------ JSON


def python_calls(work: Callable[[], object]) -> int:
    """How often the interpreter enters a function of Python: between two of them others run."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("end", ["1", '"\\ud800"'])
def test_others_run_while_many_values_are_read(end: str):
    text = f'{{"a": [{"1e-400," * FEW}{end}]}}'.encode()
    assert python_calls(lambda: parsed(text)) > FEW
    few = f'{{"a": [{"1e-400," * 1000}{end}], "b": "{"[1," * FEW}"}}'.encode()
    assert python_calls(lambda: parsed(few)) < FEW


def test_both_ways_of_reading_read_the_same():
    values = [{"a": [1, -2.5, True, None, 'x\\"\\u00e9\\ud83d\\ude00'], "": {}}, [], "", 10**30, {}]
    text = json.dumps({"a": values, "b": ["\ud800", {"\udc00": 1}]}).encode()
    many = text[:-1] + b', "c": [' + b'{},"",' * FEW + b"0]}"
    few, more = parsed(text), parsed(many)
    more.pop("c")
    assert more == few and few["b"] == ["?", {"?": 1}]


@pytest.mark.parametrize("value", [b'""', b"{}", b"[]", b"1.5", b'"a,b"'])
def test_a_body_has_a_bounded_number_of_values(value: bytes):
    text = b'{"a": [' + b",".join([value] * (MAX_VALUES + 1)) + b"]}"

    def refused() -> None:
        with pytest.raises(WireError, match="many|more than") as error:
            parsed(text)
        assert error.value.status == 413

    assert peak(refused) < 8 << 20


def test_tokens_of_texts_are_integers_of_which_there_may_be_more():
    body = parsed(json.dumps({"prompt": [1] * (MAX_VALUES + 1)}).encode())
    assert len(body["prompt"]) > MAX_VALUES


def test_the_tokens_of_a_long_context_are_read_at_once():
    context = json.dumps({"context": [100_000] * (4 * FEW)}).encode()
    assert python_calls(lambda: parsed(context)) < 6 * FEW  # to count them are 4 * FEW


def test_strings_of_any_length_are_cut_off():
    raw = json.dumps({"a": "[," * 100_000, 'b"': ["\\", '"', "é" * 70_000], "c": [1, 2]}).encode()
    marks = b"".join(without_strings(raw)).replace(b" ", b"")
    assert marks == b"{:,:[,,],:[1,2]}"


@pytest.mark.parametrize("key", ["think", "format", "keep_alive"])
def test_no_depth_is_an_error_of_the_server(server: Server, key: str):
    for depth in range(940, 1000):
        text = f'{{"model": "demo", "messages": [], "{key}": {"[" * depth}{"]" * depth}}}'
        assert ask(server, "POST", "/api/chat", text.encode())[0].status == 400, depth


# ------------------------------------------------------------------ conversations


def test_a_reference_shows_a_tool_once():
    deferred = {"name": "a", "input_schema": {}, "description": "d" * 10_000, "defer_loading": True}
    block = {"type": "tool_reference", "tool_name": "a"}
    body = {"tools": [deferred], "messages": [{**HI, "content": [block] * 1000}]}
    content = reply_of("/v1/messages", body).request.messages[0]["content"]
    assert content.count("d" * 10_000) == 1 and content.count("\na") == 999


def calls_of_one_turn(n: int) -> list[dict]:
    return [
        {"role": "assistant", "tool_calls": [{"function": {"name": f"t{k}"}} for k in range(n)]},
        *({"role": "tool", "content": f"{k}", "tool_name": f"t{k}"} for k in range(n)),
    ]


class Counted(str):
    """A text that counts how often any of its kind is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_a_result_finds_its_call_among_many():
    counts = []
    for n in (100, 400):
        messages = calls_of_one_turn(n)
        for message in messages[1:]:
            message["tool_name"] = Counted(message["tool_name"])
        Counted.compared = 0
        turns = chat_turns(messages, lambda message, path: message.get("content", ""))
        assert [turn.call_id for turn in turns[1:]] == [id for id, _, _ in turns[0].calls]
        counts.append(Counted.compared)
    assert counts[1] <= 5 * counts[0]


def test_a_result_goes_to_the_call_of_its_id_then_of_its_name_then_to_the_first():
    calls = [{"id": i, "function": {"name": n}} for i, n in ("1a", "2b", "3a", "4c", "5d")]
    asked = [{"tool_call_id": "3"}, {"name": "b"}, {"tool_name": "a"}, {}, {"name": "c"}, {}]
    results = [{"role": "tool", **one} for one in asked]
    turns = chat_turns([{"role": "assistant", "tool_calls": calls}, *results], lambda *_: "")
    assert [turn.call_id for turn in turns[1:]] == ["3", "2", "1", "4", "5", "unknown"]


def test_the_arguments_of_all_calls_have_a_bounded_number_of_values():
    text, past = "[" + "0," * (MAX_VALUES // 2) + "0]", PastArguments()
    assert len(past.read(text, "a")["input"]) == MAX_VALUES // 2 + 1
    with pytest.raises(WireError, match="more than") as error:
        past.read(text, "b")
    assert error.value.status == 413
    words = json.dumps({"a": ",[" * MAX_VALUES})
    assert PastArguments().read(words, "c") == json.loads(words)


def test_what_is_written_within_past_arguments_is_no_value():
    text, past = json.dumps({"content": "f(a, [b], {})\n" * 1000}), PastArguments()
    for number in range(MAX_VALUES // 1000):
        assert past.read(text, f"messages.{number}") == json.loads(text)


def test_past_arguments_that_are_no_json_have_no_values():
    table = "name,size\n" * MAX_VALUES
    assert PastArguments().read(table * 2, "a") == {"input": table * 2}


@pytest.mark.parametrize(
    "path, one",
    [
        ("/v1/messages", {"input_schema": {}, "defer_loading": True}),
        ("/v1/chat/completions", {"type": "function"}),
        ("/v1/responses", {"type": "function"}),
        ("/api/chat", {"type": "function"}),
    ],
)
def test_tools_have_a_bound(path: str, one: dict):
    def body(n: int) -> dict:
        return {
            "messages": [HI],
            "input": "hi",
            "tools": [{"name": f"t{k}", **one} for k in range(n)],
        }

    assert reply_of(path, body(MAX_TOOLS))
    with pytest.raises(WireError, match=f"at most {MAX_TOOLS}"):
        reply_of(path, body(MAX_TOOLS + 1))


def test_a_grammar_has_a_bounded_number_of_tools():
    check_enforceable([{}] * MAX_SCHEMAS)
    with pytest.raises(InvalidRequest, match="at most 1000 will do"):
        check_enforceable([{}] * (MAX_SCHEMAS + 1))


def test_a_tool_whose_types_nobody_asks_for_costs_nothing(caplog: pytest.LogCaptureFixture):
    wide: Any = {"properties": {f"p{k}": {"enum": [0] * 1000} for k in range(100)}}
    tools = [{"function": {"name": f"t{k}", "parameters": wide}} for k in range(50)]
    plain = {"properties": {"a": {"type": "integer"}}}
    types = ToolTypes([*tools, {"function": {"name": "plain", "parameters": plain}}])
    assert "t7" in types and types["plain"]["a"] == {"integer"}
    assert not any(set().union(*types[f"t{k}"].values()) for k in range(50))
    assert caplog.text.count("types of parameters") == 1


def test_beginnings_are_found_whichever_text_is_longer():
    texts = ["", "a", "ab", "abc", "b", "ba", "c"]
    for known in (["ab", "abd", "b"], ["ab"], ["zz", "ab"], []):
        for text in texts:
            expected = any(one.startswith(text) or text.startswith(one) for one in known)
            assert Beginnings(known).match(text) == expected, (known, text)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", ["text/plain;base64,", "text/plain,", "image"])
def test_a_file_takes_little_more_than_its_text(kind: str):
    text = "%41" * 10**6 if kind == "text/plain," else "QUFB " * 10**6

    def read() -> None:
        if kind == "image":
            assert "no PNG" in Images().text(text, "a")
        else:
            data = {"file_data": f"data:{kind}{text}"}
            assert file_text(data, "a", lambda *_: "").strip("A") == ""

    assert peak(read) < 40 << 20


@pytest.mark.parametrize(
    "data, place",
    [
        ("AAAA", None),
        ("AA==", None),
        ("A=AA", 1),
        ("AéAA", 1),
        ("A===", 1),
        ("AAA", 3),
        ("A b=", 1),
    ],
)
def test_what_is_not_base64_is_told_by_its_place(data: str, place: int | None):
    body = {"images": [data]}
    if place is None:
        assert image_texts(body, images=Images())
        return
    with pytest.raises(WireError, match=f"input byte {place}$"):
        image_texts(body, images=Images())


# ------------------------------------------------------------------ what is told and kept


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "none", "tools": [{"name": "t", "parameters": {"x": "x" * 10**6}}]},
        {"tool_choice": {"type": "auto", "x": "x" * 10**6, "mode": "x" * 10**6}},
    ],
)
def test_events_of_a_response_hold_only_what_the_model_reads(fields: dict):
    reply = reply_of("/v1/responses", {"input": "hi", **fields})
    assert len(json.dumps(reply.ping())) < 5000


def test_a_conversation_beyond_all_bounds_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    memory = ConversationMemory()
    monkeypatch.setattr(memory, "MOST", 100_000)
    memory.learn({"a": Reading("", [1] * 100, {})})
    memory.learn({"b": Reading("", [1] * 100_000, {})})
    assert memory.tokens("b") is None
    memory.learn({"c": Reading("", [1] * 100, {})})
    assert memory.tokens("c") == [1] * 100


def test_a_number_of_many_digits_is_refused_soon(server: Server):
    for digits, status in ((640, 400), (641, 400)):
        text = f'{{"model": "demo", "messages": [], "keep_alive": "1", "think": {"9" * digits}}}'
        response, said = ask(server, "POST", "/api/chat", text.encode())
        assert response.status == status and (b"too many digits" in said) == (digits > 640)
