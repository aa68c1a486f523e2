"""The server among many clients: what it says when it is full, silent or told to end, and whom it serves first."""

from __future__ import annotations

import http.client
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator

import pytest
from conftest import Server
from models import build_model
from soak import figure

from dialects import AnthropicMessages
from engine import Text, Usage

SLOW = "slow " * 400  # enough words to be busy with for a while


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes its time to read."""
    from models import CONFIGS

    config = {**CONFIGS["qwen2"], "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    return build_model("qwen2", tmp_path_factory.mktemp("slow") / "slow", config=config)


@pytest.fixture
def start(model: Path) -> Iterator:
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(Server("--model", str(model), *flags))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


class Call:
    """A request that has been sent; the answer's status and headers are there."""

    def __init__(self, server: Server, path: str, text: str, *, stream: bool = True, headers: dict | None = None, **fields):
        body = {"model": "slow", "messages": [{"role": "user", "content": text}], "stream": stream, **fields}
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        self.connection.request("POST", path, json.dumps(body), headers or {})
        self.response: http.client.HTTPResponse | None = None

    def wait(self) -> http.client.HTTPResponse:
        self.response = self.response or self.connection.getresponse()
        return self.response

    def lines(self) -> Iterator[str]:
        return (line.decode().strip() for line in self.wait())

    def hang_up(self) -> None:
        if self.response is not None:
            self.response.close()
        self.connection.close()


def messages(server: Server, text: str, max_tokens: int = 4, **more) -> Call:
    return Call(server, "/v1/messages", text, max_tokens=max_tokens, **more)


def chat(server: Server, text: str, **more) -> Call:
    return Call(server, "/api/chat", text, **more)


def get(server: Server, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def until(server: Server, name: str, value: float) -> None:
    deadline = time.monotonic() + 30
    while figure(server.port, name) != value:
        assert time.monotonic() < deadline, f"{name} never was {value}"


# ------------------------------------------------------------------ a full house


def test_a_full_house_is_refused_politely_in_each_dialect_and_hanging_up_makes_room(start):
    server = start("--max-queue", "1")
    running = messages(server, SLOW)
    running.wait()
    until(server, "running_requests", 1)
    waiting = messages(server, SLOW + "too")
    waiting.wait()
    refused = messages(server, "hi").wait()
    assert refused.status == 529 and int(refused.headers["retry-after"]) > 0
    assert json.load(refused)["error"]["type"] == "overloaded_error"
    refused = chat(server, "hi").wait()
    assert refused.status == 503
    assert json.load(refused) == {"error": "server busy, please try again.  maximum pending requests exceeded"}
    waiting.hang_up()
    until(server, "waiting_requests", 0)
    assert messages(server, "hi").wait().status == 200
    assert "event: message_stop" in running.lines()


# ------------------------------------------------------------------ never silent


def test_no_stream_is_ever_silent_for_long(start):
    server = start()
    calls = {"/v1/messages": messages(server, SLOW * 3), "/api/chat": chat(server, SLOW * 2, options={"num_predict": 4})}

    def listen(path: str) -> tuple[float, float, list[str]]:
        calls[path].wait()
        began = last = time.monotonic()
        longest, lines = 0.0, []
        for line in calls[path].lines():
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            lines.append(line)
        return last - began, longest, lines

    with ThreadPoolExecutor() as pool:
        heard = dict(zip(calls, pool.map(listen, calls)))
    for path, (whole, longest, lines) in heard.items():
        beats = [line for line in lines if line == "event: ping" or '"content":""},"done":false' in line]
        assert longest <= 6, path
        assert len(beats) >= whole // 6
    assert "event: message_stop" in heard["/v1/messages"][2]
    assert json.loads(heard["/api/chat"][2][-1])["done"] is True


def test_a_long_lull_is_bridged_by_events_that_every_client_counts():
    reply = AnthropicMessages({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]})

    class Accepted:
        id, prompt_tokens, cached_tokens, usage = "1", 5, 0, Usage(5)

    reply.open(Accepted())
    assert reply.ping(10) == [{"type": "ping"}]
    first = reply.ping(200)
    assert first[0] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    empty = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": ""}}
    assert first[-1] == empty and reply.ping(200) == [empty]
    assert reply.event(Text("hello"))[-1]["delta"]["text"] == "hello"


# ------------------------------------------------------------------ whom it serves first


@pytest.mark.parametrize("flags, headers", [
    ((), {"x-priority": "high"}),
    (("--priority", "anthropic=low"), {}),
    (("--api-key", "agent=low", "--api-key", "bot=high"), {"x-api-key": "bot"}),
])
def test_an_important_client_does_not_wait_for_the_others(start, flags: tuple[str, ...], headers: dict):
    server = start(*flags)
    agents = [messages(server, f"{n} " + SLOW * 3, headers={"x-api-key": "agent"}) for n in range(3)]
    for agent in agents:
        agent.wait()
    bot = chat(server, "slow " * 150, headers=headers, options={"num_predict": 2})
    assert json.loads([*bot.lines()][-1])["done"] is True
    server.wait_for(r"/api/chat slow: prompt")
    assert not any(re.search(r"/v1/messages slow: prompt", line) for line in server.lines)
    for agent in agents:
        agent.hang_up()


def test_a_key_bounds_the_priority_of_its_holder_and_nonsense_is_refused(start):
    server = start("--api-key", "agent=low", "--api-key", "plain")
    assert messages(server, "hi", headers={"x-api-key": "agent", "x-priority": "high"}).wait().status == 200
    refused = messages(server, "hi", headers={"x-api-key": "plain", "x-priority": "urgent"}).wait()
    assert refused.status == 400 and "x-priority" in json.load(refused)["error"]["message"]
    assert messages(server, "hi", headers={"x-api-key": "nobody"}).wait().status == 401


# ------------------------------------------------------------------ watching it, and ending it


def test_metrics_count_what_was_done(start):
    server = start()
    list(messages(server, "hi", max_tokens=3).lines())
    list(chat(server, "hi", options={"num_predict": 2}).lines())
    list(Call(server, "/api/generate", "").lines())  # only loads the model
    assert messages(server, "hi", model="nobody").wait().status == 404
    server.wait_for("nobody")
    assert figure(server.port, 'http_requests_total{dialect="anthropic",status="200"}') == 1
    assert figure(server.port, 'http_requests_total{dialect="anthropic",status="404"}') == 1
    assert figure(server.port, 'generations_total{ending="length"}') == 2
    until(server, 'generations_total{ending="load"}', 1)
    assert figure(server.port, "completion_tokens_total") == 5
    assert 0 < figure(server.port, "cached_tokens_total") < figure(server.port, "prompt_tokens_total")
    assert figure(server.port, "time_to_first_token_seconds_count") == 2
    assert 0 < figure(server.port, "memory_bytes") < figure(server.port, "memory_limit_bytes")
    for line in get(server, "/metrics")[1].splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) mlx_server_\w+ .+|mlx_server_\w+(\{[^{}]*\})? [0-9.e+-]+", line), line


def test_a_server_told_to_end_finishes_what_it_has_begun_and_takes_nothing_new(start):
    server = start("--drain", "60s")
    running = messages(server, SLOW * 2, max_tokens=30)
    running.wait()
    server.process.terminate()
    deadline = time.monotonic() + 30
    while get(server, "/health")[0] != 503:
        assert time.monotonic() < deadline
    assert messages(server, "too late").wait().status == 529
    assert "event: message_stop" in running.lines()
    assert server.process.wait(20) == 0


@pytest.mark.parametrize("signals, flags", [(1, ("--drain", "0")), (2, ("--drain", "1h"))])
def test_what_cannot_be_finished_ends_with_an_error_that_clients_understand(start, signals: int, flags: tuple[str, ...]):
    server = start(*flags)
    running = messages(server, "hi", max_tokens=30000)
    lines = running.lines()
    assert next(line for line in lines if "text_delta" in line)
    if signals == 2:
        server.process.terminate()
        while get(server, "/health")[0] != 503:
            pass
    server.process.terminate()
    assert "overloaded_error" in [*lines][-2]
    assert server.process.wait(20) == 0
