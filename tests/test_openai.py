"""The OpenAI dialect: its rules by themselves, then the official client and raw HTTP against a
really started server."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Iterator

import ollama
import openai
import pytest
from conftest import Server
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from _mlx_server.wire.conversation import IMAGE_NOTE
from _mlx_server.wire.errors import openai_error
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.openai import OpenAIChat, OpenAICompletion
from _mlx_server.wire.responses import OpenAIResponses
from _mlx_server.wire.tools import call_arguments
from engine import (
    Done,
    EngineBusy,
    EngineClosed,
    EngineError,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    PromptTooLong,
    Request,
    Text,
    Thinking,
    Token,
    ToolEnd,
    ToolInput,
    ToolStart,
    Usage,
)

HI = [{"role": "user", "content": "hi"}]
BASH = {
    "type": "function",
    "function": {
        "name": "Bash",
        "description": "Runs a command.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
}
READ = {"type": "function", "function": {"name": "Read"}}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def flat(tool: dict) -> dict:
    """A tool as responses have it."""
    return {"type": "function", "strict": False, **tool["function"]}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chat(**fields) -> Request:
    return OpenAIChat({"model": "m", "messages": HI, **fields}).request


def respond(**fields) -> Request:
    return OpenAIResponses({"model": "m", "input": "hi", **fields}).request


# ------------------------------------------------------------------ the request


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": id, "type": "function", "function": {"name": name, "arguments": '{"x": 1}'}}
        for id, name in (("1", "f"), ("2", "g"))
    ],
}


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([{"role": "developer", "content": "d"}, *HI], [("system", "d"), ("user", "hi")]),
        (
            [
                {
                    "role": "system",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                *HI,
            ],
            [("system", "a\nb"), ("user", "hi")],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "x"}},
                        {"type": "text", "text": "see"},
                    ],
                }
            ],
            [("user", f"{IMAGE_NOTE}\nsee")],
        ),
        (
            [*HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *HI],
            [("user", "hi"), ("assistant", "no"), ("user", "hi")],
        ),
        (
            [{"role": "user", "content": None}, *HI, {"role": "critic", "content": "x"}],
            [("user", "hi\nx")],
        ),
        (
            [
                *HI,
                CALL,
                {"role": "tool", "tool_call_id": "2", "content": "G"},
                {"role": "tool", "tool_call_id": "1", "content": "F"},
            ],
            [("user", "hi"), ("assistant", ""), ("tool", "F"), ("tool", "G")],
        ),
        (
            [
                *HI,
                CALL,
                {"role": "tool", "content": "F"},
                {"role": "function", "name": "g", "content": [{"type": "text", "text": "G"}]},
            ],
            [("user", "hi"), ("assistant", ""), ("tool", "F"), ("tool", "G")],
        ),
    ],
)
def test_messages(messages: list, expected: list):
    assert [
        (message["role"], message["content"]) for message in chat(messages=messages).messages
    ] == expected


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_comes_back(key: str):
    assert chat(messages=[*HI, {**CALL, key: "hm"}]).messages[1]["reasoning_content"] == "hm"


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
            {"type": "of_tomorrow"},
        ],
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "written, read",
    [
        ("", {}),
        ('{"x": 1}', {"x": 1}),
        ("[1]", {"input": [1]}),
        ("{", {"input": "{"}),
        ("[" * 5000, {"input": "[" * 5000}),
        ('{"x": "\\ud800"}', {"x": "?"}),
        ('{"x": "\\ud83d\\ude00"}', {"x": "\U0001f600"}),
    ],
)
def test_past_arguments_are_an_object_of_text_whatever_was_written(written: str, read: dict):
    assert call_arguments(written) == read


@pytest.mark.parametrize(
    "choice, expected, left",
    [
        (None, "auto", "Bash Read"),
        ("none", "none", "Bash Read"),
        ("required", "any", "Bash Read"),
        ({"type": "function", "function": {"name": "Read"}}, "Read", "Bash Read"),
        ({"type": "function", "name": "Read"}, "Read", "Bash Read"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [READ]}},
            "any",
            "Read",
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [flat(READ)]}, "auto", "Read"),
    ],
)
def test_tool_choice(choice: object, expected: str, left: str):
    request = chat(tools=[BASH, READ], tool_choice=choice, parallel_tool_calls=False)
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, False)
    assert [tool["function"]["name"] for tool in request.tools] == left.split()


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, {"max_tokens": None, "logprobs": None, "thinking": None, "effort": None, "stop": []}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_tokens": -1}, {"max_tokens": None}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", "", "b"]}, {"stop": ["a", "b"]}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"logprobs": False, "top_logprobs": 0}, {"logprobs": None}),
        ({"reasoning_effort": "none"}, {"thinking": False, "effort": None}),
        ({"reasoning_effort": "xhigh"}, {"thinking": True, "effort": "xhigh"}),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"},
            {"thinking": False, "effort": "low"},
        ),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"thinking": True, "effort": None}),
        (
            {
                "response_format": {"type": "text"},
                "user": "u",
                "store": True,
                "verbosity": "low",
                "future": {},
            },
            {"messages": HI},
        ),
    ],
)
def test_fields(fields: dict, expected: dict):
    assert {key: getattr(chat(**fields), key) for key in expected} == expected


def test_sampling():
    fields = {
        "temperature": 2,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "seed": -3,
    }
    sampling = vars(chat(**fields, top_k=-1, logit_bias={"7": -100, "8": 1.5}).sampling)
    assert {key: value for key, value in sampling.items() if value is not None} == {
        **fields,
        "top_k": 0,
        "logit_bias": {7: -100, 8: 1.5},
    }


def test_choices_have_seeds_of_their_own():
    reply = OpenAICompletion({"model": "m", "prompt": ["a", "b"], "n": 2, "seed": 5})
    assert [(one.prompt, one.sampling.seed, one.max_tokens) for one in reply.requests] == [
        ("a", 5, 16),
        ("a", 6, 16),
        ("b", 5, 16),
        ("b", 6, 16),
    ]


# ------------------------------------------------------------------ the answer


class Numbers:
    """What a dialect reads off a generation."""

    id, prompt_tokens, cached_tokens = "0123456789abcdef01234567", 100, 60


STREAM_EVENTS = TypeAdapter(ResponseStreamEvent)
EVENTS = [
    Thinking("h"),
    Thinking("m"),
    Text("Hel"),
    Text("lo"),
    ToolStart("toolu_1", "f"),
    ToolInput('{"x":'),
    ToolInput(" 1}"),
    ToolEnd({"x": 1}),
    ToolStart("toolu_2", "ns__g"),
    ToolInput("{}"),
    ToolEnd({}),
    Done("tool_calls", Usage(100, 60, 20, 7)),
]


def answer(reply, *events) -> tuple[list, dict]:
    objects = json.loads(json.dumps(reply.open(Numbers())))
    for event in events:
        objects += json.loads(json.dumps(reply.event(event)))
    return objects, reply.whole()


def test_chat_pieces_make_the_whole():
    objects, whole = answer(
        OpenAIChat({"model": "m", "messages": HI, "stream_options": {"include_usage": True}}),
        *EVENTS,
    )
    assert objects.pop() == "data: [DONE]"
    for one in objects:
        ChatCompletionChunk.model_validate(one, strict=True)
    usage = objects.pop()
    deltas = [one["choices"][0]["delta"] for one in objects]
    assert [one["usage"] for one in objects] == [None] * len(objects) and usage["choices"] == []
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert [one["choices"][0]["finish_reason"] for one in objects] == [None] * (
        len(objects) - 1
    ) + ["tool_calls"]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert pieces == [
        {
            "index": 0,
            "id": "toolu_1",
            "type": "function",
            "function": {"name": "f", "arguments": ""},
        },
        {"index": 0, "function": {"arguments": '{"x":'}},
        {"index": 0, "function": {"arguments": " 1}"}},
        {
            "index": 1,
            "id": "toolu_2",
            "type": "function",
            "function": {"name": "ns__g", "arguments": ""},
        },
        {"index": 1, "function": {"arguments": "{}"}},
    ]
    ChatCompletion.model_validate(whole, strict=True)
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
        "reasoning_content": "hm",
        "reasoning": "hm",
        "tool_calls": [
            {
                "id": "toolu_1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"x": 1}'},
            },
            {"id": "toolu_2", "type": "function", "function": {"name": "ns__g", "arguments": "{}"}},
        ],
    }
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert (
        whole["usage"]
        == usage["usage"]
        == {
            "prompt_tokens": 100,
            "completion_tokens": 20,
            "total_tokens": 120,
            "prompt_tokens_details": {"cached_tokens": 60},
            "completion_tokens_details": {"reasoning_tokens": 7},
        }
    )


NAMESPACE = {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "g"}]}


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
        Done("tool_calls", Usage(9, 0, 1)),
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
        reply, Text("He", tokens[:1]), Text("y", tokens[1:]), Done("stop", Usage(9, 0, 2))
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
    "reason, finish, status",
    [
        ("stop", "stop", "completed"),
        ("stop_sequence", "stop", "completed"),
        ("length", "length", "incomplete"),
        ("context", "length", "incomplete"),
        ("tool_calls", "tool_calls", "completed"),
    ],
)
def test_endings(reason: str, finish: str, status: str):
    done = Done(reason, Usage(9, 0, 1))
    _, whole = answer(OpenAIChat({"model": "m", "messages": HI}), Text("x"), done)
    assert whole["choices"][0]["finish_reason"] == finish
    objects, whole = answer(OpenAIResponses({"model": "m", "input": "hi"}), Text("x"), done)
    assert (
        objects[-1]["type"] == f"response.{status}"
        and whole["output"][0]["status"] == whole["status"] == status
    )
    assert (whole["incomplete_details"] is None) == (status == "completed")


def test_failures_in_a_stream():
    reply = OpenAIChat({"model": "m", "messages": HI})
    assert reply.failure(EngineError("odd")) == [
        {"error": {"message": "odd", "type": "server_error", "param": None, "code": None}}
    ]
    reply = OpenAIResponses({"model": "m", "input": "hi"})
    reply.open(Numbers())
    (event,) = reply.failure(EngineError("odd"))
    STREAM_EVENTS.validate_python(event, strict=True)
    assert event["response"]["error"] == {"code": "server_error", "message": "odd"}


@pytest.mark.parametrize(
    "error, status, kind, code, message",
    [
        (
            WireError(401, "invalid x-api-key"),
            401,
            "invalid_request_error",
            "invalid_api_key",
            "invalid x-api-key",
        ),
        (
            ModelNotFound("x", ["demo"]),
            404,
            "invalid_request_error",
            "model_not_found",
            "model 'x' not found; installed: demo",
        ),
        (
            PromptTooLong(9, 8),
            400,
            "invalid_request_error",
            "context_length_exceeded",
            "This model's maximum context length is 8 tokens. However, your messages resulted in 9 tokens.",
        ),
        (InvalidRequest("no"), 400, "invalid_request_error", None, "no"),
        (ModelLoadError("broken"), 400, "invalid_request_error", None, "broken"),
        (EngineBusy("full"), 503, "server_error", None, "Overloaded: full"),
        (EngineClosed("closing"), 503, "server_error", None, "Overloaded: closing"),
        (EngineError("odd"), 500, "server_error", None, "odd"),
        (KeyError("/secret"), 500, "server_error", None, "internal error"),
    ],
)
def test_errors(error: Exception, status: int, kind: str, code: str | None, message: str):
    got, _, body = openai_error(error)
    assert (got, body) == (
        status,
        {"error": {"message": message, "type": kind, "param": None, "code": code}},
    )


# ------------------------------------------------------------------ over HTTP


def post(server: Server, path: str, body: object) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response, text


BAD = [  # path, what differs from a good body, the parameter that is blamed
    *(
        (path, {"model": model}, "model")
        for path in (CHAT, COMPLETIONS, RESPONSES)
        for model in (None, "", 5)
    ),
    *(
        (CHAT, fields, param)
        for fields, param in [
            ({"messages": None}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": "hi"}, "messages"),
            ({"messages": ["hi"]}, "messages.0"),
            ({"messages": [{"content": "x"}]}, "messages.0.role"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
            (
                {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
                "messages.0.content.0.type",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
                "messages.0.content.0.type",
            ),
            (
                {"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
                "messages.1.tool_calls.0.function",
            ),
            ({"temperature": 2.1}, "temperature"),
            ({"temperature": "hot"}, "temperature"),
            ({"top_p": -1}, "top_p"),
            ({"n": 0}, "n"),
            ({"n": 1000}, "n"),
            ({"max_tokens": 1.5}, "max_tokens"),
            ({"max_completion_tokens": -2}, "max_completion_tokens"),
            ({"stop": [1]}, "stop.0"),
            ({"seed": "x"}, "seed"),
            ({"presence_penalty": 3}, "presence_penalty"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"5": 101}}, "logit_bias.5"),
            ({"logit_bias": []}, "logit_bias"),
            ({"logit_bias": {"999999": 1}}, None),
            ({"top_logprobs": 21}, "top_logprobs"),
            ({"logprobs": 1}, "logprobs"),
            ({"stream": "yes"}, "stream"),
            ({"stream_options": True}, "stream_options"),
            ({"tools": {}}, "tools"),
            ({"tools": [{"type": "function"}]}, "tools.0.name"),
            ({"tools": [{"type": "custom"}]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tool_choice": "maybe", "tools": [BASH]}, "tool_choice"),
            (
                {"tool_choice": {"type": "function", "function": {"name": "Rm"}}, "tools": [BASH]},
                "tool_choice.function.name",
            ),
            ({"tool_choice": 5}, "tool_choice"),
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
                "response_format.json_schema.schema",
            ),
            ({"reasoning_effort": 5}, "reasoning_effort"),
        ]
    ),
    *(
        (COMPLETIONS, fields, param)
        for fields, param in [
            ({"prompt": None}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [["x"]]}, "prompt"),
            ({"prompt": [1, "x"]}, "prompt"),
            ({"prompt": [10**6]}, None),
            ({"prompt": [-1]}, None),
            ({"prompt": ["x"] * 99}, "prompt"),
            ({"echo": True}, "echo"),
            ({"suffix": "x"}, "suffix"),
            ({"best_of": 2}, "best_of"),
            ({"logprobs": 21}, "logprobs"),
        ]
    ),
    *(
        (RESPONSES, fields, param)
        for fields, param in [
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"input": [{"type": "message", "content": "x"}]}, "input.0.role"),
            ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
            ({"input": [{"type": "item_reference"}]}, "input.0.type"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"background": True}, "background"),
            ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
            ({"tools": [{"type": "web_search"}]}, "tools"),
            ({"tools": [{"type": "custom", "name": []}]}, "tools.0.name"),
            (
                {"input": [{"type": "function_call_output", "id": "fco_1", "output": "x"}]},
                "input.0.call_id",
            ),
        ]
    ),
]
GOOD = {
    CHAT: {"model": "demo", "messages": user("say hello")},
    COMPLETIONS: {"model": "demo", "prompt": "x", "max_tokens": 2},
    RESPONSES: {"model": "demo", "input": "say hello"},
}


def test_bad_inputs_are_refused_in_openais_words_and_harm_nobody(server: Server):
    for path, fields, param in BAD:
        response, text = post(server, path, {**GOOD[path], **fields})
        error = json.loads(text)["error"]
        assert (response.status, error["type"], error["param"]) == (
            400,
            "invalid_request_error",
            param,
        ), (path, fields, error)
        assert (
            error["message"]
            and error["code"] is None
            and response.getheader("x-request-id").startswith("req_")
        )
    for path in GOOD:
        for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100000):
            response, text = post(server, path, body)
            assert (
                response.status == 400
                and json.loads(text)["error"]["type"] == "invalid_request_error"
            )
        assert post(server, path, GOOD[path])[0].status == 200


def frames(text: bytes) -> list[str]:
    return text.decode().removesuffix("\n\n").split("\n\n")


def test_frames(server: Server):
    for path in (CHAT, COMPLETIONS):
        response, text = post(server, path, {**GOOD[path], "stream": True})
        assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        *pieces, last = frames(text)
        assert last == "data: [DONE]" and all(
            json.loads(piece.removeprefix("data: "))["choices"] for piece in pieces
        )
    _, text = post(server, RESPONSES, {**GOOD[RESPONSES], "stream": True})
    for frame in frames(text):
        name, data = frame.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_a_silent_stream_says_that_it_is_alive(server: Server):
    since = len(server.lines)
    for path, body, sign in [
        (CHAT, {"messages": user("word " * 20000)}, b": ping\n"),
        (RESPONSES, {"input": "work " * 20000}, b"event: response.in_progress\n"),
    ]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", path, json.dumps({"model": "demo", "stream": True, **body}))
        lines = iter(connection.getresponse().readline, b"")
        signs = 1 if path == CHAT else 2  # the first one opens the stream
        while signs:
            signs -= next(lines) == sign
        connection.close()
        server.wait_for(f"{path} demo: .*client went away", since=since)


def test_a_broken_stream_ends_with_an_error():
    server = Server("--drain", "0")
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    )
    streams = [
        client.chat.completions.create(model="demo", messages=user("word " * 20000), stream=True),
        client.responses.create(model="demo", input="work " * 20000, stream=True),
    ]
    first = [next(iter(stream)) for stream in streams]
    assert first[0].choices[0].delta.role == "assistant" and first[1].type == "response.created"
    assert server.stop() == 0
    with pytest.raises(openai.APIError, match="shutting down"):
        list(streams[0])
    *_, last = streams[1]
    assert last.type == "response.failed" and "shutting down" in last.response.error.message


# ------------------------------------------------------------------ the official client

PRIVET = "Привет! Я встроенная демо-модель. Я умею говорить, считать, читать, писать и запускать."


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_chat_whole_and_streamed_agree(client: openai.OpenAI):
    whole = client.chat.completions.create(model="demo", messages=user("Привет!"))
    with client.chat.completions.stream(
        model="demo", messages=user("Привет!"), stream_options={"include_usage": True}
    ) as stream:
        final = list(stream) and stream.get_final_completion()
    assert whole.choices[0].message.content == final.choices[0].message.content == PRIVET
    assert whole.choices[0].finish_reason == final.choices[
        0
    ].finish_reason == "stop" and whole._request_id.startswith("req_")
    assert (
        whole.usage.total_tokens
        == final.usage.total_tokens
        == whole.usage.prompt_tokens + whole.usage.completion_tokens
    )


def test_cached_tokens_are_those_that_were_reused(client: openai.OpenAI):
    raw = [
        client.chat.completions.with_raw_response.create(model="demo", messages=user("count to 8"))
        for _ in range(2)
    ][-1]
    cached = raw.parse().usage.prompt_tokens_details.cached_tokens
    assert raw.headers["x-prompt-cache"].startswith(f"reused={cached};") and cached > 5


def test_chat_tools_round_trip(client: openai.OpenAI):
    messages = user("run ls and run pwd")
    with client.chat.completions.stream(model="demo", messages=messages, tools=[BASH]) as stream:
        choice = (list(stream) and stream.get_final_completion()).choices[0]
    calls = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and [
        json.loads(call.function.arguments)["command"] for call in calls
    ] == ["ls", "pwd"]
    whole = client.chat.completions.create(
        model="demo", messages=messages, tools=[BASH], parallel_tool_calls=False
    ).choices[0]
    assert [json.loads(call.function.arguments) for call in whole.message.tool_calls] == [
        {"command": "ls"}
    ]
    assert whole.message.content is None
    messages += [
        whole.message,
        {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": "a!"},
    ]
    last = client.chat.completions.create(model="demo", messages=messages, tools=[BASH])
    assert last.choices[0].message.content == "The tool answered: a!"
    assert last.usage.prompt_tokens_details.cached_tokens > 0.8 * last.usage.prompt_tokens


def test_chat_thinking(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="demo", messages=user("think then say hello"), logprobs=True, top_logprobs=0
    )
    message = answer.choices[0].message
    assert message.content == "hello" and message.reasoning_content == message.reasoning != ""
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert b"".join(bytes(token.bytes) for token in answer.choices[0].logprobs.content) == b"hello"


def test_log_probabilities_are_those_of_the_visible_tokens(client: openai.OpenAI):
    asked = {
        "model": "demo",
        "messages": user("Привет!"),
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    parts = [
        (chunk.choices[0].delta.content, chunk.choices[0].logprobs.content)
        for chunk in chunks
        if chunk.choices[0].logprobs
    ]
    assert all(
        text.encode() == b"".join(bytes(token.bytes) for token in tokens) for text, tokens in parts
    )
    assert [token for _, tokens in parts for token in tokens] == whole
    assert b"".join(bytes(token.bytes) for token in whole) == PRIVET.encode()
    for token in whole:
        assert (
            token.top_logprobs[0].token == token.token
            and token.top_logprobs[0].logprob == token.logprob <= 0
        )
        assert (
            len(token.top_logprobs) == 3
            and sum(math.exp(one.logprob) for one in token.top_logprobs) < 1.01
        )
    stopped = client.chat.completions.create(
        model="demo", messages=user("count to 9"), stop="5 6", logprobs=True
    ).choices[0]
    assert (
        stopped.message.content
        == "1 2 3 4 "
        == "".join(token.token for token in stopped.logprobs.content)
    )


def test_ollamas_log_probabilities(server: Server):
    llama = ollama.Client(host=server.url)
    asked = {"model": "demo", "logprobs": True, "top_logprobs": 2}
    whole = llama.chat(**asked, messages=user("say a b"))
    assert "".join(token.token for token in whole.logprobs) == whole.message.content == "a b"
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in whole.logprobs)
    parts = list(llama.generate(**asked, prompt="say a b", stream=True))
    assert "".join(token.token for part in parts for token in part.logprobs or []) == "a b"
    assert llama.generate(model="demo", prompt="say a b").logprobs is None


def test_a_bias_can_demand_a_token_and_choices_differ_by_seed(client: openai.OpenAI):
    plain = client.completions.create(
        model="demo", prompt="def ", max_tokens=4, temperature=0, logprobs=2
    )
    biased = client.completions.create(
        model="demo",
        prompt="def ",
        max_tokens=4,
        temperature=0,
        logit_bias={"300": 100},
        logprobs=0,
    )
    assert set(biased.choices[0].logprobs.tokens) == {
        biased.choices[0].text[: len(biased.choices[0].text) // 4]
    }
    assert (
        biased.choices[0].text != plain.choices[0].text
        and plain.choices[0].finish_reason == "length"
    )
    assert plain.choices[0].logprobs.text_offset[:2] == [
        0,
        len(plain.choices[0].logprobs.tokens[0]),
    ]
    drawn = [
        [
            choice.text
            for choice in client.completions.create(
                model="demo", prompt=["def ", "class "], n=2, seed=3, temperature=2, max_tokens=8
            ).choices
        ]
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4


def test_completions_take_text_and_tokens(client: openai.OpenAI):
    fields = {"model": "demo", "max_tokens": 5, "temperature": 0}
    one = client.completions.create(**fields, prompt="the word")
    # The strict one knows no pieces without a finish_reason
    lax = openai.OpenAI(base_url=client.base_url, api_key="any")
    pieces = list(lax.completions.create(**fields, prompt="the word", stream=True))
    assert "".join(chunk.choices[0].text for chunk in pieces) == one.choices[0].text
    assert pieces[-1].choices[0].finish_reason == one.choices[0].finish_reason == "length"
    both = client.completions.create(**fields, prompt=["the word", "a list"])
    assert [choice.index for choice in both.choices] == [0, 1] and both.choices[
        0
    ].text == one.choices[0].text
    tokens = client.completions.create(**fields, prompt=[[300, 301, 302], [303]])
    assert tokens.usage.prompt_tokens == 4 and tokens.usage.completion_tokens == 10
    assert (
        client.completions.create(**fields, prompt=[303]).choices[0].text == tokens.choices[1].text
    )


def test_several_choices_stream_one_after_the_other(client: openai.OpenAI):
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=user("say hello"),
            n=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [
        "".join(
            chunk.choices[0].delta.content or ""
            for chunk in chunks[:-1]
            if chunk.choices[0].index == n
        )
        for n in range(3)
    ]
    assert texts == ["hello"] * 3 and chunks[-1].choices == []
    one = client.chat.completions.create(model="demo", messages=user("say hello")).usage
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (
        one.prompt_tokens,
        3 * one.completion_tokens,
    )


def test_responses_round_trip(client: openai.OpenAI):
    said = user("run echo hello-from-mlx")
    with client.responses.stream(model="demo", input=said, tools=[flat(BASH)]) as stream:
        first = list(stream) and stream.get_final_response()
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "Bash",
        {"command": "echo hello-from-mlx"},
    )
    said += [
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "hello-from-mlx"},
    ]
    second = client.responses.create(model="demo", input=said, tools=[flat(BASH)])
    assert (
        second.output_text == "The tool answered: hello-from-mlx" and second.status == "completed"
    )
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    thought = client.responses.create(model="demo", input="think then say hello")
    assert [item.type for item in thought.output] == [
        "reasoning",
        "message",
    ] and thought.output_text == "hello"
    assert (
        thought.output[0].summary[0].text
        and thought.usage.output_tokens_details.reasoning_tokens > 0
    )
    assert (
        client.responses.create(
            model="demo", input="count to 9", max_output_tokens=2
        ).incomplete_details.reason
        == "max_output_tokens"
    )


def test_errors_have_their_codes(client: openai.OpenAI):
    for ask in (
        lambda **fields: client.chat.completions.create(messages=HI, **fields),
        lambda **fields: client.responses.create(input="hi", **fields),
        lambda **fields: client.completions.create(prompt="hi", **fields),
    ):
        with pytest.raises(openai.NotFoundError, match="no-such:7b") as caught:
            ask(model="no-such:7b")
        assert caught.value.code == "model_not_found"
    with pytest.raises(
        openai.BadRequestError, match="maximum context length is 131072 tokens"
    ) as caught:
        client.chat.completions.create(model="demo", messages=user("a b " * 80000))
    assert caught.value.code == "context_length_exceeded"


def test_models(client: openai.OpenAI):
    assert "demo" in [model.id for model in client.models.list()]
    assert client.models.retrieve("demo").owned_by == "mlx"
