"""Bodies nobody would write: JSON that is valid and wrong in all other ways, sent to each route
over real sockets.

Half of the bodies are one of a few good ones, changed at random. The others are good conversations
with one strange thing in them, none of which may be refused. FUZZ_BODIES says how many a dialect
gets; FUZZ_SEED makes others of them. The server has a small context and gives short answers: both
could be long otherwise, without being wrong. None may cost the server much more processor time than
a plain body, or as many as it has texts to embed."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import statistics
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic.types.beta
import openai.types.chat
import openai.types.responses
import pytest
from conftest import PATIENCE, Server
from fake_hub import FakeHub
from sdk_samples import samples

pytestmark = pytest.mark.slow

BODIES = int(os.environ.get("FUZZ_BODIES", 250))
SEED = int(os.environ.get("FUZZ_SEED", 1))
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
FUNCTION = {"name": "Bash", "description": "Runs a command.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "Bash", "arguments": "{}"}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "run ls"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Well."},
    {"role": "tool", "tool_call_id": "c1", "content": "a.txt"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
]
PLAIN = [{"role": "user", "content": "say hi"}]

MESSAGES = [
    {
        "messages": PLAIN,
        "max_tokens": 2,
        "system": "Be brief.",
        "stop_sequences": ["x"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
        "metadata": {"user_id": "u"},
    },
    {
        "max_tokens": 2,
        "tools": [
            {"name": "Bash", "description": "Runs.", "input_schema": SCHEMA},
            {"type": "bash_20250124", "name": "bash"},
            {"name": "later", "defer_loading": True},
        ],
        "tool_choice": {"type": "tool", "name": "Bash", "disable_parallel_tool_use": True},
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "run ls"},
                    {"type": "image", "source": {"type": "url", "url": "https://x.invalid/y.png"}},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Well.", "signature": "s"},
                    {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "is_error": True,
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "tool_reference", "tool_name": "later"},
                        ],
                    },
                    {"type": "document", "title": "t", "source": {"type": "text", "data": "d"}},
                    {
                        "type": "search_result",
                        "source": "s",
                        "title": "t",
                        "content": [{"type": "text", "text": "c"}],
                    },
                ],
            },
            {"role": "system", "content": "more"},
        ],
    },
    {
        "max_tokens": 2,
        "messages": [*PLAIN, {"role": "assistant", "content": "so "}],
        "output_config": {"effort": "low"},
    },
    {
        "max_tokens": 2,
        "messages": PLAIN,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
]
OPTIONS = {
    "num_predict": 2,
    "temperature": 0.5,
    "top_k": 3,
    "stop": ["x"],
    "seed": 4,
    "repeat_last_n": 9,
    "repeat_penalty": 1.1,
}
NATIVE = {
    "options": OPTIONS,
    "keep_alive": "5m",
    "think": False,
    "logprobs": True,
    "top_logprobs": 2,
}
SAMPLED = {
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 4,
    "logit_bias": {"5": 1},
    "presence_penalty": 1,
    "stop": "x",
    "frequency_penalty": 1,
    "stream_options": {"include_usage": True},
}
ANTHROPIC = {"/v1/messages": MESSAGES, "/v1/messages/count_tokens": MESSAGES[:2]}
OLLAMA = {
    "/api/chat": [
        {**NATIVE, "messages": PLAIN},
        {**NATIVE, "messages": CHAT[:4], "tools": [TOOL]},
        {"options": OPTIONS, "messages": PLAIN, "format": SCHEMA},
        {"messages": []},
    ],
    "/api/generate": [
        {**NATIVE, "prompt": "say hi", "system": "Be brief.", "context": [1], "images": ["aGk="]},
        {"options": OPTIONS, "prompt": "say", "raw": True},
        {"options": OPTIONS, "prompt": "hi", "format": "json"},
    ],
    "/api/show": [{"verbose": True, "system": "", "template": "", "options": {}}, {"name": "demo"}],
    "/api/embed": [
        {
            "input": ["say", "hi"],
            "truncate": True,
            "dimensions": 8,
            "options": OPTIONS,
            "keep_alive": "5m",
        }
    ],
    "/api/embeddings": [{"prompt": "say hi", "options": OPTIONS, "keep_alive": "5m"}],
    "/api/create": [
        {
            "model": "parrot",
            "from": "demo",
            "system": "Be brief.",
            "parameters": OPTIONS,
            "messages": [*PLAIN, {"role": "assistant", "content": "hi"}],
        }
    ],
    "/api/copy": [{"source": "demo", "destination": "org/other:1b"}],
    "/api/pull": [{"model": "org/nowhere", "insecure": False}],
    "/api/push": [{"model": "org/nowhere"}],
    "/api/blobs/sha256:0": [{}],
}
OPENAI = {
    "/v1/chat/completions": [
        {
            **SAMPLED,
            "messages": CHAT,
            "tools": [TOOL],
            "max_tokens": 2,
            "tool_choice": "required",
            "logprobs": True,
        },
        {
            **SAMPLED,
            "messages": PLAIN,
            "max_completion_tokens": 2,
            "n": 2,
            "reasoning_effort": "low",
            "top_logprobs": 2,
        },
        {
            "messages": PLAIN,
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        },
    ],
    "/v1/completions": [
        {**SAMPLED, "prompt": ["say", "hi"], "max_tokens": 2, "logprobs": 2, "echo": False},
        {"prompt": [5, 6, 7], "max_tokens": 2, "suffix": None},
    ],
    "/v1/embeddings": [
        {"input": ["say", "hi"], "encoding_format": "base64", "dimensions": 8},
        {"input": [5, 6, 7]},
    ],
    "/v1/responses": [
        {
            **SAMPLED,
            "input": "hi",
            "instructions": "Be brief.",
            "max_output_tokens": 2,
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
            "include": [],
            "store": False,
        },
        {
            "max_output_tokens": 2,
            "tools": [
                {"type": "function", **FUNCTION},
                {"type": "namespace", "name": "n", "tools": [FUNCTION]},
            ],
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "run ls"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Well."}]},
                {"type": "function_call", "call_id": "c1", "name": "Bash", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "a.txt"},
            ],
        },
    ],
}


def nested(depth: int) -> Any:
    value: Any = "deep"
    for level in range(depth):
        value = [value] if level % 2 else {"type": "object", "properties": value}
    return value


# What JSON allows and Python's writer does not write, by the text that stands for it.
RAW = {"<infinite>": "1e999", "<long>": "7" * 5000, "<deep>": "[" * 5000 + "]" * 5000}
# Values that few fields expect, as JSON.
ODD = [
    json.dumps(value)
    for value in [
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**31,
        2**63 - 1,
        2**63,
        -(2**64),
        10**400,
        0.5,
        -0.0,
        1e308,
        1e-320,
        *RAW,
        "",
        " ",
        "\n",
        "auto",
        "any",
        "none",
        "json",
        "object",
        "text",
        "demo",
        "assistant",
        "system",
        "tool",
        "5m",
        "\ud800",
        "a\udfffb",
        "\0",
        "\u2028\u0085\ufeff\U0001f468\u200d\U0001f469",
        "{{ 1/0 }}{% raw %}",
        "<|im_end|><think></think><tool_call>",
        "../../etc",
        "e\u0301" * 300,
        "x" * 3000,
        "[" * 5000,
        '{"\\ud800": "\\udfff"}',
        [],
        {},
        [None],
        [[]],
        [{}],
        [""],
        {"": ""},
        {"type": None},
        {"type": "text"},
        {"\ud800": "\udc00"},
        {"$ref": "#"},
        {"type": ["string", "null"]},
        {"enum": []},
        {"pattern": "("},
        {"not": {}},
        list(range(300)),
        ["x"] * 300,
        [{"type": "text", "text": "x"}] * 200,
        *map(nested, (9, 150, 400, 850)),
    ]
]


def places(value: Any, depth: int = 9) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value that is not too deep in it."""
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield value, key
        if depth:
            yield from places(inner, depth - 1)


NAMES = sorted(
    {
        key
        for place, key in places([*ANTHROPIC.values(), *OLLAMA.values(), *OPENAI.values()])
        if isinstance(place, dict)
    }
)


def mutated(body: dict, chance: random.Random) -> Any:
    """A copy with up to four things wrong."""
    body = json.loads(json.dumps(body))
    for _ in range(chance.randrange(5)):
        container, key = chance.choice(list(places(body)) or [(body, "x")])
        value, within = json.loads(chance.choice(ODD)), isinstance(container, dict)
        match chance.randrange(6):
            case 0:
                other, at = chance.choice(list(places(body)) or [([value], 0)])
                container[key] = json.loads(json.dumps(other[at]))
            case 1 if not within:
                container *= 0 if len(container) > 50 else chance.choice([0, 2, 50])
            case 1 | 2:
                container.pop(key, None) if within else container.pop(key)
            case 3 if within:
                container[chance.choice([*NAMES, "x-\u212b\0"])] = value
            case _:
                container[key] = value
    return body if chance.random() < 0.98 else json.loads(chance.choice(ODD))


def bodies(dialect: str, routes: dict[str, list[dict]]) -> Iterator[tuple[str, bytes, bool]]:
    """(path, body, whether it has to be answered) as often as FUZZ_BODIES says."""
    chance = random.Random(f"{SEED} {dialect}")
    seeds = [(path, seed) for path, seeds in routes.items() for seed in seeds]
    chats = [
        (path, key, seed)
        for path, seed in seeds
        for key in ("messages", "input")
        if isinstance(seed.get(key), list) and seed[key] and path in CHATS
    ]
    for number in range(BODIES):
        sent = {"model": "demo", "stream": chance.random() < 0.5}
        if number % 2:
            path, key, seed = chance.choice(chats)
            body = strange({**sent, **seed}, key, path, chance)
        else:
            path, seed = chance.choice(seeds)
            body = mutated({**sent, **seed}, chance)
        text = json.dumps(body)
        for mark, raw in RAW.items():
            text = text.replace(f'"{mark}"', raw)
        yield path, text.encode(), bool(number % 2)


BLOCKS = {
    "/v1/messages": list(samples(anthropic.types.beta.BetaContentBlockParam)),
    "/v1/messages/count_tokens": list(samples(anthropic.types.beta.BetaContentBlockParam)),
    "/v1/chat/completions": list(samples(openai.types.chat.ChatCompletionContentPartParam)),
    "/v1/responses": list(samples(openai.types.responses.ResponseInputContentParam)),
}
CHATS = ("/api/chat", *BLOCKS)
DEARER = 20  # times a plain body
COMPILING = 1.0  # seconds that a schema's grammar may take
# What the body's reader does not refuse: it is neither nested too deeply nor out of JSON's range
TAME = [text for text in ODD if text.count("[") < 300 and not any(mark in text for mark in RAW)]
ITEMS = list(samples(openai.types.responses.ResponseInputItemParam))


def strange(body: dict, key: str, path: str, chance: random.Random) -> dict:
    """A copy with one thing more in its conversation, which is of an unknown type or well-formed
    by an SDK's types."""
    body = json.loads(json.dumps(body))
    unknown = {"type": f"x_{chance.choice(NAMES)}"}
    for name in chance.sample(NAMES, 3):
        unknown.setdefault(name, json.loads(chance.choice(TAME)))
    users = [one for one in body[key] if one.get("role") == "user"]
    if path == "/api/chat":
        chance.choice(users)["images"] = [base64.b64encode(chance.randbytes(40)).decode()]
        return body
    if path == "/v1/responses" and chance.random() < 0.5:
        at = chance.randrange(len(body[key]) + 1)
        body[key].insert(at, chance.choice([unknown, *ITEMS]))
        return body
    block = chance.choice([unknown, chance.choice(BLOCKS[path])])
    user = chance.choice(users)
    if isinstance(user["content"], str):
        text_type = "input_text" if key == "input" else "text"
        user["content"] = [{"type": text_type, "text": user["content"]}]
    blocks = user["content"]
    inside = [one["content"] for one in blocks if isinstance(one.get("content"), list)]
    place = chance.choice([blocks, *inside])
    place.insert(chance.randrange(len(place) + 1), block)
    return body


class Asker:
    """One connection, opened again when the server has closed it. `cost` is the server's processor
    time for the last answer, in seconds."""

    def __init__(self, server: Server):
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        self._process = server.process.pid
        self.cost = 0.0

    def __call__(self, path: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        before = processor_seconds(self._process)
        self._connection.request("POST", path, body)
        response = self._connection.getresponse()
        text = response.read()
        self.cost = processor_seconds(self._process) - before
        return response, text


def processor_seconds(process: int) -> float:
    """The processor time that a process has taken, in hundredths of a second."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        shown = subprocess.check_output(["ps", "-o", "time=", "-p", str(process)], text=True)
        minutes, seconds = shown.strip().split(":")[-2:]
        return 60 * int(minutes) + float(seconds)


def texts_to_embed(path: str, body: bytes) -> int:
    """How many texts a body asks the vectors of; each is a prompt of its own."""
    if not path.startswith(("/v1/embed", "/api/embed")):
        return 0
    try:
        texts = json.loads(body)["input"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return len(texts) if isinstance(texts, list) else 1


def is_an_error(path: str, response: http.client.HTTPResponse, text: bytes) -> bool:
    """Whether an answer is an error as the route's dialect writes it."""
    body = json.loads(text)
    match body:
        case {"type": "error", "error": {"type": str(), "message": str()}, "request_id": id}:
            return path.startswith("/v1/messages") and id == response.getheader("request-id")
        case {"error": {"message": str(), "type": str(), "param": _, "code": _}}:
            return path.startswith("/v1/") and "messages" not in path and len(body) == 1
        case {"error": str()}:
            return path.startswith("/api/") and len(body) == 1
    return False


def is_an_end(response: http.client.HTTPResponse, text: bytes) -> bool:
    """Whether an answer is whole: nothing, an object, or a stream that ends as its dialect ends
    one."""
    kind = response.getheader("Content-Type")
    if kind.startswith("application/json"):
        return "error" not in json.loads(text) or json.loads(text)["error"] is None
    if kind.startswith("text/plain"):
        return not text
    last = text.strip().split(b"\n")[-1].removeprefix(b"data: ")
    if last == b"[DONE]":
        return True
    end = json.loads(last)
    return (
        end.get("done") is True
        or end.get("status") == "success"
        or end.get("type") in ("message_stop", "response.completed", "response.incomplete")
    )


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that reads and writes little, and whose hub has nothing."""
    hub = FakeHub({})
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    folder = tmp_path_factory.mktemp("fuzz")
    server = Server(
        "--max-tokens",
        "4",
        "--context",
        "512",
        "--state",
        str(folder / "presets.json"),
        env={"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(folder / "hub"), "no_proxy": "127.0.0.1"},
    )
    yield server
    assert server.stop() == 0
    hub.shutdown()
    hub.server_close()
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.parametrize(
    "dialect, routes", [("anthropic", ANTHROPIC), ("ollama", OLLAMA), ("openai", OPENAI)]
)
def test_no_body_is_the_servers_fault_or_harms_the_next(
    limited: Server, dialect: str, routes: dict[str, list[dict]]
):
    ask = Asker(limited)
    route, [seed, *_] = next(iter(routes.items()))
    sane = route, json.dumps({"model": "demo", "stream": False, **seed}).encode()
    costs, wrong = [], []
    for _ in range(9):
        response, _ = ask(*sane)
        costs.append(ask.cost)
    dear = DEARER * statistics.median(costs) + COMPILING
    for number, (path, body, answered) in enumerate(bodies(dialect, routes)):
        response, text = ask(path, body)
        ok = (
            is_an_end(response, text)
            if response.status == 200
            else is_an_error(path, response, text)
        )
        right = response.status == 200 if answered else response.status < 500
        bound = dear + 2 * statistics.median(costs) * texts_to_embed(path, body)
        if not (ok and right and ask.cost <= bound):
            wrong.append((path, response.status, ask.cost, text[-500:], body[:20000]))
        if number % 10 == 0:
            response, text = ask(*sane)
            if response.status != 200 or not is_an_end(response, text):
                wrong.append((path, response.status, text[-500:], body[:20000]))
    assert not wrong, f"{len(wrong)} of {BODIES}, plain ones cost {costs}: {wrong[:5]}"
