"""HTTP itself, over real sockets: framing, bodies, errors in the right dialect, guards, clients
that go away."""

from __future__ import annotations

import gzip
import http.client
import json
import socket

import pytest
from conftest import Server

ASK = {"model": "demo", "max_tokens": 60, "messages": [{"role": "user", "content": "say hello"}]}
LONG = "word " * 20000  # tens of seconds of prefill


def ask(server: Server, method: str, path: str, body: object = None, headers: dict | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, headers or {})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response, text


def raw(server: Server, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(text)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def post(path: str, body: bytes, *headers: str) -> bytes:
    return (
        "\r\n".join(
            [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", ""]
        ).encode()
        + body
    )


@pytest.mark.parametrize(
    "method, path, status, text",
    [
        ("GET", "/", 200, b"Ollama is running"),
        ("HEAD", "/", 200, b""),
        ("HEAD", "/api/hello", 200, b""),
        ("GET", "/health", 200, b'{"status":"ok"}'),
        ("HEAD", "/api/tags", 200, b""),
        ("GET", "/api/version", 200, b"version"),
        ("GET", "/api/nope", 404, b'{"error":"404 page not found"}'),
        ("GET", "/v1/files", 404, b"not_found_error"),
        ("GET", "/api/chat", 405, b'{"error":"405 method not allowed"}'),
        ("GET", "/v1/messages", 405, b'"type":"error"'),
        ("GET", "/v1/models?limit=1000", 200, b'"has_more":false'),
        ("GET", "/v1/models/demo", 200, b'"lifecycle":"active"'),
        ("GET", "/v1/models/org%2Fnope", 404, b"not_found_error"),
        ("GET", "/v1/models/org/nope", 404, b"org/nope"),
    ],
)
def test_routes(server: Server, method: str, path: str, status: int, text: bytes):
    response, body = ask(server, method, path)
    assert (response.status, text in body) == (status, True), body
    assert (response.getheader("request-id", "").startswith("req_")) == path.startswith("/v1/")
    if status == 405:
        assert "POST" in response.getheader("Allow")


@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat"])
@pytest.mark.parametrize(
    "body, headers, status",
    [
        (b"", {"Content-Length": "0"}, 400),
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100000, {}, 400),
        (b"{}", {}, 400),
        (b"1" * 5000, {}, 400),
        (b"x", {"Content-Encoding": "gzip"}, 400),
        (b"x", {"Content-Encoding": "br"}, 400),
    ],
)
def test_bad_bodies_are_the_clients_error_in_its_dialect(
    server: Server, path: str, body: bytes, headers: dict, status: int
):
    response, text = ask(server, "POST", path, body, headers)
    assert response.status == status
    error = json.loads(text)["error"]
    said = error["message"] if path.startswith("/v1") else error
    assert said and "sys." not in said


def test_a_body_needs_a_length_and_has_a_limit(server: Server):
    assert raw(server, post("/v1/messages", b"")).startswith(b"HTTP/1.1 411")
    refused = raw(server, post("/v1/messages", b"x" * 100, f"Content-Length: {33 << 20}"))
    assert refused.startswith(b"HTTP/1.1 413") and b"request_too_large" in refused
    assert raw(server, post("/api/chat", b"zz\r\n", "Transfer-Encoding: chunked")).startswith(
        b"HTTP/1.1 400"
    )


def test_chunked_and_compressed_bodies(server: Server):
    body = json.dumps(ASK).encode()
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:10], body[10:])) + b"0\r\n\r\n"
    assert b'"text":"hello"' in raw(
        server, post("/v1/messages?beta=true", pieces, "Transfer-Encoding: chunked")
    )
    response, text = ask(
        server, "POST", "/v1/messages", gzip.compress(body), {"Content-Encoding": "gzip"}
    )
    assert json.loads(text)["content"][0]["text"] == "hello"


def test_ollama_bodies_may_have_any_type_and_junk_behind_them(server: Server):
    body = json.dumps({**ASK, "stream": False}).encode() + b"\njunk"
    response, text = ask(
        server, "POST", "/api/chat", body, {"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert json.loads(text)["message"]["content"] == "hello"
    assert response.getheader("Content-Type") == "application/json; charset=utf-8"


def test_half_a_surrogate_pair_does_no_harm(server: Server):
    body = json.dumps({**ASK, "messages": [{"role": "user", "content": "say \ud800"}]}).encode()
    assert b"\\ud800" in body
    assert ask(server, "POST", "/v1/messages", body)[0].status == 200


def test_connections_are_kept_alive(server: Server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for path, body in (
        ("/v1/messages", {**ASK, "stream": True}),
        ("/api/chat", ASK),
        ("/v1/messages", {"bad": 1}),
    ):
        connection.request("POST", path, json.dumps(body))
        assert connection.getresponse().read()
    local = connection.sock.getsockname()
    connection.request("GET", "/")
    connection.getresponse().read()
    assert connection.sock.getsockname() == local


def test_stream_framing(server: Server):
    response, text = ask(server, "POST", "/v1/messages", {**ASK, "stream": True})
    assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
    assert response.getheader("Transfer-Encoding") == "chunked"
    frames = [frame.split("\n") for frame in text.decode().strip().split("\n\n")]
    names = [lines[0].removeprefix("event: ") for lines in frames]
    assert names == [json.loads(lines[1].removeprefix("data: "))["type"] for lines in frames]
    assert (names[0], names[1], names[-2:]) == (
        "message_start",
        "content_block_start",
        ["message_delta", "message_stop"],
    )

    response, text = ask(server, "POST", "/api/chat", ASK)
    assert response.getheader("Content-Type") == "application/x-ndjson"
    objects = [json.loads(line) for line in text.decode().removesuffix("\n").split("\n")]
    assert [o["done"] for o in objects] == [False] * (len(objects) - 1) + [True]

    response, text = ask(server, "POST", "/api/chat", ASK, {"Accept": "text/event-stream"})
    assert response.getheader("Content-Type").startswith("text/event-stream")
    assert all(
        json.loads(frame.removeprefix("data: ")) for frame in text.decode().strip().split("\n\n")
    )


def test_old_clients_get_an_unchunked_stream(server: Server):
    body = json.dumps(ASK).encode()
    answer = raw(
        server,
        b"POST /api/chat HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body),
    )
    assert b"Transfer-Encoding" not in answer and answer.endswith(b"}\n")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1:1"}, 200),
        ({"Host": "my-mac.local"}, 403),
        ({"Host": "[::1]:11435"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "app://obsidian.md"}, 200),
        ({"Origin": "http://localhost.evil.example"}, 403),
    ],
)
def test_foreign_hosts_and_origins_are_refused(server: Server, headers: dict, status: int):
    response, _ = ask(server, "GET", "/api/tags", headers=headers)
    assert response.status == status
    assert response.getheader("Access-Control-Allow-Origin") == (
        headers.get("Origin") if status == 200 else None
    )


def test_preflight(server: Server):
    asked = "x-api-key, anthropic-version, x-stainless-os"
    response, _ = ask(
        server,
        "OPTIONS",
        "/v1/messages",
        headers={"Origin": "http://localhost:5173", "Access-Control-Request-Headers": asked},
    )
    assert response.status == 204 and response.getheader("Access-Control-Allow-Headers") == asked
    assert response.getheader("Access-Control-Allow-Origin") == "http://localhost:5173"


@pytest.mark.parametrize(
    "path, body",
    [
        ("/api/generate", {"model": "demo", "prompt": f"a {LONG}", "stream": True}),
        ("/api/generate", {"model": "demo", "prompt": f"b {LONG}", "stream": False}),
        (
            "/v1/messages",
            {
                "model": "demo",
                "max_tokens": 9,
                "stream": True,
                "messages": [{"role": "user", "content": f"c {LONG}"}],
            },
        ),
    ],
)
def test_a_client_that_goes_away_stops_its_generation(server: Server, path: str, body: dict):
    seen = len(server.lines)
    connection = socket.create_connection(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    if body["stream"]:
        assert connection.recv(100)
    else:  # accepted once another request, sent later, has been answered
        ask(server, "POST", "/api/chat", ASK)
    connection.close()
    server.wait_for(f"{path} demo: .*client went away", since=seen)
    assert ask(server, "POST", "/v1/messages", ASK)[0].status == 200


def test_silent_and_slow_sockets_block_nobody(server: Server):
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    silent[0].sendall(
        b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    )
    # `ask` gives up long before the server gives up the silent ones
    assert ask(server, "GET", "/api/version")[0].status == 200
    for connection in silent:
        connection.close()


@pytest.mark.parametrize(
    "head, status",
    [
        ("GET //[ HTTP/1.1\r\nHost: localhost", b"404"),
        ("GET /v1/models HTTP/1.1\r\nHost: [::1", b"400"),
        ("GET /api/tags HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[x", b"400"),
        ("GET /api/tags?%zz=[ HTTP/1.1\r\nHost: localhost", b"200"),
    ],
)
def test_malformed_heads(server: Server, head: str, status: bytes):
    assert raw(server, f"{head}\r\nConnection: close\r\n\r\n".encode()).split()[1] == status


def test_a_body_is_asked_for_only_when_it_is_wanted(server: Server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        answer = connection.makefile("rb")
        body = json.dumps(ASK).encode()
        connection.sendall(
            post("/api/chat", b"", "Expect: 100-continue", f"Content-Length: {len(body)}")
        )
        assert (answer.readline(), answer.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        connection.sendall(body)
        assert answer.readline().startswith(b"HTTP/1.1 200")
    for path, length, status in [("/api/chat", 33 << 20, b"413"), ("/api/nope", 10, b"404")]:
        assert (
            raw(
                server, post(path, b"", "Expect: 100-continue", f"Content-Length: {length}")
            ).split()[1]
            == status
        )


def test_a_log_line_cannot_be_forged(server: Server):
    ask(server, "GET", "/api/%0a12:00:00")
    server.wait_for(r"/api/\\n12:00:00")
    assert not [line for line in server.lines if line.startswith("12:00:00")]


def test_garbage_instead_of_http(server: Server):
    assert b"400" in raw(server, b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
    assert ask(server, "GET", "/")[0].status == 200


def test_an_api_key_guards_every_route_but_the_root():
    server = Server("--api-key", "secret")
    try:
        assert ask(server, "GET", "/")[0].status == ask(server, "GET", "/health")[0].status == 200
        for headers in (
            {},
            {"x-api-key": "wrong"},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic secret"},
        ):
            response, text = ask(server, "GET", "/v1/models", headers=headers)
            assert (
                response.status == 401
                and json.loads(text)["error"]["type"] == "authentication_error"
            )
        for headers in (
            {"x-api-key": "secret"},
            {"Authorization": "Bearer secret"},
            {"Authorization": "bearer secret"},
        ):
            assert ask(server, "GET", "/api/tags", headers=headers)[0].status == 200
    finally:
        assert server.stop() == 0
