"""What the holder of a key learns of the requests of others: nothing."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PATIENCE, until
from phases import Phases
from test_content import document, pdf
from test_http import ask, post
from test_limits import HI, KEYS, call

import dialects
import mlx_server
from _mlx_server.front.http import HTTPHandler
from _mlx_server.front.sockets import ClientDisconnected, is_readable
from _mlx_server.front.turns import FILES, Turn, Turns
from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.cache.prefix_cache import CacheEntry
from _mlx_server.inference.generation import Generation
from _mlx_server.inference.pool import ModelPool
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import EngineBusy, Priority
from _mlx_server.inference.sequence import State
from _mlx_server.wire import documents
from engine import Engine, Request, Sampling

FILLER = " ".join(f"word{n}" for n in range(40))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine("demo", state=tmp_path_factory.mktemp("state") / "presets.json") as engine:
        yield engine


def prompt(words: str) -> list[dict]:
    return [{"role": "user", "content": f"{FILLER} {words}"}]


def reused(server: mlx_server.MLXServer, key: str, words: str, stream: bool) -> tuple[int, str]:
    """What an answer to a prompt says of reuse, and the whole header that does."""
    body = {"model": "demo", "max_tokens": 2, "stream": stream, "messages": prompt(words)}
    response, text = call(server, key, "/v1/messages", body)
    header = response.headers["x-prompt-cache"]
    counts = {int(n) for n in re.findall(r'"cache_read_input_tokens": ?(\d+)', text)}
    counts.add(int(header.partition("reused=")[2].partition(";")[0]))
    assert response.status == 200 and len(counts) == 1
    return counts.pop(), header


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_what_was_read_for_a_key_is_reused_for_that_key_alone(
    engine: Engine,
    serve: Callable,
    stream: bool,
):
    keys = {f"{key}-{stream}": priority for key, priority in KEYS.items()}
    server, secret = serve(engine, api_keys=keys), f"the code is 471{stream}"
    for key in keys:
        count, header = reused(server, key, secret, stream)
        assert count == 0 and "parts" not in header
    for key in keys:
        assert reused(server, key, secret, stream)[0] > 100
        assert "parts-at=" in reused(server, key, f"the code is 47{stream}", stream)[1]


@pytest.mark.slow
def test_a_flood_of_less_important_prompts_pushes_nothing_important_out():
    def read(first: int, priority: Priority) -> int:
        tokens = [first, *range(10, 130)]  # prompts that share no beginning
        answer = engine.submit(Request("demo", prompt=tokens, priority=priority, max_tokens=1))
        list(answer)
        return answer.usage.cached_tokens

    with Engine("demo") as engine:
        read(300, Priority.HIGH)
        size = engine.stats().prefix_cache_bytes
    with Engine("demo", cache_limit=int(size * 3.5)) as engine:
        read(300, Priority.HIGH)
        for number in range(301, 309):
            read(number, Priority.LOW)
        assert read(300, Priority.HIGH) > 100


@pytest.mark.slow
def test_such_a_flood_pushes_nothing_important_out_on_disk_either(tmp_path: Path):
    def read(first: int, priority: Priority) -> int:
        tokens = [first, *range(10, 130)]
        with Engine("demo", cache_dir=tmp_path, cache_dir_limit=limit) as engine:
            answer = engine.submit(Request("demo", prompt=tokens, priority=priority, max_tokens=1))
            list(answer)
        return answer.usage.cached_tokens

    limit = 1 << 30
    read(300, Priority.HIGH)
    limit = int(3.5 * sum(path.stat().st_size for path in tmp_path.iterdir()))
    for number in range(301, 306):
        read(number, Priority.LOW)
    assert read(300, Priority.HIGH) > 100
    assert read(301, Priority.LOW) == 0


def test_a_single_key_and_none_have_one_cache(engine: Engine, serve: Callable):
    single = serve(engine, api_keys={"one": Priority.NORMAL})
    assert reused(serve(engine), "", "first", False)[0] == 0
    assert reused(single, "one", "first", False)[0] > 100


def test_nothing_is_copied_from_a_running_request_of_another(engine: Engine):
    running = engine.chat(prompt("say running"), owner="a", max_tokens=2000)
    next(event for event in running if type(event).__name__ == "Text")
    try:
        counts = []
        for owner in ("b", "a"):
            one = engine.chat(prompt("say running"), owner=owner, max_tokens=1)
            list(one)
            counts.append(one.usage.cached_tokens)
        assert counts[0] == 0 and counts[1] > 100
    finally:
        running.cancel()


@pytest.mark.slow
def test_the_cache_on_disk_keeps_keys_apart_over_a_restart(tmp_path: Path):
    def ask_all(*owners: str) -> list[tuple[int, int]]:
        counts = []
        with Engine("demo", cache_dir=tmp_path) as engine:
            for owner in owners:
                one = engine.chat(prompt("say kept"), owner=owner, max_tokens=4)
                list(one)
                counts.append((one.cached_tokens, one.usage.cached_tokens))
        return counts

    assert ask_all("a") == [(0, 0)]
    (first, _), (none, nothing), (again, _) = ask_all("a", "b", "")
    assert first > 100 and (none, nothing, again) == (0, 0, 0)
    assert not [path for path in tmp_path.iterdir() if b'"a"' in path.read_bytes()[:4096]]


def test_what_was_generated_for_a_key_is_remembered_for_that_key_alone(engine: Engine):
    answer = engine.chat(prompt("say one two"), owner="a", max_tokens=20)
    text = "".join(answer.text())
    turns = [*prompt("say one two"), {"role": "assistant", "content": text}, *HI]
    renderer = engine.renderer(engine.resolve("demo"))
    known = {o: renderer.prompt(Request("demo", turns, owner=o)).known for o in ("a", "b")}
    assert known["a"] > 100 and known["b"] == 0


@pytest.mark.slow
def test_what_a_key_has_used_last_decides_nothing_for_another(folder: Path):
    with Engine(models_dirs=[folder]) as engine:
        for owner, model in (("a", "qwen3"), ("b", "qwen2"), ("a", "qwen3")):
            list(engine.chat("hi", model=model, owner=owner, max_tokens=1))
        assert engine.resolve("claude-sonnet-4-5", "a").name == "qwen3"
        assert engine.resolve("claude-sonnet-4-5", "b").name == "qwen2"


def test_a_low_key_does_not_see_what_a_name_adds_to_a_conversation(
    engine: Engine,
    serve: Callable,
):
    server = serve(engine, api_keys=KEYS)
    turns = [*prompt("hidden turn"), {"role": "assistant", "content": "hidden answer"}]
    made = {"model": "made", "from": "demo", "system": "hidden system", "messages": turns}
    assert call(server, "boss", "/api/create", made)[0].status == 200
    for key, sees in (("boss", True), ("agent", True), ("guest", False)):
        response, text = call(server, key, "/api/show", {"model": "made"})
        assert response.status == 200 and json.loads(text)["details"]
        for hidden in ("hidden system", "hidden turn", "hidden answer"):
            assert (hidden in text) is sees, (key, hidden)


def test_keys_have_names_that_do_not_tell_them(serve: Callable):
    server = serve(api_keys=KEYS)
    names = set(server.owners.values())
    assert len(names) == len(KEYS) and not [k for k in KEYS for name in names if k in name]
    assert server.owners == serve(api_keys=KEYS).owners  # or a restart would lose the cache
    assert serve(api_keys={"one": Priority.HIGH}).owners == {}
    assert ask(server, "GET", "/api/tags")[0].status == 401


# ------------------------------------------------------------------ turns


def gone() -> bool:
    return True


def test_a_less_important_request_waits_for_its_turn_and_others_do_not():
    turns = Turns()
    with turns.take(Priority.LOW, gone):
        with pytest.raises(ClientDisconnected), turns.take(Priority.LOW, gone):
            pass
        for priority in (Priority.NORMAL, Priority.HIGH):
            with turns.take(priority, gone):
                pass
    with turns.take(Priority.LOW, gone):
        pass


def test_a_turn_that_is_given_away_is_neither_lost_nor_held_twice():
    turns = Turns()
    for error in (ClientDisconnected, TimeoutError, EngineBusy):
        with pytest.raises(error), turns.take(Priority.LOW, gone) as turn, turn.paused():
            raise error
    with (
        contextlib.ExitStack() as other,
        pytest.raises(ClientDisconnected),
        turns.take(Priority.LOW, gone) as turn,
        turn.paused(),
    ):
        other.enter_context(turns.take(Priority.LOW, gone))
    with turns.take(Priority.LOW, gone) as turn:
        with turn.paused(), turns.take(Priority.LOW, gone):
            pass
        with pytest.raises(ClientDisconnected), turns.take(Priority.LOW, gone):
            pass


def test_who_waits_for_a_turn_does_not_hold_all_connections(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("_mlx_server.front.turns.MAX_WAITING", 0)
    turns = Turns()
    with pytest.raises(EngineBusy), turns.take(Priority.LOW, gone):
        pass


def test_a_client_whose_connection_fails_while_it_waits_leaves_its_place():
    def fails() -> bool:
        raise ConnectionResetError

    turns = Turns()
    with (
        turns.take(Priority.LOW, gone),
        pytest.raises(ConnectionResetError),
        turns.take(Priority.LOW, fails),
    ):
        pass
    with turns.take(Priority.LOW, gone):
        pass


class Queue:
    """Requests of clients that wait for a turn, in threads. `order` are those that have had it."""

    def __init__(self, turns: Turns, pool: ThreadPoolExecutor):
        self.order: list[str] = []
        self._turns, self._pool = turns, pool

    def wait(self, client: str, most: float = math.inf) -> Future:
        """Begins to wait, and returns once it does."""
        entered = threading.Event()

        def is_gone() -> bool:  # asked of who waits
            entered.set()
            return False

        def take() -> None:
            with self._turns.take(Priority.LOW, is_gone, most, client):
                self.order.append(client)

        future = self._pool.submit(take)
        until(lambda: entered.is_set() or future.done())
        return future


def test_turns_go_round_among_clients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("_mlx_server.front.turns.POLL", 0.001)
    with ThreadPoolExecutor(16) as pool:
        queue = Queue(turns := Turns(), pool)
        with turns.take(Priority.LOW, gone, client="many"):
            for client in ["many"] * 5 + ["few", "many", "few", "one"]:
                queue.wait(client)
    assert "".join(client[0] for client in queue.order) == "fomfmmmmm"


def test_a_client_that_waits_with_many_requests_lets_others_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("_mlx_server.front.turns.POLL", 0.001)
    with ThreadPoolExecutor(16) as pool:
        queue = Queue(turns := Turns(), pool)
        with turns.take(Priority.LOW, gone):
            for _ in range(4):
                queue.wait("many", most=4)
            with pytest.raises(EngineBusy):
                queue.wait("many", most=4).result()
            for _ in range(2):
                queue.wait("few", most=4)
            with pytest.raises(EngineBusy):
                queue.wait("few", most=4).result()
    assert sorted(queue.order) == ["few"] * 2 + ["many"] * 4


@pytest.mark.parametrize("path", ["/api/chat", "/api/embed", "/v1/messages/count_tokens"])
def test_nothing_that_costs_time_is_done_for_a_low_key_before_its_turn(
    engine: Engine, serve: Callable, path: str
):
    server = serve(engine, api_keys=KEYS)
    body = {"model": "demo", "messages": HI, "input": "hi", "options": {"num_predict": 1}}
    with ThreadPoolExecutor() as pool, server.turns.take(Priority.LOW, gone):
        waits = pool.submit(call, server, "guest", path, body)
        assert call(server, "boss", path, body)[0].status == 200
        assert not waits.done()
    assert waits.result()[0].status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/demo", "/api/tags", "/api/ps"])
def test_nor_are_models_looked_for(engine: Engine, serve: Callable, path: str):
    server = serve(engine, api_keys=KEYS)
    with ThreadPoolExecutor() as pool, server.turns.take(Priority.LOW, gone):
        waits = pool.submit(call, server, "guest", path, None, "GET")
        assert call(server, "boss", path, None, "GET")[0].status == 200
        assert not waits.done()
    assert waits.result()[0].status == 200


def chunks_of(server: mlx_server.MLXServer, key: str, end: bytes = b"0\r\n\r\n") -> socket.socket:
    """A connection on which a request with a body in chunks of one byte was sent, up to its
    `end`."""
    body = b"".join(b"1\r\n%c\r\n" % octet for octet in b'{"model": "demo"}')
    head = f"POST /api/show HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + body + end)
    return connection


def test_bodies_in_chunks_are_read_in_turn_and_waited_for_outside_of_it(
    engine: Engine, serve: Callable
):
    server = serve(engine, api_keys=KEYS)
    with contextlib.closing(chunks_of(server, "guest", end=b"")):  # of which more may come
        with contextlib.closing(chunks_of(server, "guest")) as whole:
            assert whole.recv(99).startswith(b"HTTP/1.1 200")
        with server.chunk_turns.take(Priority.LOW, gone):
            waits = chunks_of(server, "guest")
            with contextlib.closing(chunks_of(server, "boss")) as important:
                assert important.recv(99).startswith(b"HTTP/1.1 200")
            assert not is_readable(waits, 0)
        with contextlib.closing(waits):
            assert waits.recv(99).startswith(b"HTTP/1.1 200")


def test_who_waits_for_a_turn_is_not_late(
    engine: Engine, serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    passed = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed)
    monkeypatch.setattr("_mlx_server.front.sockets.time", clock)
    server = serve(engine, api_keys=KEYS)
    head = post(
        "/api/show", b"", "Transfer-Encoding: chunked", "x-api-key: guest", "Expect: 100-continue"
    )
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
        with server.chunk_turns.take(Priority.LOW, gone):
            connection.sendall(head)
            assert connection.recv(99).startswith(b"HTTP/1.1 100")  # from now on it waits
            passed = 3600.0
        assert not is_readable(connection, 0.1)  # a 408 would come at once
        connection.sendall(b'11\r\n{"model": "demo"}\r\n0\r\n\r\n')
        assert connection.recv(99).startswith(b"HTTP/1.1 200")


class Large(HTTPHandler):
    """Answers with more than a socket holds, in one piece, or with nothing."""

    dialect = dialects.OPENAI

    def answer(self) -> None:
        if self.exchange.route == "/large":
            self.send_large_json({"text": "a" * (32 << 20)})
        else:
            self.send(200, b"")


def test_an_answer_that_is_made_needs_no_other_turn(serve: Callable):
    server = serve(api_keys=KEYS)
    server.RequestHandlerClass = Large
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", "/large", headers={"x-api-key": "guest"})
        assert is_readable(connection.sock, PATIENCE)  # it is being sent
        with server.turns.take(Priority.LOW, gone):
            assert len(connection.getresponse().read()) > 32 << 20
            connection.request("GET", "/small", headers={"x-api-key": "guest"})
            assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    "field", ["x-api-key: guest", "x-api-key: nobody", "Origin: http://foreign.example", "No: key"]
)
def test_requests_that_cost_little_keep_their_distance(engine: Engine, serve: Callable, field: str):
    server = serve(engine, api_keys=KEYS)
    server.low_pace.gap = server.keyless_pace.gap = 3600.0
    request = f"GET /api/version HTTP/1.1\r\nHost: localhost\r\n{field}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
        connection.sendall(request.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 ")
        connection.sendall(request.encode())
        for _ in range(9):
            assert call(server, "boss", "/api/version", None, "GET")[0].status == 200
        assert not is_readable(connection, 0)


def test_so_do_those_whose_head_cannot_be_read(serve: Callable):
    server = serve(api_keys=KEYS)
    server.keyless_pace.gap = 3600.0
    address = "127.0.0.1", server.port
    with (
        socket.create_connection(address, PATIENCE) as first,
        socket.create_connection(address, PATIENCE) as second,
    ):
        first.sendall(b"GET / HTTP/9.9\r\n\r\n")
        assert first.recv(4096).startswith(b"HTTP/1.1 505")
        second.sendall(b"GET / HTTP/9.9\r\n\r\n")
        for _ in range(9):
            assert call(server, "boss", "/api/version", None, "GET")[0].status == 200
        assert not is_readable(second, 0)


@pytest.mark.parametrize("path", ["/api/chat", "/api/embed"])
def test_half_of_the_connections_are_for_important_keys(engine: Engine, serve: Callable, path: str):
    server = serve(engine, api_keys=KEYS)
    server.max_connections = 4
    body = {"model": "demo", "messages": HI, "input": "hi", "options": {"num_predict": 1}}
    with ThreadPoolExecutor() as pool:
        with server.turns.take(Priority.LOW, gone):
            waiting = [pool.submit(call, server, "guest", path, body) for _ in range(2)]
            until(lambda: server.connections - server.waiting == 2)
            assert call(server, "guest", path, body)[0].status == 503
            assert call(server, "agent", path, body)[0].status == 200
        assert [one.result()[0].status for one in waiting] == [200, 200]
    assert call(server, "guest", path, body)[0].status == 200


def test_those_of_one_key_are_not_let_in_before_the_first_of_another(
    monkeypatch: pytest.MonkeyPatch, phases: Phases
):
    monkeypatch.setattr(ModelPool, "MOST_LOW", 1)
    hold = phases.hold(State.PREFILL)
    with Engine("demo") as engine:
        engine.chat("say hi", max_tokens=1, priority=Priority.HIGH)
        with hold:
            asked = [
                engine.chat(f"say {n}", max_tokens=1, priority=Priority.LOW, client=client)
                for n, client in enumerate(["many", "many", "many", "few"])
            ]
        for one in asked:
            list(one)
        first, second, third, other = (phases.when(one, State.PREFILL) for one in asked)
        assert first < other < second < third


def test_few_less_important_requests_are_in_work_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelPool, "MOST_LOW", 3, raising=False)
    with Engine("demo") as engine:

        def begin(n: int, priority: Priority) -> Generation:
            return engine.chat(f"{n} count to 100", max_tokens=10_000, priority=priority)

        low = [begin(n, Priority.LOW) for n in range(8)]
        others = [begin(n, Priority.NORMAL) for n in range(4)]
        list(engine.chat("say hi", max_tokens=1, priority=Priority.HIGH))
        working = [one.request.priority for one in engine.pool.sequences()]
        assert (working.count(Priority.LOW), working.count(Priority.NORMAL)) == (3, 4)
        for one in [*low[:6], *others]:
            one.cancel()
        assert [next(iter(one.text())) for one in low[6:]]
        for one in low:
            one.cancel()


def test_how_much_is_kept_for_others_and_until_when_is_not_told(engine: Engine, serve: Callable):
    server = serve(engine, api_keys=KEYS)
    list(engine.chat("say hi", max_tokens=1, keep_alive=1e6))
    guest, boss = (
        json.loads(call(server, key, "/api/ps", {}, "GET")[1])["models"][0]
        for key in ("guest", "boss")
    )
    assert guest["size"] == engine.resolve("demo").size < boss["size"]
    assert guest["expires_at"].startswith("2318") and not boss["expires_at"].startswith("2318")


# ------------------------------------------------------------------ memory


class Counting:
    """A model's tokenizer, with the texts that it has encoded."""

    def __init__(self, engine: Engine):
        self._wrapped = engine.renderer(engine.resolve("demo")).tokenizer
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        self.texts.append(text)
        return self._wrapped.encode(text, **options)


def test_the_tokens_of_a_long_text_are_not_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TextTokenizer, "REMEMBERED", 5000)
    counting = Counting(engine)
    tokenizer = TextTokenizer(counting)
    short, long = "a short text", "a long text " * 200
    counting.texts.clear()
    for text in (short, long, short, long):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert counting.texts == [short, long, long]


def test_a_result_that_one_key_has_sent_is_spelt_anew_for_another(engine: Engine):
    renderer = PromptRenderer(engine.resolve("demo"))
    short = renderer.prompt(Request("demo", [{"role": "user", "content": "hi"}]))
    renderer.tokenizer = counting = Counting(engine)
    asked = []
    for owner in ("one", "one", "two"):
        counting.texts.clear()
        messages = [{"role": "tool", "content": "1\ta\n2\tb\n"}]
        assert renderer.drafters(Request("demo", messages, owner=owner), short)
        asked.append([text for text in counting.texts if "a" in text])
    assert asked[0] == asked[2] != [] and not asked[1]


@pytest.mark.parametrize("text", ["a b " * 5000, "<|im_end|> a b " * 2000])
def test_a_text_is_encoded_only_until_it_has_too_many_tokens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str
):
    monkeypatch.setattr(TextTokenizer, "LONG", 1000)
    counting = Counting(engine)
    tokenizer = TextTokenizer(counting)
    for encode in (tokenizer.encode, tokenizer.encode_raw):
        counting.texts.clear()
        assert len(encode(text, 500)) > 500
        assert max(map(len, counting.texts)) <= 1000 and sum(map(len, counting.texts)) < 6000


def test_the_tokens_of_a_state_count_where_its_layers_do_not_grow():
    short, long = (CacheEntry([0] * count, []) for count in (10, 100_000))
    assert long.nbytes - short.nbytes >= 16 * 99_990


def test_a_map_of_bounded_size_keeps_the_latest_entries():
    kept: BoundedMap[str] = BoundedMap(10, lambda key, value: len(value))
    for key in "abcd":
        kept.put(key, key * 4)
    assert [kept.get(key) for key in "abcd"] == [None, None, "cccc", "dddd"]
    kept.put("d", "d" * 6)
    assert kept.get("c") == "cccc"
    assert kept.get_or_make("e", lambda: "e" * 11) == "e" * 11
    assert kept.get("e") is None and kept.get("d") == "d" * 6


@pytest.fixture
def busy(folder: Path) -> Iterator[Engine]:
    """An engine that works for an important request."""
    with Engine("demo", models_dirs=[folder]) as engine:
        endless = Sampling(logit_bias={2: -100.0})
        high = engine.chat("hi", max_tokens=99_999, sampling=endless, priority=Priority.HIGH)
        next(high.text())
        yield engine
        assert high.sequence.decoding
        high.cancel()


def test_no_model_is_loaded_for_a_less_important_request_while_others_are_in_work(folder: Path):
    with Engine("demo", models_dirs=[folder]) as engine:
        high = engine.chat("count to 100", max_tokens=10_000, priority=Priority.HIGH)
        next(high.text())
        low = engine.chat("hi", model="qwen2", max_tokens=1, priority=Priority.LOW)
        # Nor does it hold up what needs none to be loaded
        list(engine.chat("say hi", max_tokens=1, priority=Priority.LOW))
        assert list(engine.pool.runners) == ["demo"]
        high.cancel()
        list(low)
        assert "qwen2" in engine.pool.runners


@pytest.mark.parametrize(
    "path, status", [("/v1/messages", 529), ("/v1/chat/completions", 503), ("/api/chat", 503)]
)
def test_who_waits_too_long_for_a_model_is_told_why(
    busy: Engine,
    serve: Callable,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    status: int,
):
    monkeypatch.setattr(ModelPool, "PUT_OFF", 0.0)
    server = serve(busy, api_keys=KEYS)
    body = {"model": "qwen2", "messages": HI, "max_tokens": 1}
    response, text = call(server, "guest", path, {**body, "stream": False})
    assert response.status == status and "'qwen2' is not in memory" in text
    assert int(response.headers["retry-after"]) > 1
    response, text = call(server, "guest", path, {**body, "stream": True})
    assert response.status == 200 and "'qwen2' is not in memory" in text


def test_who_waits_for_a_model_hears_that_the_server_is_alive(
    busy: Engine, serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("_mlx_server.front.answers.PING_AFTER", 0.0)
    server = serve(busy, api_keys=KEYS)
    body = {"model": "qwen2", "messages": HI, "max_tokens": 1, "stream": True}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/messages", json.dumps(body), {"x-api-key": "guest"})
        response = connection.getresponse()
        assert next(line for line in response if b"event: ping" in line)
        assert "qwen2" not in busy.pool.runners


class Noted(Turns):
    """Turns for files, with the clients that wanted one."""

    def __init__(self) -> None:
        super().__init__(FILES)
        self.wanted: list[str] = []

    def begin(self, turn: Turn, most: float) -> None:
        self.wanted.append(turn.client)
        super().begin(turn, most)


def test_files_of_a_low_key_hold_up_only_its_own(
    engine: Engine, serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    """Another one with such a key is answered while a file is read, and has its own read next."""
    server = serve(engine, api_keys={**KEYS, "other": Priority.LOW})
    server.file_turns = noted = Noted()
    order: list[str] = []
    began, answered = threading.Event(), threading.Event()

    def read(data: bytes) -> str:
        order.append(names[data])
        began.set()
        assert answered.wait(PATIENCE)
        until(lambda: len(set(noted.wanted)) == 2, PATIENCE)
        return "text"

    monkeypatch.setattr(documents, "read_pdf", read)
    names = {pdf(f"{name} has its turn"): name for name in ("a0", "a1", "a2", "a3", "a4", "b")}

    def ask_with(key: str, files: Iterable[bytes]) -> int:
        content = [*map(document, files), {"type": "text", "text": "say hi"}]
        messages = [{"role": "user", "content": content}]
        body = {"model": "demo", "max_tokens": 1, "messages": messages}
        return call(server, key, "/v1/messages", body)[0].status

    with ThreadPoolExecutor() as pool:
        *many, few = names
        asked = [pool.submit(ask_with, "guest", many)]
        assert began.wait(PATIENCE)
        try:
            assert pool.submit(ask_with, "other", []).result(60) == 200
        finally:
            answered.set()
        asked.append(pool.submit(ask_with, "other", [few]))
        assert [one.result() for one in asked] == [200, 200]
    assert sorted(order) == sorted(names.values()) and order.index("b") < 3


def test_files_that_nobody_waits_for_are_not_read(engine: Engine, serve: Callable):
    started: list[str] = []
    began = threading.Event()

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and "pdf.py" in str(args):
            started.append(event)
            began.set()

    sys.addaudithook(hear)  # for good
    server = serve(engine, api_keys=KEYS)
    files = [document(pdf(f"nobody waits for {n}")) for n in range(40)]
    ask_low = {"model": "demo", "max_tokens": 2, "messages": [{"role": "user", "content": files}]}
    body = json.dumps(ask_low).encode()
    low = next(key for key, priority in KEYS.items() if priority is Priority.LOW)
    head = post("/v1/messages", body, f"Content-Length: {len(body)}", f"x-api-key: {low}")
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(head)
        assert began.wait(PATIENCE)
    # Its turn comes when the other one has ended
    assert call(server, low, "/v1/messages", {**ask_low, "messages": HI})[0].status == 200
    assert len(started) < 10
