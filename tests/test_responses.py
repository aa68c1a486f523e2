"""OpenAI's responses: bodies in, requests out; events in, objects out. No socket and no model."""

from __future__ import annotations

import json
import logging

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai_cases import BASH, CALL, EVENTS, NAMESPACE, READ, answer, chat, flat, respond
from pydantic import TypeAdapter
from wire_cases import HI, Accepted

from _mlx_server.wire.responses import OpenAIResponses
from engine import Done, EngineError, Text, Token, ToolEnd, ToolInput, ToolStart, Usage


def test_both_apis_make_the_same_conversation():
    tools = [BASH, READ]
    ours = chat(
        messages=[
            {"role": "system", "content": "s"},
            *HI,
            {**CALL, "content": "Well", "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "1", "content": "F"},
            {"role": "tool", "tool_call_id": "2", "content": "G"},
        ],
        tools=tools,
        reasoning_effort="low",
        response_format={"type": "json_schema", "json_schema": {"schema": {"a": 1}}},
        tool_choice={"type": "function", "function": {"name": "Read"}},
    )
    theirs = respond(
        instructions="s",
        tools=[*map(flat, tools), {"type": "web_search"}],
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"a": 1}}},
        store=False,
        include=["x"],
        tool_choice={"type": "function", "name": "Read"},
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "hm"}],
                "content": None,
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Well"}],
            },
            *(
                {"type": "function_call", "call_id": id, "name": name, "arguments": '{"x": 1}'}
                for id, name in (("1", "f"), ("2", "g"))
            ),
            {
                "type": "function_call_output",
                "call_id": "2",
                "output": [{"type": "input_text", "text": "G"}],
            },
            {"type": "function_call_output", "call_id": "1", "output": "F"},
            {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": []},
        ],
    )
    assert ours == theirs


STREAM_EVENTS = TypeAdapter(ResponseStreamEvent)


def test_responses_events_make_the_whole():
    reply = OpenAIResponses({"model": "m", "input": "hi", "tools": [flat(READ), NAMESPACE]})
    objects, whole = answer(reply, *EVENTS)
    for one in objects:
        STREAM_EVENTS.validate_python(one, strict=True)
    Response.model_validate_json(json.dumps(whole), strict=True)
    names = [one["type"].removeprefix("response.") for one in objects]
    around = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        *["reasoning_summary_text.delta"] * 2,
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 2,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        *around[:2],
        *around[1:],
        *around,
        "completed",
    ]
    assert [one["sequence_number"] for one in objects] == list(range(len(objects)))
    done = [one["item"] for one in objects if one["type"] == "response.output_item.done"]
    assert done == objects[-1]["response"]["output"] == whole["output"]
    assert [one["type"] for one in done] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert (
        done[0]["summary"] == [{"type": "summary_text", "text": "hm"}]
        and done[1]["content"][0]["text"] == "Hello"
    )
    assert [
        (one["call_id"], one.get("namespace"), one["name"], one["arguments"]) for one in done[2:]
    ] == [("toolu_1", None, "f", '{"x": 1}'), ("toolu_2", "ns", "g", "{}")]
    assert len({one["id"] for one in done}) == 4
    assert whole["usage"] == {
        "input_tokens": 100,
        "output_tokens": 20,
        "total_tokens": 120,
        "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 7},
    }


PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}


def test_a_custom_tool_is_called_with_text():
    reply = OpenAIResponses(
        {
            "model": "m",
            "input": "hi",
            "tools": [PATCH],
            "tool_choice": {"type": "custom", "name": "apply_patch"},
        }
    )
    assert reply.request.tool_choice == "apply_patch"
    [offered] = reply.request.tools
    assert offered["function"]["description"] == "Edits.\n\nstart: /.+/"
    assert offered["function"]["parameters"]["required"] == ["input"]
    objects, whole = answer(
        reply,
        ToolStart("toolu_1", "apply_patch"),
        ToolInput('{"input": "a'),
        ToolInput('\\n"}'),
        ToolEnd({"input": "a\n"}),
        Done("tool_calls", Usage(9, completion_tokens=1)),
    )
    for one in objects:
        STREAM_EVENTS.validate_python(one, strict=True)
    Response.model_validate_json(json.dumps(whole), strict=True)
    assert [one["type"].removeprefix("response.") for one in objects[2:-1]] == [
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
    ]
    [item] = whole["output"]
    assert (item["type"], item["call_id"], item["name"], item["input"]) == (
        "custom_tool_call",
        "toolu_1",
        "apply_patch",
        "a\n",
    )
    [_, called, result] = respond(
        tools=[PATCH],
        input=[
            *HI,
            {**item, "input": '{"x": 1}'},
            {"type": "custom_tool_call_output", "call_id": "toolu_1", "output": "done"},
        ],
    ).messages
    assert (
        called["tool_calls"][0]["function"]["arguments"] == {"input": '{"x": 1}'}
        and result["content"] == "done"
    )


def test_a_local_shell_call_in_the_history_is_a_call():
    action = {"type": "exec", "command": ["ls"], "env": {}}
    [_, called, result] = respond(
        input=[
            *HI,
            {
                "type": "local_shell_call",
                "id": "lsh_1",
                "call_id": "c1",
                "action": action,
                "status": "completed",
            },
            {"type": "local_shell_call_output", "id": "c1", "output": "a.txt"},
        ]
    ).messages
    assert called["tool_calls"][0]["function"] == {"name": "local_shell", "arguments": action}
    assert (result["role"], result["content"]) == ("tool", "a.txt")


def test_responses_weigh_their_tokens_where_that_is_asked_for():
    body = {
        "model": "m",
        "input": "hi",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    reply = OpenAIResponses(body)
    assert reply.request.logprobs == 2
    tokens = [Token(text, text.encode(), -0.5, [Token("x", b"x", -0.25)]) for text in ("He", "y")]
    objects, whole = answer(
        reply,
        Text("He", tokens[:1]),
        Text("y", tokens[1:]),
        Done("stop", Usage(9, completion_tokens=2)),
    )
    for one in objects:
        STREAM_EVENTS.validate_python(one, strict=True)
    Response.model_validate_json(json.dumps(whole), strict=True)
    pieces = [one["logprobs"] for one in objects if one["type"] == "response.output_text.delta"]
    weighed = whole["output"][0]["content"][0]["logprobs"]
    assert [one["token"] for one in weighed] == ["He", "y"] and weighed == [*pieces[0], *pieces[1]]
    assert [one["logprobs"] for one in objects if one["type"] == "response.output_text.done"] == [
        weighed
    ]
    assert (
        OpenAIResponses({"model": "m", "input": "hi", "top_logprobs": 2}).request.logprobs is None
    )


def test_a_tool_of_a_namespace_keeps_its_name_when_its_call_comes_back():
    request = respond(
        tools=[NAMESPACE],
        input=[
            *HI,
            {
                "type": "function_call",
                "call_id": "1",
                "namespace": "ns",
                "name": "g",
                "arguments": "{}",
            },
        ],
    )
    called = request.messages[1]["tool_calls"][0]["function"]["name"]
    assert called == request.tools[0]["function"]["name"] != "g"
    strict = {**NAMESPACE, "tools": [{**NAMESPACE["tools"][0], "strict": True}]}
    assert respond(tools=[strict]).strict and not respond(tools=[NAMESPACE]).strict


@pytest.mark.parametrize(
    "reason, status",
    [
        ("stop", "completed"),
        ("stop_sequence", "completed"),
        ("length", "incomplete"),
        ("context", "incomplete"),
        ("tool_calls", "completed"),
    ],
)
def test_endings(reason: str, status: str):
    reply = OpenAIResponses({"model": "m", "input": "hi"})
    objects, whole = answer(reply, Text("x"), Done(reason, Usage(9, completion_tokens=1)))
    assert objects[-1]["type"] == f"response.{status}"
    assert whole["output"][0]["status"] == whole["status"] == status
    assert (whole["incomplete_details"] is None) == (status == "completed")


def test_a_failure_in_a_stream():
    reply = OpenAIResponses({"model": "m", "input": "hi"})
    reply.open(Accepted())
    (event,) = reply.failure(EngineError("odd"))
    STREAM_EVENTS.validate_python(event, strict=True)
    assert event["response"]["error"] == {"code": "server_error", "message": "odd"}


def test_an_unknown_item_becomes_a_note_and_a_log_line(caplog: pytest.LogCaptureFixture):
    note = "[item_of_tomorrow omitted: this server cannot use it]"
    with caplog.at_level(logging.INFO, "mlx_server"):
        request = respond(input=[{"type": "item_of_tomorrow"}, *HI])
    assert request.messages == [{"role": "user", "content": f"{note}\nhi"}]
    assert f"input.0: {note}" in caplog.text


def test_items_that_this_server_cannot_use_leave_calls_and_results_together():
    def call(id: str) -> dict:
        return {"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"}

    messages = respond(
        input=[
            *HI,
            {"type": "item_reference", "id": "rs_1"},
            call("1"),
            {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}},
            call("2"),
            {"type": "function_call_output", "call_id": "1", "output": "F"},
            {"type": "function_call_output", "call_id": "2", "output": "G"},
            {"type": "function_call_output", "name": "later", "output": "H"},
        ]
    ).messages
    assert "rs_1" in messages[0]["content"] and "web_search_call" in messages[1]["content"]
    assert [(one["role"], one["content"]) for one in messages[2:]] == [
        ("tool", "F"),
        ("tool", "G"),
        ("user", "Tool result (later): H"),
    ]
