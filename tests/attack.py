"""A client with a key for low priority that does nothing but harm, and what one with a key for high
priority notices of it.

    python tests/attack.py [SECONDS] [--only ROW,ROW]

starts a server with both keys, asks for first tokens alone and then for SECONDS under attack, and
prints both, and the memory. It ends with status 1 if a promise is broken: the first token comes
within twice the time that it takes alone and one chunk, and the memory is back afterwards but for
SLACK. It is compared with that of a server to which no attacker has come, once it has loaded the
modules and tables that such requests need: a few harmless ones with the same fields see to that.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 240.0  # seconds after which a request counts as stuck
THREADS = 4  # that send the same attack
SETTLED = 60.0  # seconds within which the memory has to be back
# Bytes more than before that may be held then beside the prompt cache. Python gives a megabyte back
# once no object is left in it: most of what was in use at the most stays, 40 MB, around what is
# remembered of the high client's conversations; and that itself, and what lies between their arrays
SLACK = 128 << 20
KEYS = {"low": "attack-low", "high": "attack-high"}
HI = [{"role": "user", "content": "say hi"}]
CHAT = {"model": "demo", "messages": HI, "stream": False, "options": {"num_predict": 4}}
MESSAGES = {"model": "demo", "max_tokens": 4, "messages": HI}


def doubling(levels: int = 40) -> dict:
    """A schema of which each level names the next one twice."""
    names = [f"#/$defs/d{n}" for n in range(levels + 1)]
    definitions = {
        f"d{n}": {"allOf": [{"$ref": names[n + 1]}, {"$ref": names[n + 1]}]} for n in range(levels)
    }
    return {"$ref": names[0], "$defs": {**definitions, f"d{levels}": {"type": "object"}}}


def durations(n: int) -> tuple[str, dict]:
    return "/api/chat", {**CHAT, "keep_alive": "1" * (1000 + 4000 * (n % 2)) + "x"}


def definitions(n: int) -> tuple[str, dict]:
    if n % 2:
        return "/api/chat", {**CHAT, "format": doubling()}
    tool = {"name": "Bash", "description": "", "input_schema": doubling()}
    turns = [{"role": "user", "content": "run ls"}]
    return "/v1/messages", {**MESSAGES, "messages": turns, "tools": [tool], "max_tokens": 30}


def loops(n: int) -> tuple[str, dict]:
    """A model that repeats itself within a call, as far as the demo can be made to."""
    pumped = random.choice([" ", "\n", "to=", '{"', "<tool_call>"]) * 200
    turns = [{"role": "user", "content": f"run {pumped}"}]
    tool = {"name": "Bash", "description": "", "input_schema": {"type": "object"}}
    answer = {"tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 200}
    return "/v1/messages", {**MESSAGES, **answer, "messages": turns}


def large(n: int) -> tuple[str, dict]:
    """Prompts that are refused once they are read, names, and values that take more than their
    text."""
    text = f"{n} {random.random()} " + "lorem ipsum " * 180_000
    if n % 3 == 0:
        return "/api/chat", {**CHAT, "messages": [{"role": "user", "content": text}]}
    if n % 3 == 1:
        return "/api/show", {"model": f"a{n}" + "b" * (16 << 20)}
    return "/api/chat", {**CHAT, "ignored": [0] * (4 << 20)}


def packed(n: int) -> tuple[str, bytes]:
    """A body that unpacks to a thousand times its size."""
    return "/api/chat", gzip.compress(b'{"model": "demo", "a": [' + b"[]," * (10 << 20) + b"1]}")


def patterns(n: int) -> tuple[str, dict]:
    every = [{"pattern": f"(.*a.{{{20 + number}}}.*)"} for number in range(20)]
    schema = {"type": "object", "properties": {"a": {"type": "string", "allOf": every}}}
    return "/api/chat", {**CHAT, "format": schema}


def many(n: int) -> tuple[str, dict]:
    """Thousands of calls and results, and of stop strings."""
    if n % 2:
        return "/api/chat", {**CHAT, "options": {"stop": [f"s{k}" for k in range(200_000)]}}
    turns: list[dict] = [*HI]
    for k in range(8000):
        function = {"name": "Bash", "arguments": "{}"}
        call = {"id": f"c{n}_{k}", "type": "function", "function": function}
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        turns.append({"role": "tool", "tool_call_id": f"c{n}_{k}", "content": "x"})
    return "/v1/chat/completions", {"model": "demo", "max_tokens": 4, "messages": turns}


ATTACKS: dict[str, Callable[[int], tuple[str, dict | bytes]]] = {
    "1": durations,
    "2": definitions,
    "5": loops,
    "9": large,
    "9z": packed,
    "10": patterns,
    "14": many,
}


def encoded(body: dict | bytes) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def post(port: int, path: str, body: bytes) -> None:
    """Sends a body, and reads the answer."""
    headers = {"x-api-key": KEYS["low"]}
    if body.startswith(b"\x1f\x8b"):
        headers["Content-Encoding"] = "gzip"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", path, body, headers)
        connection.getresponse().read()


def load(port: int) -> None:
    """Lets a server load what it needs for requests like the attacks, but for their size."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}}
    tool = {"name": "Bash", "input_schema": schema}
    answer = {"tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 20}
    post(port, "/api/chat", encoded({**CHAT, "format": schema}))
    post(port, "/v1/messages", encoded({**MESSAGES, **answer}))
    post(port, "/api/chat", gzip.compress(encoded(CHAT)))


def send(port: int, make: Callable[[int], tuple[str, dict | bytes]], start: int) -> None:
    """Sends one attack after the other, for ever. Bodies are made once: to make them anew would
    slow the attacker."""
    made = [(path, encoded(body)) for path, body in map(make, range(start, start + 6))]
    for path, body in itertools.cycle(made):
        with contextlib.suppress(OSError, http.client.HTTPException):
            post(port, path, body)


def sit(port: int) -> None:
    """Holds silent connections (row 8), and sends long paths and large heads, for ever."""
    silent: list[socket.socket] = []
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            silent.append(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
            silent[-1].sendall(random.choice([b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n"]))
            if len(silent) > 550:
                silent.pop(0).close()
            if len(silent) % 20 == 0:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                with contextlib.closing(connection):
                    connection.request("GET", "/" + "a" * 30_000)
                    connection.getresponse().read()
        time.sleep(0.01)


def attack(port: int, rows: list[str]) -> None:
    """All attacks at once, until the process is ended. The attackers' own work is not to slow the
    server, as it would not on another machine."""
    os.nice(19)
    if "8" in rows:
        threading.Thread(target=sit, args=(port,), daemon=True).start()
    for row, start in itertools.product(rows, range(THREADS)):
        if row != "8":
            arguments = port, ATTACKS[row], start
            threading.Thread(target=send, args=arguments, daemon=True).start()
    threading.Event().wait()


def first_token(port: int, words: str) -> float:
    """Seconds until a client with the high key gets a stream's first piece of text."""
    turns = [{"role": "user", "content": f"{words} say yes"}]
    body = {"model": "demo", "max_tokens": 3, "stream": True, "messages": turns}
    body["thinking"] = {"type": "disabled"}  # which random words may begin
    headers = {"x-api-key": KEYS["high"]}
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/messages", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read()!r}")
        lines = []
        for line in answer:
            if line.startswith(b"data:") and b"content_block_delta" in line:
                return time.monotonic() - began
            lines.append(line)
    raise RuntimeError(f"an answer without text: {lines}")


def figure(port: int, name: str) -> int:
    """The sum of a figure of a server's `/metrics`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"x-api-key": KEYS["high"]})
        text = connection.getresponse().read().decode()
    return sum(int(n) for n in re.findall(rf"^mlx_server_{name}(?:{{.*}})? (\d+)$", text, re.M))


def answered(port: int) -> int:
    """Requests that a server has answered so far."""
    return figure(port, "http_requests_total")


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    out = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(out.stdout) * 1024


@dataclass
class Report:
    """Seconds to the first tokens that the high client got, alone and under attack; bytes that the
    server held beside the prompt cache at the start, with all loaded and after the attacks."""

    alone: list[float]
    attacked: list[float]
    start: int
    before: int
    after: int
    chunk: float  # seconds that one chunk of a prompt takes
    attacks: int  # requests of the attackers that were answered meanwhile

    @property
    def bound(self) -> float:
        return 2 * statistics.median(self.alone) + self.chunk

    @property
    def kept(self) -> bool:
        in_time = statistics.median(self.attacked) <= self.bound
        return in_time and self.after <= self.before + SLACK

    def __str__(self) -> str:
        return (
            f"first token alone {_spread(self.alone)}, under attack {_spread(self.attacked)}; "
            f"one chunk {self.chunk * 1000:.0f} ms, so at most {self.bound * 1000:.0f} ms; "
            f"{self.attacks} attacks answered; memory beside the prompt cache "
            f"{self.start >> 20} MB at the start, {self.before >> 20} MB with all loaded, "
            f"{self.after >> 20} MB afterwards"
        )


def _spread(times: list[float]) -> str:
    """What most of some times are, and the longest of them."""
    ordered = sorted(times)
    most = ordered[min(len(times) - 1, len(times) * 19 // 20)]
    return (
        f"{statistics.median(times) * 1000:.0f} ms (19 of 20 within {most * 1000:.0f} ms, "
        f"at most {ordered[-1] * 1000:.0f} ms, {len(times)} requests)"
    )


@contextlib.contextmanager
def attackers(port: int, rows: list[str]) -> Iterator[None]:
    """Within it a process attacks."""
    command = [sys.executable, __file__, "--attack", str(port), "--only", ",".join(rows)]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(port: int, pid: int, seconds: float, rows: list[str]) -> Report:
    """Attacks a server that has the demo model, which runs as `pid`, for so long."""
    count = itertools.count()

    def ask(length: int = 5) -> float:
        return first_token(port, " ".join(f"w{random.randrange(10**6)}" for _ in range(length)))

    def settled(most: int = 0) -> int:
        """The bytes held beside the prompt cache, once nothing is in work and they are at most
        `most`, or have not come to be."""
        until = time.monotonic() + SETTLED
        while True:
            ask()
            time.sleep(2)  # an idle server gives memory back after a second
            at_work = figure(port, "running_requests") + figure(port, "waiting_requests")
            held = resident(pid) - figure(port, "prefix_cache_bytes")
            if time.monotonic() > until or not at_work and held <= (most or held):
                return held

    for _ in range(5):
        ask()
    start = settled()
    load(port)
    before = settled()
    alone = [ask() for _ in range(30)]
    # 60 such words are about a chunk, 512 tokens
    chunk = statistics.median(ask(65) for _ in range(5)) - statistics.median(alone)
    attacked: list[float] = []
    earlier = answered(port)
    with attackers(port, rows):
        until = time.monotonic() + seconds
        while time.monotonic() < until or next(count) < 5:
            attacked.append(ask())
            time.sleep(0.2)
    attacks = answered(port) - earlier - len(attacked)
    after = settled(before + SLACK)
    return Report(alone, attacked, start, before, after, max(0.0, chunk), attacks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=60)
    parser.add_argument("--only", default=",".join([*ATTACKS, "8"]))
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = args.only.split(",")
    if args.attack:
        attack(args.attack, rows)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report, status = besiege(Path(folder) / "keys", args.seconds, rows)
    print(report, f"; status {status}", sep="")
    return int(not report.kept or status != 0)


def besiege(keys: Path, seconds: float, rows: list[str]) -> tuple[Report, int]:
    """Measures a server of its own, whose keys are in a file; returns its exit status, too."""
    from conftest import Server  # which takes seconds, and the attackers have no use for it

    keys.write_text("".join(f"{key}={name}\n" for name, key in KEYS.items()))
    keys.chmod(0o600)
    server = Server("--model", "demo", "--api-key-file", str(keys), "--prompt-cache", "64MB")
    try:
        report = measure(server.port, server.process.pid, seconds, rows)
    finally:
        status = server.stop()
    return report, status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
