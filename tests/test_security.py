"""What the server refuses: over real sockets, with clients that mean harm or are clumsy."""

from __future__ import annotations

import base64
import gzip
import json
import os
import resource
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, Server, until
from test_http import ASK, ask, post, raw

import mlx_server

BODY = json.dumps(ASK).encode()
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH, CODING = f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"
HI = [{"role": "user", "content": "hi"}]


def get(server: Server, *headers: str, line: str = "GET /api/tags HTTP/1.1") -> bytes:
    return raw(server, "\r\n".join([line, *headers, "Connection: close", "", ""]).encode())


def status(answer: bytes) -> int:
    return int(answer.split()[1])


# ------------------------------------------------------------------ heads and bodies


@pytest.mark.parametrize(
    "headers, body",
    [
        ((LENGTH, CODING), CHUNKED),
        ((LENGTH, LENGTH), BODY),
        ((LENGTH, "Content-Length: 5"), BODY),
        ((f"{LENGTH}, {len(BODY)}",), BODY),
        ((f"Content-Length: +{len(BODY)}",), BODY),
        (("Content-Length: -1",), BODY),
        (("Transfer-Encoding: gzip, chunked",), CHUNKED),
        (("Transfer-Encoding: xchunked",), CHUNKED),
        ((CODING, "Transfer-Encoding: identity"), CHUNKED),
        (("Transfer-Encoding : chunked", LENGTH), BODY),
        (("Transfer-Encoding:\r\n chunked",), CHUNKED),
        ((LENGTH, "X-Folded: a\r\n b"), BODY),
        ((f"X-Bare: a\r{LENGTH}",), BODY),
        ((CODING,), b"0x" + CHUNKED),
        ((CODING,), b"+" + CHUNKED),
        ((CODING,), b" " + CHUNKED),
        ((CODING,), b"\r\n" + CHUNKED),
        ((CODING,), CHUNKED.replace(b"}\r\n0", b"}xx0")),
        ((CODING,), b"%x;" % len(BODY) + b"a" * 1021 + BODY + b"\r\n0\r\n\r\n"),
        ((CODING,), b"f" * 16 + CHUNKED),
        ((CODING,), CHUNKED.replace(b"\r\n{", b"\n{")),
        ((CODING,), b"1;\n{\r\n" + CHUNKED),
        ((CODING,), CHUNKED.removesuffix(b"\r\n") + b" \r\n"),
        ((CODING,), CHUNKED.removesuffix(b"\r\n") + b"\n"),
        ((CODING,), CHUNKED.removesuffix(b"\r\n") + b"X: a\n\r\n"),
        ((CODING,), CHUNKED.removesuffix(b"\r\n") + b"X : a\r\n\r\n"),
        (("X: a\nY: b", LENGTH), BODY),
        (("X: a\0b", LENGTH), BODY),
        (("X: a\x0bb", LENGTH), BODY),
        (("X: a\x1cContent-Length: 5", LENGTH), BODY),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_served(
    server: Server, headers: tuple, body: bytes
):
    head = "\r\n".join(["POST /v1/messages HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()
    answer = raw(server, head + body + b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status(answer) in (400, 411)
    assert answer.count(b"HTTP/1.1 ") == 1 and b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize(
    "line",
    ["GET /", "GET\t/ HTTP/1.1", "GET  / HTTP/1.1", "GET / HTTP/1.1 ", "GET\x0b/ HTTP/1.1"]
    + ["GET\x85/ HTTP/1.1", "GET / HTTP/1.10", "GET / HTTP/01.1", "GET /\0 HTTP/1.1"],
)
def test_a_request_line_has_one_form(server: Server, line: str):
    answer = raw(server, f"{line}\r\nHost: localhost\r\n\r\n".encode("latin-1"))
    assert b" 200 " not in answer and b"malformed request line" in answer


def test_an_old_client_sends_no_chunks(server: Server):
    head = f"POST /v1/messages HTTP/1.0\r\nConnection: keep-alive\r\n{CODING}\r\n\r\n".encode()
    answer = raw(server, head + CHUNKED + b"GET /api/version HTTP/1.0\r\n\r\n")
    assert status(answer) == 400 and answer.count(b"HTTP/1.1 ") == 1


def test_trailers_are_read_and_ignored(server: Server):
    body = CHUNKED.removesuffix(b"\r\n") + b"X-Sum: 1\r\n\r\n"
    assert status(raw(server, post("/v1/messages", body, CODING))) == 200


def test_limits_of_heads_and_bodies(server: Server):
    host = "Host: localhost"
    assert status(get(server, host, *(f"X-{n}: 1" for n in range(101)))) == 431
    assert status(get(server, host, f"X: {'a' * 70000}")) == 431
    assert status(get(server, host, *(f"X-{n}: {'a' * 1000}" for n in range(70)))) == 431
    assert status(get(server, host, line=f"GET /{'a' * 70000} HTTP/1.1")) == 414
    bomb = gzip.compress(bytes(40 << 20))
    assert len(bomb) < 50_000
    assert (
        status(
            raw(
                server,
                post("/api/chat", bomb, "Content-Encoding: gzip", f"Content-Length: {len(bomb)}"),
            )
        )
        == 413
    )
    tiny = b"1\r\n \r\n" * 100 + b"2000000\r\n"  # what chunks cost counts, too
    assert status(raw(server, post("/api/chat", tiny, CODING))) == 413


@pytest.mark.parametrize(
    "headers, expected",
    [
        ((), 400),
        (("Host: localhost", "Host: evil.example"), 400),
        (("Host: evil.example@localhost",), 400),
        (("Host: localhost/evil.example",), 400),
        (("Host: localhost:1x",), 400),
        (("Host: localhost evil.example",), 400),
        (("Host: evil.example.",), 403),
        (("Host: localhost.evil.example",), 403),
        (("Host: 8.8.8.8",), 403),
        (("Host: [2600::1]",), 403),
        (("Host: [::ffff:8.8.8.8]:80",), 403),
        (("Host: LOCALHOST:1",), 200),
        (("Host: [::1]",), 200),
        (("Host: localhost", "Origin: null"), 403),
        (("Host: localhost", "Origin: http://localhost:1 https://evil.example"), 403),
        (("Host: localhost", "Origin: http://localhost:1", "Origin: https://evil.example"), 400),
        (("Host: localhost", "Origin: http://localhost@evil.example"), 403),
        (("Host: localhost", "Origin: //localhost"), 200),
    ],
)
def test_a_web_page_does_not_get_in_by_another_name(server: Server, headers: tuple, expected: int):
    answer = get(server, *headers)
    assert status(answer) == expected, answer
    assert b"evil" not in answer.partition(b"\r\n\r\n")[0]


def test_no_foreign_page_is_let_into_the_private_network(server: Server):
    preflight = "OPTIONS /v1/messages HTTP/1.1"
    asks = (
        "Host: localhost",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Private-Network: true",
    )
    answer = get(server, *asks, "Origin: https://evil.example", line=preflight)
    assert (
        status(answer) == 403
        and b"allow-origin" not in answer.lower()
        and b"private" not in answer.lower()
    )
    forged = get(
        server,
        *asks,
        "Origin: http://localhost:1",
        "Access-Control-Request-Headers: a\r\n Evil: x",
        line=preflight,
    )
    assert status(forged) == 400 and b"Evil" not in forged


# ------------------------------------------------------------------ many and slow connections


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[mlx_server.MLXServer]:
    """A server without an engine that waits 0.4 s for a request, and has room for four connections
    and for two more that are refused. It answers `/api/hello` after `release` was called."""
    monkeypatch.setattr("_mlx_server.front.sockets.REQUEST_DEADLINE", 0.4)
    monkeypatch.setattr("_mlx_server.front.connections.MAX_CONNECTIONS", 4)
    monkeypatch.setattr("_mlx_server.front.connections.MAX_REFUSALS", 2)
    server = mlx_server.MLXServer(("127.0.0.1", 0))
    server.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    released = threading.Event()

    def hold(handler: mlx_server.Handler) -> None:
        assert released.wait(60)
        handler.send(200, b"")

    server.release = released.set
    monkeypatch.setitem(mlx_server.ROUTES, "/api/hello", {"GET": hold})
    yield server
    released.set()
    server.stop()


@pytest.mark.parametrize(
    "head, answer",
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b""),
        (post("/api/show", b"", "Content-Length: 1000000"), b"HTTP/1.1 408"),
        (post("/api/show", b"fffff\r\n", CODING), b"HTTP/1.1 408"),
    ],
)
def test_a_request_that_trickles_in_is_given_up(
    brief: mlx_server.MLXServer, head: bytes, answer: bytes
):
    with socket.create_connection(("127.0.0.1", brief.port), timeout=0.05) as connection:
        connection.sendall(head)
        got = None
        while got is None:  # for ever, if each byte were a new beginning
            try:
                connection.sendall(b"a")
                got = connection.recv(1000)
            except TimeoutError:
                pass
            except ConnectionError:
                got = b""
        assert got[: len(answer)] == answer and bool(got) == bool(answer)
    assert ask(brief, "GET", "/")[0].status == 200


def test_connections_beyond_what_there_is_room_for_are_told_so(brief: mlx_server.MLXServer):
    with ExitStack() as stack:

        def connect() -> socket.socket:
            address = ("127.0.0.1", brief.port)
            return stack.enter_context(socket.create_connection(address, timeout=60))

        held = [connect() for _ in range(4)]
        for connection in held:
            connection.sendall(b"GET /api/hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: brief.connections == 4 and brief.waiting == 0)
        for path, expected in (
            ("/v1/messages", 529),
            ("/v1/chat/completions", 503),
            ("/api/chat", 503),
            ("/", 503),
        ):
            refused, text = ask(brief, "POST", path, b"x" * 200_000)
            assert refused.status == expected and refused.headers["Connection"] == "close"
            assert json.loads(text)["error"]
            until(lambda: brief.connections == 4)
        connect(), connect()
        assert connect().recv(1000) == b""  # not even an error is sent to this many
        brief.release()
        assert held[0].recv(1000).startswith(b"HTTP/1.1 200")
    until(lambda: brief.connections == 0)
    assert ask(brief, "GET", "/")[0].status == 200


def test_the_room_leaves_files_to_open():
    with mlx_server.MLXServer(("127.0.0.1", 0)) as server:
        assert 0 < server.max_connections <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


@pytest.mark.slow
def test_it_asks_for_the_files_it_needs():
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))  # as in a Mac's terminal
    try:
        server = Server()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    with ExitStack() as stack:
        for _ in range(130):
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", server.port), timeout=20)
            )
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert server.stop() == 0


# ------------------------------------------------------------------ keys


@pytest.mark.slow
def test_a_server_for_others_without_a_key_warns_in_a_line_and_one_for_this_machine_does_not(
    server: Server,
):
    assert not [line for line in server.lines if "--api-key-file" in line]
    wide = Server("--host", "0.0.0.0")
    line = wide.wait_for(".*whoever reaches.*")[0]
    assert "--api-key-file" in line and "--host" in line
    assert wide.stop() == 0


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys from a file that has models nobody can load, and that says all it can."""
    folder = tmp_path_factory.mktemp("with blank")
    keys = folder / "keys"
    keys.write_text("secret-one\n\n secret-two=low \nключ-three\n", "utf-8")
    keys.chmod(0o644)
    for name, file, more in [
        (
            "Remote-Tokenizer",
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        ),
        ("Remote-Model", "config.json", {"model_file": "own.py"}),
        ("Mapped", "config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}),
        ("Unknown", "config.json", {"model_type": "unknown"}),
        ("Broken", "config.json", {"hidden_size": 7}),
    ]:
        model = shutil.copytree(ROOT / "tests" / "demo", folder / "models" / name)
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**content, **more}))
        (model / "own.py").write_text(
            f"open({str(folder / 'has-run')!r}, 'w')\nOwn = Model = ModelArgs = None\n"
        )
    (
        shutil.copytree(ROOT / "tests" / "demo", folder / "models" / "No-Tokenizer")
        / "tokenizer.json"
    ).write_text("{")
    shutil.copytree(ROOT / "tests" / "demo", folder / "outside")
    server = Server(
        "--api-key-file",
        str(keys),
        "--models-dir",
        str(folder / "models"),
        "--verbose",
        "--alias",
        f"gone={folder}/nothing/here",
        "--state",
        str(folder / "presets.json"),
    )
    server.folder = folder
    yield server
    assert server.stop() == 0
    assert not (folder / "has-run").exists()


def call(
    server: Server, path: str, body: dict | None = None, method: str = "POST"
) -> tuple[int, str]:
    response, text = ask(server, method, path, body, {"x-api-key": "secret-one"})
    return response.status, text.decode()


def test_keys_of_a_file_open_every_route_and_others_none(guarded: Server):
    routes = [(method, path) for path, methods in mlx_server.ROUTES.items() for method in methods]
    for method, path in [
        *routes,
        ("GET", "/v1/models/demo"),
        ("POST", "/api/blobs/sha256:0"),
        ("DELETE", "/activity/1"),
        ("GET", "/nowhere"),
    ]:
        for key in ("", "secret", "secret-one ", "secret-two=low", "guess-4711"):
            response, text = ask(guarded, method, path, None, {"Authorization": f"Bearer {key}x"})
            is_open = path in ("/", "/health") or path.startswith("/page/")
            assert response.status == (200 if is_open else 401), (method, path)
            assert b"secret" not in text and b"guess" not in text
    for key in ("secret-one", "secret-two", "ключ-three".encode()):
        assert ask(guarded, "GET", "/api/tags", None, {"x-api-key": key})[0].status == 200
    refused = ask(
        guarded,
        "POST",
        "/api/chat",
        {"messages": 1},
        {"x-api-key": "secret-one", "x-priority": "secret-one"},
    )
    assert refused[0].status == 400 and b"secret" not in refused[1]


def test_the_log_shows_no_key_and_who_can_read_their_file_is_told(guarded: Server):
    guarded.wait_for(r"others may read the keys in .*chmod 600 '.*/keys'")
    ask(
        guarded,
        "GET",
        "/v1/last",
        None,
        {"x-api-key": "guess-4711", "Authorization": "Bearer guess-4711"},
    )
    guarded.wait_for("/v1/last -> 401")
    assert not [
        line for line in guarded.lines if "secret" in line or "guess" in line or "three" in line
    ]


def test_the_list_of_processes_shows_no_key_of_a_file(guarded: Server):
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    assert f"{guarded.folder}/nothing/here" in listed and "secret-one" not in listed


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--api-key", ""], "cannot be empty"),
        (["--api-key-file", "/no/keys"], "/no/keys cannot be read: No such file"),
        (["--api-key-file", os.devnull], "holds no key"),
        (["--api-key", "secret"], "--api-key-file"),
        ([], "--api-key-file"),
    ],
)
def test_a_server_that_should_have_keys_never_starts_without_them(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("MLX_SERVER_API_KEY", "secret")
    with pytest.raises(SystemExit, match="2"):
        mlx_server.main(["--print-launchd", *flags])
    said_all = capsys.readouterr()
    assert said in said_all.err and "secret" not in said_all.out + said_all.err


# ------------------------------------------------------------------ models


@pytest.mark.parametrize(
    "name", ["Remote-Tokenizer", "Remote-Model", "Unknown", "Broken", "No-Tokenizer", "gone"]
)
def test_a_model_that_cannot_be_loaded_is_the_callers_error_and_says_nothing_of_the_machine(
    guarded: Server, name: str
):
    seen = len(guarded.lines)
    for path in (
        "/v1/messages",
        "/api/chat",
        "/v1/chat/completions",
        "/api/embed",
        "/v1/messages/count_tokens",
    ):
        code, text = call(
            guarded,
            path,
            {"model": name, "max_tokens": 1, "messages": HI, "input": "hi", "stream": False},
        )
        assert code in (400, 404) or (code, path) == (200, "/v1/messages/count_tokens"), text
        assert str(guarded.folder) not in text and "blank" not in text and "/tmp" not in text
        if name.startswith("Remote") and code != 200:
            assert (
                "wants Python code that comes with it to be run, which is never done here" in text
            )
    if name.startswith("Remote"):
        guarded.wait_for(f"{name}.*Python code.*{guarded.folder}/models/{name}", since=seen)


def test_code_that_is_not_needed_is_no_hindrance(guarded: Server):
    code, text = call(
        guarded,
        "/api/chat",
        {"model": "mapped", "messages": HI, "stream": False, "options": {"num_predict": 2}},
    )
    assert code == 200 and json.loads(text)["done"]


def test_lists_and_descriptions_say_nothing_of_the_machine(guarded: Server):
    call(guarded, "/api/create", {"model": "mine", "from": "demo"})
    call(guarded, "/api/generate", {"model": "demo", "prompt": ""})
    places = [
        ("GET", "/api/tags", None),
        ("GET", "/api/ps", None),
        ("GET", "/v1/models", None),
        ("GET", "/metrics", None),
        ("GET", "/activity", None),
        ("POST", "/api/show", {"model": "demo", "verbose": True}),
        ("POST", "/api/show", {"model": "mine"}),
        ("POST", "/api/show", {"model": "unknown"}),
        ("DELETE", "/api/delete", {"model": "demo"}),
    ]
    for method, path, body in places:
        _, text = call(guarded, path, body, method)
        assert not any(
            str(place) in text for place in (guarded.folder, ROOT, Path.home(), "site-packages")
        ), path


OUTSIDE = [
    "../outside",
    "models/../../outside",
    "{folder}/outside",
    "{folder}/models/../outside",
    "{folder}",
    "/etc/passwd",
    "~",
    "~root",
    "~nobody-here/x",
    "./outside",
    "outside",
    "..",
    ".",
    "/",
    "\0",
    "/\0",
    "/etc\0",
    "demo\0",
    "mapped/../../outside",
    "mapped/..",
    "%2e%2e/outside",
    "..%2foutside",
    "file:///etc/passwd",
    "a" * 70000,
    "/" + "a/" * 3000,
]


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_a_name_does_not_reach_outside_the_folders_of_models(guarded: Server, name: str):
    name = name.format(folder=guarded.folder)
    for path in ("/v1/messages", "/api/show", "/api/delete", "/v1/embeddings"):
        body = {"model": name, "max_tokens": 1, "messages": HI, "input": "hi"}
        code, text = call(guarded, path, body, "DELETE" if path == "/api/delete" else "POST")
        assert code in (400, 404), (path, code, text[:300])
    for path in ("/api/create", "/api/copy", "/api/pull"):
        body = {
            "from": "demo",
            "source": "demo",
            "destination": name,
            "stream": False,
            "model": name,
        }
        if name != "outside":
            assert call(guarded, path, body)[0] == 400
    assert (guarded.folder / "outside" / "config.json").exists()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2foutside",
        "/v1/models/%2fetc%2fpasswd",
        "/v1/models/%252e%252e/x",
        "/v1/models/~nobody",
        "/v1/models/%2f%00",
        "/api/blobs/sha256:../../keys",
        "/api/blobs/..%2f..%2fkeys",
        "//etc/passwd",
        "/../keys",
        "/api/../../keys",
        "/%2e%2e/keys",
    ],
)
def test_a_path_does_not_reach_a_file(guarded: Server, path: str):
    code, text = call(guarded, path, None, "GET")
    assert code == 404 and "secret" not in text and "root:" not in text


# ------------------------------------------------------------------ what others are asked


def naming(url: str) -> Iterator[tuple[str, dict]]:
    """Paths and bodies, in each of which the URL stands where a file is expected."""
    text, source = {"type": "text", "text": "say hi"}, {"type": "url", "url": url}
    image, document = {"type": "image", "source": source}, {"type": "document", "source": source}
    uploaded = {"type": "image", "source": {"type": "file", "file_id": url}}
    for blocks in ([image, document], [uploaded]):
        yield "/v1/messages", {"messages": [{"role": "user", "content": [*blocks, text]}]}
    for block in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "file", "file": {"file_data": url}},
        {"type": "input_audio", "input_audio": {"data": url}},
    ):
        yield "/v1/chat/completions", {"messages": [{"role": "user", "content": [block, text]}]}
    said = {"type": "input_text", "text": "say hi"}
    for block in (
        {"type": "input_image", "image_url": url},
        {"type": "input_file", "file_url": url},
    ):
        yield "/v1/responses", {"input": [{"role": "user", "content": [block, said]}]}
    encoded = base64.b64encode(url.encode()).decode()
    message = {"role": "user", "content": "say hi", "images": [url, encoded]}
    yield "/api/chat", {"messages": [message]}
    yield "/api/generate", {"prompt": "say hi", "images": [url]}


def test_urls_of_images_and_documents_are_never_fetched(server: Server):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        for path, body in naming(f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"):
            body = {"model": "demo", "max_tokens": 4, "stream": False, **body}
            answer, said = ask(server, "POST", path, body)
            assert answer.status in (200, 400), said
        trap.setblocking(False)
        with pytest.raises(BlockingIOError):
            trap.accept()
