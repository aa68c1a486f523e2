"""The Ollama dialect: bodies in, requests out; events in, wire objects out. No socket and no
model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ollama import ChatResponse, GenerateResponse, ListResponse, ProcessResponse, ShowResponse

from _mlx_server.wire.conversation import IMAGE_NOTE
from _mlx_server.wire.errors import ollama_error
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.ollama import OllamaChat, OllamaGenerate
from _mlx_server.wire.ollama_models import ollama_ps, ollama_show
from _mlx_server.wire.ollama_request import parse_keep_alive
from dialects import tag_list
from engine import (
    Done,
    EngineClosed,
    EngineError,
    InvalidRequest,
    Loaded,
    LocalModel,
    ModelLoadError,
    ModelNotFound,
    PromptTooLong,
    Request,
    Text,
    Thinking,
    Tick,
    ToolEnd,
    ToolInput,
    ToolStart,
    Usage,
)

HI = [{"role": "user", "content": "hi"}]
DEMO = LocalModel(
    "demo",
    Path("/x"),
    10,
    1_700_000_000.5,
    "ab" * 32,
    {},
    "qwen2",
    1000,
    "1.0K",
    "int4",
    4096,
    64,
    ["completion", "tools"],
)


@dataclass
class Numbers:
    """What a dialect reads off a generation."""

    id: str = "0123456789abcdef01234567"
    prompt_tokens: int = 100
    cached_tokens: int = 60


def chat(**fields) -> Request:
    return OllamaChat({"model": "m", "messages": HI, **fields}).request


def generate(**fields) -> Request:
    return OllamaGenerate({"model": "m", "prompt": "hi", **fields}).request


def brief(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def call(name: str, arguments: object = None, **fields) -> dict:
    return {
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
        **fields,
    }


# ------------------------------------------------------------------ fields


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": None, "stop": None}, {"temperature": None}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": -1.0}, {"temperature": 0}),
        ({"top_k": 40.9, "top_p": 1, "min_p": 0.1}, {"top_k": 40, "top_p": 1, "min_p": 0.1}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": 7.0}, {"seed": 7}),
        ({"seed": -1}, {"seed": None}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1, "repetition_context": None}),
        (
            {"repeat_penalty": 1.1, "repeat_last_n": 32},
            {"repetition_penalty": 1.1, "repetition_context": 32},
        ),
        ({"repeat_penalty": 1.1, "repeat_last_n": 0}, {"repetition_penalty": 1.0}),
        ({"repeat_penalty": 1.1, "repeat_last_n": -1}, {"repetition_context": 1 << 20}),
        (
            {"presence_penalty": 1, "frequency_penalty": 0.5},
            {"presence_penalty": 1, "frequency_penalty": 0.5},
        ),
        ({"num_ctx": 4096, "numa": "ignored", "mirostat": 2}, {"temperature": None, "seed": None}),
    ],
)
def test_sampling_options(options: dict, expected: dict) -> None:
    sampling = vars(chat(options=options).sampling)
    assert {key: sampling[key] for key in expected} == expected


@pytest.mark.parametrize(
    "fields, attribute, value",
    [
        ({}, "max_tokens", None),
        ({"options": {"num_predict": -1}}, "max_tokens", None),
        ({"options": {"num_predict": -2}}, "max_tokens", None),
        ({"options": {"num_predict": 5.0}}, "max_tokens", 5),
        ({"options": {"stop": "END"}}, "stop", ["END"]),
        ({"options": {"stop": ["a", ""]}}, "stop", ["a"]),
        ({"options": None, "tools": [], "format": ""}, "stop", []),
        ({"think": None}, "thinking", None),
        ({"think": True}, "thinking", True),
        ({"think": False}, "thinking", False),
        ({"think": "high"}, "thinking", True),
        ({"think": "max"}, "effort", "max"),
        ({"keep_alive": "1h30m"}, "keep_alive", 5400),
        ({}, "keep_alive", None),
        (
            {
                "truncate": False,
                "shift": True,
                "logprobs": True,
                "top_logprobs": 20,
                "metadata": {},
            },
            "model",
            "m",
        ),
    ],
)
@pytest.mark.parametrize("ask", [chat, generate])
def test_fields(ask, fields: dict, attribute: str, value: object) -> None:
    assert getattr(ask(**fields), attribute) == value


@pytest.mark.parametrize(
    "value, seconds",
    [
        (None, None),
        (0, 0),
        (300, 300),
        (0.5, 0.5),
        (-1, -1),
        (-0.5, -1),
        ("5m", 300),
        ("1h30m", 5400),
        ("300ms", 0.3),
        ("0", 0),
        ("-1m", -1),
        ("-1", -1),
        ("5", 5),
        ("1.5s", 1.5),
        ("100us", 1e-4),
        ("99999999h", -1),
    ],
)
def test_keep_alive(value: object, seconds: float | None) -> None:
    assert parse_keep_alive(value) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("value", [True, False, "", "soon", "5x", "1h 3m", "--5", [], float("inf")])
def test_bad_keep_alive(value: object) -> None:
    with pytest.raises(WireError, match="time: invalid duration") as caught:
        parse_keep_alive(value)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "given, stream", [({}, True), ({"stream": None}, True), ({"stream": False}, False)]
)
def test_streaming_is_the_default(given: dict, stream: bool) -> None:
    assert OllamaChat({"model": "m", "messages": HI, **given}).stream is stream


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    "form, demand",
    [
        ("json", "Answer with JSON only."),
        (SCHEMA, 'Answer with JSON only, matching this schema: {"type": "object"}'),
    ],
)
@pytest.mark.parametrize("ask", [chat, generate])
def test_a_format_is_asked_for(ask, form: object, demand: str) -> None:
    request = ask(format=form)
    assert brief(request.messages) == [("user", f"hi\n\n{demand}")] and request.format == form


def test_tools() -> None:
    assert chat(
        tools=[{"type": "function", "function": {"name": "f", "parameters": None}}]
    ).tools == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ]


# ------------------------------------------------------------------ the conversation


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([{"role": "SYSTEM", "content": "s"}, *HI], [("system", "s"), ("user", "hi")]),
        (
            [*HI, {"role": "system", "content": "s"}],
            [("user", "<system-reminder>\ns\n</system-reminder>\nhi")],
        ),
        ([{"role": "user", "content": None}, {"role": "control", "content": "x"}], [("user", "x")]),
        ([{"role": "user"}], [("user", "")]),
        (
            [{"role": "user", "content": "see", "images": ["AAAA", "aGk="]}],
            [("user", f"{IMAGE_NOTE}\n{IMAGE_NOTE}\nsee")],
        ),
    ],
)
def test_messages(messages: list, expected: list) -> None:
    assert brief(chat(messages=messages).messages) == expected


def test_history() -> None:
    messages = chat(
        messages=[
            *HI,
            {
                "role": "assistant",
                "thinking": "hmm",
                "tool_calls": [call("f", {"x": 1}, id="c1", type="function", index=0)],
            },
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
        ]
    ).messages
    assert messages[1:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hmm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "1"},
    ]


NAMED = [call("f", id="1"), call("g", id="2")]


@pytest.mark.parametrize(
    "calls, results",
    [
        (NAMED, [{"content": "F"}, {"content": "G"}]),
        (NAMED, [{"content": "G", "tool_name": "g"}, {"content": "F"}]),
        (NAMED, [{"content": "G", "tool_call_id": "2"}, {"content": "F", "tool_call_id": "1"}]),
        (NAMED, [{"content": "G", "tool_name": "g"}, {"content": "F", "tool_call_id": "lost"}]),
        ([call("f"), call("g")], [{"content": "F"}, {"content": "G"}]),
        (
            [call("f"), call("g")],
            [{"content": "G", "tool_name": "g"}, {"content": "F", "tool_name": "f"}],
        ),
    ],
)
def test_results_find_their_calls(calls: list, results: list) -> None:
    messages = chat(
        messages=[
            *HI,
            {"role": "assistant", "tool_calls": calls},
            *({"role": "tool", **result} for result in results),
        ]
    ).messages
    assert [(message["name"], message["content"]) for message in messages[2:]] == [
        ("f", "F"),
        ("g", "G"),
    ]
    assert [message["tool_call_id"] for message in messages[2:]] == [
        one["id"] for one in messages[1]["tool_calls"]
    ]


def test_a_growing_chat_is_append_only() -> None:
    session = [
        {"role": "system", "content": "s"},
        *HI,
        {"role": "assistant", "content": "x", "tool_calls": [call("f"), call("g")]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "more"},
        {"role": "system", "content": "late"},
        {"role": "assistant", "content": "z"},
        {"role": "user", "content": "end"},
    ]
    rendered = [chat(messages=session[:end]).messages for end in (2, 5, 8, 10)]
    assert all(len(a) < len(b) and b[: len(a)] == a for a, b in zip(rendered, rendered[1:]))


def test_generate_is_a_chat_of_one_message() -> None:
    assert brief(generate(system="s", images=["AAAA"]).messages) == [
        ("system", "s"),
        ("user", f"{IMAGE_NOTE}\nhi"),
    ]


def test_raw_prompts_are_untouched() -> None:
    request = generate(prompt=" <s>hi ", raw=True)
    assert (request.prompt, request.messages) == (" <s>hi ", [])


# ------------------------------------------------------------------ what is refused

LEVELS = '(must be "high", "medium", "low", "max", true, or false)'
SHARED_REFUSALS = [
    ({"model": "a b"}, 400, "invalid model name"),
    ({"options": {"temperature": "hot"}}, 400, 'option "temperature" must be of type float32'),
    ({"options": {"temperature": True}}, 400, 'option "temperature" must be of type float32'),
    ({"options": {"num_predict": "x"}}, 400, 'option "num_predict" must be of type integer'),
    ({"options": {"use_mmap": 1}}, 400, 'option "use_mmap" must be of type boolean'),
    ({"options": {"stop": 1}}, 400, 'option "stop" must be of type array'),
    ({"options": {"stop": [1]}}, 400, 'option "stop" must be of an array of strings'),
    ({"think": "foo"}, 400, f'invalid think value: "foo" {LEVELS}'),
    ({"think": 1}, 400, f"invalid think value: 1 {LEVELS}"),
    (
        {"format": "xml"},
        400,
        'invalid format: "xml"; expected "json" or a valid JSON Schema object',
    ),
    ({"top_logprobs": 21}, 400, "top_logprobs must be between 0 and 20"),
    ({"stream": "yes"}, 400, "stream: Input should be a valid boolean"),
]
REFUSALS = [
    *((ask, *case) for ask in (OllamaChat, OllamaGenerate) for case in SHARED_REFUSALS),
    (OllamaChat, {"model": None}, 400, "model is required"),
    (OllamaGenerate, {"model": None}, 404, "model '' not found"),
    (OllamaChat, {"messages": {}}, 400, "messages: Input should be a valid list"),
    (OllamaChat, {"messages": [{"content": "x"}]}, 400, "messages.0.role: Field required"),
    (
        OllamaChat,
        {"messages": [{"role": "user", "content": []}]},
        400,
        "messages.0.content: Input should be a valid string",
    ),
    (
        OllamaChat,
        {"messages": [{"role": "user", "images": ["AA!A"]}]},
        400,
        "illegal base64 data at input byte 2",
    ),
    (OllamaGenerate, {"images": ["AAA"]}, 400, "illegal base64 data at input byte 3"),
    (OllamaGenerate, {"suffix": 1}, 400, "suffix: Input should be a valid string"),
    (
        OllamaGenerate,
        {"template": "{{ .Prompt }}"},
        400,
        "template is not supported by this server: models use their own",
    ),
    *(
        (
            OllamaGenerate,
            {"raw": True, key: value},
            400,
            "raw mode does not support template, system, or context",
        )
        for key, value in {"template": "x", "system": "x", "context": [1]}.items()
    ),
    (OllamaGenerate, {"raw": True, "format": "json"}, 400, "raw mode does not support format"),
]


@pytest.mark.parametrize("ask, fields, status, message", REFUSALS)
def test_refusals(ask: type, fields: dict, status: int, message: str) -> None:
    with pytest.raises(WireError) as caught:
        ask({"model": "m", "messages": HI, "prompt": "hi", **fields})
    assert (caught.value.status, caught.value.message) == (status, message)


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
    said = None
    try:
        reply.check(replace(DEMO, capabilities=capabilities))
    except WireError as error:
        said = error.message
    assert said == message


# ------------------------------------------------------------------ the answer

USAGE = Usage(
    100,
    60,
    20,
    7,
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
    objects = reply.open(Numbers())
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
    "ask, empty, said",
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
    ask: type, empty: dict, said: dict, keep_alive: object, unload: bool
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
    assert whole == {**said, "done": True, "done_reason": "unload" if unload else "load"}


def test_a_chat_with_keep_alive_zero_is_answered() -> None:
    reply = OllamaChat({"model": "m", "messages": HI, "keep_alive": 0})
    assert not reply.unload and reply.request.keep_alive == 0


def test_ping_and_failure() -> None:
    reply = OllamaChat({"model": "m", "messages": HI})
    (ping,) = reply.ping()
    assert ping["message"] == {"role": "assistant", "content": ""} and ping["done"] is False
    assert reply.framing == "lines"
    assert reply.failure(EngineError("the engine failed")) == [{"error": "the engine failed"}]


@pytest.mark.parametrize(
    "error, status, message",
    [
        (WireError(405, "405 method not allowed"), 405, "405 method not allowed"),
        (ModelNotFound("x", ["demo"]), 404, "model 'x' not found"),
        (
            PromptTooLong(9, 8),
            400,
            "input length (9 tokens) exceeds the model's maximum context length (8 tokens)",
        ),
        (InvalidRequest("no"), 400, "no"),
        (ModelLoadError("broken"), 400, "broken"),
        (EngineClosed("closing"), 503, "server busy, please try again.  closing"),
        (EngineError("odd"), 500, "odd"),
        (KeyError("/secret/path"), 500, "internal error"),
    ],
)
def test_errors(error: Exception, status: int, message: str) -> None:
    assert ollama_error(error) == (status, {}, {"error": message})


# ------------------------------------------------------------------ models

BIG = replace(
    DEMO,
    name="mlx-community/Qwen3-8B-4bit",
    modified=1_800_000_000.0,
    digest="cd" * 32,
    family="qwen3",
    config={
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "vocab_size": None,
        "text_config": {"num_key_value_heads": 8},
    },
)
DETAILS = {
    "parent_model": "",
    "format": "safetensors",
    "family": "qwen2",
    "families": ["qwen2"],
    "parameter_size": "1.0K",
    "quantization_level": "int4",
    "context_length": 4096,
    "embedding_length": 64,
}


def test_tags() -> None:
    listed = tag_list([DEMO, replace(BIG, name="org/x:4b")])
    ListResponse.model_validate_json(json.dumps(listed))
    assert [one["name"] for one in listed["models"]] == ["org/x:4b", "demo:latest"]
    assert listed["models"][1] == {
        "name": "demo:latest",
        "model": "demo:latest",
        "modified_at": "2023-11-14T22:13:20.500000Z",
        "size": 10,
        "digest": "ab" * 32,
        "details": DETAILS,
        "capabilities": ["completion", "tools"],
    }
    assert tag_list([]) == {"models": []}


def test_show() -> None:
    generation = {
        "temperature": 0.6,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "eos_token_id": [1, 2],
        "do_sample": True,
    }
    shown = ollama_show(BIG, 2048, "{{ x }}", generation, "qwen3:8b")
    ShowResponse.model_validate_json(json.dumps(shown))
    assert shown["model_info"] == {
        "general.architecture": "qwen3",
        "general.basename": "qwen3:8b",
        "general.parameter_count": 1000,
        "qwen3.context_length": 2048,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 36,
        "qwen3.attention.head_count": 32,
        "qwen3.attention.head_count_kv": 8,
    }
    assert shown["parameters"].splitlines()[0] == "temperature                    0.6"
    assert len(shown["parameters"].splitlines()) == 3 and "repeat_penalty" in shown["parameters"]
    assert all(
        isinstance(shown[key], str)
        for key in ("license", "modelfile", "system", "template", "modified_at")
    )
    assert shown["capabilities"] == ["completion", "tools"]


def test_ps() -> None:
    listed = ollama_ps([Loaded(DEMO, 10, 1_700_000_300.0, 2048), Loaded(BIG, 20, None, 4096)])
    ProcessResponse.model_validate_json(json.dumps(listed))
    assert [one["expires_at"][:4] for one in listed["models"]] == ["2318", "2023"]
    assert listed["models"][1] == {
        "name": "demo:latest",
        "model": "demo:latest",
        "size": 10,
        "size_vram": 10,
        "digest": "ab" * 32,
        "details": DETAILS,
        "expires_at": "2023-11-14T22:18:20.000000Z",
        "context_length": 2048,
    }
    assert ollama_ps([]) == {"models": []}
