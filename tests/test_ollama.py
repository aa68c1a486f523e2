"""Events in, objects of Ollama's chat and generate out. No socket and no model."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from ollama import ChatResponse, GenerateResponse
from wire_cases import DEMO, HI, Accepted

from _mlx_server.wire.fields import WireError
from _mlx_server.wire.ollama import OllamaChat, OllamaGenerate
from engine import Done, EngineError, Text, Thinking, Tick, ToolEnd, ToolInput, ToolStart, Usage


@pytest.mark.parametrize(
    "ask, fields, capabilities, message",
    [
        (OllamaChat, {"think": True}, ["completion"], '"m" does not support thinking'),
        (OllamaGenerate, {"think": "low"}, ["completion"], '"m" does not support thinking'),
        (OllamaChat, {"think": False}, ["completion"], None),
        (OllamaChat, {}, ["completion"], None),
        (OllamaChat, {"think": True}, ["completion", "thinking"], None),
        (OllamaChat, {}, ["embedding"], '"m" does not support chat'),
        (OllamaGenerate, {"suffix": "x"}, ["completion"], "m does not support insert"),
        (OllamaGenerate, {"suffix": "x"}, ["completion", "insert"], None),
        (OllamaGenerate, {}, ["embedding"], '"m" does not support generate'),
    ],
)
def test_what_a_model_cannot_do(
    ask: type, fields: dict, capabilities: list, message: str | None
) -> None:
    reply = ask({"model": "m", "messages": HI, "prompt": "hi", **fields})
    refusal = None
    try:
        reply.check(replace(DEMO, capabilities=capabilities))
    except WireError as error:
        refusal = error.message
    assert refusal == message


USAGE = Usage(
    prompt_tokens=100,
    cached_tokens=60,
    completion_tokens=20,
    thinking_tokens=7,
    load_seconds=0.25,
    prefill_seconds=1.0000000019,
    decode_seconds=2.0,
    total_seconds=3.5,
)
METRICS = {
    "total_duration": 3_500_000_000,
    "load_duration": 250_000_000,
    "prompt_eval_count": 100,
    "prompt_eval_duration": 1_000_000_001,
    "eval_count": 20,
    "eval_duration": 2_000_000_000,
}
RESPONSES = {OllamaChat: ChatResponse, OllamaGenerate: GenerateResponse}


def answer(ask: type, *events: object, **fields) -> tuple[list[dict], dict]:
    """The stream's objects and the whole answer, without their times; the official client can read
    them all."""
    reply = ask({"model": "M", "messages": HI, "prompt": "hi", **fields})
    objects = reply.open(Accepted())
    for event in events:
        objects += reply.event(event)
    whole = reply.whole()
    for one in [*objects, whole]:
        RESPONSES[ask].model_validate_json(json.dumps(one))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", one.pop("created_at"))
        assert one.pop("model") == "M" and "error" not in one
    return objects, whole


def test_chat_stream() -> None:
    objects, whole = answer(
        OllamaChat,
        Thinking("hmm"),
        Tick(),
        Text("Hel"),
        Text("lo"),
        ToolStart("toolu_1", "f"),
        ToolInput('{"x": '),
        ToolInput("1}"),
        ToolEnd({"x": 1}),
        ToolStart("toolu_2", "g"),
        ToolInput("{}"),
        ToolEnd({}),
        Done("tool_calls", USAGE),
    )
    calls = whole["message"]["tool_calls"]
    assert [one["function"] for one in calls] == [
        {"index": 0, "name": "f", "arguments": {"x": 1}},
        {"index": 1, "name": "g", "arguments": {}},
    ]
    assert (
        all(re.fullmatch(r"call_[a-z0-9]{8}", one["id"]) for one in calls)
        and calls[0]["id"] != calls[1]["id"]
    )

    def chunk(content: str, done: bool = False, **more) -> dict:
        return {"message": {"role": "assistant", "content": content, **more}, "done": done}

    ending = {"done_reason": "stop", **METRICS}
    assert objects == [
        chunk("", thinking="hmm"),
        chunk("Hel"),
        chunk("lo"),
        chunk("", tool_calls=calls[:1]),
        chunk("", tool_calls=calls[1:]),
        {**chunk("", done=True), **ending},
    ]
    assert whole == {**chunk("Hello", done=True, thinking="hmm", tool_calls=calls), **ending}


def test_generate_stream() -> None:
    objects, whole = answer(
        OllamaGenerate, Thinking("hmm"), Text("Hel"), Text("lo"), Done("stop", USAGE, tokens=[5, 6])
    )
    ending = {"done": True, "done_reason": "stop", "context": [5, 6], **METRICS}
    assert objects == [
        {"response": "", "thinking": "hmm", "done": False},
        {"response": "Hel", "done": False},
        {"response": "lo", "done": False},
        {"response": "", **ending},
    ]
    assert whole == {"response": "Hello", "thinking": "hmm", **ending}


def test_a_chat_and_a_raw_prompt_have_no_context() -> None:
    done = Done("stop", USAGE, tokens=[5, 6])
    for objects, whole in answer(OllamaGenerate, done, raw=True), answer(OllamaChat, done):
        assert "context" not in objects[-1] | whole


def test_counts_and_durations_are_integers() -> None:
    ending = answer(OllamaChat, Done("stop", USAGE))[0][-1]
    assert all(type(ending[key]) is int for key in METRICS)


@pytest.mark.parametrize(
    "reason, done_reason",
    [
        ("stop", "stop"),
        ("stop_sequence", "stop"),
        ("tool_calls", "stop"),
        ("length", "length"),
        ("context", "length"),
        ("load", "load"),
    ],
)
@pytest.mark.parametrize("ask", [OllamaChat, OllamaGenerate])
def test_done_reasons(ask: type, reason: str, done_reason: str) -> None:
    objects, whole = answer(ask, Done(reason, USAGE))
    assert objects[-1]["done_reason"] == whole["done_reason"] == done_reason
    assert ("eval_count" in whole) == (reason != "load")


@pytest.mark.parametrize("letter", ["x", "\n", "я", "😀", "\x00"])
def test_lines_stay_short(letter: str) -> None:
    text = letter * 100_000
    objects, whole = answer(OllamaChat, Text(text), Done("stop", USAGE))
    assert max(len(json.dumps(one)) for one in objects) < 128 * 1024
    assert (
        "".join(one["message"]["content"] for one in objects) == whole["message"]["content"] == text
    )


@pytest.mark.parametrize(
    "ask, empty, text_fields",
    [
        (OllamaChat, {"messages": []}, {"message": {"role": "assistant", "content": ""}}),
        (OllamaChat, {"messages": None}, {"message": {"role": "assistant", "content": ""}}),
        (OllamaGenerate, {"prompt": ""}, {"response": ""}),
        (OllamaGenerate, {"prompt": None, "raw": True}, {"response": ""}),
    ],
)
@pytest.mark.parametrize(
    "keep_alive, unload", [(None, False), ("5m", False), (0, True), ("0s", True)]
)
def test_loading_and_unloading(
    ask: type, empty: dict, text_fields: dict, keep_alive: object, unload: bool
) -> None:
    body = {
        "model": "m",
        "messages": HI,
        "prompt": "hi",
        "stream": True,
        "keep_alive": keep_alive,
        **empty,
    }
    reply = ask(body)
    assert (reply.unload, reply.stream, reply.request.messages, reply.request.prompt) == (
        unload,
        False,
        [],
        None,
    )
    events = [] if unload else [Done("load", Usage())]
    _, whole = answer(ask, *events, **{"keep_alive": keep_alive, **empty})
    assert whole == {**text_fields, "done": True, "done_reason": "unload" if unload else "load"}


def test_a_chat_with_keep_alive_zero_is_answered() -> None:
    reply = OllamaChat({"model": "m", "messages": HI, "keep_alive": 0})
    assert not reply.unload and reply.request.keep_alive == 0


def test_ping_and_failure() -> None:
    reply = OllamaChat({"model": "m", "messages": HI})
    (ping,) = reply.ping()
    assert ping["message"] == {"role": "assistant", "content": ""} and ping["done"] is False
    assert reply.framing == "lines"
    assert reply.failure(EngineError("the engine failed")) == [{"error": "the engine failed"}]
