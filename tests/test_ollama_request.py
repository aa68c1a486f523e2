"""Ollama's bodies in, requests out. No socket and no model."""

from __future__ import annotations

import itertools

import pytest
from wire_cases import HI, IMAGE_NOTE, brief

from _mlx_server.wire.fields import WireError
from _mlx_server.wire.ollama import OllamaChat, OllamaGenerate
from _mlx_server.wire.ollama_request import parse_keep_alive
from engine import Request


def chat(**fields) -> Request:
    return OllamaChat({"model": "m", "messages": HI, **fields}).request


def generate(**fields) -> Request:
    return OllamaGenerate({"model": "m", "prompt": "hi", **fields}).request


def call(name: str, arguments: object = None, **fields) -> dict:
    return {
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
        **fields,
    }


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
    assert all(len(a) < len(b) and b[: len(a)] == a for a, b in itertools.pairwise(rendered))


def test_generate_is_a_chat_of_one_message() -> None:
    assert brief(generate(system="s", images=["AAAA"]).messages) == [
        ("system", "s"),
        ("user", f"{IMAGE_NOTE}\nhi"),
    ]


def test_raw_prompts_are_untouched() -> None:
    request = generate(prompt=" <s>hi ", raw=True)
    assert (request.prompt, request.messages) == (" <s>hi ", [])


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
