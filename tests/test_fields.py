"""The tables of fields: each row of a wire is honoured (and nothing else changes), ignored or
refused.

https://platform.claude.com/docs/en/api/messages,
https://github.com/ollama/ollama/blob/main/docs/api.md and
https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import asdict

import anthropic
import openai
import pytest
from conftest import Server
from test_http import ask
from wire_cases import IMAGE_NOTE

from _mlx_server.wire.anthropic import AnthropicMessages
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.ollama import OllamaChat, OllamaGenerate
from _mlx_server.wire.openai import OpenAIChat, OpenAICompletion
from _mlx_server.wire.responses import OpenAIResponses

HI = [{"role": "user", "content": "hi"}]
BASE = {"model": "m", "max_tokens": 9, "messages": HI, "prompt": "hi", "input": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
LOOK = {"name": "look", "description": "", "input_schema": SCHEMA}
FUNCTION = {
    "type": "function",
    "function": {"name": "look", "description": "", "parameters": SCHEMA},
}
FLAT = {"type": "function", "name": "look", "description": "", "parameters": SCHEMA, "strict": True}
DEMAND = [
    {
        "role": "user",
        "content": f"hi\n\nAnswer with JSON only, matching this schema: {json.dumps(SCHEMA)}",
    }
]
RULES = [{"role": "system", "content": "Be brief."}, *HI]
FORM = {"type": "json_schema", "schema": SCHEMA}
NOTED = (  # blocks of Anthropic's servers
    "server_tool_use",
    "web_search_tool_result",
    "web_fetch_tool_result",
    "code_execution_tool_result",
    "bash_code_execution_tool_result",
    "text_editor_code_execution_tool_result",
    "tool_search_tool_result",
    "mcp_tool_use",
    "mcp_tool_result",
    "advisor_tool_result",
)


def assistant(kind: str) -> dict:
    """A message with a block of some type."""
    block = {"type": kind, "content": [], "of_tomorrow": 1}
    return {"role": "assistant", "content": [block]}


def note(kind: str) -> str:
    return f"[{kind} omitted: this server cannot use it]"


IGNORED: dict[type, list[dict]] = {
    AnthropicMessages: [
        {"metadata": {"user_id": "u"}},
        {"service_tier": "standard_only"},
        {"speed": "fast"},
        {"inference_geo": "eu"},
        {"user_profile_id": "u"},
        {"billing_policy": {}},
        {"diagnostics": {"previous_message_id": "m"}},
        {"fallbacks": [{}]},
        {"betas": ["b"]},
        {"fallback_credit_token": "t"},
        {"cache_control": {"type": "ephemeral", "ttl": "9h", "scope": "x"}},
        {"container": "c"},
        {
            "context_management": {
                "edits": [{"type": "clear_thinking_20251015"}, {"type": "compact_20260112"}]
            }
        },
        {"output_config": {"task_budget": {"type": "tokens", "total": 5}}},
        {"tool_choice": {"type": "auto"}},
        {"mcp_servers": []},
        {"compaction": None},
        {"thread": None},
        {"of_tomorrow": {"x": [1]}},
        *({"messages": [*HI, assistant(kind)]} for kind in ("redacted_thinking", "fallback")),
        *(
            {"messages": [*HI, {"role": "system", "content": [{"type": kind, "tool": {}}]}]}
            for kind in ("tool_addition", "tool_removal")
        ),
    ],
    OllamaChat: [
        {"truncate": True},
        {"shift": False},
        {"_debug_render_only": False},
        {"template": "x"},
        {"system": "x"},
        {"num_predict": 1},
        {"metadata": {}},
        {"top_logprobs": 3},
        {"format": ""},
        {"tools": []},
        {"max_tokens": 1},
        *(
            {"options": {key: 3}}
            for key in (
                "num_ctx",
                "num_keep",
                "num_batch",
                "num_gpu",
                "main_gpu",
                "num_thread",
                "draft_num_predict",
                "typical_p",
                "mirostat",
                "mirostat_tau",
                "mirostat_eta",
                "tfs_z",
                "penalize_newline",
                "numa",
                "low_vram",
                "f16_kv",
                "logits_all",
                "vocab_only",
                "use_mlock",
                "embedding_only",
            )
        ),
    ],
    OllamaGenerate: [
        {"width": 1},
        {"height": 1},
        {"steps": 1},
        {"suffix": ""},
        {"template": ""},
        {"images": []},
    ],
    OpenAIChat: [
        *(
            {key: "x"}
            for key in (
                "user",
                "store",
                "service_tier",
                "prompt_cache_key",
                "verbosity",
                "safety_identifier",
            )
        ),
        {"stream_options": {"include_usage": True}},
        {"response_format": {"type": "text"}},
        {"tool_choice": "auto"},
        {"n": 1},
    ],
    OpenAICompletion: [{"echo": False}, {"suffix": ""}, {"best_of": 1}, {"user": "u"}],
    OpenAIResponses: [
        {"store": False},
        {"include": ["x"]},
        {"prompt_cache_key": "k"},
        {"text": {"verbosity": "low"}},
        {"reasoning": {"summary": "auto"}},
        {"metadata": {}},
        {"truncation": "auto"},
    ],
}
TOOLS = {"tools": [FUNCTION]}
SERVER_TOOLS = (
    "web_search_20260318",
    "web_fetch_20250910",
    "code_execution_20260521",
    "tool_search_tool_regex_20251119",
    "advisor_20260301",
    "mcp_toolset",
)
# What is asked for, and the fields of the request that differ for it
HONOURED: list[tuple[type, dict, dict]] = [
    (AnthropicMessages, {"system": "Be brief."}, {"messages": RULES}),
    (AnthropicMessages, {"system": [{"type": "text", "text": "Be brief."}]}, {"messages": RULES}),
    (AnthropicMessages, {"max_tokens": 0}, {"max_tokens": 0}),
    (AnthropicMessages, {"stop_sequences": ["\n", ""]}, {"stop": ["\n"]}),
    (AnthropicMessages, {"tools": [LOOK]}, TOOLS),
    *(
        (AnthropicMessages, {"tools": [{**LOOK, key: value}]}, TOOLS)
        for key, value in {
            "type": "custom",
            "cache_control": {"type": "ephemeral"},
            "eager_input_streaming": True,
            "input_examples": [{"a": "x"}],
            "allowed_callers": ["direct"],
            "strict": False,
        }.items()
    ),
    (AnthropicMessages, {"tools": [{**LOOK, "strict": True}]}, {**TOOLS, "strict": True}),
    (
        OpenAIChat,
        {"tools": [{**FUNCTION, "function": {**FUNCTION["function"], "strict": True}}]},
        {**TOOLS, "strict": True},
    ),
    (OpenAIChat, TOOLS, TOOLS),
    *(
        (AnthropicMessages, {"tools": [LOOK, {"type": kind, "name": "x"}]}, TOOLS)
        for kind in SERVER_TOOLS
    ),
    (
        AnthropicMessages,
        {"tools": [LOOK], "tool_choice": {"type": "any"}},
        {**TOOLS, "tool_choice": "any"},
    ),
    (
        AnthropicMessages,
        {"tools": [LOOK], "tool_choice": {"type": "tool", "name": "look"}},
        {**TOOLS, "tool_choice": "look"},
    ),
    (
        AnthropicMessages,
        {"tools": [LOOK], "tool_choice": {"type": "none"}},
        {**TOOLS, "tool_choice": "none"},
    ),
    *(
        (
            AnthropicMessages,
            {
                "tools": [LOOK],
                "tool_choice": {"type": kind, "name": "look", "disable_parallel_tool_use": True},
            },
            {**TOOLS, "tool_choice": choice, "parallel_tool_calls": False},
        )
        for kind, choice in (("auto", "auto"), ("any", "any"), ("tool", "look"))
    ),
    (
        AnthropicMessages,
        {"thinking": {"type": "enabled", "budget_tokens": 7}},
        {"thinking": True, "thinking_budget": 7},
    ),
    (AnthropicMessages, {"thinking": {"type": "between_tools"}}, {"thinking": False}),
    *(
        (
            AnthropicMessages,
            {"thinking": {"type": "adaptive", "display": display}},
            {"thinking": True, "adaptive": True},
        )
        for display in ("summarized", "updates", "omitted", None)
    ),
    (AnthropicMessages, {"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
    *(
        (AnthropicMessages, {"output_config": {"effort": effort}}, {"effort": effort})
        for effort in ("low", "medium", "high", "xhigh", "max")
    ),
    (
        AnthropicMessages,
        {"output_config": {"format": FORM}},
        {"format": SCHEMA, "messages": DEMAND},
    ),
    *(
        (
            AnthropicMessages,
            {"messages": [*HI, assistant(kind)]},
            {"messages": [*HI, {"role": "assistant", "content": note(kind)}]},
        )
        for kind in NOTED
    ),
    (AnthropicMessages, {"output_format": FORM}, {"format": SCHEMA, "messages": DEMAND}),
    (OllamaChat, TOOLS, TOOLS),
    (OllamaChat, {"format": SCHEMA}, {"format": SCHEMA, "messages": DEMAND}),
    (OllamaGenerate, {"system": "Be brief."}, {"messages": RULES}),
    (
        OllamaGenerate,
        {"images": ["aGk="]},
        {"messages": [{"role": "user", "content": f"{IMAGE_NOTE}\nhi"}]},
    ),
    (OllamaGenerate, {"context": [1, 2]}, {"context": [1, 2]}),
    (OllamaGenerate, {"raw": True}, {"prompt": "hi", "messages": []}),
    *(
        (ask, {"think": "low"}, {"thinking": True, "effort": "low"})
        for ask in (OllamaChat, OllamaGenerate)
    ),
    *((ask, {"keep_alive": -1}, {"keep_alive": -1}) for ask in (OllamaChat, OllamaGenerate)),
    *(
        (ask, {"logprobs": True, "top_logprobs": 3}, {"logprobs": 3, "max_tokens": 1 << 16})
        for ask in (OllamaChat, OllamaGenerate)
    ),
    *(
        (ask, {"options": {"draft_num_predict": 0}}, {"speculate": False})
        for ask in (OllamaChat, OllamaGenerate)
    ),
    *(
        (ask, {"options": {"num_predict": 4, "stop": "x"}}, {"max_tokens": 4, "stop": ["x"]})
        for ask in (OllamaChat, OllamaGenerate)
    ),
    (OpenAIChat, {"max_completion_tokens": 4}, {"max_tokens": 4}),
    (OpenAIChat, {"stop": "x"}, {"stop": ["x"]}),
    (OpenAIChat, {**TOOLS, "tool_choice": "required"}, {**TOOLS, "tool_choice": "any"}),
    (OpenAIChat, {"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    (
        OpenAIChat,
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            }
        },
        {"format": SCHEMA, "messages": DEMAND},
    ),
    (
        OpenAIChat,
        {"response_format": {"type": "json_object"}},
        {
            "format": "json",
            "messages": [{"role": "user", "content": "hi\n\nAnswer with JSON only."}],
        },
    ),
    (OpenAIChat, {"reasoning_effort": "none"}, {"thinking": False}),
    (OpenAIChat, {"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}),
    (
        OpenAIChat,
        {"messages": [{"role": "developer", "content": "Be brief."}, *HI]},
        {"messages": RULES},
    ),
    (OpenAICompletion, {"logprobs": 2}, {"logprobs": 2}),
    (OpenAICompletion, {"max_tokens": 4}, {"max_tokens": 4}),
    (OpenAIResponses, {"instructions": "Be brief."}, {"messages": RULES}),
    (
        OpenAIResponses,
        {
            "input": [
                {"type": "custom_tool_call", "call_id": "c", "name": "sh", "input": "ls"},
                {"type": "custom_tool_call_output", "call_id": "c", "output": "a"},
            ]
        },
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "sh", "arguments": {"input": "ls"}},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "name": "sh", "content": "a"},
            ]
        },
    ),
    (OpenAIResponses, {"max_output_tokens": 4}, {"max_tokens": 4}),
    (OpenAIResponses, {"tools": [FLAT]}, {**TOOLS, "strict": True}),
    (OpenAIResponses, {"reasoning": {"effort": "high"}}, {"thinking": True, "effort": "high"}),
    (OpenAIResponses, {"text": {"format": FORM}}, {"format": SCHEMA, "messages": DEMAND}),
]
REFUSED: list[tuple[type, dict, str]] = [  # what the vendors' own tests of fields leave out
    *((AnthropicMessages, {"top_k": value}, "top_k") for value in (-1, 1.5, True)),
    *((AnthropicMessages, {"thread": value}, "thread is not supported") for value in ({}, "t")),
    (AnthropicMessages, {"tool_choice": {"type": "tool"}, "tools": [LOOK]}, "tool_choice.name"),
    (
        AnthropicMessages,
        {"tool_choice": {"type": "tool", "name": ""}, "tools": [LOOK]},
        "tool_choice.name",
    ),
    (
        AnthropicMessages,
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
        "tool_choice.disable_parallel_tool_use",
    ),
    (AnthropicMessages, {"output_format": FORM, "output_config": "high"}, "output_config: Input"),
    *(
        (OpenAICompletion, {key: value}, key)
        for key, value in (("echo", True), ("suffix", "x"), ("best_of", 2))
    ),
    *(
        (AnthropicMessages, {"tools": [{"type": kind, "name": "x"}]}, f"tools: '{kind}'")
        for kind in SERVER_TOOLS
    ),
    *(
        (AnthropicMessages, {"tools": [{"type": kind, "name": "x"}]}, "tools.0: tools of type")
        for kind in (
            "computer_20241022",
            "computer_20251124",
            "computer_toolset_20260801",
            "browser_toolset_20260801",
        )
    ),
    *(
        (ask, {"_debug_render_only": True}, "_debug_render_only")
        for ask in (OllamaChat, OllamaGenerate)
    ),
    *(
        (OpenAIResponses, {key: "x"}, key)
        for key in ("previous_response_id", "conversation", "background")
    ),
]


def body(reply: type, fields: dict) -> dict:
    """A good body but for some fields. In a response's, `prompt` would be something else than
    text."""
    return {
        key: value for key, value in BASE.items() if reply is not OpenAIResponses or key != "prompt"
    } | fields


def request(reply: type, fields: dict) -> dict:
    return asdict(reply(body(reply, fields)).request)


@pytest.mark.parametrize(
    "reply, fields", [(reply, fields) for reply, rows in IGNORED.items() for fields in rows]
)
def test_what_is_ignored_changes_nothing(reply: type, fields: dict):
    assert request(reply, fields) == request(reply, {})


@pytest.mark.parametrize("reply, fields, difference", HONOURED)
def test_what_is_honoured_changes_just_that(reply: type, fields: dict, difference: dict):
    assert request(reply, fields) == request(reply, {}) | difference


@pytest.mark.parametrize("reply", IGNORED)
def test_sampling_fields_are_honoured_by_every_dialect(reply: type):
    given = {"temperature": 0.5, "top_p": 0.25, "top_k": 3}
    sampling = request(reply, given | {"options": given})["sampling"]
    assert {key: sampling[key] for key in given} == given


@pytest.mark.parametrize("reply, fields, said", REFUSED)
def test_what_is_refused_is_named(reply: type, fields: dict, said: str):
    with pytest.raises(WireError) as caught:
        reply(body(reply, fields))
    assert caught.value.status == 400 and caught.value.message.startswith(said)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/v1/files", 404),
        ("POST", "/v1/messages/batches", 404),
        ("POST", "/v1/complete", 404),
        ("GET", "/v1/skills", 404),
        ("GET", "/v1/responses/resp_1", 404),
        ("POST", "/v1/messages?beta=true", 400),
        ("DELETE", "/v1/messages", 405),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("HEAD", "/v1/models", 200),
        ("POST", "/api/tags", 405),
        ("HEAD", "/api/version", 200),
        ("HEAD", "/", 200),
        ("HEAD", "/api/hello", 200),
        ("OPTIONS", "*", 204),
        ("GET", "/api/tags/", 200),
        ("GET", "/v1/models/?limit=1", 200),
        ("GET", "/api/status", 200),
        ("POST", "/api/me", 404),
        ("POST", "/api/signout", 404),
        ("GET", "/api/experimental/model-recommendations", 404),
        ("POST", "/v1/systemone", 404),
        ("POST", "/v1/audio/transcriptions", 404),
        ("GET", "/api/ps", 200),
        ("OPTIONS", "/v1/anything", 204),
    ],
)
def test_endpoints(server: Server, method: str, path: str, status: int):
    assert ask(server, method, path)[0].status == status


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    "path, reply",
    [
        ("/v1/messages", AnthropicMessages),
        ("/api/chat", OllamaChat),
        ("/api/generate", OllamaGenerate),
        ("/v1/chat/completions", OpenAIChat),
        ("/v1/completions", OpenAICompletion),
        ("/v1/responses", OpenAIResponses),
    ],
)
def test_every_dialect_takes_compressed_bodies(server: Server, path: str, reply: type, coding: str):
    text = json.dumps(
        body(reply, {"model": "demo", "stream": False, "options": {"num_predict": 9}})
    ).encode()
    packed = gzip.compress(text) if coding == "gzip" else zlib.compress(text)
    assert ask(server, "POST", path, packed, {"Content-Encoding": coding})[0].status == 200


@pytest.mark.parametrize(
    "key", ["repeat_last_n", "repeat_penalty", "frequency_penalty", "temperature", "top_k", "seed"]
)
def test_the_largest_and_smallest_numbers_do_no_harm(server: Server, key: str):
    for value in (1e308, -1e308, 1e-320):
        options = {"num_predict": 4, "temperature": 0.5, "repeat_penalty": 1.1, key: value}
        response, text = ask(
            server,
            "POST",
            "/api/chat",
            {"model": "demo", "stream": False, "messages": HI, "options": options},
        )
        assert response.status == 200, text


@pytest.mark.parametrize("truncate", [True, False])
def test_what_is_too_long_is_refused_whole_as_ollama_does_with_mlx_models(
    server: Server, truncate: bool
):
    long = [*HI, {"role": "user", "content": "a b " * 80000}]
    response, text = ask(
        server,
        "POST",
        "/api/chat",
        {"model": "demo", "stream": False, "truncate": truncate, "messages": long},
    )
    assert (
        response.status == 400
        and b"exceeds the model's maximum context length (131072 tokens)" in text
    )


def say(server: Server, messages: list[dict], **fields) -> anthropic.types.Message:
    client = anthropic.Anthropic(
        base_url=server.url, api_key="any", max_retries=0, _strict_response_validation=True
    )
    with client.messages.stream(
        **{"model": "demo", "max_tokens": 60, "messages": messages, **fields}
    ) as stream:
        streamed = stream.get_final_message()
    whole = client.messages.create(
        **{"model": "demo", "max_tokens": 60, "messages": messages, **fields}
    )
    assert streamed.model_dump(
        include={"content", "stop_reason"}, exclude={"content": {"__all__": {"parsed_output"}}}
    ) == (whole.model_dump(include={"content", "stop_reason"}))
    return whole


def test_a_prefill_is_continued_beside_tools_up_to_a_stop_sequence(server: Server):
    count = {"role": "user", "content": "count to 9"}
    answer = say(
        server,
        [count, {"role": "assistant", "content": "1 2 3 "}],
        tools=[LOOK],
        stop_sequences=["7", "zzz"],
    )
    assert (answer.content[0].text.strip(), answer.stop_reason, answer.stop_sequence) == (
        "4 5 6",
        "stop_sequence",
        "7",
    )


def test_no_tokens_at_all_only_fill_the_cache(server: Server):
    asked = [{"role": "user", "content": "say hello to the cache that was filled"}]
    answer = say(server, asked, max_tokens=0)
    assert (answer.content[0].text, answer.stop_reason, answer.usage.output_tokens) == (
        "",
        "max_tokens",
        0,
    )
    assert say(server, asked).usage.cache_read_input_tokens > 0.5 * answer.usage.input_tokens


def test_hidden_thinking_is_paid_for_but_not_told(server: Server):
    asked = [{"role": "user", "content": "think then say hello"}]
    shown, hidden = (
        say(server, asked, thinking={"type": "adaptive", "display": display})
        for display in ("summarized", "updates")
    )
    assert (
        shown.content[0].thinking and not hidden.content[0].thinking and hidden.content[0].signature
    )
    assert [answer.content[1].text for answer in (shown, hidden)] == ["hello", "hello"]
    assert shown.usage.output_tokens_details == hidden.usage.output_tokens_details


def test_both_families_of_clients_list_the_same_models(server: Server):
    ours = anthropic.Anthropic(
        base_url=server.url, api_key="any", _strict_response_validation=True
    ).models
    theirs = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", _strict_response_validation=True
    ).models
    assert [model.id for model in theirs.list()] == ["demo"]
    assert [model.id for model in ours.list(limit=1)] == ["demo", "anthropic/demo"]
    assert ours.retrieve("anthropic/demo").id == "demo"
    assert ours.retrieve("demo").created_at.timestamp() // 1 == theirs.retrieve("demo").created
