"""OpenAI's chat and completions: bodies in, requests out; events in, objects out. No socket and
no model."""

from __future__ import annotations

import logging

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai_cases import BASH, CALL, EVENTS, READ, answer, chat, flat
from wire_cases import ELSEWHERE, HI

from _mlx_server.wire.openai import OpenAIChat, OpenAICompletion
from _mlx_server.wire.tools import PastArguments
from engine import Done, EngineError, Text, Usage


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
            [("user", f"[image omitted: x: {ELSEWHERE}]\nsee")],
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
    assert PastArguments().read(written, "") == read


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
    first = {"name": "f", "arguments": ""}
    second = {"name": "ns__g", "arguments": ""}
    assert pieces == [
        {"index": 0, "id": "toolu_1", "type": "function", "function": first},
        {"index": 0, "function": {"arguments": '{"x":'}},
        {"index": 0, "function": {"arguments": " 1}"}},
        {"index": 1, "id": "toolu_2", "type": "function", "function": second},
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


@pytest.mark.parametrize(
    "reason, finish_reason",
    [
        ("stop", "stop"),
        ("stop_sequence", "stop"),
        ("length", "length"),
        ("context", "length"),
        ("tool_calls", "tool_calls"),
    ],
)
def test_endings(reason: str, finish_reason: str):
    _, whole = answer(
        OpenAIChat({"model": "m", "messages": HI}),
        Text("x"),
        Done(reason, Usage(9, completion_tokens=1)),
    )
    assert whole["choices"][0]["finish_reason"] == finish_reason


def test_a_failure_in_a_stream():
    reply = OpenAIChat({"model": "m", "messages": HI})
    assert reply.failure(EngineError("odd")) == [
        {"error": {"message": "odd", "type": "server_error", "param": None, "code": None}}
    ]


def test_an_unknown_part_becomes_a_note_and_a_log_line(caplog: pytest.LogCaptureFixture):
    content = [{"type": "part_of_tomorrow"}, {"type": "text", "text": "hi"}]
    note = "[part_of_tomorrow omitted: this server cannot use it]"
    with caplog.at_level(logging.INFO, "mlx_server"):
        request = chat(messages=[{"role": "user", "content": content}])
    assert request.messages == [{"role": "user", "content": f"{note}\nhi"}]
    assert f"messages.0.content.0: {note}" in caplog.text


def test_calls_of_custom_tools_and_functions_of_old_are_calls():
    custom = {"id": "1", "type": "custom", "custom": {"name": "sh", "input": "ls"}}
    later = {"id": "2", "type": "of_tomorrow", "of_tomorrow": {}}
    messages = chat(
        messages=[
            *HI,
            {"role": "assistant", "tool_calls": [custom, later]},
            {"role": "tool", "tool_call_id": "1", "content": "a.txt"},
            {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "F"},
        ]
    ).messages
    called = [one["tool_calls"][0]["function"] for one in messages if "tool_calls" in one]
    assert called == [
        {"name": "sh", "arguments": {"input": "ls"}},
        {"name": "f", "arguments": {"x": 1}},
    ]
    assert messages[1]["content"] == "[of_tomorrow omitted: this server cannot use it]"
    assert [one["content"] for one in messages if one["role"] == "tool"] == ["a.txt", "F"]
