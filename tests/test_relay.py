"""The relay: what no local model answers to goes to the upstream and comes back as it is.

The upstream is a second server of ours with a model that the first does not have; where bytes,
headers or accidents matter, it is a few lines of `http.server` that record what arrives and answer
what they are told."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
import ollama
import pytest
from conftest import PATIENCE, Server
from models import build_model
from test_http import ask, post, raw

import dialects
import mlx_server
from _mlx_server.front.upstream import Upstream
from engine import Engine, Priority
from mlx_server import MLXServer

RELAYED = [route for route, endpoint in dialects.ENDPOINTS.items() if endpoint.relayed]

TAGS = [
    {
        "name": "far:latest",
        "modified_at": "2026-05-04T17:37:44.706015396-07:00",
        "size": 1,
        "unknown": [None],
    },
    {"name": "Org/GGUF:Q4_K_M", "details": {"family": "llama"}},
    {"name": "DEMO:latest", "digest": "not the local one"},
    {"name": "claude-sonnet:latest"},
]
USER = [{"role": "user", "content": "say hi"}]
HI = {"model": "far", "max_tokens": 8, "messages": USER}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("demo") as engine:
        yield engine


@contextlib.contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[ThreadingHTTPServer]:
    server.port, server.url = server.server_port, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def relay_to(
    url: str, engine: Engine, overflow: bool = False, **options
) -> contextlib.AbstractContextManager:
    return running(MLXServer(("127.0.0.1", 0), engine, upstream=Upstream(url, overflow), **options))


class Foreign(ThreadingHTTPServer):
    """Lists `TAGS`, records every other request in `seen` and lets `answer` write to its socket
    what it wants."""

    daemon_threads = True

    def __init__(self):
        self.asked, self.seen = 0, []
        self.answer = lambda out: out(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        super().__init__(("127.0.0.1", 0), ForeignHandler)


class ForeignHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"models": TAGS}).encode())

    def do_POST(self):
        self.server.seen.append(
            (self.path, self.headers, self.rfile.read(int(self.headers["Content-Length"])))
        )
        self.server.answer(self.wfile.write)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def foreign_and_front(engine: Engine) -> Iterator[tuple[Foreign, MLXServer]]:
    with (
        running(Foreign()) as foreign,
        relay_to(foreign.url, engine, api_keys={"secret": Priority.NORMAL}) as front,
    ):
        yield foreign, front


@pytest.fixture
def foreign(foreign_and_front) -> Foreign:
    foreign, _ = foreign_and_front
    foreign.seen.clear()
    foreign.answer = lambda out: out(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    return foreign


@pytest.fixture
def front(foreign_and_front, foreign: Foreign) -> MLXServer:
    return foreign_and_front[1]


@pytest.fixture
def remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, what the upstream has said of its models is remembered."""
    monkeypatch.setattr("_mlx_server.front.upstream.TAGS_LIFETIME", 1e9)


KEY = {"x-api-key": "secret"}


# ------------------------------------------------------------------ two real servers


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """An upstream with the model "far", and a server that relays to it."""
    models = tmp_path_factory.mktemp("models")
    build_model("qwen2", models / "far")
    upstream = Server("--models-dir", str(models))
    front = Server("--upstream", f"{upstream.url}/")
    yield upstream, front
    for server in (front, upstream):
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.slow
def test_ollamas_client_gets_from_the_relay_what_it_gets_from_the_upstream(
    pair: tuple[Server, Server],
):
    there, here = (ollama.Client(host=server.url) for server in pair)
    options = {"num_predict": 12, "temperature": 0}
    whole = there.chat(model="far", messages=USER, options=options).message.content
    assert whole and here.chat(model="far", messages=USER, options=options).message.content == whole
    parts = list(here.chat(model="far", messages=USER, options=options, stream=True))
    assert "".join(part.message.content for part in parts) == whole and len(parts) > 2
    assert here.show("far") == there.show("far")
    assert here.generate(model="far", prompt="hi", options=options).eval_count == 12
    assert here.chat(model="demo", messages=USER).message.content == "hi"
    assert {model.model for model in here.list().models} == {"demo:latest", "far:latest"}
    pair[1].wait_for(r"/api/chat far: relayed to http://\S+ -> 200, .* done")


@pytest.mark.slow
def test_anthropics_client_gets_from_the_relay_what_it_gets_from_the_upstream(
    pair: tuple[Server, Server],
):
    there, here = (
        anthropic.Anthropic(
            base_url=server.url, api_key="any", max_retries=0, _strict_response_validation=True
        )
        for server in pair
    )
    whole = there.messages.create(**HI).content
    assert whole and here.messages.create(**HI).content == whole
    with here.messages.stream(**HI) as stream:
        assert stream.get_final_text() == whole[0].text
    assert here.messages.count_tokens(model="far", messages=USER) == there.messages.count_tokens(
        model="far", messages=USER
    )
    assert [model.id for model in here.models.list()] == [
        "demo",
        "anthropic/demo",
        "far:latest",
    ]
    assert (
        here.models.retrieve("far").id == "far:latest" and here.models.retrieve("demo").id == "demo"
    )
    for wrong in ({"max_tokens": -1}, {"messages": []}):
        with pytest.raises(anthropic.BadRequestError) as direct:
            there.messages.create(**HI | wrong)
        with pytest.raises(anthropic.BadRequestError) as relayed:
            here.messages.create(**HI | wrong)
        assert relayed.value.body["error"] == direct.value.body["error"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_upstreams_generation(
    pair: tuple[Server, Server], stream: bool
):
    upstream, front = pair
    options = {"num_predict": 20000}
    body = json.dumps(
        {"model": "far", "prompt": "word " * 3000, "stream": stream, "options": options}
    ).encode()
    since = len(upstream.lines)
    with socket.create_connection(("127.0.0.1", front.port)) as connection:
        connection.sendall(post("/api/generate", body, f"Content-Length: {len(body)}"))
        if stream:
            assert connection.recv(12) == b"HTTP/1.1 200"
    upstream.wait_for("/api/generate far: .* client went away", since=since)
    front.wait_for("/api/generate far: relayed .* client went away")


# ------------------------------------------------------------------ byte for byte


@pytest.mark.parametrize("path", sorted(RELAYED))
def test_requests_and_answers_pass_unchanged_on_every_route(
    foreign: Foreign, front: MLXServer, path: str
):
    foreign.answer = lambda out: out(
        b"HTTP/1.1 418 T\r\nContent-Length: 10\r\nContent-Type: a/b\r\nX-Two: 1\r\nx-two: 2\r\n"
        b"Request-Id: theirs\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\n{ \xff\r\n\0 }\r\n"
    )
    body = (
        b'\n{"model" : "FAR",  "suffix": "\\u00e9", "nobody": {"knows": 1e400}, "messages": "odd"}'
    )
    response, text = ask(
        front,
        "POST",
        f"{path}?beta=true&x=%2f&x=",
        body,
        {
            **KEY,
            "Content-Type": "text/odd",
            "X-Stainless-Lang": "none",
            "Connection": "x-mine",
            "X-Mine": "1",
        },
    )
    assert [(seen[0], seen[2]) for seen in foreign.seen] == [(f"{path}?beta=true&x=%2f&x=", body)]
    got = foreign.seen[0][1]
    assert (got["Content-Type"], got["X-Stainless-Lang"], got["X-Mine"]) == (
        "text/odd",
        "none",
        None,
    )
    assert got["Host"] == foreign.url.removeprefix("http://") and got["Via"] == "1.1 mlx-server"
    assert (response.status, text) == (418, b"{ \xff\r\n\0 }\r\n")
    got = {name.lower(): value for name, value in response.getheaders()}
    got.pop("date")
    id_header = dialects.endpoint(path).dialect.request_id_header
    own = {id_header: "theirs"} if id_header else {}
    assert got == {"content-type": "a/b", "x-two": "1, 2", "content-length": "10", **own}


def test_compressed_and_chunked_bodies_arrive_as_they_were(foreign: Foreign, front: MLXServer):
    packed = gzip.compress(json.dumps(HI).encode())
    assert (
        ask(front, "POST", "/v1/messages", packed, {**KEY, "Content-Encoding": "gzip"})[0].status
        == 200
    )
    pieces = b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed)
    assert raw(
        front,
        post(
            "/api/chat",
            pieces,
            "Transfer-Encoding: chunked",
            "Content-Encoding: gzip",
            "Authorization: Bearer secret",
        ),
    ).startswith(b"HTTP/1.1 200")
    assert [(headers["Content-Encoding"], body) for _, headers, body in foreign.seen] == [
        ("gzip", packed)
    ] * 2


def test_a_stream_passes_as_it_arrives(foreign: Foreign, front: MLXServer):
    received = threading.Event()

    def answer(out):
        out(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\none\n\r\n5\r\nmore\n\r\n")
        assert received.wait(30)
        out(b"4\r\ntwo\n\r\n0\r\n\r\n")

    foreign.answer = answer
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=60)
    for _ in range(2):
        received.clear()
        connection.request("POST", "/api/chat", json.dumps(HI), KEY)
        response = connection.getresponse()
        assert response.readline() + response.readline() == b"one\nmore\n"
        received.set()
        assert response.read() == b"two\n"
    connection.close()
    received.set()
    old = (
        b"POST /api/chat HTTP/1.0\r\nHost: localhost\r\nx-api-key: secret\r\n"
        b'Content-Length: 15\r\n\r\n{"model":"far"}'
    )
    assert raw(front, old).partition(b"\r\n\r\n")[2] == b"one\nmore\ntwo\n"


def test_chunks_that_come_at_once_go_on_as_one(foreign: Foreign, front: MLXServer):
    text = b"a" * 5000
    chunks = b"".join(b"1\r\n%c\r\n" % one for one in text)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    foreign.answer = lambda out: out(head + chunks + b"0\r\n\r\n")
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/api/chat", json.dumps(HI), KEY)
        response, pieces = connection.getresponse(), []
        while piece := response.read1(len(text)):  # at most a chunk
            pieces.append(piece)
    assert b"".join(pieces) == text and len(pieces) < 100


def test_an_answer_that_ends_with_its_connection_passes_whole(foreign: Foreign, front: MLXServer):
    foreign.answer = lambda out: out(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 300_000)
    assert ask(front, "POST", "/api/chat", HI, KEY)[1] == b"x" * 300_000


def test_requests_sent_ahead_are_answered_in_turn(foreign: Foreign, front: MLXServer):
    body = b'{"model":"far"}'
    last = post("/api/chat", body, "Content-Length: 15", "x-api-key: secret")
    answers = raw(front, last.replace(b"Connection: close\r\n", b"") * 2 + last)
    assert (
        answers.count(b"HTTP/1.1 200 OK") == 3 and [seen[2] for seen in foreign.seen] == [body] * 3
    )


def test_the_key_is_demanded_and_kept(foreign: Foreign, front: MLXServer):
    assert ask(front, "POST", "/api/chat", HI)[0].status == 401 and not foreign.seen
    for headers in (
        KEY,
        {"Authorization": "Bearer secret"},
        {**KEY, "Authorization": "Basic other", "Cookie": "a=b"},
    ):
        assert ask(front, "POST", "/api/chat", HI, headers)[0].status == 200
    assert len(foreign.seen) == 3
    sent = {name.lower() for _, headers, _ in foreign.seen for name in headers}
    assert "content-length" in sent and not {"authorization", "x-api-key", "cookie"} & sent


# Ollama takes each of them
@pytest.mark.parametrize("name", ["keep_alive", "Keep_Alive", "KEEP_ALIVE", "\u212aeep_alive"])
def test_a_key_for_low_priority_does_not_say_how_long_the_upstreams_models_stay(
    foreign: Foreign, engine: Engine, remember: None, name: str
):
    asked = {**HI, "options": {"seed": 2}, name: 0}
    packed = gzip.compress(json.dumps(asked).encode())
    keys = {"secret": Priority.LOW, "other": Priority.HIGH}
    with relay_to(foreign.url, engine, api_keys=keys) as front:
        for key in keys:
            headers = {"x-api-key": key, "Content-Encoding": "gzip"}
            assert ask(front, "POST", "/api/chat", packed, headers)[0].status == 200
    (_, headers, low), (_, _, high) = foreign.seen
    assert "Content-Encoding" not in headers and high == packed
    assert json.loads(low) == {key: asked[key] for key in asked if key != name}


# ------------------------------------------------------------------ what goes where


def test_lists_show_the_local_models_and_then_the_upstreams_others(
    foreign: Foreign, front: MLXServer
):
    tags = json.loads(ask(front, "GET", "/api/tags", headers=KEY)[1])["models"]
    assert [tag["name"] for tag in tags][:1] == ["demo:latest"] and tags[0][
        "digest"
    ] != "not the local one"
    assert tags[1:] == [TAGS[0], TAGS[1], TAGS[3]]
    page = json.loads(ask(front, "GET", "/v1/models?limit=2", headers=KEY)[1])
    assert [model["id"] for model in page["data"]] == ["demo", "far:latest"] and page["has_more"]
    rest = json.loads(ask(front, "GET", "/v1/models?after_id=far:latest", headers=KEY)[1])
    assert [model["id"] for model in rest["data"]] == ["Org/GGUF:Q4_K_M", "claude-sonnet:latest"]
    one = json.loads(ask(front, "GET", "/v1/models/org%2Fgguf:q4_k_m", headers=KEY)[1])
    assert (one["id"], one["created"]) == ("Org/GGUF:Q4_K_M", 0)
    assert ask(front, "GET", "/v1/models/nope", headers=KEY)[0].status == 404


@pytest.mark.parametrize(
    "name, relayed",
    [
        ("far", True),
        ("Far:latest", True),
        ("org/gguf:q4_k_m", True),
        ("gpt-oss:120b-cloud", True),
        ("kimi-k2:cloud", True),
        ("demo", False),
        ("demo:latest", False),
        ("claude-sonnet", False),
        ("opus", False),
        ("far:7b", False),
        ("gguf", False),
    ],
)
def test_local_and_vendors_names_stay_here_and_only_what_the_upstream_has_is_relayed(
    foreign: Foreign, front: MLXServer, name: str, relayed: bool
):
    ask(front, "POST", "/v1/messages", {**HI, "model": name}, KEY)
    assert bool(foreign.seen) == relayed


def test_a_name_that_nobody_knows_is_refused_as_ever(
    foreign: Foreign, front: MLXServer, engine: Engine
):
    with running(MLXServer(("127.0.0.1", 0), engine)) as alone:
        for path in ("/v1/messages", "/api/chat", "/api/show"):
            (one, here), (two, there) = (
                ask(at, "POST", path, {**HI, "model": "nope"}, KEY) for at in (front, alone)
            )
            assert (
                one.status == two.status == 404
                and json.loads(here)["error"] == json.loads(there)["error"]
            )
    assert not foreign.seen


def test_while_a_local_model_answers_nobody_asks_the_upstream(engine: Engine, remember: None):
    with running(Foreign()) as foreign, relay_to(foreign.url, engine) as front:
        for path, body in (
            ("/v1/messages", {**HI, "model": "demo"}),
            ("/v1/messages", {"model": "demo", "max_tokens": -1}),
            ("/api/show", {"model": "demo"}),
            ("/api/chat", {"model": 1}),
            ("/api/chat", b"{"),
        ):
            ask(front, "POST", path, body)
        ask(front, "GET", "/v1/models/demo")
        assert foreign.asked == 0
        for _ in range(2):
            ask(front, "POST", "/api/chat", HI)
        assert (foreign.asked, len(foreign.seen)) == (1, 2)


@pytest.mark.parametrize(
    "method, path",
    [
        ("DELETE", "/api/delete"),
        pytest.param("POST", "/api/pull", marks=pytest.mark.slow),
        ("POST", "/api/push"),
        ("POST", "/api/copy"),
        ("POST", "/api/create"),
        ("POST", "/api/blobs/sha256:0"),
        ("GET", "/api/ps"),
        ("PUT", "/api/chat"),
        ("POST", "/api/chat/../pull"),
        ("POST", "/api/chat%2f..%2fpull"),
        ("POST", "/api/tags"),
    ],
)
def test_no_other_route_reaches_the_upstream(
    foreign: Foreign, front: MLXServer, method: str, path: str
):
    ask(front, method, path, {"model": "far", "name": "far"}, KEY)
    assert not foreign.seen


def test_a_request_is_not_relayed_twice(foreign: Foreign, front: MLXServer):
    again = {**KEY, "Via": "1.0 other, 1.1 mlx-server"}
    response, text = ask(front, "POST", "/api/chat", HI, again)
    assert (response.status, json.loads(text)) == (
        404,
        {"error": "model 'far' not found"},
    ) and not foreign.seen
    assert len(json.loads(ask(front, "GET", "/api/tags", headers=again)[1])["models"]) == 1
    assert ask(front, "POST", "/api/chat", HI, {**KEY, "Via": "1.0 other"})[0].status == 200


def test_what_finds_the_queue_full_overflows_to_the_upstreams_model_of_that_name(foreign: Foreign):
    with (
        Engine("demo", max_queue=0) as full,
        relay_to(foreign.url, full) as strict,
        relay_to(foreign.url, full, overflow=True) as generous,
    ):
        demo, vendors = ({**HI, "model": model} for model in ("demo", "claude-opus"))
        refusal = ask(strict, "POST", "/v1/messages", demo)[0].status
        assert refusal == 529 and not foreign.seen
        assert (
            ask(generous, "POST", "/v1/messages", demo)[0].status == 200 and len(foreign.seen) == 1
        )
        assert (
            ask(generous, "POST", "/v1/messages", vendors)[0].status == refusal
            and len(foreign.seen) == 1
        )


# ------------------------------------------------------------------ accidents


def refused(front: MLXServer) -> dict[str, tuple[int, str]]:
    """Status and sentence for "far" in each dialect."""
    answers = {path: ask(front, "POST", path, HI) for path in ("/v1/messages", "/api/chat")}
    return {
        path: (response.status, error["message"] if path == "/v1/messages" else error)
        for path, (response, text) in answers.items()
        for error in [json.loads(text)["error"]]
    }


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["Connection refused", "timed out", "status 200 and no list"])
def test_without_its_upstream_a_server_serves_its_own_models_and_says_why_not_others(
    engine: Engine, reason: str
):
    with contextlib.ExitStack() as stack:
        # Accepts, and says nothing
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if reason == "Connection refused":
            listener.close()
        elif reason != "timed out":
            url = stack.enter_context(running(ThreadingHTTPServer(("127.0.0.1", 0), NoOllama))).url
        front = stack.enter_context(relay_to(url, engine))
        assert ask(front, "POST", "/api/chat", {**HI, "model": "demo"})[0].status == 200
        for status, sentence in refused(front).values():
            assert status == 404
            assert (
                sentence
                == f"model 'far' not found here, and the upstream {url} cannot be asked: "
                + {"status 200 and no list": "GET /api/tags gave status 200 and no list"}.get(
                    reason, reason
                )
            )
        assert [tag["name"] for tag in json.loads(ask(front, "GET", "/api/tags")[1])["models"]] == [
            "demo:latest"
        ]
        assert b"cannot be asked" in ask(front, "GET", "/v1/models/far")[1]


class NoOllama(ForeignHandler):
    def do_GET(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n[]")


def test_an_upstream_that_fails_before_it_answers_is_a_bad_gateway(engine: Engine, remember: None):
    with running(Foreign()) as foreign, relay_to(foreign.url, engine) as front:
        foreign.answer = lambda out: None
        for status, sentence in refused(front).values():
            assert status == 502 and f"the upstream {foreign.url} failed" in sentence
        foreign.answer = lambda out: out(b"nonsense\r\n\r\n")
        assert [status for status, _ in refused(front).values()] == [502, 502]
        foreign.shutdown()
        foreign.server_close()
        for status, sentence in refused(front).values():
            assert status == 502 and "Connection refused" in sentence


@pytest.mark.parametrize(
    "start",
    [
        b"Transfer-Encoding: chunked\r\n\r\n4\r\none\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n4\r\none\n\r\nnonsense\r\n",
        b"Content-Length: 9\r\n\r\none\n",
        b"Transfer-Encoding: chunked\r\n\r\n9\r\none\n",
    ],
)
def test_a_stream_that_breaks_is_cut_and_not_ended(
    foreign: Foreign, front: MLXServer, start: bytes
):
    foreign.answer = lambda out: out(b"HTTP/1.1 200 OK\r\n" + start)
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(front, "POST", "/api/chat", HI, KEY)
    assert cut.value.partial in (b"one\n", b"")
    answer = raw(
        front, post("/api/chat", b'{"model":"far"}', "Content-Length: 15", "x-api-key: secret")
    )
    assert b"one\n" in answer and not answer.endswith(b"0\r\n\r\n")


def test_a_header_of_an_answer_stays_one(foreign: Foreign, front: MLXServer):
    foreign.answer = lambda out: out(
        b"HTTP/1.1 200 OK\r\nX-Mine: a\r\n\tX-Other: b\r\nSet-Cookie: c=d\r\n"
        b'Clear-Site-Data: "*"\r\nWWW-Authenticate: Basic\r\nRefresh: 0\r\n'
        b"Access-Control-Allow-Credentials: true\r\nContent-Length: 2\r\n\r\n{}"
    )
    body = b'{"model":"far"}'
    answer = raw(front, post("/api/chat", body, "Content-Length: 15", "x-api-key: secret"))
    assert b"x-mine: a \tX-Other: b\r\n" in answer and b"c=d" not in answer
    for name in (b"clear-site", b"authenticate", b"refresh", b"access-control"):
        assert name not in answer.lower()


def test_what_an_upstream_says_that_is_no_answer_is_quoted_in_part(
    foreign: Foreign, front: MLXServer
):
    foreign.answer = lambda out: out(b"nonsense " * 5000)
    response, text = ask(front, "POST", "/api/chat", HI, KEY)
    assert response.status == 502 and b"nonsense nonsense" in text and len(text) < 400


def test_a_client_that_goes_away_ends_an_answer_that_never_begins(
    foreign: Foreign, front: MLXServer
):
    began, ended, over = threading.Event(), threading.Event(), threading.Event()

    def answer(out: Callable[[bytes], int]) -> None:
        try:
            while not over.is_set():
                out(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)
                began.set()
        except OSError:
            ended.set()

    foreign.answer = answer
    request = post("/api/chat", b'{"model":"far"}', "Content-Length: 15", "x-api-key: secret")
    with socket.create_connection(("127.0.0.1", front.port)) as connection:
        connection.sendall(request)
        assert began.wait(PATIENCE)
    try:
        assert ended.wait(PATIENCE)
    finally:
        over.set()


def test_a_list_of_models_that_makes_no_sense_is_none(engine: Engine):
    class Nested(ForeignHandler):
        def do_GET(self):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000)

    with (
        running(ThreadingHTTPServer(("127.0.0.1", 0), Nested)) as upstream,
        relay_to(upstream.url, engine) as front,
    ):
        assert ask(front, "GET", "/v1/models")[0].status == 200


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n"])
def test_an_upstream_that_tells_its_models_byte_by_byte_is_given_up(
    head: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("_mlx_server.front.upstream.CONNECT_TIMEOUT", 1.0)
    left = threading.Event()

    def drip(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            client.sendall(head)
            while not left.wait(0.05):
                client.sendall(b" " if head else b"H")
        left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        try:
            upstream = Upstream(f"http://127.0.0.1:{listener.getsockname()[1]}")
            with ThreadPoolExecutor() as pool:
                tags = pool.submit(upstream.tags)
                assert tags.result(60) == []
        finally:
            left.set()
            thread.join()


def test_a_query_that_is_no_uri_harms_nobody(foreign: Foreign, front: MLXServer):
    request = post(
        "/api/chat?x", b'{"model":"far"}', "Content-Length: 15", "x-api-key: secret"
    ).replace(b"?x", b"?\xff")
    assert raw(front, request).startswith(b"HTTP/1.1 502")
    assert not foreign.seen


@pytest.mark.parametrize(
    "url",
    [
        "localhost:11434",
        "https://localhost",
        "http://",
        "http://h:99999",
        "http://h/path",
        "http://a@h",
    ],
)
def test_an_upstream_has_a_plain_url(url: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        mlx_server.main(["--upstream", url])
    assert url.replace("http://h:", "") in capsys.readouterr().err.splitlines()[-1]


def test_overflow_needs_an_upstream(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        mlx_server.main(["--overflow"])
    assert "--upstream" in capsys.readouterr().err.splitlines()[-1]
