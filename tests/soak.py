"""Many clients of all dialects at once, which hang up, come back, send nonsense and change models.

Every answer is compared with what the server answered to the same prompt when it had no other
client.
"""

from __future__ import annotations

import collections
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PROMPTS = [
    "say hello world",
    "say the quick brown fox",
    "count to 7",
    "count to 12",
    "hello",
    "Привет!",
    "run echo hi",
    "read /etc/hosts",
    "think then say yes",
    "what is love",
    "say 42 is the answer",
    "run ls -l and run pwd",
]
TOOLS = [
    {
        "name": name,
        "description": f"{name}s. " * 20,
        "input_schema": {
            "type": "object",
            "properties": {key: {"type": "string"}},
            "required": [key],
        },
    }
    for name, key in (("Bash", "command"), ("Read", "file_path"), ("Write", "content"))
]
PREFACES = ["", "Be brief. " * 30, "You are an agent. " * 200]
PATIENCE = 240.0  # seconds without a byte after which a request counts as stuck
Reply = tuple[http.client.HTTPConnection, http.client.HTTPResponse]
KINDS = ("ask", "hang up", "nonsense", "other model")
PATHS = {"anthropic": "/v1/messages", "ollama": "/api/chat", "openai": "/v1/chat/completions"}
NONSENSE = [
    ("anthropic", {"max_tokens": "many"}, 400),
    ("anthropic", {"messages": 5}, 400),
    ("ollama", {"messages": "x"}, 400),
    ("openai", {"messages": None}, 400),
    ("ollama", {"model": "nobody:7b"}, 404),
    ("anthropic", {"model": "nobody"}, 404),
]


@dataclass
class Report:
    """Requests by kind, what was wrong, and the seconds that each `GET /api/version` took."""

    done: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    version: list[float] = field(default_factory=list)

    @property
    def slowest_version(self) -> float:
        """Seconds within which 99 of 100 were answered."""
        return statistics.quantiles(self.version, n=100)[98]


class Probe:
    """Asks for `/api/version` 20 times a second, in a process of its own: what it sees is the
    server's delay alone."""

    def __init__(self, port: int):
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> list[float]:
        """Ends it; returns the seconds that each answer took."""
        return [float(line) for line in self._process.communicate("")[0].split()]


def probe(port: int) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
    while not ended.wait(0.05):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        started = time.perf_counter()
        connection.request("GET", "/api/version")
        json.loads(connection.getresponse().read())["version"]
        print(time.perf_counter() - started)
        connection.close()


def body(dialect: str, model: str, words: str, preface: str, stream: bool, tokens: int) -> dict:
    """The same request in each dialect."""
    turns = [{"role": "user", "content": words}]
    if dialect == "anthropic":
        return {
            "model": model,
            "max_tokens": tokens,
            "temperature": 0,
            "system": preface,
            "tools": TOOLS,
            "messages": turns,
            "stream": stream,
        }
    tools = [as_function(tool) for tool in TOOLS]
    turns = [{"role": "system", "content": preface}, *turns] if preface else turns
    limits = {"max_tokens": tokens, "temperature": 0}
    if dialect == "ollama":
        limits = {"options": {"num_predict": tokens, "temperature": 0}}
    return {"model": model, "messages": turns, "tools": tools, "stream": stream, **limits}


def as_function(tool: dict) -> dict:
    """A tool of Anthropic's API in the form of the other two."""
    function = {
        "name": tool["name"],
        "description": tool["description"],
        "parameters": tool["input_schema"],
    }
    return {"type": "function", "function": function}


def read(dialect: str, stream: bool, lines: list[str]) -> str:
    """The text and the calls of an answer. Raises ValueError if it has no proper end."""
    if not stream:
        return _whole(dialect, json.loads("".join(lines)))
    if dialect == "ollama":
        return _ollama_stream([json.loads(line) for line in lines if line])
    data = [line[5:].strip() for line in lines if line.startswith("data:")]
    if dialect == "anthropic":
        return _anthropic_stream([json.loads(item) for item in data])
    if data[-1:] != ["[DONE]"]:
        raise ValueError("no [DONE]")
    return _openai_stream([json.loads(item) for item in data[:-1]])


def _ollama_stream(objects: list[dict]) -> str:
    if not objects or not objects[-1].get("done"):
        raise ValueError("no last object")
    messages = [one["message"] for one in objects]
    calls = [call["function"] for one in messages for call in one.get("tool_calls", [])]
    text = "".join(one["content"] for one in messages)
    return _said(text, [(call["name"], call["arguments"]) for call in calls])


def _anthropic_stream(events: list[dict]) -> str:
    if not events or events[-1]["type"] != "message_stop":
        raise ValueError("no message_stop")
    blocks: list[dict] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            block, delta = blocks[-1], event["delta"]
            block["text"] = block.get("text", "") + delta.get("text", "")
            block["json"] += delta.get("partial_json", "")
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["json"])
    return _said_in(blocks)


def _openai_stream(chunks: list[dict]) -> str:
    text, calls = "", []
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
        text += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            if call.get("id"):
                calls.append([call["function"]["name"], ""])
            calls[-1][1] += call["function"].get("arguments") or ""
    return _said(text, [(name, json.loads(arguments)) for name, arguments in calls])


def _whole(dialect: str, answer: dict) -> str:
    if dialect == "anthropic":
        return _said_in(answer["content"])
    message = answer["message"] if dialect == "ollama" else answer["choices"][0]["message"]
    calls = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        if dialect == "openai":
            arguments = json.loads(arguments)
        calls.append((call["function"]["name"], arguments))
    return _said(message.get("content") or "", calls)


def _said_in(blocks: list[dict]) -> str:
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    calls = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    return _said(text, calls)


def _said(text: str, calls: list[tuple[str, dict]]) -> str:
    return json.dumps([text.strip(), calls], ensure_ascii=False)


class Client:
    """Sends one request after the other, each of a kind chosen at random."""

    def __init__(self, soak: Soak, seed: int):
        self.soak, self.rng = soak, random.Random(seed)

    def run(self) -> None:
        while self.soak.goes_on():
            kind = self.rng.choices(KINDS, self.soak.weights)[0]
            try:
                getattr(self, kind.replace(" ", "_"))()
            except Exception as error:  # whatever it is, it is the server's fault
                self.soak.note_wrong(f"{kind}: {type(error).__name__}: {error}")
            self.soak.note_done(kind)

    def send(self, dialect: str, payload: dict) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.soak.port, timeout=PATIENCE)
        connection.request("POST", PATHS[dialect], json.dumps(payload).encode())
        return connection, connection.getresponse()

    def pick(self) -> tuple[str, str, str, bool]:
        """A dialect, a prompt, a preface, and whether to stream."""
        choice = self.rng.choice
        picked = choice(list(PATHS)), choice(PROMPTS), choice(PREFACES)
        return (*picked, self.rng.random() < 0.7)

    def ask(self) -> None:
        dialect, words, preface, stream = self.pick()
        self.soak.check(dialect, words, preface, stream)

    def hang_up(self) -> None:
        """Leaves in the midst of an answer, and half of the time comes back with the same
        request."""
        dialect, words, preface, _ = self.pick()
        connection, response = self.send(dialect, body(dialect, "demo", words, preface, True, 80))
        for _ in range(self.rng.randrange(6)):
            response.readline()
        response.close()
        connection.close()
        if self.rng.random() < 0.5:
            self.soak.check(dialect, words, preface, True)

    def nonsense(self) -> None:
        dialect, change, status = self.rng.choice(NONSENSE)
        payload = {**body(dialect, "demo", "hi", "", False, 5), **change}
        connection, response = self.send(dialect, payload)
        answer = json.loads(response.read())
        connection.close()
        if response.status != status or "error" not in answer:
            self.soak.note_wrong(f"{dialect} {change} -> {response.status} {answer}")

    def other_model(self) -> None:
        dialect, words, preface, stream = self.pick()
        model = self.rng.choice(self.soak.others)
        connection, response = self.send(dialect, body(dialect, model, words, preface, stream, 5))
        lines = [line.decode().rstrip("\n") for line in response]
        connection.close()
        if response.status != 200:
            raise ValueError(f"{model} -> {response.status} {lines}")
        read(dialect, stream, lines)


class Soak:
    """`clients` of a server at `port` that has the demo model and `others`, until `requests` are
    through, or `seconds` and at least one request of each kind."""

    def __init__(
        self,
        port: int,
        clients: int,
        others: list[str],
        *,
        seconds: float | None = None,
        requests: int | None = None,
        hang_ups: int = 20,
    ):
        self.port, self.clients, self.others = port, clients, others
        self.weights = [85 - hang_ups, hang_ups, 10, 5 if others else 0]  # in the order of `KINDS`
        self.report = Report()
        self._until, self._left, self._seconds = 0.0, requests, seconds
        self._lock = threading.Lock()
        self._alone = Client(self, 0)
        self._expected: dict[tuple[str, str, str], str] = {}

    def learn(self) -> None:
        """Asks for the right answers, one after the other."""
        for dialect in PATHS:
            for words in PROMPTS:
                for preface in PREFACES:
                    answer = self.answer(dialect, words, preface, False)
                    self._expected[dialect, words, preface] = answer

    def run(self) -> Report:
        """Starts all clients and waits for their end."""
        self._until = time.monotonic() + (self._seconds or 0)
        threads = [threading.Thread(target=Client(self, seed).run) for seed in range(self.clients)]
        probe = Probe(self.port)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.report.version = probe.stop()
        return self.report

    def goes_on(self) -> bool:
        with self._lock:
            if self._left is not None:
                self._left -= 1
                return self._left >= 0
            wanted = {kind for kind, weight in zip(KINDS, self.weights, strict=True) if weight}
            return time.monotonic() < self._until or not wanted <= {*self.report.done}

    def answer(self, dialect: str, words: str, preface: str, stream: bool) -> str:
        connection, response = self._alone.send(
            dialect, body(dialect, "demo", words, preface, stream, 80)
        )
        lines = [line.decode().rstrip("\n") for line in response]
        connection.close()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {lines}")
        return read(dialect, stream, lines)

    def check(self, dialect: str, words: str, preface: str, stream: bool) -> None:
        said = self.answer(dialect, words, preface, stream)
        right = self._expected[dialect, words, preface]
        if said != right:
            where = f"{dialect} {words!r} behind {len(preface)} characters"
            self.note_wrong(f"{where}: {said} instead of {right}")

    def note_wrong(self, what: str) -> None:
        with self._lock:
            self.report.wrong.append(what)

    def note_done(self, kind: str) -> None:
        with self._lock:
            self.report.done[kind] += 1


def figure(url: str, name: str) -> float:
    """A figure of a server's `/metrics`. Raises LookupError if it has none of that name."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=PATIENCE)
    connection.request("GET", f"{address.path.rstrip('/')}/metrics")
    text = connection.getresponse().read().decode(errors="replace")
    connection.close()
    found = re.search(rf"^mlx_server_{re.escape(name)} (\S+)$", text, re.M)
    if not found:
        raise LookupError(f"{url}/metrics has no {name}")
    return float(found[1])


def memory(port: int, others: list[str]) -> float:
    """What MLX holds, in bytes, once nothing runs any more and all models were unloaded and the
    demo loaded again."""
    for body in [
        *({"model": model, "keep_alive": 0} for model in [*others, "demo"]),
        {"model": "demo", "keep_alive": -1},
    ]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("POST", "/api/generate", json.dumps(body))
        connection.getresponse().read()
        connection.close()
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    while figure(url, "running_requests") or figure(url, "waiting_requests"):
        if time.monotonic() > deadline:
            raise TimeoutError("a request is stuck")
        time.sleep(0.05)
    return figure(url, "memory_bytes")


if __name__ == "__main__":
    probe(int(sys.argv[1]))
