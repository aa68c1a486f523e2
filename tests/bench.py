"""Measures a server as its clients see it, in one table.

    python tests/bench.py [--minutes 10] [--model NAME] [--against URL --against-model NAME] [--plot
    FILE.png]

starts this server with its default model, or asks the one at `--url`. `--against` names a server to
compare it with (Ollama's http://localhost:11434, say); else it is compared with itself and mlx-lm's
`stream_generate`. Both sides are asked in turn, greedily, with the same prompts, none of which they
have seen before; so both models have to fit into memory together. Parts of the table can be named,
to measure nothing else: `loop`, `prefill`, `decode`, `concurrent`, `contended`. Besides, there are

    python tests/bench.py reuse [--trace FILE]   a recorded session again: what of each prompt had
    to be prefilled python tests/bench.py render                 a prompt that has grown: rendering,
    tokenising, look-up, warm as a ratio to cold python tests/bench.py soak                   64
    clients that hang up and come back: what goes wrong, and memory

A trace is `{"requests": [{"body": {...Messages API...}}, ...]}`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import http.client
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from soak import Soak, figure, memory

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
FAILURES = OSError, ValueError, LookupError, http.client.HTTPException  # of other people's servers


# ------------------------------------------------------------------ one request


@dataclass
class Answer:
    """What a request cost: tokens of the prompt and those of them that were read before (None: the
    server does not tell), tokens of the answer, seconds to the first piece of it, from there to the
    last, and those that the server says it read the prompt for; and the content blocks in the
    Messages API's form."""

    prompt: int = 0
    reused: int | None = None
    tokens: int = 0
    first: float = 0.0
    rest: float = 0.0
    reading: float = 0.0
    content: list[dict] = field(default_factory=list)


@dataclass
class Side:
    """A server to measure: its API (a key of `APIS`) and the model's name there; whether it tells
    what of a prompt it had read before; and the context to ask Ollama for, in tokens."""

    name: str
    url: str
    api: str
    model: str
    about: str = ""
    tells: bool = True
    context: int = 0

    def ask(self, body: dict) -> Answer:
        """Sends a Messages API body, streamed, in the server's API. An answer of no visible piece
        counts from its end. Where tokens are not counted, a piece of the answer is one, and four
        characters of the prompt. Raises OSError for an error."""
        path, form, read = APIS[self.api]
        payload = form({"temperature": 0, **body, "model": self.model, "stream": True})
        if self.api == "ollama" and self.context:  # with another one it would load the model anew
            payload["options"]["num_ctx"] = self.context
        answer, pieces, started, seen = Answer(), 0, time.perf_counter(), 0.0
        with request(self.url, path, payload) as response:
            if response.status != 200:
                raise OSError(
                    f"{self.url}{path} answered {response.status}: {response.read(500).decode(errors='replace')}"
                )
            for line in response:
                if not (line := line.removeprefix(b"data:").strip()).startswith(b"{"):
                    continue
                if (event := json.loads(line)).get("error"):
                    raise OSError(f"{self.url}{path} broke off: {event['error']}")
                if read(event, answer):
                    pieces, seen = pieces + 1, time.perf_counter()
                    answer.first = answer.first or seen - started
        answer.first = answer.first or time.perf_counter() - started
        answer.rest = max(0.0, seen - started - answer.first)
        answer.tokens, answer.prompt = (
            answer.tokens or pieces,
            answer.prompt or len(json.dumps(body)) // 4,
        )
        for block in answer.content:
            if block["type"] == "tool_use":
                block["input"], arguments = {}, block.pop("json")
                with contextlib.suppress(ValueError):  # there are none, or they were cut off
                    block["input"] = json.loads(arguments)
        return answer

    def memory(self) -> float:
        """GB that the server says it holds, in Ollama's list of models or our metrics; 0 if it does
        not."""
        with contextlib.suppress(*FAILURES):
            if self.api == "ollama":
                return (
                    sum(one["size"] for one in json.loads(get(self.url, "/api/ps"))["models"]) / 1e9
                )
            return figure(self.url, "memory_bytes") / 1e9
        return 0


@contextlib.contextmanager
def request(url: str, path: str, payload: dict | None = None) -> Iterator[http.client.HTTPResponse]:
    """Sends GET, or POST of a payload."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=3600)
    with contextlib.closing(connection):
        connection.request(
            "POST" if payload else "GET",
            parts.path.rstrip("/") + path,
            json.dumps(payload),
            {
                "Content-Type": "application/json",
                "x-api-key": "bench",
                "anthropic-version": "2023-06-01",
            },
        )
        yield connection.getresponse()


def get(url: str, path: str) -> str:
    """The text that GET brings, empty if the status is not 200."""
    with request(url, path) as response:
        return response.read().decode() if response.status == 200 else ""


def find_out(name: str, url: str, api: str | None, model: str | None) -> Side:
    """The server at a URL, in that of its APIs that tells most, with its only model if none is
    named. Raises SystemExit."""
    sides, failed = [], []
    try:
        listed = {} if model else json.loads(get(url, "/api/tags") or get(url, "/v1/models"))
        models = (
            [model]
            if model
            else [one.get("name") or one["id"] for one in listed.get("models") or listed["data"]]
        )
    except FAILURES as error:
        raise SystemExit(f"bench: {url} cannot be asked: {error}") from None
    if len(models) != 1:
        raise SystemExit(f"bench: name the model of {url}: {', '.join(models)}")
    for one in [api] if api else APIS:
        side = Side(name, url, one, models[0], f"{models[0]}, asked in its API '{one}'")
        try:
            *_, again = (side.ask(say(text("probe", 20), 1)) for _ in range(2))
        except FAILURES as error:
            failed.append(f"{url} cannot be asked: {error}")
        else:
            side.tells = bool(again.reused)
            sides.append(side)
    if not sides:
        raise SystemExit(f"bench: {'; '.join(failed)}")
    return max(sides, key=lambda side: side.tells)


class Generate:
    """mlx-lm's own `stream_generate` in this process, to be asked as a server is, without an
    agent's tools."""

    name, parts = "stream_generate", ("prefill", "decode")

    def __init__(self, path: str):
        from mlx_lm.utils import load_model

        from _mlx_server.inference.renderer import PromptRenderer
        from engine import Library

        self._model, _ = load_model(Path(path))
        self._tokenizer = PromptRenderer(Library([]).resolve(path, trusted=True)).tokenizer

    def ask(self, body: dict) -> Answer:
        from mlx_lm import stream_generate

        started, first = time.perf_counter(), 0.0
        prompt = self._tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        for last in stream_generate(
            self._model,
            self._tokenizer,
            prompt,
            max_tokens=body["max_tokens"],
            prefill_step_size=512,
        ):
            seen = time.perf_counter()
            first = first or seen - started
        return Answer(len(prompt), 0, last.generation_tokens, first, seen - started - first)

    def memory(self) -> float:
        return 0


def read_event(event: dict, answer: Answer) -> bool:
    """Takes up an event of the Messages API; whether it brought a piece of the answer."""
    usage = event.get("message", event).get("usage") or {}
    if "input_tokens" in usage:
        cached = answer.reused = usage.get("cache_read_input_tokens") or 0
        answer.prompt = (
            usage["input_tokens"] + cached + (usage.get("cache_creation_input_tokens") or 0)
        )
    answer.tokens = usage.get("output_tokens", answer.tokens)
    if event["type"] == "content_block_start":
        answer.content.append(
            {
                **event["content_block"],
                **({"json": ""} if event["content_block"]["type"] == "tool_use" else {}),
            }
        )
    elif event["type"] == "content_block_delta":
        for kind in ("text", "thinking", "signature"):
            if kind in event["delta"]:
                answer.content[-1][kind] = answer.content[-1].get(kind, "") + event["delta"][kind]
        if "partial_json" in event["delta"]:
            answer.content[-1]["json"] += event["delta"]["partial_json"]
    return event["type"] == "content_block_delta"


def read_chunk(chunk: dict, answer: Answer) -> bool:
    """The same for a chat completion's chunk."""
    if usage := chunk.get("usage"):
        answer.prompt, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
    if text := delta.get("content"):
        if not answer.content or answer.content[-1]["type"] != "text":
            answer.content.append({"type": "text", "text": ""})
        answer.content[-1]["text"] += text
    for call in delta.get("tool_calls") or []:
        if call.get("id"):
            answer.content.append(
                {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "json": ""}
            )
        answer.content[-1]["json"] += call["function"].get("arguments") or ""
    return bool(
        delta.get("content")
        or delta.get("tool_calls")
        or delta.get("reasoning_content")
        or delta.get("reasoning")
    )


def read_object(event: dict, answer: Answer) -> bool:
    """The same for a line of Ollama's API, whose prompt counts hold what was read before."""
    message = event.get("message") or {}
    if event.get("done"):
        answer.prompt, answer.tokens = event.get("prompt_eval_count", 0), event.get("eval_count", 0)
        answer.reading = event.get("prompt_eval_duration", 0) / 1e9
    calls = [
        {
            **call,
            "id": f"call_{len(answer.content) + n}",
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"]),
            },
        }
        for n, call in enumerate(message.get("tool_calls") or [])
    ]
    delta = {
        "content": message.get("content"),
        "tool_calls": calls,
        "reasoning": message.get("thinking"),
    }
    return read_chunk({"choices": [{"delta": delta}]}, answer)


def as_ollama(body: dict) -> dict:
    """A Messages API body as one of /api/chat."""
    chat = as_chat(body)
    for message in chat["messages"]:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    options = {"num_predict": chat.pop("max_tokens"), "temperature": chat.pop("temperature")}
    return {**chat, "options": options}


def as_chat(body: dict) -> dict:
    """A Messages API body as one of /v1/chat/completions."""
    system = "\n\n".join(b["text"] for b in blocks(body.get("system") or []))
    messages: list[dict] = [{"role": "system", "content": system}] if system else []
    for message in body["messages"]:
        texts, calls = [], []
        for block in blocks(message["content"]):
            if block["type"] == "text":
                texts.append(block["text"])
            elif block["type"] == "tool_use":
                calls.append(
                    {
                        "id": block["id"],
                        "type": "function",
                        "function": {
                            "name": block["name"],
                            "arguments": json.dumps(block["input"]),
                        },
                    }
                )
            elif block["type"] == "tool_result":
                text = "\n".join(b.get("text", "") for b in blocks(block.get("content") or []))
                messages.append(
                    {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}
                )
        if texts or calls:
            role = message["role"] if message["role"] != "system" else "user"
            messages.append(
                {
                    "role": role,
                    "content": "\n\n".join(texts),
                    **({"tool_calls": calls} if calls else {}),
                }
            )
    tools = [
        {
            "type": "function",
            "function": {
                "name": t["name"],
                "description": t.get("description", ""),
                "parameters": t["input_schema"],
            },
        }
        for t in body.get("tools") or []
        if "input_schema" in t
    ]
    return {
        **{
            key: body[key]
            for key in ("model", "max_tokens", "temperature", "stream")
            if key in body
        },
        "messages": messages,
        "stream_options": {"include_usage": True},
        **({"tools": tools} if tools else {}),
    }


APIS: dict[str, tuple[str, Callable[[dict], dict], Callable[[dict, Answer], bool]]] = {
    "ollama": ("/api/chat", as_ollama, read_object),
    "messages": ("/v1/messages", dict, read_event),
    "chat": ("/v1/chat/completions", as_chat, read_chunk),
}


def blocks(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# ------------------------------------------------------------------ recorded and made-up sessions

STORY = "Write a story of 1000 words about the ship {}."  # asks for a long answer


@functools.cache
def source() -> tuple[str, list[tuple[int, int]]]:
    """Real source code, and where its words are: what agents read, and as varied."""
    text = "\n".join(
        path.read_text("utf-8")
        for path in sorted(Path(contextlib.__file__).parent.glob("*.py"))[::4]
    )
    return text, [match.span() for match in re.finditer(r"\S+", text)]


def excerpt(rng: random.Random, count: int) -> str:
    """So many words in a row."""
    text, words = source()
    start = rng.randrange(len(words) - count)
    return text[words[start][0] : words[start + count - 1][1]]


def text(salt: str, words: int) -> str:
    """A text that begins like no other of another salt."""
    return f"{salt}\n{excerpt(random.Random(salt), words)}"


def say(words: str, tokens: int) -> dict:
    return {"max_tokens": tokens, "messages": [{"role": "user", "content": words}]}


def made_up_trace(turns: int = 12, seed: int = 5) -> list[dict]:
    """Requests as an agent sends them: a growing conversation with tools, titles and a sub-agent's
    in between."""
    rng = random.Random(seed)
    library = sorted(Path(contextlib.__file__).parent.glob("*.py"))
    prose = functools.partial(excerpt, rng)

    def tool(name: str) -> dict:
        properties = {
            path.stem: {"type": "string", "description": prose(12)}
            for path in rng.sample(library, 3)
        }
        return {
            "name": name,
            "description": prose(150),
            "input_schema": {"type": "object", "properties": properties},
        }

    tools, system = [tool(name) for name in ("Bash", "Read", "Edit", "Grep", "Task")], prose(1200)
    messages: list[dict] = []
    bodies: list[dict] = []
    for turn in range(turns):
        if turn % 3 == 0:
            text = f"<system-reminder>\n{prose(60)}\n</system-reminder>\n{prose(20)}"
            messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        marked = [
            *messages[:-1],
            {
                **messages[-1],
                "content": [
                    *messages[-1]["content"][:-1],
                    {**messages[-1]["content"][-1], "cache_control": {"type": "ephemeral"}},
                ],
            },
        ]
        bodies.append(
            {"system": [{"type": "text", "text": system}], "tools": tools, "messages": marked}
        )
        if turn % 4 == 1:
            bodies.append(
                {
                    "system": [{"type": "text", "text": "Write a title."}],
                    "messages": [{"role": "user", "content": prose(40)}],
                }
            )
        if turn % 5 == 2:
            bodies.append(
                {
                    "system": [{"type": "text", "text": system[:2000]}],
                    "tools": tools[:3],
                    "messages": [{"role": "user", "content": prose(300)}],
                }
            )
        if turn % 3 == 2:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": prose(30)}]})
        else:
            call = {
                "type": "tool_use",
                "id": f"toolu_{turn:04}",
                "name": "Bash",
                "input": {"command": prose(6)},
            }
            messages.append(
                {"role": "assistant", "content": [{"type": "text", "text": prose(8)}, call]}
            )
            messages.append(
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": call["id"],
                            "content": prose(rng.choice((20, 200, 900))),
                        }
                    ],
                }
            )
    return bodies


def pieces(body: dict) -> list[str]:
    """What a prompt consists of, in order, without what is no part of it: two bodies that begin
    alike share a beginning."""

    def clean(block: Any) -> str:
        return json.dumps(
            {key: value for key, value in block.items() if key != "cache_control"}, sort_keys=True
        )

    system = [
        clean(b)
        for b in blocks(body.get("system") or [])
        if not b["text"].startswith("x-anthropic-billing-header")
    ]
    said = [
        message["role"] + clean(block)
        for message in body["messages"]
        for block in blocks(message["content"])
    ]
    return [clean(tool) for tool in body.get("tools") or []] + system + said


# ------------------------------------------------------------------ what is measured


@dataclass
class Plan:
    """Sizes, the same for both sides: words of a prompt and of a long one, tokens of an answer,
    turns of a session. `salt` makes every prompt new: no two plans have the same."""

    words: int = 100
    long: int = 200
    tokens: int = 16
    turns: int = 4
    salt: str = field(default_factory=lambda: f"{time.time_ns():x}")


def loop(side: Side, plan: Plan, salt: str) -> dict[str, float]:
    """An agent's session in which each turn answers the model's last one. Where a server does not
    tell what it had read before, it is taken to have prefilled in proportion to the time that it
    took, of which the first turn is the measure."""
    fields = {"command": {"type": "string"}, "timeout": {"type": "number"}}
    body = {
        "max_tokens": 96,
        "system": "You are an agent.\n" + text(salt, plan.words),
        "tools": [
            {
                "name": "Bash",
                "description": f"Runs a command. {salt}",
                "input_schema": {"type": "object", "properties": fields, "required": ["command"]},
            }
        ],
    }
    messages: list[dict] = [{"role": "user", "content": "run echo 0"}]
    answers: list[Answer] = []
    new = read = 0
    for turn in range(plan.turns):
        answer = side.ask({**body, "messages": messages})
        if answers:
            share = (answer.reading or answer.first) / (answers[0].reading or answers[0].first)
            read += (
                answer.prompt - (answer.reused or 0)
                if side.tells
                else min(answer.prompt, round(answers[0].prompt * share))
            )
            new += answer.prompt - answers[-1].prompt - answers[-1].tokens
        answers.append(answer)
        calls = [block for block in answer.content if block["type"] == "tool_use"]
        for call in calls:  # agents send inputs back validated: in another order, with defaults
            call["input"] = {"timeout": 120000, **dict(reversed(call["input"].items()))}
        if all(block["type"] == "thinking" for block in answer.content):
            answer.content.append({"type": "text", "text": "(nothing)"})
        results = [
            {"type": "tool_result", "tool_use_id": call["id"], "content": f"line {turn}"}
            for call in calls
        ]
        messages.append({"role": "assistant", "content": answer.content})
        messages.append({"role": "user", "content": results or f"run echo {turn}"})
    return {
        "cold": answers[0].first,
        "warm": statistics.median(a.first for a in answers[1:]),
        "reread": read / max(1, new),
    }


def prefill(side: Side | Generate, plan: Plan, salt: str) -> dict[str, float]:
    answer = side.ask(say(text(salt, plan.words), 1))
    return {"prefill": answer.prompt / answer.first}


def decode(side: Side | Generate, plan: Plan, salt: str) -> dict[str, float]:
    answer = side.ask(say(STORY.format(salt), plan.tokens))
    if answer.tokens < 2 or not answer.rest:
        raise ValueError(f"an answer of {answer.tokens} tokens that came at once has no speed")
    return {"decode": (answer.tokens - 1) / answer.rest}


def concurrent(side: Side, plan: Plan, salt: str) -> dict[str, float]:
    def together(count: int) -> float:
        with ThreadPoolExecutor(count) as pool:
            answers = list(
                pool.map(
                    lambda n: side.ask(say(STORY.format(f"{salt} {count} {n}"), plan.tokens)),
                    range(count),
                )
            )
        return sum(a.tokens for a in answers) / max(a.first + a.rest for a in answers)

    return {"one": together(1), "concurrent": together(8)}


def contended(side: Side, plan: Plan, salt: str) -> dict[str, float]:
    """A short request that comes while a long prompt is read, and what 512 tokens of that take."""
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(side.ask, say(text(salt, plan.long), 2))
        time.sleep(0.1)
        with contextlib.suppress(LookupError):  # others do not tell whether they have begun
            while figure(side.url, "running_requests") == 0 and not long.done():
                time.sleep(0.02)
        if long.done():
            raise ValueError(
                f"a prompt of {long.result().prompt} tokens was read before the short request came"
            )
        short = side.ask(say(text(f"{salt} short", 20), 2))
        return {"contended": short.first, "chunk": 512 * long.result().first / long.result().prompt}


PARTS: dict[str, Callable[[Any, Plan, str], dict[str, float]]] = {
    part.__name__: part for part in (loop, prefill, decode, concurrent, contended)
}


# ------------------------------------------------------------------ the table


# What it is, whether more is better, and with which figure it is compared where there is no other
# server.
Row = namedtuple("Row", "key title unit more reference label", defaults=("", ""))
ROWS = [
    Row("cold", "first token, cold", "s", False),
    Row("warm", "first token, next turn", "s", False, "cold", "cold"),
    Row("reread", "prefilled per new token", "tokens", False),
    Row("prefill", "prefill", "tokens/s", True, label=Generate.name),
    Row("decode", "decode", "tokens/s", True, label=Generate.name),
    Row("concurrent", "8 streams together", "tokens/s", True, "one", "one stream"),
    Row("contended", "first token behind a long prompt", "s", False, "chunk", "512 tokens of it"),
    Row("memory", "peak memory", "GB", False),
]


def progress(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def calibrate(side: Side, other: Side | Generate | None, seconds: float) -> Plan:
    """Loads the models, and finds sizes with which one run of a part takes about so many
    seconds."""
    small = Plan()

    def warm_up(one: Side | Generate) -> Answer:
        progress(f"warming up {one.name}")
        return [one.ask(say(text(f"{small.salt} {n}", small.words), 8)) for n in range(2)][0]

    per_word = warm_up(side).prompt / small.words
    read, write = (
        prefill(side, small, small.salt)["prefill"],
        decode(side, small, small.salt)["decode"],
    )
    prompt = max(100, min(8000, read * seconds / 2))
    long = max(2 * prompt, read)  # it has to take a while
    if isinstance(other, Side):
        other.context = max(8192, int(2 * long))
    if other:
        warm_up(other)
    return Plan(
        int(prompt / per_word),
        int(long / per_word),
        int(max(16, min(256, write * seconds / 2))),
        int(max(3, min(10, write * seconds / 100))),
    )


def measure(
    sides: list[Side | Generate], plan: Plan, parts: list[str], seconds: float, trouble: list[str]
) -> list[dict[str, float]]:
    """Figures of each side: medians of one to five runs of each part, in turn, as many as fit into
    its `seconds`. What failed is added to `trouble`."""
    seen: list[dict[str, list[float]]] = [{} for _ in sides]
    for part in parts:
        able = [side for side in sides if isinstance(side, Side) or part in Generate.parts]
        started = time.perf_counter()
        for run in range(5):
            if run and (time.perf_counter() - started) * (run + 1) / run > seconds:
                break
            for side in able[:]:
                progress(f"{part} of {side.name}, run {run + 1}")
                try:
                    with held(side) as memory:
                        found = PARTS[part](side, plan, f"{plan.salt} {part} {run}")
                except FAILURES as error:
                    trouble.append(f"{part} of {side.name}: {error}")
                    able.remove(side)
                else:
                    for key, value in [*found.items(), ("memory", max(memory))]:
                        seen[sides.index(side)].setdefault(key, []).append(value)
    return [
        {
            key: (max if key == "memory" else statistics.median)(values)
            for key, values in one.items()
        }
        for one in seen
    ]


@contextlib.contextmanager
def held(side: Side | Generate) -> Iterator[list[float]]:
    """The GB that a server holds, looked at four times a second."""
    ended, memory = threading.Event(), [0.0]

    def look() -> None:
        while not ended.wait(0.25):
            memory.append(side.memory())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look)
        try:
            yield memory
        finally:
            ended.set()


def table(args: argparse.Namespace) -> None:
    """Measures the server and what it is compared with; prints and draws what came of it."""
    if args.plot and not find_spec("matplotlib"):
        raise SystemExit("bench: --plot needs matplotlib: pip install -e '.[bench]'")
    parts, trouble, seconds = args.what or list(PARTS), [], args.minutes * 60
    with target(args) as side:
        if args.against:
            other = find_out(
                urlsplit(args.against).netloc, args.against, args.against_api, args.against_model
            )
        else:
            other = None if args.url else Generate(side.model)
        sides = [side, other] if other else [side]
        try:
            plan = calibrate(side, other, seconds / len(parts) / len(sides) / 4)
        except FAILURES as error:
            raise SystemExit(f"bench: warming up failed: {error}") from None
        ours, theirs = (measure(sides, plan, parts, seconds / len(parts), trouble) + [{}])[:2]
    if not args.against:
        theirs |= {row.key: ours[row.reference] for row in ROWS if row.reference in ours}
    name = other.name if args.against else "compared with"
    head = [
        machine(),
        f"{side.name}: {side.about}",
        *([f"{name}: {other.about}"] if args.against else []),
        f"prompts of {plan.words} words, long: {plan.long}, answers of up to {plan.tokens} tokens, {plan.turns} turns",
    ]
    print("\n".join(head) + "\n")
    print(f"  {'':41} {side.name:>12} {name:>26} {'ratio':>8}")
    for row in ROWS:
        one, two = ours.get(row.key), theirs.get(row.key)
        if one is None and two is None and args.what:
            continue
        guess = "≤ " if args.against and row.key == "reread" and not other.tells else ""
        mark = "" if not two else guess if args.against else f"{row.label} "
        print(
            f"{'↑' if row.more else '↓'} {f'{row.title} ({row.unit})':41} {number(one):>12} {mark + number(two):>26} "
            f"{number(one / two) if one and two else '–':>8}"
        )
    print(
        "\n↑ more is better, ↓ less. Medians. Memory is what a server says it holds. ≤ it does not tell: by the time it took."
    )
    print("\n".join(trouble))
    if args.plot:
        draw(args.plot, head, (side.name, name if args.against else ""), ours, theirs)


def number(value: float | None) -> str:
    return f"{value:,.0f}" if value and value >= 100 else f"{value:.3g}" if value else "–"


def machine() -> str:
    """When and on what this was measured."""
    import mlx.core as mx

    from _mlx_server import __version__

    device = mx.device_info()
    memory = device.get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{time.strftime('%Y-%m-%d')}, {device.get('device_name', platform.machine())}, {memory / 2**30:.0f} GB, "
        f"{platform.platform(terse=True)}; "
        f"mlx-server {__version__}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, Python {platform.python_version()}"
    )


def draw(
    path: str,
    head: list[str],
    names: tuple[str, str],
    ours: dict[str, float],
    theirs: dict[str, float],
) -> None:
    """A panel for each line of the table, as PNG."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(14, 7), layout="constrained")
    sheet.suptitle("\n".join(head), fontsize=8)
    sheet.get_layout_engine().set(h_pad=0.2, w_pad=0.2)
    for row, panel in zip(ROWS, sheet.subplots(2, 4).flat):
        bars = panel.bar(
            [0, 1],
            [ours.get(row.key, 0), theirs.get(row.key, 0)],
            0.6,
            color=["#2a6f97", "#b8bcc2"],
        )
        panel.bar_label(bars, [number(ours.get(row.key)), number(theirs.get(row.key))], padding=2)
        panel.set_xticks([0, 1], [names[0], names[1] or row.label])
        panel.set_title(
            f"{row.title}\n{row.unit}, {'more' if row.more else 'less'} is better", fontsize=10
        )
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set(yticks=[], xlim=(-0.6, 1.6))
        panel.margins(y=0.15)
    sheet.savefig(path, format="png", dpi=120)


# ------------------------------------------------------------------ the commands


@contextlib.contextmanager
def target(args: argparse.Namespace, *flags: str) -> Iterator[Side]:
    """The server to measure: the one named, or one of our own for the while. Raises SystemExit if
    there is no such model."""
    if args.url:
        yield find_out("mlx-server", args.url, args.api, args.model)
        return
    from conftest import Server

    from engine import EngineError, Library

    with (
        random_model(args.kind)
        if args.kind
        else contextlib.nullcontext(args.model or "default") as name
    ):
        library = Library([])
        try:
            model = library.resolve(name, trusted=True)
        except EngineError as error:
            raise SystemExit(f"bench: {error}") from None
        if not args.model and model.name == "demo" and len(library.models()) > 1:
            progress(
                f"this measures the built-in model; --model takes {', '.join(one.name for one in library.models())}"
            )
        server = Server(*flags, "--model", str(model.path))
        try:
            yield Side(
                "mlx-server",
                server.url,
                "messages",
                str(model.path),
                f"{model.name} ({model.quantization}, {model.size / 1e9:.1f} GB)",
            )
        finally:
            server.stop()


def reuse(args: argparse.Namespace) -> None:
    bodies = (
        [r["body"] for r in json.loads(Path(args.trace).read_text("utf-8"))["requests"]]
        if args.trace
        else made_up_trace()
    )
    before: list[tuple[list[str], int]] = []
    reusable_sum = reused_sum = 0
    print(
        f"{'#':>3} {'prompt':>8} {'reusable':>8} {'reused':>8} {'prefilled':>9} {'first token':>12}"
    )
    with target(args) as side:
        for number, body in enumerate(bodies, 1):
            answer = side.ask({**body, "max_tokens": args.max_tokens})
            parts, reused = pieces(body), answer.reused or 0
            # A recorded answer is not the one the model gives here: the earlier prompt is what can
            # be reused.
            reusable = max(
                (tokens for earlier, tokens in before if parts[: len(earlier)] == earlier),
                default=0,
            )
            before.append((parts, answer.prompt))
            reusable_sum, reused_sum = reusable_sum + reusable, reused_sum + min(reusable, reused)
            print(
                f"{number:3} {answer.prompt:8} {reusable:8} {reused:8} {answer.prompt - reused:9} {answer.first:10.3f} s"
            )
    print(
        f"reused {reused_sum} of {reusable_sum} reusable tokens: {reused_sum / max(1, reusable_sum):.2%}"
    )


def soak(args: argparse.Namespace) -> None:
    """64 connections and 1,000 requests of all dialects, a fifth of which hang up."""
    with target(args, "--max-queue", "128") as side:
        port = urlsplit(side.url).port
        trouble = Soak(port, 64, [], requests=1000)
        trouble.learn()
        before = memory(port, [])
        started = time.perf_counter()
        report = trouble.run()
        seconds, after = time.perf_counter() - started, memory(port, [])
        print(f"{sum(report.done.values())} requests in {seconds:.0f} s: {dict(report.done)}")
        print(f"{len(report.wrong)} wrong or stuck {report.wrong[:3]}")
        print(
            f"memory, prompt cache emptied: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / before - 1:+.1%})"
        )
        print(
            f"GET /api/version within {report.slowest_version * 1000:.0f} ms (99 of 100), {len(report.version)} times"
        )


@contextlib.contextmanager
def random_model(kind: str) -> Iterator[str]:
    """A model of random weights that has no way to stop early, so large that its arithmetic takes
    the time."""
    from models import CONFIGS, build_model

    config = {
        **CONFIGS[kind],
        "num_hidden_layers": 8,
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "max_position_embeddings": 131072,
        "mlp_only_layers": list(range(8)),
    }
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"] * 2
    with tempfile.TemporaryDirectory() as folder:
        yield str(build_model(kind, Path(folder) / "random", config=config))


def render(args: argparse.Namespace) -> None:
    from _mlx_server.inference.prefix_cache import CacheEntry, PrefixCache
    from _mlx_server.inference.renderer import PromptRenderer
    from engine import Library, Request

    local = Library([]).resolve(args.model, trusted=True)
    requests = []
    for body in made_up_trace(args.turns):
        if len(body.get("tools") or []) == 5:
            chat = as_ollama({**body, "max_tokens": 1, "temperature": 0})
            requests.append(Request(args.model, chat["messages"], tools=chat["tools"]))
    *_, first, second, third = requests[:-5]
    PromptRenderer(local).prompt(first)
    tongue, prefixes = PromptRenderer(local), PrefixCache(lambda: 1 << 40)
    cold, _ = timed(lambda: tongue.prompt(first))
    for request in (second, third):  # turns of other kinds than the first
        prefixes.put(CacheEntry(tongue.prompt(request).tokens, []))
    grown, again = [], []
    for request in requests[-5:]:
        gc.collect()
        for ratios in (grown, again):  # with the turn's new text to tokenise, and without
            seconds, (_, found) = timed(lambda: prefixes.find("", tongue.prompt(request).tokens))
            ratios.append(seconds / cold)
        prefixes.put(CacheEntry(tongue.prompt(request).tokens, []))
        print(
            f"{found} tokens: cold {cold * 1000:.0f} ms, with a new turn {grown[-1]:.3f} of that, once more {again[-1]:.3f}"
        )
    print(f"median ratios {statistics.median(grown):.3f} and {statistics.median(again):.3f}")


def timed(call: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def main(argv: list[str] | None = None) -> None:
    commands = {command.__name__: command for command in (reuse, render, soak)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", help=f"{', '.join([*PARTS, *commands])}; without any, the whole table"
    )
    parser.add_argument(
        "--minutes", type=float, default=10, help="what the table may take (default: %(default)s)"
    )
    parser.add_argument("--url", help="a running server, instead of one that is started")
    parser.add_argument(
        "--model", help="a name that the server knows, or a path (default: the server's)"
    )
    parser.add_argument("--against", metavar="URL", help="a server to compare with")
    parser.add_argument(
        "--against-model", metavar="NAME", help="the model's name there (default: its only one)"
    )
    for option in ("--api", "--against-api"):
        parser.add_argument(
            option, choices=APIS, help="that server's API (default: the one that tells most)"
        )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the table, too")
    parser.add_argument(
        "--trace", metavar="FILE", help="a recorded session; without it one is made up"
    )
    parser.add_argument(
        "--turns", type=int, default=20, help="turns of a made-up session to render"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=8, help="length of the answers to a trace"
    )
    parser.add_argument(
        "--kind",
        choices=("qwen3", "llama_sliding", "hybrid"),
        help="a model of random weights with plain, sliding or recurrent layers",
    )
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(PARTS) - (set(commands) if len(args.what) == 1 else set()):
        parser.error(f"there is no part of the table named {', '.join(unknown)}")
    command = commands.get(args.what[0]) if args.what else None
    if command:
        args.model = args.model or "demo"
    (command or table)(args)


if __name__ == "__main__":
    main()
