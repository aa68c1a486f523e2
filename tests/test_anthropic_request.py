"""Anthropic's bodies in, requests out. No socket and no model."""

from __future__ import annotations

import itertools
import json
import logging
from typing import Any

import pytest
from wire_cases import ELSEWHERE, HI, IMAGE_NOTE, brief

from _mlx_server.wire.anthropic import AnthropicMessages
from _mlx_server.wire.anthropic_request import count_request
from _mlx_server.wire.fields import WireError
from engine import Request

WEATHER = {
    "name": "weather",
    "description": "Tells it.",
    "input_schema": {"type": "object", "properties": {}},
}


def ask(messages: list | None = None, **fields) -> Request:
    return AnthropicMessages(
        {"model": "m", "max_tokens": 9, "messages": messages or HI, **fields}
    ).request


def message(role: str, *blocks: dict | str) -> dict:
    return {
        "role": role,
        "content": [{"type": "text", "text": b} if isinstance(b, str) else b for b in blocks],
    }


def tool_use(id: str, name: str = "weather", **input) -> dict:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def tool_result(id: str, content: object = "ok", **fields) -> dict:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **fields}


def client_requests(messages: list[dict]) -> list[list[dict]]:
    """A session's requests as Claude Code makes them: one at the end of each user's turn, the last
    message as blocks with the cache marker, the others as strings where they can be."""
    requests = []
    for end in range(1, len(messages) + 1):
        if messages[end - 1]["role"] != "assistant" and (
            end == len(messages) or messages[end]["role"] == "assistant"
        ):
            sent = [dict(message) for message in messages[:end]]
            for message in sent[:-1]:
                if [block["type"] for block in message["content"]] == ["text"]:
                    message["content"] = message["content"][0]["text"]
            blocks = sent[-1]["content"]
            sent[-1]["content"] = [
                *blocks[:-1],
                {**blocks[-1], "cache_control": {"type": "ephemeral"}},
            ]
            requests.append(sent)
    return requests


SESSIONS = {
    "system after the prompt": [
        message("user", "git", "commits", "fix it"),
        message("system", "env"),
        message("assistant", "ok", tool_use("1")),
        message("user", tool_result("1")),
        message("assistant", "done"),
        message("user", "more"),
        message("assistant", "yes"),
    ],
    "system after results": [
        message("user", "fix it"),
        message("system", "env"),
        message("assistant", tool_use("1")),
        message("user", tool_result("1")),
        message("system", "left: 9"),
        message("assistant", tool_use("2")),
        message("user", tool_result("2")),
        message("system", "left: 8"),
        message("assistant", "done"),
        message("user", "more"),
        message("system", "date"),
        message("assistant", "fine"),
        message("user", "x"),
    ],
    "words with results": [
        message("user", "a"),
        message("assistant", tool_use("1"), tool_use("2")),
        message("user", tool_result("2"), tool_result("1"), "note"),
        message("system", "s"),
        message("assistant", "b"),
        message("user", "c"),
        message("assistant", "d"),
        message("user", "e"),
    ],
    "interrupted": [
        message("user", "a"),
        message("system", "s"),
        message("assistant", "half"),
        message("user", "[interrupted]", "go on"),
        message("assistant", tool_use("1")),
        message("user", tool_result("1", is_error=True), "stopped"),
        message("assistant", "b"),
        message("user", "c"),
    ],
    "deferred tools": [
        message("user", "a"),
        message("assistant", tool_use("1")),
        message("user", tool_result("1", [{"type": "tool_reference", "tool_name": "later"}])),
        message("assistant", "b"),
        message("user", "c"),
    ],
}


def is_prefix(short: list[dict], long: list[dict]) -> bool:
    return len(short) < len(long) and long[: len(short)] == short


@pytest.mark.parametrize("messages", SESSIONS.values(), ids=SESSIONS)
def test_sessions_are_append_only(messages: list[dict]) -> None:
    later = {**WEATHER, "name": "later", "defer_loading": True}
    requests = client_requests(messages)
    rendered = [ask(sent, tools=[WEATHER, later]).messages for sent in requests]
    assert len(rendered) >= 3
    assert all(is_prefix(*pair) for pair in itertools.pairwise(rendered))


def test_string_and_block_render_the_same_and_markers_do_not() -> None:
    marked = {
        "type": "text",
        "text": "hi",
        "cache_control": {"type": "ephemeral", "ttl": "9h", "scope": "x"},
    }
    system = [{"type": "text", "text": "be nice", "cache_control": {"type": "ephemeral"}}]
    assert ask(system="be nice") == ask([message("user", marked)], system=system)


BILLING = "x-anthropic-billing-header: cc_version=2.1.330.4ed; cc_entrypoint=cli;"


@pytest.mark.parametrize(
    "system, expected",
    [
        (None, None),
        ("", None),
        ("a", "a"),
        ([message("", "a")["content"][0], {"type": "text", "text": "b"}], "a\n\nb"),
        ([{"type": "text", "text": BILLING}, {"type": "text", "text": "a"}], "a"),
        (f"{BILLING}\na", "a"),
        (BILLING, None),
        ([{"type": "text", "text": "a\n"}, {"type": "text", "text": "\nb"}], "a\n\n\nb"),
    ],
)
def test_system(system: object, expected: str | None) -> None:
    expected_messages = [("system", expected)] if expected else []
    assert brief(ask(system=system).messages) == [*expected_messages, ("user", "hi")]


ENCRYPTED_SUMMARY = "[summary of the conversation so far omitted: it is encrypted]"


def source(kind: str, **fields) -> dict:
    return {"source": {"type": kind, **fields}}


@pytest.mark.parametrize(
    "block, text",
    [
        ({"type": "text", "text": ""}, ""),
        ({"type": "text", "text": "x", "citations": None, "parsed_output": 1}, "x"),
        ({"type": "image", **source("base64", media_type="image/png", data="AAAA")}, IMAGE_NOTE),
        ({"type": "image", **source("url", url="x.png")}, f"[image omitted: x.png: {ELSEWHERE}]"),
        (
            {
                "type": "document",
                "title": "T",
                "context": "C",
                **source("text", media_type="text/plain", data="D"),
            },
            "T\nC\nD",
        ),
        ({"type": "document", **source("content", content="D")}, "D"),
        (
            {"type": "document", **source("content", content=message("", "D", "E")["content"])},
            "D\nE",
        ),
        (
            {
                "type": "search_result",
                "title": "T",
                "source": "S",
                "content": message("", "D")["content"],
            },
            "T\nS\nD",
        ),
        ({"type": "compaction", "content": "summary"}, "summary"),
        ({"type": "compaction", "content": None, "encrypted_content": "x"}, ENCRYPTED_SUMMARY),
        ({"type": "tool_addition", "tool": {}}, ""),
        ({"type": "image", **source("file", file_id="f")}, f"[image omitted: f: {ELSEWHERE}]"),
        ({"type": "container_upload", "file_id": "f"}, f"[file omitted: f: {ELSEWHERE}]"),
        (
            {"type": "document", "title": "T", **source("url", url="http://x")},
            f"T\n[document omitted: http://x: {ELSEWHERE}]",
        ),
        (
            {"type": "document", **source("file", file_id="f")},
            f"[document omitted: f: {ELSEWHERE}]",
        ),
        (
            {"type": "document", **source("of_tomorrow")},
            "[document omitted: this server cannot use it]",
        ),
        ({"type": "never_heard_of"}, "[never_heard_of omitted: this server cannot use it]"),
    ],
)
def test_blocks_become_text(block: dict, text: str) -> None:
    assert ask([message("user", "go", block)]).messages[0]["content"] == (
        f"go\n{text}" if text else "go"
    )


def test_blocks_of_an_assistant() -> None:
    history = [
        *HI,
        message(
            "assistant",
            {"type": "redacted_thinking", "data": "x"},
            {"type": "thinking", "thinking": "hmm"},
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            " ",
            tool_use("1", city="Rome"),
            "well",
        ),
        message("user", "after", tool_result("1")),
    ]
    assert ask(history).messages[1:] == [
        {
            "role": "assistant",
            "content": "[server_tool_use omitted: this server cannot use it]\nwell",
            "reasoning_content": "hmm",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Rome"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "ok"},
        {"role": "user", "content": "after"},
    ]


@pytest.mark.parametrize(
    "given, arguments",
    [
        ({"a": 1}, {"a": 1}),
        ('{"a": 1}', {"a": 1}),
        ("no json", {"input": "no json"}),
        (None, {}),
        ("", {}),
    ],
)
def test_inputs_are_objects(given: object, arguments: dict) -> None:
    messages = ask(
        [
            *HI,
            message("assistant", {**tool_use("1"), "input": given}),
            message("user", tool_result("1")),
        ]
    ).messages
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    "block, text",
    [
        (tool_result("1", None), ""),
        ({"type": "tool_result", "tool_use_id": "1"}, ""),
        (tool_result("1", []), ""),
        (tool_result("1", message("", "a", "b")["content"]), "a\nb"),
        (tool_result("1", "boom", is_error=True), "Error: boom"),
        (tool_result("1", "Error: boom", is_error=True), "Error: boom"),
        (tool_result("1", "fine", is_error=False), "fine"),
        (tool_result("1", [{"type": "image", **source("base64", data="A")}]), IMAGE_NOTE),
        (tool_result("1", [{"type": "tool_reference", "tool_name": "weather"}]), "weather"),
    ],
)
def test_tool_results(block: dict, text: str) -> None:
    messages = ask(
        [*HI, message("assistant", tool_use("1")), message("user", block)], tools=[WEATHER]
    ).messages
    assert messages[-1] == {"role": "tool", "tool_call_id": "1", "name": "weather", "content": text}


def test_other_role_names_are_users() -> None:
    assert ask([{"role": "ctx", "content": "a"}, {"role": "msg", "content": "b"}]).messages == [
        {"role": "user", "content": "a\nb"}
    ]


@pytest.mark.parametrize(
    "body, expected",
    [
        (
            {"temperature": 1, "top_p": 0.5, "top_k": 3},
            {"temperature": 1, "top_p": 0.5, "top_k": 3},
        ),
        ({"temperature": None}, {"temperature": None, "top_p": None, "top_k": None}),
    ],
)
def test_sampling(body: dict, expected: dict) -> None:
    sampling = vars(ask(**body).sampling)
    assert {key: sampling[key] for key in expected} == expected


@pytest.mark.parametrize(
    "body, attribute, value",
    [
        ({"max_tokens": 0}, "max_tokens", 0),
        ({"stop_sequences": ["\n", "", "END"]}, "stop", ["\n", "END"]),
        ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "thinking", True),
        ({"thinking": {"type": "adaptive", "display": "updates"}}, "thinking", True),
        ({"thinking": {"type": "disabled"}}, "thinking", False),
        ({"thinking": {"type": "between_tools"}}, "thinking", False),
        ({}, "thinking", None),
        ({"thinking": None}, "thinking", None),
        ({"output_config": {"effort": "high", "format": None}}, "effort", "high"),
        ({"output_config": {"effort": None}}, "effort", None),
        (
            {
                "metadata": {"user_id": None},
                "betas": ["x"],
                "context_management": {"edits": []},
                "container": "c",
                "new": 1,
                "mcp_servers": [],
                "service_tier": "auto",
            },
            "model",
            "m",
        ),
    ],
)
def test_fields(body: dict, attribute: str, value: object) -> None:
    assert getattr(ask(**body), attribute) == value


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_output_format_is_asked_for(field: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    request = ask(
        [*HI, message("assistant", tool_use("1")), message("user", tool_result("1"))],
        **{field: {"format": form} if field == "output_config" else form},
    )
    assert (
        request.messages[0]["content"]
        == 'hi\n\nAnswer with JSON only, matching this schema: {"type": "object"}'
    )
    assert request.format == form["schema"]


def test_count_tokens_sees_the_same_request() -> None:
    body = {"model": "m", "messages": HI, "tools": [WEATHER], "system": "s"}
    counted = count_request(body)
    asked = AnthropicMessages({**body, "max_tokens": 9}).request
    assert (counted.messages, counted.tools) == (asked.messages, asked.tools)


WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search"}


def names(tools: list[dict]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


@pytest.mark.parametrize(
    "schema, parameters",
    [
        ({}, {"type": "object", "properties": {}}),
        ({"type": None, "properties": None}, {"type": "object", "properties": {}}),
        (
            {"type": "object", "properties": {"a": "bar"}, "$schema": "x"},
            {"type": "object", "properties": {"a": "bar"}, "$schema": "x"},
        ),
    ],
)
def test_a_tool_is_always_complete(schema: dict, parameters: dict) -> None:
    assert ask(tools=[{"name": "f", "input_schema": schema, "type": None}]).tools == [
        {"type": "function", "function": {"name": "f", "description": "", "parameters": parameters}}
    ]


def test_deferred_tools_appear_where_they_are_referenced() -> None:
    later = {**WEATHER, "name": "later", "defer_loading": True}
    found = message("user", tool_result("1", [{"type": "tool_reference", "tool_name": "later"}]))
    request = ask(
        [*HI, message("assistant", tool_use("1")), found],
        tools=[
            {"name": "DeferredToolPlaceholder", "description": "", "defer_loading": True},
            later,
            WEATHER,
        ],
    )
    assert names(request.tools) == ["weather"] and names(request.deferred_tools) == ["later"]
    assert json.loads(request.messages[-1]["content"]) == request.deferred_tools[0]


def test_tools_that_servers_run_are_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "mlx_server"):
        assert names(ask(tools=[WEB_SEARCH, WEATHER]).tools) == ["weather"]
    assert "web_search_20250305" in caplog.text


def test_without_tool_search_deferred_tools_are_declared() -> None:
    search = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
    request = ask(tools=[search, {**WEATHER, "defer_loading": True}])
    assert names(request.tools) == ["weather"] and request.deferred_tools == []


@pytest.mark.parametrize(
    "kind, name, has",
    [
        ("bash_20250124", "bash", "restart"),
        ("text_editor_20241022", "str_replace_editor", "old_str"),
        ("text_editor_20250728", "str_replace_based_edit_tool", "view_range"),
        ("memory_20250818", "memory", "new_path"),
    ],
)
def test_tools_that_clients_run_get_a_schema(kind: str, name: str, has: str) -> None:
    function = ask(tools=[{"type": kind, "name": name}]).tools[0]["function"]
    assert function["name"] == name and has in function["parameters"]["properties"]


@pytest.mark.parametrize(
    "choice, expected",
    [
        (None, ("auto", True)),
        ({"type": "auto"}, ("auto", True)),
        ({"type": "any"}, ("any", True)),
        ({"type": "none"}, ("none", True)),
        (
            {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
            ("weather", False),
        ),
    ],
)
def test_tool_choice(choice: dict | None, expected: tuple) -> None:
    request = ask(tools=[WEATHER], tool_choice=choice)
    assert (request.tool_choice, request.parallel_tool_calls) == expected and names(
        request.tools
    ) == ["weather"]


REFUSALS = [
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
    ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
    ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0"),
    ({"model": ""}, "model: String should have at least 1 character"),
    ({"messages": None}, "messages: Field required"),
    ({"messages": {}}, "messages: Input should be a valid list"),
    ({"messages": []}, "messages: at least one message is required"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages: at least one message is required"),
    ({"messages": ["hi"]}, "messages.0: Input should be an object"),
    (
        {"messages": [{"role": "bot", "content": "x"}]},
        "messages.0.role: Input should be 'user', 'assistant' or 'system'",
    ),
    ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    (
        {"messages": [{"role": "user", "content": 5}]},
        "messages.0.content: Input should be a valid string or list",
    ),
    (
        {"messages": [{"role": "user", "content": ["x"]}]},
        "messages.0.content.0: Input should be an object",
    ),
    (
        {"messages": [message("user", {"type": "text"})]},
        "messages.0.content.0.text: Field required",
    ),
    (
        {"messages": [message("user", {"type": []})]},
        "messages.0.content.0.type: Input should be a valid string",
    ),
    (
        {"messages": [*HI, message("assistant", "x", tool_use("t1"))]},
        "messages.1: `tool_use` ids were found without `tool_result` blocks immediately after: "
        "t1. Each `tool_use` block must have a corresponding `tool_result` block in the next "
        "message.",
    ),
    (
        {"messages": [message("user", {"type": "image", "source": None})]},
        "messages.0.content.0.source: Field required",
    ),
    (
        {"messages": [message("user", {"type": "document", **source("base64", data="A")})]},
        "messages.0.content.0.source.data: Input should be valid base64",
    ),
    (
        {"messages": [message("user", {"type": "document", "source": {}})]},
        "messages.0.content.0.source.type: Field required",
    ),
    ({"system": 5}, "system: Input should be a valid string or list"),
    ({"stop_sequences": [1]}, "stop_sequences.0: Input should be a valid string"),
    ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    ({"temperature": float("nan")}, "temperature: Input should be a valid number"),
    (
        {"thinking": {"type": "deep"}},
        "thinking.type: Input should be 'enabled', 'adaptive', 'disabled' or 'between_tools'",
    ),
    ({"thinking": {"type": []}}, "thinking.type: Input should be a valid string"),
    ({"mcp_servers": [{}]}, "mcp_servers is not supported by this server"),
    ({"container": {"skills": [{}]}}, "container.skills is not supported by this server"),
    ({"compaction": {}}, "compaction is not supported by this server"),
    (
        {"output_config": {"format": {"type": "xml"}}},
        "output_config.format.type: Input should be 'json_schema'",
    ),
    (
        {"output_config": {"format": {"type": "json_schema"}}},
        "output_config.format.schema: Field required",
    ),
    ({"tools": [WEATHER, WEATHER]}, "tools: Tool names must be unique."),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema: Field required"),
    (
        {"tools": [WEB_SEARCH]},
        "tools: 'web_search_20250305' runs on Anthropic's servers "
        "and is not supported by this server",
    ),
    (
        {"tools": [{"type": "computer_20250124", "name": "computer"}]},
        "tools.0: tools of type 'computer_20250124' are not supported by this server",
    ),
    ({"tool_choice": "any"}, "tool_choice: Input should be an object"),
    ({"tool_choice": {"type": "any"}}, "tool_choice: 'any' needs tools to choose from"),
    (
        {"tool_choice": {"type": "x"}},
        "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'",
    ),
    (
        {"tool_choice": {"type": "tool", "name": "g"}, "tools": [WEATHER]},
        "tool_choice.name: Tool 'g' not found in provided tools",
    ),
    ({"stream": "yes"}, "stream: Input should be a valid boolean"),
]


@pytest.mark.parametrize("fields, message", REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_refusals(fields: dict, message: str) -> None:
    with pytest.raises(WireError) as caught:
        AnthropicMessages({"model": "m", "max_tokens": 9, "messages": HI, **fields})
    assert (caught.value.status, caught.value.message) == (400, message)


@pytest.mark.parametrize(
    "edits, keeps",
    [
        ([{"type": "clear_thinking_20251015", "keep": "all"}], True),
        (
            [
                {
                    "type": "clear_thinking_20251015",
                    "keep": {"type": "thinking_turns", "value": 2},
                }
            ],
            False,
        ),
        ([{"type": "clear_tool_uses_20250919"}], None),
        ("nonsense", None),
    ],
)
def test_a_client_says_whether_old_thinking_stays(edits: Any, keeps: bool | None):
    body = {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "hi"}],
        "context_management": {"edits": edits},
    }
    assert AnthropicMessages(body).request.keep_thinking is keeps
