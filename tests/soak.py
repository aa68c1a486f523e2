"""Many clients of all dialects at once, who hang up, come back, send nonsense and change models,
for as long as one likes.

Every answer is compared with what the server said to the same words when nobody else was there.
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
    """What came of it: requests by kind, what was wrong, and the seconds that `GET /api/version`
    took."""

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
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
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
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["input_schema"],
            },
        }
        for tool in TOOLS
    ]
    turns = [{"role": "system", "content": preface}, *turns] if preface else turns
    limits = {"max_tokens": tokens, "temperature": 0}
    if dialect == "ollama":
        limits = {"options": {"num_predict": tokens, "temperature": 0}}
    return {"model": model, "messages": turns, "tools": tools, "stream": stream, **limits}


def read(dialect: str, stream: bool, lines: list[str]) -> str:
    """The text and the calls of an answer. Raises ValueError if it has no proper end."""
    if not stream:
        return _whole(dialect, json.loads("".join(lines)))
    if dialect == "ollama":
        objects = [json.loads(line) for line in lines if line]
        if not objects or not objects[-1].get("done"):
            raise ValueError("no last object")
        text = "".join(o["message"]["content"] for o in objects)
        calls = [c["function"] for o in objects for c in o["message"].get("tool_calls", [])]
        return _said(text, [(c["name"], c["arguments"]) for c in calls])
    data = [line[5:].strip() for line in lines if line.startswith("data:")]
    if dialect == "openai":
        if data[-1:] != ["[DONE]"]:
            raise ValueError("no [DONE]")
        return _openai_stream([json.loads(item) for item in data[:-1]])
    events = [json.loads(item) for item in data]
    if not events or events[-1]["type"] != "message_stop":
        raise ValueError("no message_stop")
    blocks: list[dict] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            blocks[-1]["text"] = blocks[-1].get("text", "") + event["delta"].get("text", "")
            blocks[-1]["json"] += event["delta"].get("partial_json", "")
    return _said(
        "".join(b["text"] for b in blocks if b["type"] == "text"),
        [(b["name"], json.loads(b["json"])) for b in blocks if b["type"] == "tool_use"],
    )


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
        return _said(
            "".join(b["text"] for b in answer["content"] if b["type"] == "text"),
            [(b["name"], b["input"]) for b in answer["content"] if b["type"] == "tool_use"],
        )
    message = answer["message"] if dialect == "ollama" else answer["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return _said(
        message.get("content") or "",
        [
            (c["name"], c["arguments"] if dialect == "ollama" else json.loads(c["arguments"]))
            for c in calls
        ],
    )


def _said(text: str, calls: list[tuple[str, dict]]) -> str:
    return json.dumps([text.strip(), calls], ensure_ascii=False)


class Client:
    """One connection's worth of trouble."""

    def __init__(self, soak: Soak, seed: int):
        self.soak, self.rng = soak, random.Random(seed)

    def run(self) -> None:
        while self.soak.goes_on():
            kind = self.rng.choices(
                ("ask", "hang up", "nonsense", "other model"), self.soak.weights
            )[0]
            try:
                getattr(self, kind.replace(" ", "_"))()
            except Exception as error:  # whatever it is, it is the server's fault
                self.soak.note_wrong(f"{kind}: {type(error).__name__}: {error}")
            self.soak.note_done(kind)

    def send(
        self, path: str, payload: dict
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.soak.port, timeout=self.soak.patience
        )
        connection.request("POST", path, json.dumps(payload).encode())
        return connection, connection.getresponse()

    def pick(self) -> tuple[str, str, str, bool]:
        rng = self.rng
        return (
            rng.choice(list(PATHS)),
            rng.choice(PROMPTS),
            rng.choice(PREFACES),
            rng.random() < 0.7,
        )

    def ask(self) -> None:
        dialect, words, preface, stream = self.pick()
        self.soak.check(dialect, words, preface, stream)

    def hang_up(self) -> None:
        """Leaves in the midst of an answer, and half of the time comes back with the same
        request."""
        dialect, words, preface, _ = self.pick()
        connection, response = self.send(
            PATHS[dialect], body(dialect, "demo", words, preface, True, 80)
        )
        for _ in range(self.rng.randrange(6)):
            response.readline()
        response.close()
        connection.close()
        if self.rng.random() < 0.5:
            self.soak.check(dialect, words, preface, True)

    def nonsense(self) -> None:
        dialect, change, status = self.rng.choice(NONSENSE)
        connection, response = self.send(
            PATHS[dialect], {**body(dialect, "demo", "hi", "", False, 5), **change}
        )
        answer = json.loads(response.read())
        connection.close()
        if response.status != status or "error" not in answer:
            self.soak.note_wrong(f"{dialect} {change} -> {response.status} {answer}")

    def other_model(self) -> None:
        dialect, words, preface, stream = self.pick()
        model = self.rng.choice(self.soak.others)
        connection, response = self.send(
            PATHS[dialect], body(dialect, model, words, preface, stream, 5)
        )
        lines = [line.decode().rstrip("\n") for line in response]
        connection.close()
        if response.status != 200:
            raise ValueError(f"{model} -> {response.status} {lines}")
        read(dialect, stream, lines)


class Soak:
    """`clients` of a server at `port` that has the demo model and `others`, until `seconds` or
    `requests` are through."""

    patience = 240.0  # seconds without a byte after which a request counts as stuck

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
        self.weights = [85 - hang_ups, hang_ups, 10, 5 if others else 0]
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
                    self._expected[dialect, words, preface] = self.answer(
                        dialect, words, preface, False
                    )

    def run(self) -> Report:
        """Lets everybody loose."""
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
            return time.monotonic() < self._until

    def answer(self, dialect: str, words: str, preface: str, stream: bool) -> str:
        connection, response = self._alone.send(
            PATHS[dialect], body(dialect, "demo", words, preface, stream, 80)
        )
        lines = [line.decode().rstrip("\n") for line in response]
        connection.close()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {lines}")
        return read(dialect, stream, lines)

    def check(self, dialect: str, words: str, preface: str, stream: bool) -> None:
        said, right = (
            self.answer(dialect, words, preface, stream),
            self._expected[dialect, words, preface],
        )
        if said != right:
            self.note_wrong(
                f"{dialect} {words!r} behind {len(preface)} characters: {said} instead of {right}"
            )

    def note_wrong(self, what: str) -> None:
        with self._lock:
            self.report.wrong.append(what)

    def note_done(self, kind: str) -> None:
        with self._lock:
            self.report.done[kind] += 1


def figure(url: str, name: str) -> float:
    """A figure of a server's `/metrics`. Raises LookupError if it has none of that name."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=30)
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
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/api/generate", json.dumps(body))
        connection.getresponse().read()
        connection.close()
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while figure(url, "running_requests") or figure(url, "waiting_requests"):
        if time.monotonic() > deadline:
            raise TimeoutError("a request is stuck")
    return figure(url, "memory_bytes")


if __name__ == "__main__":
    probe(int(sys.argv[1]))
