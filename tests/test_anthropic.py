"""Events in, objects of Anthropic's Messages API out. No socket and no model."""

from __future__ import annotations

import json

import pytest
from anthropic.types import Message
from anthropic.types.raw_message_stream_event import RawMessageStreamEvent
from pydantic import TypeAdapter
from wire_cases import HI, Accepted

from _mlx_server.wire.anthropic import AnthropicMessages
from engine import Done, EngineError, Text, Thinking, Tick, ToolEnd, ToolInput, ToolStart, Usage

USAGE = Usage(prompt_tokens=100, cached_tokens=64, completion_tokens=20, thinking_tokens=7)
CALL = [
    ToolStart("toolu_1", "weather"),
    ToolInput('{"city": '),
    ToolInput('"Rome"}'),
    ToolEnd({"city": "Rome"}),
]


def folded(objects: list[dict]) -> list[dict]:
    """The content a client puts together from a stream."""
    content: list[dict] = []
    for one in objects:
        if one["type"] == "content_block_start":
            assert one["index"] == len(content)
            content.append({**one["content_block"], "_json": ""})
        elif one["type"] == "content_block_delta":
            ((key, piece),) = ((key, value) for key, value in one["delta"].items() if key != "type")
            key = {"partial_json": "_json"}.get(key, key)
            content[one["index"]][key] += piece
    for block in content:
        if written := block.pop("_json"):
            block["input"] = json.loads(written)
    return content


EVENTS = TypeAdapter(RawMessageStreamEvent)


def answer(*events: object, **fields) -> tuple[list[dict], dict]:
    """The stream's objects and the whole message, held against each other and against the official
    client's types."""
    reply = AnthropicMessages({"model": "m", "max_tokens": 9, "messages": HI, **fields})
    objects = reply.open(Accepted())
    for event in events:
        objects += reply.event(event)
    for one in objects:
        if one["type"] != "ping":
            EVENTS.validate_python(one, strict=True)
    Message.model_validate(reply.whole(), strict=True)
    assert folded(objects) == reply.whole()["content"]
    return objects, reply.whole()


def shape(objects: list[dict]) -> list[str]:
    names = []
    for one in objects:
        detail = one.get("content_block") or one.get("delta") or {}
        index = f"{one['index']} " if "index" in one else ""
        kind = one["type"].removeprefix("content_block_")
        names.append(f"{index}{kind} {detail.get('type', '')}".rstrip())
    return names


def test_event_order() -> None:
    objects, whole = answer(
        Thinking("hm"),
        Tick(),
        Thinking("m"),
        Text("\n\n"),
        Text("Hello"),
        Text(" "),
        *CALL,
        Text("\n"),
        ToolStart("toolu_2", "weather"),
        ToolInput("{}"),
        ToolEnd({}),
        Done("tool_calls", USAGE),
    )
    assert shape(objects) == [
        "message_start",
        "0 start thinking",
        "ping",
        "0 delta thinking_delta",
        "0 delta thinking_delta",
        "0 delta signature_delta",
        "0 stop",
        "1 start text",
        "1 delta text_delta",
        "1 delta text_delta",
        "1 stop",
        "2 start tool_use",
        *["2 delta input_json_delta"] * 3,
        "2 stop",
        "3 start tool_use",
        *["3 delta input_json_delta"] * 2,
        "3 stop",
        "message_delta",
        "message_stop",
    ]
    assert whole["content"] == [
        {"type": "thinking", "thinking": "hmm", "signature": whole["content"][0]["signature"]},
        {"type": "text", "text": "\n\nHello "},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
        {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
    ]
    assert whole["content"][0]["signature"]
    starts = [one["content_block"] for one in objects if one["type"] == "content_block_start"]
    assert (
        starts[0] == {"type": "thinking", "thinking": "", "signature": ""}
        and starts[2]["input"] == {}
    )


def test_first_and_last_objects() -> None:
    objects, whole = answer(Text("x"), Done("stop", USAGE))
    start, delta = objects[0]["message"], objects[-2]
    assert {
        key: start[key]
        for key in ("id", "role", "model", "content", "stop_reason", "stop_sequence")
    } == {
        "id": "msg_0123456789abcdef01234567",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }
    assert (start["usage"]["input_tokens"], start["usage"]["cache_read_input_tokens"]) == (40, 60)
    assert delta["usage"] == {
        "input_tokens": 36,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 64,
        "output_tokens": 20,
        "output_tokens_details": {"thinking_tokens": 7},
    }
    assert whole["usage"] == {
        **delta["usage"],
        "service_tier": "standard",
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    }
    assert objects[-1] == {"type": "message_stop"}


@pytest.mark.parametrize(
    "reason, stop_reason",
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("context", "model_context_window_exceeded"),
        ("tool_calls", "tool_use"),
        ("load", "end_turn"),
        ("stop_sequence", "stop_sequence"),
    ],
)
def test_stop_reasons(reason: str, stop_reason: str) -> None:
    stop = "END" if reason == "stop_sequence" else None
    objects, whole = answer(Text("x"), Done(reason, USAGE, stop))
    assert objects[-2]["delta"] == {
        "stop_reason": stop_reason,
        "stop_sequence": stop,
        "stop_details": None,
    }
    assert (whole["stop_reason"], whole["stop_sequence"]) == (stop_reason, stop)


@pytest.mark.parametrize("events", [[], [Text(" \n")]])
def test_an_empty_answer_is_one_empty_text(events: list) -> None:
    objects, whole = answer(*events, Done("stop", USAGE))
    assert whole["content"] == [{"type": "text", "text": ""}]
    assert shape(objects)[1:4] == ["0 start text", "ping", "0 stop"]


@pytest.mark.parametrize("display", ["omitted", "updates"])
def test_hidden_thinking_streams_only_its_signature(display: str) -> None:
    objects, whole = answer(
        Thinking("secret"),
        Thinking("!"),
        Text("x"),
        Done("stop", USAGE),
        thinking={"type": "adaptive", "display": display},
    )
    assert shape(objects)[1:5] == ["0 start thinking", "ping", "0 delta signature_delta", "0 stop"]
    assert "secret" not in json.dumps([objects, whole]) and whole["content"][0]["signature"]


def test_a_cut_answer_closes_its_block() -> None:
    assert shape(answer(Thinking("hm"), Done("length", USAGE))[0])[-4:] == [
        "0 delta signature_delta",
        "0 stop",
        "message_delta",
        "message_stop",
    ]


def test_ping_and_failure() -> None:
    reply = AnthropicMessages(
        {"model": "m", "max_tokens": 9, "messages": HI, "stream": True}, "req_1"
    )
    assert reply.stream and reply.framing == "events" and reply.ping() == [{"type": "ping"}]
    assert reply.failure(EngineError("the engine failed")) == [
        {
            "type": "error",
            "error": {"type": "api_error", "message": "the engine failed"},
            "request_id": "req_1",
        }
    ]
