"""What a client, or the holder of a key, cannot do to the others: sockets, memory, time, names and
what the prompt cache tells."""

from __future__ import annotations

import gc
import gzip
import json
import logging
import os
import platform
import socket
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
from conftest import ROOT, until
from phases import Phases
from test_http import ask

import mlx_server
from _mlx_server.front import budget, head
from _mlx_server.front.body import decompress, parse_json
from _mlx_server.front.budget import BodyBudget, BodyClaim
from _mlx_server.front.connections import Connection
from _mlx_server.front.logs import JSONLine, OneLine, log_file
from _mlx_server.front.request_log import RequestLog
from _mlx_server.front.turns import BACKLOG, GAP, Pace
from _mlx_server.front.upstream import CLOUD
from _mlx_server.inference.catalog.presets import Preset, PresetStore
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import EngineBusy, Priority, PromptTooLong, Request
from _mlx_server.inference.sequence import State
from _mlx_server.wire.anthropic import AnthropicMessages
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.images import Images
from _mlx_server.wire.ollama_embeddings import OllamaEmbed
from _mlx_server.wire.ollama_models import checked_name
from _mlx_server.wire.ollama_request import image_texts, parse_keep_alive
from engine import Engine

HI = [{"role": "user", "content": "say hi"}]
KEYS = {"boss": Priority.HIGH, "agent": Priority.NORMAL, "guest": Priority.LOW}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine("demo", state=tmp_path_factory.mktemp("state") / "presets.json") as engine:
        yield engine


# ------------------------------------------------------------------ time


def seconds(work: Callable[[str], object], text: str) -> float:
    """Of the thread's own time, the least of some runs."""
    times = []
    for _ in range(5):
        start = time.thread_time()
        work(text)
        times.append(time.thread_time() - start)
    return min(times)


def refused(call: Callable[[str], object]) -> Callable[[str], None]:
    def work(text: str) -> None:
        with pytest.raises(WireError):
            call(text)

    return work


def billing(text: str) -> None:
    body = {"model": "m", "max_tokens": 1, "messages": HI}
    AnthropicMessages({**body, "system": f"x-anthropic-billing-header: a\n{text}"})


def json_reader(text: str) -> None:
    refused(lambda text: parse_json(b"," * 20_000 + text.encode(), True, claimed()))(text)


PUMPED = {
    "digits": (refused(parse_keep_alive), lambda n: "1" * n + "x"),
    "parts": (refused(parse_keep_alive), lambda n: "1m" * n + "x"),
    "points": (refused(parse_keep_alive), lambda n: "1." * n),
    "name": (refused(lambda text: checked_name(text, "bad")), lambda n: "a/" * n),
    "image": (
        refused(lambda text: image_texts({"images": [text]}, images=Images())),
        lambda n: "=" * n + "x",
    ),
    "host": (head.HOST.fullmatch, lambda n: "a." * n + "/"),
    "host:": (head.HOST.fullmatch, lambda n: "[" + ":" * n),
    "origin": (head.LOCAL_ORIGIN.fullmatch, lambda n: "http://localhost:" + "1" * n + "x"),
    "app": (head.LOCAL_ORIGIN.fullmatch, lambda n: "app://" + "/" * n + "\n"),
    "billing": (billing, lambda n: "\n" * n),
    "headers": (billing, lambda n: "x-anthropic-billing-header:\n " * n),
    "strings": (json_reader, lambda n: '"' + '\\"' * n),
    "cloud": (CLOUD.fullmatch, lambda n: ":-" * n + "cloud!"),
}


@pytest.mark.parametrize("name", PUMPED)
def test_a_text_of_four_times_the_length_takes_no_more_than_linear_time(name: str):
    work, pump = PUMPED[name]
    size = 64
    while (short := seconds(work, pump(size))) < 1e-3 and size < 1 << 18:
        size *= 2
    assert seconds(work, pump(4 * size)) < 10 * short + 1e-3  # 16 times, were it quadratic


# ------------------------------------------------------------------ sockets


def test_silent_connections_make_room_for_who_comes_next(
    serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("_mlx_server.front.connections.MAX_CONNECTIONS", 8)
    server = serve()
    address = ("127.0.0.1", server.port)
    heads = [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /api/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ]
    with ExitStack() as stack:
        for number in range(24):
            silent = stack.enter_context(socket.create_connection(address, timeout=60))
            silent.sendall(heads[number % len(heads)])
        for _ in range(3):
            assert ask(server, "GET", "/")[0].status == 200
        assert silent.fileno() >= 0 and server.connections <= 8 + 32


def test_who_does_not_read_the_answers_makes_room_as_well(
    serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("_mlx_server.front.connections.MAX_CONNECTIONS", 1)
    started = threading.Event()

    def flood(handler: mlx_server.Handler) -> None:
        started.set()
        handler.send(200, bytes(64 << 20))

    monkeypatch.setitem(mlx_server.ROUTES, "/api/hello", {"GET": flood})
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as deaf:
        deaf.sendall(b"GET /api/hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert started.wait(60)
        until(lambda: server.waiting == 1)
        assert ask(server, "GET", "/")[0].status == 200


def test_a_connection_that_is_worked_for_is_not_closed_for_another():
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        connection = Connection(ours, "")
        assert connection.waiting_since is not None
        connection.works()
        assert connection.waiting_since is None


def test_a_remote_address_has_a_share(serve: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("_mlx_server.front.connections.MAX_CONNECTIONS", 8)
    monkeypatch.setattr("_mlx_server.front.connections.network_of", lambda address: "far")
    server = serve()
    with ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        silent = [
            stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(5)
        ]
        assert all(one.recv(1) == b"" for one in silent[:3])
        until(lambda: server.connections == 2)


# ------------------------------------------------------------------ memory


def claimed(limit: int = budget.BUDGET) -> BodyClaim:
    return BodyClaim(BodyBudget(), limit)


class CountingPace(Pace):
    """Lets no request begin but the first, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.gap, self.asked = 3600.0, 0

    def delay(self) -> float:
        self.asked += 1
        return super().delay()


@pytest.mark.parametrize("key", ["", "nobody", "guest"])
def test_who_keeps_a_distance_makes_room_for_others(
    serve: Callable, monkeypatch: pytest.MonkeyPatch, key: str
):
    monkeypatch.setattr("_mlx_server.front.connections.MAX_CONNECTIONS", 8)
    server = serve(api_keys=KEYS)
    pace = server.low_pace = server.keyless_pace = CountingPace()
    request = f"GET /api/version HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(8):
            address = ("127.0.0.1", server.port)
            many = stack.enter_context(socket.create_connection(address, timeout=60))
            many.sendall(2 * request.encode())
        until(lambda: pace.asked == 9)
        for _ in range(3):
            assert call(server, "boss", "/api/version", {}, "GET")[0].status == 200
        until(lambda: server.connections < 8)


def test_those_who_have_gone_put_off_nobody_for_long():
    pace = Pace()
    for _ in range(10_000):
        last = pace.delay()
    assert last <= BACKLOG * GAP < 2


def test_bodies_share_a_budget_and_short_ones_always_get_in():
    bodies = BodyBudget()
    first, second, short = (BodyClaim(bodies, 100) for _ in range(3))
    first.add(budget.FREE + 60)
    short.add(budget.FREE)
    with pytest.raises(EngineBusy):
        second.add(budget.FREE + 41)
    first.release()
    second.add(budget.FREE + 100)
    with pytest.raises(WireError) as too_large:
        short.add(101)
    assert too_large.value.status == 413


def test_a_body_beyond_the_budget_is_told_to_come_later(
    engine: Engine, serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    server = serve(engine)
    body = {"model": "demo", "prompt": "a" * (2 << 20), "stream": False}
    other = BodyClaim(server.bodies, budget.BUDGET)
    other.add(budget.BUDGET + budget.FREE)
    for path, status in [("/v1/messages", 529), ("/api/generate", 503)]:
        response, text = ask(server, "POST", path, body)
        assert response.status == status and json.loads(text)["error"]
    other.release()
    assert ask(server, "POST", "/api/show", {**body, "model": "none"})[0].status == 404
    deadline = time.monotonic() + 60
    while True:  # a handler gives back its claim when the client has its answer already
        try:
            return server.bodies.change(budget.BUDGET, budget.BUDGET)
        except EngineBusy:
            assert time.monotonic() < deadline


def test_a_low_key_cannot_take_the_whole_budget(engine: Engine, serve: Callable):
    server = serve(engine, api_keys=KEYS)
    server.bodies.change(budget.BUDGET // 2, budget.BUDGET)
    body = {"model": "none", "prompt": "a" * (2 << 20)}
    for key, status in [("guest", 503), ("boss", 404)]:
        headers = {"x-api-key": key}
        assert ask(server, "POST", "/api/show", body, headers)[0].status == status


@pytest.mark.parametrize(
    "text, status",
    [(b"[" + b"[]," * (10 << 20) + b"[]]", 413), (b" " * (40 << 20), 413), (b"[1" * 9, 400)],
)
def test_a_small_body_that_unpacks_to_much_takes_little_memory(text: bytes, status: int):
    packed, claim = gzip.compress(text), claimed()
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as error:
            parse_json(decompress(packed, "gzip", claim), True, claim)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.value.status == status and peak < 100 << 20


def traced_growth(work: Callable[[], object]) -> int:
    """Bytes of Python objects that are left after the second time that something is done."""
    tracemalloc.start()
    try:
        work()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_an_idle_connection_holds_no_body(engine: Engine, serve: Callable):
    list(engine.chat("say hi", max_tokens=1))  # loads all that is loaded later
    server, body = serve(engine), json.dumps({"model": "none", "pad": "a" * (4 << 20)})
    with ExitStack() as stack:

        def send() -> None:
            client = HTTPConnection("127.0.0.1", server.port, timeout=60)
            stack.callback(client.close)
            client.request("POST", "/api/show", body)
            assert client.getresponse().read()
            until(nothing_claimed)

        def nothing_claimed() -> bool:
            try:
                server.bodies.change(budget.BUDGET, budget.BUDGET)
            except EngineBusy:
                return False
            server.bodies.change(-budget.BUDGET, 0)
            return True

        assert traced_growth(send) < 2 << 20


def test_a_thread_that_runs_python_keeps_others_waiting_for_a_millisecond_at_most():
    prepared = "from _mlx_server.front.startup import prepare_process as prepare; prepare()"
    command = [sys.executable, "-c", f"import sys; {prepared}; print(sys.getswitchinterval())"]
    told = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert float(told) <= 0.001


def test_a_bodys_values_are_gone_once_they_are_a_request(
    engine: Engine, serve: Callable, phases: Phases
):
    server, held, filler = serve(engine), phases.hold(State.DECODE), os.urandom(8).hex()
    body = {"model": "demo", "messages": HI, "max_tokens": 4, "ignored": [filler]}
    body = json.dumps(body).encode()
    path = "/v1/chat/completions"
    client = threading.Thread(target=ask, args=(server, "POST", path, body))
    client.start()
    with held:
        lists = [one for one in gc.get_objects() if type(one) is list and len(one) == 1]
        assert not [one for one in lists if type(one[0]) is str and one[0] == filler]
    client.join()


TELL_POOLS = """
import ctypes, resource, sys, threading
from _mlx_server.front.startup import share_arena
from _mlx_server.inference.memory import release_free_memory

if "shared" in sys.argv:
    share_arena()
everyone = threading.Barrier(17)


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()


def work():
    large = bytes(8 << 20)
    del large  # from now on blocks of this size come from pools
    held = [b"x" * 1000 for _ in range(100)] + [b"x" * (1 << 20) for _ in range(4)]
    everyone.wait()
    held.clear()
    everyone.wait()


before = resident()
for _ in range(16):
    threading.Thread(target=work).start()
everyone.wait()
everyone.wait()
release_free_memory()
print(resident() - before, flush=True)
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("shared", [True, False])
def test_threads_share_a_pool_of_memory_that_is_given_back(shared: bool):
    command = [sys.executable, "-c", TELL_POOLS, "shared" if shared else "as it is"]
    told = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert (told.count("<heap nr=") == 1) == shared
    assert not shared or int(told.splitlines()[0]) < 16 << 20


@pytest.mark.slow
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_prompt_that_is_refused_leaves_nothing(role: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TextTokenizer, "LONG", 1 << 14)

    def submit() -> None:
        text = f"{os.urandom(8).hex()} " + "a b " * 25_000
        with pytest.raises(PromptTooLong):
            engine.chat([{"role": role, "content": text}, *HI][:2])

    with Engine("demo", context=1000) as engine:
        list(engine.chat("say hi", max_tokens=1))  # loads all that is loaded later
        assert traced_growth(submit) < 50_000


@pytest.mark.slow
def test_enormous_tools_are_not_kept(engine: Engine):
    renderer = engine.renderer(engine.resolve("demo"))

    def render() -> None:
        function = {"name": "a", "description": os.urandom(8).hex() + "a b " * 1_200_000}
        with pytest.raises(PromptTooLong):
            renderer.prompt(Request("demo", HI, tools=[{"function": function}]), most=1000)

    assert traced_growth(render) < 1 << 20


def test_marks_in_strings_are_no_values():
    text = '[{,\\"' * 100_000
    claim = claimed(limit=4 << 20)
    assert parse_json(json.dumps({"a": text}).encode(), True, claim) == {"a": text}
    with pytest.raises(WireError, match="too many values"):
        parse_json(b'{"a": [' + b"{}," * 10_000 + b"{}]}", True, claim)


def test_texts_to_embed_have_a_bound():
    with pytest.raises(WireError, match="at most 10000"):
        OllamaEmbed({"model": "m", "input": ["a"] * 10_001})


def test_a_body_in_many_pieces_is_unpacked_whole():
    text = json.dumps({"a": os.urandom(200_000).hex()}).encode()
    claim = claimed()
    assert parse_json(decompress(gzip.compress(text), "gzip", claim), True, claim)


@pytest.mark.parametrize("name", ["a" * 513, "9" * 5000, f"{'9' * 5000}x7b", f"m:{'9' * 500}b"])
def test_a_long_name_is_the_callers_error(engine: Engine, serve: Callable, name: str):
    server = serve(engine)
    calls = [("POST", path) for path in ("/v1/messages", "/api/chat", "/api/show", "/api/create")]
    for method, path in [*calls, ("GET", f"/v1/models/{name}"), ("DELETE", "/api/delete")]:
        body = {"model": name, "from": name, "max_tokens": 1, "messages": HI}
        response, text = ask(server, method, path, body)
        expected = (400, 404) if len(name) <= 512 else (400,)
        assert response.status in expected, (path, text)


def test_a_number_with_many_digits_in_a_name_is_only_a_large_one(engine: Engine, serve: Callable):
    body = {"model": f"{'9' * 400}x7b", "messages": HI}
    assert ask(serve(engine), "POST", "/api/chat", body)[0].status == 404


# ------------------------------------------------------------------ the log and files


def test_a_line_of_the_log_quotes_little_of_what_was_sent(
    serve: Callable, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "mlx_server")
    server = serve()
    assert ask(server, "GET", f"/nowhere/{'a' * 60000}")[0].status == 404
    record = next(one for one in caplog.records if "/nowhere/aaa" in one.getMessage())
    assert len(record.getMessage()) < 500
    long = logging.LogRecord("x", logging.INFO, "", 1, "%s", ("b" * 10**6,), None)
    try:
        raise ValueError("\x1b[2J" + "c" * 10**6)
    except ValueError:
        failed = logging.LogRecord("x", logging.INFO, "", 1, "d", (), sys.exc_info())
    for form in (OneLine("%(message)s"), JSONLine()):
        assert len(form.format(long)) < 5000 and len(form.format(failed)) < 25_000
        assert "\x1b" not in form.format(failed)
    request = RequestLog("/api/chat", "id", "ollama")
    request.fail(WireError(400, "e" * 10**4))
    request.relay("far", "http://localhost", 400)
    assert len(JSONLine().format(caplog.records[-1])) < 5000


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_logs_are_their_owners(tmp_path: Path):
    handler = log_file(str(tmp_path / "logs" / "a.log"))
    handler.close()
    assert (mode(tmp_path / "logs"), mode(tmp_path / "logs" / "a.log")) == (0o700, 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes links of others")
def test_a_log_follows_no_link_that_somebody_else_has_made(tmp_path: Path):
    target, link = tmp_path / "mine", tmp_path / "a.log"
    target.write_text("precious")
    link.symlink_to(target)
    log_file(str(link)).close()  # one's own is followed
    os.lchown(link, 65534, 65534)
    with pytest.raises(OSError, match="symbolic"):
        log_file(str(link))


def test_the_names_of_ones_own_are_their_owners(tmp_path: Path):
    path = tmp_path / "state" / "presets.json"
    PresetStore(path).put(Preset("mine", "demo", system="secret"))
    assert (mode(path.parent), mode(path)) == (0o700, 0o600)
    assert PresetStore(path).get("mine").system == "secret"


# ------------------------------------------------------------------ names of the server


def answer(server: mlx_server.MLXServer, host: str, **headers: str) -> int:
    return ask(server, "GET", "/api/tags", None, {"Host": host, **headers})[0].status


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_without_a_key_only_the_servers_own_names_are_answered(
    engine: Engine, serve: Callable, address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("socket.gethostname", lambda: "My-Mac.home")
    server = serve(engine, address, allowed_hosts=["Proxy.example"])
    for host in ("evil.local", "evil.internal", "evil.example", "my-mac.evil.example", "my-mac."):
        assert answer(server, host) == 403, host
        assert answer(server, f"{host}:{server.port}", Origin=f"http://{host}") == 403
    own = ["localhost", "a.localhost", "my-mac.home", "my-mac.local", "proxy.example:80"]
    own += ["host.docker.internal", "gateway.docker.internal", "host.containers.internal"]
    for host in [*own, "127.0.0.1", "[::1]", "192.168.1.5:11435"]:
        assert answer(server, host) == 200, host
    assert answer(server, "8.8.8.8") == (403 if address == "127.0.0.1" else 200)


def test_with_a_key_other_machines_may_use_any_name(engine: Engine, serve: Callable):
    keys, headers = {"secret": Priority.NORMAL}, {"x-api-key": "secret"}
    server = serve(engine, "0.0.0.0", api_keys=keys)
    assert answer(server, "mac.example", **headers) == 200
    assert answer(server, "mac.example") == 401
    assert answer(serve(engine, api_keys=keys), "mac.example", **headers) == 403


# ------------------------------------------------------------------ keys


def call(server: mlx_server.MLXServer, key: str, path: str, body: dict, method: str = "POST"):
    response, text = ask(server, method, path, body, {"x-api-key": key})
    return response, text.decode()


MANAGING = [
    ("POST", "/api/create", {"model": "mine", "from": "demo"}),
    ("POST", "/api/copy", {"source": "demo", "destination": "mine"}),
    ("POST", "/api/pull", {"model": "no such name"}),
    ("DELETE", "/api/delete", {"model": "nothing"}),
    ("POST", "/api/generate", {"model": "demo", "keep_alive": 0}),
]


@pytest.mark.parametrize("method, path, body", MANAGING, ids=[path for _, path, _ in MANAGING])
def test_a_low_key_does_not_change_which_models_there_are(
    engine: Engine, serve: Callable, method: str, path: str, body: dict
):
    server = serve(engine, api_keys=KEYS)
    response, text = call(server, "guest", path, body, method)
    assert response.status == 403 and "may not" in json.loads(text)["error"]
    for key in ("agent", "boss"):
        assert call(server, key, path, body, method)[0].status in (200, 400, 404)


@pytest.mark.parametrize("path", ["/activity", "/metrics"])
def test_a_low_key_does_not_see_what_others_do(engine: Engine, serve: Callable, path: str):
    server = serve(engine, api_keys=KEYS)
    response, text = call(server, "guest", path, {}, "GET")
    assert response.status == 403 and "may not see" in text
    for key in ("agent", "boss"):
        assert call(server, key, path, {}, "GET")[0].status == 200


@pytest.mark.slow
def test_a_low_key_does_not_say_how_long_a_model_stays(engine: Engine, serve: Callable):
    server = serve(engine, api_keys=KEYS)
    body = {"model": "demo", "messages": HI, "keep_alive": -1, "stream": False}
    engine.unload("demo")
    for key, stays in (("guest", None), ("agent", -1)):
        assert call(server, key, "/api/chat", body)[0].status == 200
        assert engine.pool.runners["demo"].keep_alive == stays
    engine.unload("demo")


@pytest.mark.parametrize(
    "name",
    ["claude-sonnet-4-5", "Claude-x:latest", "gpt-4o", "opus", "sonnet", "haiku", "default"]
    + ["anthropic/claude-sonnet-4-5", "anthropic/x", "openai/o3", "org/claude-x", "demo"]
    + ["demo-mlx", "DEMO:latest"],
)
def test_nobody_takes_a_name_that_others_rely_on(engine: Engine, serve: Callable, name: str):
    server = serve(engine)
    for path, body in [
        ("/api/create", {"model": name, "from": "demo", "system": "hidden"}),
        ("/api/copy", {"source": "demo", "destination": name}),
    ]:
        response, text = ask(server, "POST", path, body)
        assert response.status == 400 and b"name" in text, (path, text)
    assert engine.preset(name) is None


def test_ones_own_names_may_be_made_again(engine: Engine, serve: Callable):
    server = serve(engine)
    for system in ("one", "two"):
        body = {"model": "again", "from": "demo", "system": system}
        assert ask(server, "POST", "/api/create", body)[0].status == 200
    assert engine.preset("again").system == "two"
    body = {"model": "gpt-oss-mine", "from": "demo"}
    assert ask(server, "POST", "/api/create", body)[0].status == 200


@pytest.mark.parametrize("given", ["", "secret-1", "secret-10", "other"])
def test_every_key_is_compared_in_the_same_way(given: str, monkeypatch: pytest.MonkeyPatch):
    compared = []
    compare = head.hmac.compare_digest
    monkeypatch.setattr(
        head.hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b)
    )
    keys = {f"secret-{n}": Priority.NORMAL for n in range(5)}
    try:
        head.check_key({"x-api-key": given, "Authorization": f"Bearer {given}"}, keys)
    except WireError as error:
        assert error.status == 401
    assert sorted(compared) == sorted([key.encode() for key in keys] * 2)


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_a_blank_key_in_the_environment_opens_no_server(
    blank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("MLX_SERVER_API_KEY", blank)
    with pytest.raises(SystemExit, match="2"):
        mlx_server.main(["--port", "0"])
    assert "MLX_SERVER_API_KEY is set but blank" in capsys.readouterr().err


# ------------------------------------------------------------------ terminals and services


def test_a_models_files_do_not_control_the_terminal(tmp_path: Path):
    model = tmp_path / "models" / "odd\x1b[2J"
    model.parent.mkdir()
    demo = ROOT / "tests" / "demo"
    model.mkdir()
    for file in demo.iterdir():
        if file.is_file():
            (model / file.name).symlink_to(file)
    config = json.loads((demo / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, "model_type": "a\x1b]0;b\x07"}))
    flags = ["--models-dir", str(model.parent), "--state", str(tmp_path / "presets.json")]
    for words in (["list"], ["show", model.name]):
        out = subprocess.run(
            [sys.executable, str(ROOT / "mlx_server.py"), *words, *flags],
            capture_output=True,
            text=True,
            timeout=240,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )
        said = out.stdout + out.stderr
        assert "\\x1b" in said and "\x1b" not in said and "\x07" not in said


@pytest.mark.parametrize("kind", ["--print-systemd", "--print-launchd"])
@pytest.mark.parametrize("flag", ["a\nExecStartPost=/bin/evil", "a\x1b[2J"])
def test_a_service_has_no_lines_of_its_flags(
    kind: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit, match="2"):
        mlx_server.main([kind, "--alias", f"{flag}=demo"])
    monkeypatch.setenv("HF_HOME", flag)
    with pytest.raises(SystemExit, match="2"):
        mlx_server.main([kind])
    said = capsys.readouterr()
    assert "control characters" in said.err and not said.out
