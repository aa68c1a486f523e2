"""What a body costs to read grows with its length, whatever of it is long, in every dialect."""

from __future__ import annotations

import base64
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dialects
from _mlx_server.wire.anthropic_request import count_request
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.ollama_models import ollama_create
from engine import Engine, EngineError, Preset

HI = {"role": "user", "content": "hi"}
MESSAGES, CHAT, GENERATE = "/v1/messages", "/api/chat", "/api/generate"
COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/responses"


def function(number: int, **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties}
    named = {"name": f"t{number}", "description": "d", "parameters": parameters}
    return {"type": "function", "function": named, **named}


def tool(number: int, **fields: Any) -> dict:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    return {"name": f"t{number}", "description": "d", "input_schema": schema, **fields}


def many_properties(n: int) -> dict:
    return {f"p{k}": {"type": "string", "description": "d"} for k in range(n)}


def chat_calls(n: int) -> list[dict]:
    turns = [HI]
    for k in range(n):
        call = {"id": f"c{k}", "type": "function", "function": {"name": "t0", "arguments": "{}"}}
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        turns.append({"role": "tool", "tool_call_id": f"c{k}", "content": "x"})
    return turns


def one_chat_turn(n: int) -> list[dict]:
    function = {"name": "t0", "arguments": "{}"}
    calls = [{"type": "function", "function": function}] * n
    return [HI, {"role": "assistant", "tool_calls": calls}, *[{"role": "tool", "content": "x"}] * n]


def one_turn_of_calls(n: int) -> list[dict]:
    calls = [{"type": "tool_use", "id": f"c{k}", "name": "t0", "input": {}} for k in range(n)]
    results = [{"type": "tool_result", "tool_use_id": f"c{k}", "content": "x"} for k in range(n)]
    return [HI, {"role": "assistant", "content": calls}, {"role": "user", "content": results[::-1]}]


def texts(n: int, kind: str = "text") -> list[dict]:
    return [{"type": kind, "text": "some words"}] * n


def document(n: int, kind: str) -> dict:
    data = base64.b64encode(b"words \n" * 50 * n).decode()
    source = {"type": "base64", "media_type": kind, "data": data}
    return {"role": "user", "content": [{"type": "document", "source": source}]}


def functions(n: int) -> list[dict]:
    return [{"type": "function_call", "call_id": f"c{k}", "name": "a"} for k in range(n)] + [
        {"type": "function_call_output", "call_id": f"c{k}", "output": "x"} for k in range(n)
    ]


def reminders(n: int) -> list[dict]:
    return [{"role": role, "content": "x"} for _ in range(n) for role in ("user", "system")]


# By what of it grows: the route, and the fields of n such things
BODIES: dict[str, tuple[str, Callable[[int], dict]]] = {
    "messages": (MESSAGES, lambda n: {"messages": [HI, {**HI, "role": "assistant"}] * n + [HI]}),
    "one role": (MESSAGES, lambda n: {"messages": [HI] * n}),
    "system messages": (MESSAGES, lambda n: {"messages": [HI, *reminders(n)]}),
    "blocks": (MESSAGES, lambda n: {"messages": [{**HI, "content": texts(n)}]}),
    "system": (MESSAGES, lambda n: {"messages": [HI], "system": texts(n)}),
    "billing": (
        MESSAGES,
        lambda n: {"messages": [HI], "system": "x-anthropic-billing-header: a\n" * n},
    ),
    "calls": (MESSAGES, lambda n: {"messages": one_turn_of_calls(n), "tools": [tool(0)]}),
    "tools": (MESSAGES, lambda n: {"messages": [HI], "tools": list(map(tool, range(n)))}),
    "deferred tools": (
        MESSAGES,
        lambda n: {
            "messages": [HI],
            "tools": [tool(0), *(tool(k, defer_loading=True) for k in range(1, n))],
        },
    ),
    "stops": (
        MESSAGES,
        lambda n: {"messages": [HI], "stop_sequences": [f"s{k}" for k in range(n)]},
    ),
    "text file": (MESSAGES, lambda n: {"messages": [document(n, "text/plain")]}),
    "some file": (MESSAGES, lambda n: {"messages": [document(n, "application/x-odd")]}),
    "edits": (
        MESSAGES,
        lambda n: {"messages": [HI], "context_management": {"edits": [{"type": "a"}] * n}},
    ),
    "chat": (COMPLETIONS, lambda n: {"messages": chat_calls(n)}),
    "chat calls": (COMPLETIONS, lambda n: {"messages": one_chat_turn(n)}),
    "chat parts": (COMPLETIONS, lambda n: {"messages": [{**HI, "content": texts(n)}]}),
    "chat tools": (
        COMPLETIONS,
        lambda n: {"messages": [HI], "tools": list(map(function, range(n)))},
    ),
    "allowed tools": (
        COMPLETIONS,
        lambda n: {
            "messages": [HI],
            "tools": list(map(function, range(n))),
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": list(map(function, range(n)))},
            },
        },
    ),
    "properties": (
        COMPLETIONS,
        lambda n: {"messages": [HI], "tools": [function(0, **many_properties(n))]},
    ),
    "biases": (
        COMPLETIONS,
        lambda n: {"messages": [HI], "logit_bias": {f"{k}": 1 for k in range(n)}},
    ),
    "tokens": ("/v1/completions", lambda n: {"prompt": [1, 2, 3] * n}),
    "items": (RESPONSES, lambda n: {"input": [{**HI, "content": texts(1, "input_text")}] * n}),
    "function items": (RESPONSES, lambda n: {"input": [HI, *functions(n)]}),
    "namespaces": (
        RESPONSES,
        lambda n: {
            "input": "hi",
            "tools": [
                {"type": "namespace", "name": f"n{k}", "tools": [function(k)]} for k in range(n)
            ],
        },
    ),
    "ollama": (CHAT, lambda n: {"messages": chat_calls(n)}),
    "images": (CHAT, lambda n: {"messages": [{**HI, "images": ["aGk="] * n}]}),
    "options": (CHAT, lambda n: {"messages": [HI], "options": {f"o{k}": 1 for k in range(n)}}),
    "context": (GENERATE, lambda n: {"prompt": "hi", "context": [1, 2, 3] * n}),
    "texts": ("/api/embed", lambda n: {"input": ["hi"] * min(n, 9000)}),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("demo") as engine:
        yield engine


def cost(work: Callable[[], object]) -> float:
    """Seconds of this thread's time."""
    gc.collect()
    gc.disable()  # it would walk through all that the tests before have left
    began = time.thread_time()
    with contextlib.suppress(WireError, EngineError):  # too many may be refused, if that is soon
        work()
    took = time.thread_time() - began
    gc.enable()
    return took


def check_growth(work: Callable[[dict], object], make: Callable[[int], dict]) -> None:
    """Fails if the fourfold costs more than about four times as much. A machine that was busy with
    other work is given another chance."""
    sizes = [32 << power for power in range(9)]
    size = next((n for n in sizes if cost(lambda n=n: work(make(n))) > 0.02), sizes[-1])
    for _ in range(5):
        bodies = [make(size * factor) for factor in (1, 4)]
        few, many = (cost(lambda body=body: work(body)) for body in bodies)
        if many < 8 * max(few, 0.005):  # 16 times, were it quadratic
            return
    pytest.fail(f"{size}: {few * 1e3:.1f} ms, four times as many: {many * 1e3:.1f} ms")


FAST = ("messages", "allowed tools", "chat calls")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in BODIES]
)
def test_a_body_costs_its_length(name: str):
    path, fields = BODIES[name]
    reply = dialects.ENDPOINTS[path].reply
    check_growth(
        lambda body: reply(body, "id").requests,
        lambda n: {"model": "demo", "max_tokens": 1, "input": "hi", **fields(n)},
    )


RENDERED = ["messages", "calls", "tools", "chat", "properties", "function items", "ollama"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RENDERED)
def test_a_prompt_costs_its_length(name: str, engine: Engine):
    path, fields = BODIES[name]
    renderer = engine.renderer(engine.default)

    def render(body: dict) -> None:
        renderer.prompt(dialects.ENDPOINTS[path].reply(body, "id").request, 1 << 20)

    check_growth(
        render, lambda n: {"model": "demo", "max_tokens": 1, "x": time.time(), **fields(n)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["messages", "tools"])
def test_counting_costs_the_length(name: str):
    _, fields = BODIES[name]
    check_growth(count_request, lambda n: {"model": "demo", **fields(n)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ollama", "options"])
def test_a_new_name_costs_its_length(name: str):
    _, fields = BODIES[name]
    check_growth(
        lambda body: ollama_create(body, "made", Preset("made", "demo")),
        lambda n: {**fields(n), "parameters": fields(n).get("options")},
    )
