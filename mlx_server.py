"""The front door: HTTP in, HTTP out.

`python mlx_server.py --port 11435` serves local MLX models to Claude Code, Ollama clients and scripts. This module knows
bytes, routes and sockets. What a body means is the business of `dialects`, what a model does that of `engine`.

One thread serves one connection. It hands a request to the engine, then turns the engine's events into bytes. Between two
events it looks whether the client is still there; when it is not, the generation is cancelled.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import fnmatch
import hmac
import ipaddress
import itertools
import json
import logging
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Iterable, Sequence
from urllib.parse import parse_qsl, unquote, urlsplit

import dialects
from dialects import Object, Reply, WireError
from engine import Done, Engine, EngineError, Priority, Tick

__version__ = "0.1.0"
log = logging.getLogger("mlx_server")

OLLAMA_VERSION = "0.35.0"  # the API level we speak; clients parse it as numbers and refuse what is too old
MAX_BODY = 32 * 1024 * 1024  # bytes, the Messages API's own limit
PING_AFTER = 4.0  # seconds without a byte after which a stream says that it is alive; clients count on 5
PATIENCE = 300.0  # seconds that a socket may take for one read or write
LOCAL_ORIGINS = re.compile(
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?|(app|file|tauri|vscode-webview|vscode-file)://.*", re.I)


class HungUp(ConnectionError):
    """The client has closed its side."""


# ------------------------------------------------------------------ what is counted


class Metrics:
    """Counts for `/metrics`, in Prometheus' text format 0.0.4. From any thread."""

    BUCKETS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]  # seconds to the first token

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._waits = [0] * (len(self.BUCKETS) + 1)
        self._waited = 0.0

    def answered(self, dialect: str, status: int) -> None:
        """An HTTP request was answered."""
        with self._lock:
            self._requests[dialect, status] += 1

    def began(self, seconds: float) -> None:
        """An answer's first token came after so many seconds."""
        with self._lock:
            self._waits[bisect.bisect_left(self.BUCKETS, seconds)] += 1
            self._waited += seconds

    def text(self, engine: Engine) -> str:
        """Everything, with the engine's figures of this moment."""
        stats = engine.stats()
        totals = stats.totals
        with self._lock:
            requests, waits, waited = dict(self._requests), list(self._waits), self._waited
        out: list[str] = []

        def metric(name: str, kind: str, about: str, *samples: tuple[str, float]) -> None:
            out.append(f"# HELP mlx_server_{name} {about}\n# TYPE mlx_server_{name} {kind}")
            out.extend(f"mlx_server_{name}{labels} {value}" for labels, value in samples)

        metric("up", "gauge", "Whether the engine works.", ("", int(engine.health() is None)))
        metric("http_requests_total", "counter", "Answered requests.",
               *((f'{{dialect="{dialect}",status="{status}"}}', count) for (dialect, status), count in sorted(requests.items())))
        metric("generations_total", "counter", "Generations by how they ended.",
               *((f'{{ending="{ending}"}}', count) for ending, count in sorted(totals.endings.copy().items())))
        metric("prompt_tokens_total", "counter", "Tokens of prompts.", ("", totals.prompt_tokens))
        metric("cached_tokens_total", "counter", "Tokens of prompts that were not prefilled again.", ("", totals.cached_tokens))
        metric("completion_tokens_total", "counter", "Generated tokens.", ("", totals.completion_tokens))
        metric("waiting_requests", "gauge", "Requests that wait.", ("", stats.waiting))
        metric("running_requests", "gauge", "Requests that are prefilled or decoded.", ("", stats.running))
        metric("loaded_models", "gauge", "Models in memory.", ("", stats.loaded))
        metric("prefix_cache_bytes", "gauge", "KV states of earlier prompts.", ("", stats.prefix_cache_bytes))
        metric("prefix_cache_limit_bytes", "gauge", "Most bytes of them.", ("", stats.prefix_cache_limit))
        metric("memory_bytes", "gauge", "What MLX holds.", ("", stats.memory))
        metric("memory_limit_bytes", "gauge", "What models and states may take.", ("", stats.memory_limit))
        below = itertools.accumulate(waits)
        metric("time_to_first_token_seconds", "histogram", "From the request to the first piece of its answer.")
        out += [f'mlx_server_time_to_first_token_seconds_bucket{{le="{bound}"}} {count}'
                for bound, count in zip([*self.BUCKETS, "+Inf"], below)]
        out += [f"mlx_server_time_to_first_token_seconds_sum {waited}",
                f"mlx_server_time_to_first_token_seconds_count {sum(waits)}"]
        return "\n".join(out) + "\n"


# ------------------------------------------------------------------ the server


class MLXServer(ThreadingHTTPServer):
    """Serves `engine` at `address` (host, port), once `serve_forever` runs. Raises OSError when the address is taken.

    With `api_keys` every route but `/` and `/health` wants one of them, as `x-api-key` or bearer token; the priority that
    belongs to a key is the highest its holder can have. `priorities` are pairs of a glob, for a model's name or a dialect,
    and the priority of the requests that it matches, where they do not say themselves.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], engine: Engine | None = None, *, api_keys: dict[str, Priority] | None = None,
                 priorities: Sequence[tuple[str, Priority]] = ()):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.engine, self.api_keys, self.priorities = engine, api_keys or {}, priorities
        self.metrics = Metrics()
        self.talking: set[threading.Thread] = set()  # threads in the midst of an answer
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for a name nobody needs
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def loopback(self) -> bool:
        return ipaddress.ip_address(self.server_address[0]).is_loopback

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("connection failed", exc_info=True)

    def stop(self, drain: float = 0.0, grace: float = 4.5) -> None:
        """Takes no new work, gives the running answers `drain` seconds, ends those left with an error their clients
        understand, then everything else, within `grace` seconds."""
        if self.engine is not None:
            self.engine.drain(drain)
        deadline = time.monotonic() + grace
        self.shutdown()
        if self.engine is not None:
            self.engine.close(grace - 1)
        for thread in list(self.talking):
            thread.join(max(0.0, deadline - time.monotonic()))
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection. Routes are at the end of the class."""

    server: MLXServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = PATIENCE

    # -- a request's way through

    def serve(self) -> None:
        """Serves the request whose head has been read."""
        self.request_id = f"req_{secrets.token_hex(12)}"
        self.answered, self.origin = False, ""
        self.body_read = not ({"content-length", "transfer-encoding"} & {name.lower() for name in self.headers})
        self.route, _, query = self.path.partition("?")
        self.route, self.query = unquote(self.route), dict(parse_qsl(query))
        self.anthropic = self.route.startswith("/v1/")
        try:
            self.check_origin()
            if self.command == "OPTIONS":
                return self.send(204, b"")
            self.check_key()
            self.find_route()()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except (WireError, EngineError) as error:
            self.fail(error)
        except Exception as error:
            log.error("%s %s failed", self.command, self.route, exc_info=True)
            self.fail(error)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = serve

    def find_route(self) -> Callable[[], None]:
        methods = ROUTES.get(self.route)
        if methods is None and self.route.startswith("/v1/models/"):
            methods = {"GET": Handler.get_model}
        if methods is None:
            raise WireError(404, "404 page not found" if not self.anthropic else f"Not found: {self.route}")
        handle = methods.get("GET" if self.command == "HEAD" else self.command)
        if handle is None:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
            raise WireError(405, "405 method not allowed", {"Allow": allowed})
        return lambda: handle(self)

    def check_origin(self) -> None:
        """A web page must not reach a local server by rebinding its own name to it, nor from a foreign origin."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin", "")
        try:
            name, foreign = urlsplit(f"//{host}").hostname or "", urlsplit(origin).netloc != host
        except ValueError:
            raise WireError(400, "malformed Host or Origin header") from None
        if self.server.loopback and not _is_local(name):
            raise WireError(403, f"Host '{name}' is not served here")
        if origin and foreign and not LOCAL_ORIGINS.fullmatch(origin):
            raise WireError(403, f"Origin '{origin}' is not allowed")
        self.origin = origin

    def check_key(self) -> None:
        self.highest = Priority.HIGH
        if not self.server.api_keys or self.route in ("/", "/health"):
            return
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        given = [self.headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
        found = [priority for key, priority in self.server.api_keys.items() for one in given
                 if hmac.compare_digest(one.encode(), key.encode())]
        if not found:
            raise WireError(401, "invalid x-api-key", {"x-should-retry": "false"})
        self.highest = min(found)

    def priority(self, reply: Reply, model: str) -> Priority:
        """Who the client is, what it asks for in `x-priority`, or what a rule says of its model or dialect."""
        asked = self.headers.get("x-priority", "").strip().upper()
        if asked and asked not in Priority.__members__:
            raise WireError(400, "x-priority: Input should be 'high', 'normal' or 'low'")
        names = [reply.request.model.lower(), model.lower(), reply.dialect]
        ruled = (priority for pattern, priority in self.server.priorities
                 if any(fnmatch.fnmatchcase(name, pattern.lower()) for name in names))
        keyed = self.highest if self.server.api_keys else Priority.NORMAL
        return max(self.highest, Priority[asked] if asked else next(ruled, keyed))

    # -- bodies in

    def read_json(self) -> Object:
        """The body as JSON. Raises WireError in every case of not being one."""
        raw = self.read_body()
        if not raw.strip():
            raise WireError(400, "missing request body")
        try:
            text = raw.decode("utf-8-sig")
            if self.anthropic:
                body = json.loads(text)
            else:  # Ollama's own decoder stops behind the first value
                body, _ = json.JSONDecoder().raw_decode(text.lstrip())
            if "\\ud" in text.lower():  # half a surrogate pair is no text that a tokenizer could read
                body = json.loads(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise WireError(400, f"the body is not valid JSON: {said}") from None
        if not isinstance(body, dict):
            raise WireError(400, "the body should be a JSON object")
        return body

    def handle_expect_100(self) -> bool:
        return True  # said by `go_on`, once it is certain that the body is wanted

    def go_on(self) -> None:
        """Tells a client that waits for it to send its body (RFC 9110, 10.1.1)."""
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version != "HTTP/1.0":
            self.send_response_only(100)
            self.end_headers()

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            self.go_on()
            raw = b"".join(self.read_chunks())
        else:
            length = self.headers.get("Content-Length")
            if length is None:
                raise WireError(411, "Length Required")
            if not re.fullmatch(r"\d{1,18}", length, re.ASCII):
                raise WireError(400, "bad Content-Length")
            if int(length) > MAX_BODY:
                raise _too_large()
            self.go_on()
            raw = self.read_exactly(int(length))
        self.body_read = True
        coding = self.headers.get("Content-Encoding", "identity").strip().lower()
        if coding in ("gzip", "x-gzip", "deflate"):
            try:
                inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
                raw = inflater.decompress(raw, MAX_BODY)
            except zlib.error:
                raise WireError(400, f"the body is not valid {coding}") from None
            if inflater.unconsumed_tail:
                raise _too_large()
        elif coding not in ("", "identity"):
            raise WireError(400, f"Content-Encoding '{coding}' is not supported")
        return raw

    def read_chunks(self) -> Iterable[bytes]:
        """The decoded pieces of a chunked body."""
        total = 0
        while True:
            line = self.rfile.readline(1024).partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", line):
                raise WireError(400, "malformed chunked body")
            size = int(line, 16)
            total += size
            if total > MAX_BODY:
                raise _too_large()
            if size == 0:
                while self.rfile.readline(65536).strip():
                    pass
                return
            yield self.read_exactly(size)
            self.read_exactly(2)

    def read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise HungUp
        return data

    # -- answers out

    def send(self, status: int, body: bytes, kind: str = "application/json", headers: dict[str, str] | None = None) -> None:
        """A whole answer. The connection ends with it if the request's body was left unread."""
        self.answered = True
        self.close_connection |= not self.body_read
        self.start(status, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
                   if status != 204 else headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)
        if not self.body_read:
            self.drain()

    def send_json(self, body: Object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, _encode(body), "application/json" if self.anthropic else "application/json; charset=utf-8", headers)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.server.metrics.answered("anthropic" if self.anthropic else "ollama", status)
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        if self.anthropic:
            self.send_header("request-id", self.request_id)
        if self.origin:
            headers = {**headers, "Access-Control-Allow-Origin": self.origin, "Vary": "Origin"}
        if self.command == "OPTIONS":
            headers = {**headers, "Allow": "GET, POST, DELETE, HEAD, OPTIONS",
                       "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS",
                       "Access-Control-Allow-Headers": self.headers.get("Access-Control-Request-Headers", "*"),
                       "Access-Control-Max-Age": "600"}
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def fail(self, error: Exception) -> None:
        """Any exception as an error of the dialect that was spoken to."""
        if self.answered:
            self.close_connection = True
            return
        if self.anthropic:
            status, headers, body = dialects.anthropic_error(error, self.request_id)
        else:
            status, headers, body = dialects.ollama_error(error)
        log.info("%s %s -> %d %s", self.command, self.route, status, error if status < 500 else type(error).__name__)
        try:
            self.send_json(body, status, headers)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library found wrong with the request line or the headers."""
        self.request_id, self.anthropic, self.answered, self.body_read, self.origin = "", False, False, True, ""
        self.headers, self.command, self.route, self.request_version = {}, self.command or "GET", "", self.protocol_version
        self.close_connection = True
        self.fail(WireError(int(code), message or "bad request"))

    def drain(self) -> None:
        """Lets a client finish sending what will not be read, or it would see a reset instead of the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 2
        while (left := deadline - time.monotonic()) > 0 and _readable(self.connection, left):
            if not self.connection.recv(1 << 16):
                break

    # -- generations

    def converse(self, reply: Reply) -> None:
        """Answers with what the engine generates, streamed or whole."""
        engine = self.server.engine
        model = engine.resolve(reply.request.model)
        reply.check(model)
        reply.request.priority = self.priority(reply, model.name)
        if reply.unload:
            engine.unload(reply.request.model)
            return self.send_json(reply.whole())
        started, first, ending = time.monotonic(), None, "client went away"
        generation = engine.submit(reply.request)
        stream = Stream(self, reply.framing, _reuse(generation)) if reply.stream else None
        thread = threading.current_thread()
        self.server.talking.add(thread)
        try:
            objects = reply.open(generation)
            for event in _after(generation):
                if event is not None:
                    if isinstance(event, Tick):
                        objects = reply.ping(stream.lull) if stream and stream.silence >= PING_AFTER else []
                    else:
                        first = first or time.monotonic()
                        objects = reply.event(event)
                if self.hung_up():
                    raise HungUp
                if stream:
                    stream.write(objects, means_something=not isinstance(event, Tick))
                if isinstance(event, Done):
                    ending = event.reason
            if stream:
                stream.end()
            else:
                self.send_json(reply.whole(), headers=_reuse(generation, generation.usage.cached_tokens))
        except EngineError as error:
            ending = f"failed: {error}"
            if not stream:
                raise
            stream.write(reply.failure(error))
            stream.end()
        finally:
            generation.cancel()
            self.server.talking.discard(thread)
            if first:
                self.server.metrics.began(first - started)
            self.log_generation(generation, started, first, ending)

    def hung_up(self) -> bool:
        # Asked first: a socket with a timeout would wait that long in recv, whatever the flags say.
        readable = _readable(self.connection, 0)
        return readable and self.connection.recv(1, socket.MSG_PEEK) == b""

    def log_generation(self, generation: Any, started: float, first: float | None, ending: str) -> None:
        usage = generation.usage
        speed = f"{usage.completion_tokens / usage.decode_seconds:.1f} tokens/s" if usage.decode_seconds else "- tokens/s"
        wait = f"first token {first - started:.2f} s" if first else "no token"
        miss = generation.miss
        parted = f" (parts at {miss.at} in {_place(miss)}: {miss.now!r} was {miss.was!r})" if miss else ""
        log.info("%s %s: prompt %d, reused %d%s, generated %d, %s, %s, %s", self.route, generation.model.name,
                 usage.prompt_tokens, usage.cached_tokens, parted, usage.completion_tokens, wait, speed, ending)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    # -- routes

    def get_root(self) -> None:
        self.send(200, b"Ollama is running", "text/plain; charset=utf-8")  # the words Ollama's clients look for

    def get_hello(self) -> None:
        self.send(200, b"", "text/plain; charset=utf-8")

    def get_health(self) -> None:
        trouble = self.server.engine.health()
        self.send_json({"status": "ok"} if trouble is None else {"status": "error", "error": trouble}, 503 if trouble else 200)

    def get_metrics(self) -> None:
        self.send(200, self.server.metrics.text(self.server.engine).encode(), "text/plain; version=0.0.4; charset=utf-8")

    def post_messages(self) -> None:
        self.converse(dialects.AnthropicMessages(self.read_json(), self.request_id))

    def post_count_tokens(self) -> None:
        request = dialects.anthropic_count(self.read_json())
        self.send_json({"input_tokens": self.server.engine.count_tokens(request)})

    def get_models(self) -> None:
        self.send_json(dialects.anthropic_models(self.server.engine.models(), self.query))

    def get_model(self) -> None:
        name = self.route.removeprefix("/v1/models/")
        self.send_json(dialects.anthropic_model(self.server.engine.resolve(name)))

    def post_generate(self) -> None:
        self.converse(dialects.OllamaGenerate(self.read_json()))

    def post_chat(self) -> None:
        self.converse(dialects.OllamaChat(self.read_json()))

    def get_tags(self) -> None:
        self.send_json(dialects.ollama_tags(self.server.engine.models()))

    def post_show(self) -> None:
        body = self.read_json()
        name = body.get("model") or body.get("name")
        if not isinstance(name, str):
            raise WireError(400, "model is required")
        engine = self.server.engine
        local = engine.resolve(name)
        template, generation = engine.show(local)
        self.send_json(dialects.ollama_show(local, engine.context_length(local), template, generation, name))

    def get_ps(self) -> None:
        self.send_json(dialects.ollama_ps(self.server.engine.loaded()))

    def get_version(self) -> None:
        self.send_json({"version": OLLAMA_VERSION})


ROUTES: dict[str, dict[str, Callable[[Handler], None]]] = {
    "/": {"GET": Handler.get_root},
    "/health": {"GET": Handler.get_health},
    "/metrics": {"GET": Handler.get_metrics},
    "/v1/messages": {"POST": Handler.post_messages},
    "/v1/messages/count_tokens": {"POST": Handler.post_count_tokens},
    "/v1/models": {"GET": Handler.get_models},
    "/api/hello": {"GET": Handler.get_hello},
    "/api/generate": {"POST": Handler.post_generate},
    "/api/chat": {"POST": Handler.post_chat},
    "/api/tags": {"GET": Handler.get_tags},
    "/api/show": {"POST": Handler.post_show},
    "/api/ps": {"GET": Handler.get_ps},
    "/api/version": {"GET": Handler.get_version},
}


class Stream:
    """A streamed answer: objects as server-sent events or NDJSON lines, each sent at once, chunked for HTTP/1.1."""

    def __init__(self, handler: Handler, framing: str, headers: dict[str, str]):
        self._handler, self._file = handler, handler.wfile
        self._chunked = handler.request_version != "HTTP/1.0"
        self._framing = framing
        if framing == "lines" and "text/event-stream" in handler.headers.get("Accept", ""):
            self._framing = "data"
        headers = {**headers, "Cache-Control": "no-cache", "Content-Type":
                   "application/x-ndjson" if self._framing == "lines" else "text/event-stream; charset=utf-8"}
        if self._chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            handler.close_connection = True
        handler.answered = True
        handler.start(200, headers)
        self._last = self._last_meant = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since something was sent."""
        return time.monotonic() - self._last

    @property
    def lull(self) -> float:
        """Seconds since something was sent that meant something."""
        return time.monotonic() - self._last_meant

    def write(self, objects: list[Object], means_something: bool = True) -> None:
        if objects:
            self._send(b"".join(map(self._frame, objects)))
            self._last_meant = self._last if means_something else self._last_meant

    def end(self) -> None:
        if self._chunked:
            self._file.write(b"0\r\n\r\n")

    def _send(self, data: bytes) -> None:
        self._file.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        self._last = time.monotonic()

    def _frame(self, body: Object) -> bytes:
        if self._framing == "lines":
            return _encode(body) + b"\n"
        name = b"event: " + body["type"].encode() + b"\n" if self._framing == "events" else b""
        return name + b"data: " + _encode(body) + b"\n\n"


def _reuse(generation: Any, cached: int | None = None) -> dict[str, str]:
    """The header that tells what of a prompt was read before, as far as that is known, and where it parts from what was."""
    value = f"reused={generation.cached_tokens if cached is None else cached}; prompt={generation.prompt_tokens}"
    if generation.miss:
        value += f"; parts-at={generation.miss.at}; in={_place(generation.miss)}"
    return {"x-prompt-cache": value}


def _place(miss: Any) -> str:
    return "the prompt" if miss.message is None else f"message {miss.message} ({miss.role})"


def _readable(connection: socket.socket, seconds: float) -> bool:
    """Whether there is something to read, or the end, within some seconds."""
    poll = select.poll()  # select() fails with many open files
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _after(generation: Iterable) -> Iterable:
    """Nothing, for what is to be sent at once, then the generation's events."""
    yield None
    yield from generation


def _encode(body: Object) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _too_large() -> WireError:
    return WireError(413, f"the body is larger than {MAX_BODY // 2**20} MB")


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_private or address.is_unspecified
    except ValueError:
        return host in ("", "localhost", socket.gethostname().lower()) or host.endswith((".localhost", ".local", ".internal"))


# ------------------------------------------------------------------ the command line


def _pair(text: str) -> tuple[str, str]:
    pattern, separator, name = text.partition("=")
    if not (pattern and separator and name):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form PATTERN=NAME")
    return pattern, name


def _priority(text: str) -> Priority:
    if text.upper() not in Priority.__members__:
        raise argparse.ArgumentTypeError(f"'{text}' is not high, normal or low")
    return Priority[text.upper()]


def _rule(text: str) -> tuple[str, Priority]:
    pattern, separator, priority = text.rpartition("=")
    if not (pattern and separator):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form PATTERN=PRIORITY")
    return pattern, _priority(priority)


def _key(text: str) -> tuple[str, Priority]:
    key, _, priority = text.rpartition("=")
    return (key, _priority(priority)) if key and priority.upper() in Priority.__members__ else (text, Priority.NORMAL)


def _seconds(text: str) -> float:
    try:
        return dialects.parse_keep_alive(text)
    except WireError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")) if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size like 512MB or 8GB")
    return size


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port number")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="mlx-server", description="Serves local MLX models to Claude Code, Ollama clients and scripts.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=11435, help="port to listen on, 0 for any (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="default model, loaded at once")
    parser.add_argument("--models-dir", metavar="DIR", action="append", default=[], help="a folder of models (repeatable)")
    parser.add_argument("--alias", metavar="PATTERN=NAME", type=_pair, action="append", default=[],
                        help="serve names like PATTERN (a glob) with model NAME (repeatable)")
    parser.add_argument("--context", metavar="N", type=_positive, help="most tokens of prompt and answer together")
    parser.add_argument("--max-tokens", metavar="N", type=_positive, help="most tokens of an answer")
    parser.add_argument("--prompt-cache", metavar="SIZE", type=_bytes,
                        help="memory for the KV states of earlier prompts, e.g. 8GB (default: a quarter of what the machine has)")
    parser.add_argument("--cache-dir", metavar="DIR", help="keep these states in DIR, too, where they survive a restart")
    parser.add_argument("--cache-dir-size", metavar="SIZE", type=_bytes, default=32 * 2**30,
                        help="most bytes of files in DIR (default: 32GB)")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="keep the KV cache quantised: half or a quarter of its size")
    parser.add_argument("--memory", metavar="SIZE", type=_bytes,
                        help="memory for models and KV states together (default: nine tenths of what the GPU may use)")
    parser.add_argument("--max-loaded", metavar="N", type=_positive, help="most models in memory (default: what fits)")
    parser.add_argument("--keep-alive", metavar="DURATION", type=_seconds,
                        help="unload models that were idle for so long, e.g. 30m (default: when their memory is needed)")
    parser.add_argument("--max-queue", metavar="N", type=_positive, default=64,
                        help="most requests that may wait, before more are refused (default: %(default)s)")
    parser.add_argument("--priority", metavar="PATTERN=PRIORITY", type=_rule, action="append", default=[],
                        help="high, normal or low for requests to models, or in dialects, like PATTERN (repeatable)")
    parser.add_argument("--api-key", metavar="KEY[=PRIORITY]", type=_key, action="append", default=[],
                        help="demand this key (repeatable; default: $MLX_SERVER_API_KEY, else none)")
    parser.add_argument("--drain", metavar="DURATION", type=_seconds, default=10.0,
                        help="time for running answers when the server is told to end (default: 10s)")
    parser.add_argument("--verbose", action="store_true", help="log every detail")
    parser.add_argument("--version", action="version", version=f"mlx-server {__version__}")
    return parser


class OneLine(logging.Formatter):
    """A record is one line, whatever names and errors it quotes; only a traceback may follow it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().formatMessage(record))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until SIGINT or SIGTERM; returns the exit status."""
    args = arguments().parse_args(argv)
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.INFO, handlers=[lines])
    if not args.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on model types concern nobody here
        logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        keys = args.api_key or [_key(key) for key in filter(None, [os.environ.get("MLX_SERVER_API_KEY")])]
        server = MLXServer((args.host, args.port), api_keys=dict(keys), priorities=args.priority)
    except (OSError, ValueError) as error:
        reason = "it is already in use" if getattr(error, "errno", None) in (48, 98) else error
        print(f"mlx-server: cannot listen on {args.host}:{args.port}: {reason}", file=sys.stderr)
        return 1
    try:
        server.engine = Engine(args.model, models_dirs=args.models_dir, aliases=args.alias, context=args.context,
                               max_tokens=args.max_tokens, cache_limit=args.prompt_cache, cache_dir=args.cache_dir,
                               cache_dir_limit=args.cache_dir_size, kv_bits=args.kv_bits, memory=args.memory,
                               max_loaded=args.max_loaded, max_queue=args.max_queue, keep_alive=args.keep_alive)
    except (EngineError, OSError) as error:
        reason = f"cannot keep a prompt cache in {args.cache_dir}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"mlx-server: {reason}", file=sys.stderr)
        server.server_close()
        return 1
    stopper = threading.Thread(target=server.stop, args=(args.drain,))
    for number in (signal.SIGINT, signal.SIGTERM):  # the second one does not wait
        signal.signal(number, lambda *_: server.engine.close(0) if stopper.ident else stopper.start())
    host = f"[{args.host}]" if ":" in args.host else args.host
    log.info("mlx-server %s is listening on http://%s:%d", __version__, host, server.server_port)
    server.serve_forever(poll_interval=0.1)
    stopper.join()
    if not server.engine.close(0):
        logging.shutdown()
        os._exit(0)  # an engine in the midst of a long step would crash the interpreter's own way out
    return 0


if __name__ == "__main__":
    sys.exit(main())
