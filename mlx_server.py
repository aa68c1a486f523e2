"""The front door: HTTP in, HTTP out.

`python mlx_server.py --port 11435` serves local MLX models to Claude Code, Ollama clients and scripts. This module knows
bytes, routes and sockets. What a body means is the business of `dialects`, what a model does that of `engine`.

One thread serves one connection. It hands a request to the engine, then turns the engine's events into bytes. Between two
events it looks whether the client is still there; when it is not, the generation is cancelled. What no local model answers
to is relayed to the upstream, another server, if there is one that has it.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # before anything that an older one does not understand
    sys.exit(f"mlx-server needs Python 3.11 or newer, not {sys.version.split()[0]} ({sys.executable}); get it from python.org")

import argparse
import bisect
import collections
import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import hashlib
import hmac
import http.client
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import plistlib
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Callable, Iterable, Iterator, Sequence
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import dialects
from dialects import Object, Reply, WireError, is_a, items
from engine import (Done, Engine, EngineBusy, EngineError, Group, Library, LocalModel, ModelNotFound, Preset, Priority,
                    Ranks, Tick, best_repo, gigabytes, parse_name, shortcoming, usable_memory)

__version__ = "0.1.0"
log = logging.getLogger("mlx_server")

OLLAMA_VERSION = "0.35.0"  # the API level we speak; clients parse it as numbers and refuse what is too old
MAX_BODY = 32 * 1024 * 1024  # bytes, the Messages API's own limit
PING_AFTER = 4.0  # seconds without a byte after which a stream says that it is alive; clients count on 5
LOOK_AFTER = 0.1  # seconds after which an answer in the making looks again whether its client is there
PATIENCE = 300.0  # seconds that a client may take to read some of an answer, or to send its next request
ARRIVAL = 120.0  # seconds that a request may take to arrive, from its first byte on
CONNECTIONS = 512  # at the same time; fewer where a process may not open twice as many files
FILES = 4096  # to be open at the same time, if that is allowed: a large model alone has hundreds
TURNED_AWAY = 32  # more that are told that there is no room
ASKING = 2.0  # seconds that an upstream may take to accept a connection, or to say what it has
FRESH = 5.0  # seconds for which the upstream's last word on that counts
HOST = re.compile(r"([\w.-]*|\[[\da-f:.]+\])(:\d{1,5})?", re.I | re.A)
LOCAL_ORIGINS = re.compile(
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?|(app|file|tauri|vscode-webview|vscode-file)://.*", re.I)


class HungUp(ConnectionError):
    """The client has closed its side."""


class UpstreamError(Exception):
    """The upstream cannot be reached or has failed; the message says why."""


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
               *((f'{{dialect="{dialect}",status="{status}"}}', n) for (dialect, status), n in sorted(requests.items())))
        metric("generations_total", "counter", "Generations by how they ended.",
               *((f'{{ending="{ending}"}}', n) for ending, n in sorted(totals.endings.copy().items())))
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
    and the priority of the requests that it matches, where they do not say themselves. `upstream` serves the
    models that are not here.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], engine: Engine | None = None, *, api_keys: dict[str, Priority] | None = None,
                 priorities: Sequence[tuple[str, Priority]] = (), upstream: Upstream | None = None):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.engine, self.api_keys, self.priorities = engine, api_keys or {}, priorities
        self.upstream, self.metrics = upstream, Metrics()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.room = CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, files // 2)
        self.connected: dict[Any, bool] = {}  # sockets, and whether there is room for them
        self.talking: set[threading.Thread] = set()  # threads in the midst of an answer
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for a name nobody needs
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def loopback(self) -> bool:
        return ipaddress.ip_address(self.server_address[0]).is_loopback

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connected[request] = len(self.connected) < self.room
        if len(self.connected) > self.room + TURNED_AWAY:
            log.warning("a connection is closed: there are too many")
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connected.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("connection failed", exc_info=True)

    def service_actions(self) -> None:
        if self.engine is not None and self.engine.broken:
            os.kill(os.getpid(), signal.SIGTERM)  # what supervises the program starts it anew

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


class Arriving(socket.SocketIO):
    """What a client sends. Once a request has begun, `due` is when all of it has to be there, in monotonic seconds; reading
    raises TimeoutError then."""

    due: float | None = None

    def readinto(self, buffer: Any) -> int | None:
        if not _readable(self, PATIENCE if self.due is None else max(0.0, self.due - time.monotonic())):
            raise TimeoutError
        self.due = self.due or time.monotonic() + ARRIVAL
        return super().readinto(buffer)


class Lines(io.BufferedReader):
    """What arrives, for reading its lines. A CR alone ends none (RFC 9112, 2.2): it becomes a fold, which is refused."""

    def readline(self, limit: int = -1) -> bytes:
        line = super().readline(limit)
        end = line[-2:] if line.endswith(b"\r\n") else b""
        return line.removesuffix(end).replace(b"\r", b"\r\n ") + end


class Handler(BaseHTTPRequestHandler):
    """One connection. Routes are at the end of the class."""

    server: MLXServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = PATIENCE

    # -- a request's way through

    def setup(self) -> None:
        super().setup()
        self.rfile = Lines(Arriving(self.connection, "r"))

    def handle_one_request(self) -> None:
        self.rfile.raw.due = None
        super().handle_one_request()

    def serve(self) -> None:
        """Serves the request whose head has been read."""
        self.request_id = f"req_{secrets.token_hex(12)}"
        self.answered, self.origin, self.model = False, "", None
        self.body_read = not ({"content-length", "transfer-encoding"} & {name.lower() for name in self.headers})
        self.route, _, query = self.path.partition("?")
        self.route, self.query = unquote(self.route).rstrip("/") or "/", dict(parse_qsl(query))
        self.anthropic = self.route.startswith("/v1/")
        self.openai = self.route in OPENAI
        try:
            if not self.server.connected[self.request]:
                self.close_connection = True
                raise EngineBusy("there are too many connections")
            self.check_head()
            self.check_origin()
            if self.command == "OPTIONS":
                return self.send(204, b"")
            self.check_key()
            self.answer()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except (WireError, EngineError) as error:
            self.fail(error)
        except Exception as error:
            log.error("%s %s failed", self.command, self.route, exc_info=True)
            self.fail(error)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = serve

    def answer(self) -> None:
        """Answers here, or lets the upstream do so."""
        handle = self.find_route()
        try:
            handle()
        except (WireError, EngineError) as error:
            if not self.is_relayed(error):
                raise
            self.relay()

    def find_route(self) -> Callable[[], None]:
        methods = ROUTES.get(self.route)
        if methods is None and self.route.startswith("/v1/models/"):
            methods = {"GET": Handler.get_model}
        if methods is None and self.route.startswith("/api/blobs/"):
            methods = {"GET": Handler.get_blob, "POST": Handler.post_blob}
        if methods is None:
            raise WireError(404, "404 page not found" if not self.anthropic else f"Not found: {self.route}")
        handle = methods.get("GET" if self.command == "HEAD" else self.command)
        if handle is None:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
            raise WireError(405, "405 method not allowed", {"Allow": allowed})
        return lambda: handle(self)

    def check_head(self) -> None:
        """What another server might read in another way is refused (RFC 9112, 3.2, 5 and 6.3)."""
        hosts, origins, lengths, codings = (
            self.headers.get_all(name, []) for name in ("Host", "Origin", "Content-Length", "Transfer-Encoding"))
        wrong = (
            "malformed header" if self.headers.defects or any("\n" in value for value in self.headers.values()) else
            "Host, Origin and the body's length can be given only once"
            if max(len(hosts), len(origins), len(lengths + codings)) > 1 else
            "the Host header is missing" if not hosts and self.request_version > "HTTP/1.0" else
            "malformed Host header" if not all(map(HOST.fullmatch, hosts)) else
            f"Transfer-Encoding '{codings[0]}' is not supported" if codings and codings[0].lower() != "chunked" else None)
        if wrong:
            self.body_read = False  # where it ends is not known
            raise WireError(400, wrong)

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
                 if hmac.compare_digest(one.encode("latin-1"), key.encode())]
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
            body = dialects.encodable(body, text)
        except (ValueError, RecursionError) as error:
            known = {RecursionError: "it is nested too deeply", ValueError: "a number in it has too many digits"}
            raise WireError(400, f"the body cannot be read as JSON: {known.get(type(error), error)}") from None
        if not isinstance(body, dict):
            raise WireError(400, "the body should be a JSON object")
        name = body.get("model") or body.get("name")
        self.model = name if isinstance(name, str) else None
        return body

    def handle_expect_100(self) -> bool:
        return True  # said by `go_on`, once it is certain that the body is wanted

    def go_on(self) -> None:
        """Tells a client that waits for it to send its body (RFC 9110, 10.1.1)."""
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version != "HTTP/1.0":
            self.send_response_only(100)
            self.end_headers()

    def read_body(self) -> bytes:
        try:
            raw = self.read_raw()
        except TimeoutError:
            raise WireError(408, f"the request has not arrived within {ARRIVAL:.0f} s") from None
        self.body_read, self.body = True, raw
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

    def read_raw(self) -> bytes:
        if "Transfer-Encoding" in self.headers:
            self.go_on()
            body = io.BytesIO()  # a list of the smallest chunks would take many times their size
            body.writelines(self.read_chunks())
            return body.getvalue()
        length = self.headers.get("Content-Length")
        if length is None:
            raise WireError(411, "Length Required")
        if not re.fullmatch(r"\d{1,18}", length, re.ASCII):
            raise WireError(400, "bad Content-Length")
        if int(length) > MAX_BODY:
            raise _too_large()
        self.go_on()
        return self.read_exactly(int(length))

    def read_chunks(self) -> Iterable[bytes]:
        """The decoded pieces of a chunked body."""
        total = 0
        while True:
            line = self.rfile.readline(1024)
            match = re.fullmatch(rb"([\da-fA-F]{1,15})[ \t]*(;.*)?\r?\n", line)
            if not match:
                raise WireError(400, "malformed chunked body")
            size = int(match[1], 16)
            total += len(line) + size
            if total > MAX_BODY:
                raise _too_large()
            if size == 0:
                break
            yield self.read_exactly(size)
            if self.read_exactly(2) != b"\r\n":
                raise WireError(400, "malformed chunked body")
        while (line := self.rfile.readline(65536)).strip():  # trailers
            total += len(line)
            if total > MAX_BODY:
                raise _too_large()

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
        self.server.metrics.answered("openai" if self.openai else "anthropic" if self.anthropic else "ollama", status)
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        if self.anthropic:
            self.send_header("x-request-id" if self.openai else "request-id", self.request_id)
        if self.origin:
            headers = {**headers, "Access-Control-Allow-Origin": self.origin, "Vary": "Origin"}
        if self.command == "OPTIONS" and status == 204:
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
        if self.openai:
            status, headers, body = dialects.openai_error(error)
        elif self.anthropic:
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
        self.openai, self.close_connection = False, True
        self.fail(WireError(int(code), message or "bad request"))

    def drain(self) -> None:
        """Lets a client finish sending what will not be read, or it would see a reset instead of the answer."""
        with contextlib.suppress(OSError):  # a Mac's word for a client that has gone is no ConnectionError
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
        looked = 0.0
        generations: list[Any] = []
        stream = None
        thread = threading.current_thread()
        self.server.talking.add(thread)
        try:
            for request in reply.requests:
                generations.append(engine.submit(request))
            stream = Stream(self, reply.framing, _reuse(generations[0])) if reply.stream else None
            objects = reply.open(generations[0])
            for event in _after(generations):
                if event is not None:
                    if isinstance(event, Tick):
                        objects = reply.ping(stream.lull) if stream and stream.silence >= PING_AFTER else []
                    else:
                        first = first or (None if isinstance(event, Done) else time.monotonic())
                        objects = reply.event(event)
                if time.monotonic() - looked >= LOOK_AFTER:
                    if self.hung_up():
                        raise HungUp
                    looked = time.monotonic()
                if stream:
                    stream.write(objects, means_something=not isinstance(event, Tick))
                if isinstance(event, Done):
                    ending = event.reason
            if stream:
                stream.end()
            else:
                self.send_json(reply.whole(), headers=_reuse(generations[0], generations[0].usage.cached_tokens))
        except EngineError as error:
            ending = f"failed: {error}"
            if not stream:
                raise
            stream.write(reply.failure(error))
            stream.end()
        finally:
            self.server.talking.discard(thread)
            if first:
                self.server.metrics.began(first - started)
            for generation in generations:
                generation.cancel()
                self.log_generation(generation, started, first, ending)

    def embed(self, reply: dialects.Embeddings) -> None:
        """Answers with the embeddings of texts, which are read one after the other, so that others get their turn."""
        engine, started, thread = self.server.engine, time.monotonic(), threading.current_thread()
        model = engine.resolve(reply.request.model)
        self.server.talking.add(thread)
        try:
            for request in reply.requests:
                request.priority = self.priority(reply, model.name)
                generation = engine.submit(request)
                for event in generation:
                    reply.event(event)
                    if self.hung_up():
                        generation.cancel()
                        raise HungUp
            self.send_json(reply.whole())
        finally:
            self.server.talking.discard(thread)
            seconds = time.monotonic() - started
            log.info("%s %s: embedded %d of %d texts, %d tokens, %.2f s", self.route, model.name, len(reply.vectors),
                     len(reply.requests), reply.tokens, seconds,
                     extra={"figures": {"route": self.route, "model": model.name, "texts": len(reply.vectors),
                                        "prompt_tokens": reply.tokens, "seconds": seconds}})

    def progress(self, steps: Iterator[Object], stream: bool) -> None:
        """Answers in Ollama's dialect with the steps of some work as they are done, or only with the last one."""
        out, step = None, {}
        with contextlib.closing(steps):
            try:
                for step in steps:
                    if self.hung_up():
                        raise HungUp
                    if stream:
                        out = out or Stream(self, "lines", {})
                        out.write([step])
            except (WireError, EngineError) as error:
                if out is None:
                    raise
                out.write([dialects.ollama_error(error)[2]])
        if out:
            out.end()
        else:
            self.send_json(step)

    def hung_up(self) -> bool:
        # Asked first: a socket with a timeout would wait that long in recv, whatever the flags say.
        readable = _readable(self.connection, 0)
        return readable and self.connection.recv(1, socket.MSG_PEEK) == b""

    def log_generation(self, generation: Any, started: float, first: float | None, ending: str) -> None:
        usage = generation.usage
        rate = usage.completion_tokens / usage.decode_seconds if usage.decode_seconds else None
        speed = f"{rate:.1f} tokens/s" if rate else "- tokens/s"
        wait = f"first token {first - started:.2f} s" if first else "no token"
        miss = generation.miss
        parted = f" (parts at {miss.at} in {_place(miss)}: {miss.now!r} was {miss.was!r})" if miss else ""
        figures = {
            "route": self.route, "model": generation.model.name, "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens, "completion_tokens": usage.completion_tokens,
            "first_token_seconds": first and first - started, "tokens_per_second": rate,
            "seconds": time.monotonic() - started, "ending": ending, "miss": miss and dataclasses.asdict(miss)}
        log.info("%s %s: prompt %d, reused %d%s, generated %d, %s, %s, %s", self.route, generation.model.name,
                 usage.prompt_tokens, usage.cached_tokens, parted, usage.completion_tokens, wait, speed, ending,
                 extra={"figures": figures})

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    # -- relayed requests

    @property
    def upstream(self) -> Upstream | None:
        """The upstream, but not for a request that has come through a relay: it might go round in circles."""
        relayed = any(RELAY in value for value in self.headers.get_all("Via", []))
        return None if relayed else self.server.upstream

    def upstream_tags(self) -> list[Object]:
        return self.upstream.tags() if self.upstream else []

    def is_relayed(self, error: WireError | EngineError) -> bool:
        """Whether the upstream is to answer what has failed here. Raises WireError if it should but cannot be asked.

        An unknown name may fail for other reasons first: what is not for us need not be what we understand.
        """
        upstream = self.upstream
        if upstream is None or self.answered or self.model is None or self.route not in RELAYED:
            return False
        if isinstance(error, EngineBusy):
            return upstream.overflow and dialects.find_tag(upstream.tags(), self.model) is not None
        try:
            self.server.engine.resolve(self.model)
            return False
        except ModelNotFound:
            return upstream.find(self.model) is not None

    def relay(self) -> None:
        """Sends the request as it came to the upstream, and the answer as it comes to the client."""
        started, status, ending, url = time.monotonic(), 0, "client went away", self.upstream.url
        try:
            with self.upstream.open(self) as answer:
                status = answer.status
                self.pass_on(answer)
            ending = "done"
        except (UpstreamError, http.client.HTTPException) as error:
            ending = f"failed: {error}"
            raise WireError(502, f"the upstream {url} failed: {error}") from None
        finally:
            seconds = time.monotonic() - started
            log.info("%s %s: relayed to %s -> %d, %.2f s, %s", self.route, self.model, url, status, seconds, ending,
                     extra={"figures": {"route": self.route, "model": self.model, "upstream": url, "status": status,
                                        "seconds": seconds, "ending": ending}})

    def pass_on(self, answer: http.client.HTTPResponse) -> None:
        """Copies an answer piece by piece. One that breaks off is left without its end, so that the client sees it."""
        headers = _end_to_end(answer.headers)
        self.request_id = headers.pop("request-id", self.request_id)
        chunked = answer.length is None and self.request_version != "HTTP/1.0"
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif answer.length is None:
            self.close_connection = True
        else:
            headers["Content-Length"] = str(answer.length)
        self.answered = True
        self.start(answer.status, headers)
        while piece := answer.read1(1 << 16):
            self.wfile.write(_chunk(piece) if chunked else piece)
        if answer.length:
            raise UpstreamError(f"{answer.length} bytes are missing")
        if chunked:
            self.wfile.write(_chunk(b""))

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
        self.send_json(dialects.anthropic_models(self.server.engine.models(), self.query, self.upstream_tags()))

    def get_model(self) -> None:
        name = self.route.removeprefix("/v1/models/")
        try:
            model = dialects.anthropic_model(self.server.engine.resolve(name))
        except ModelNotFound:
            tag = self.upstream and self.upstream.find(name)
            if not tag:
                raise
            model = dialects.upstream_model(tag)
        self.send_json(model)

    def post_chat_completions(self) -> None:
        self.converse(dialects.OpenAIChat(self.read_json()))

    def post_completions(self) -> None:
        self.converse(dialects.OpenAICompletion(self.read_json()))

    def post_responses(self) -> None:
        self.converse(dialects.OpenAIResponses(self.read_json()))

    def post_generate(self) -> None:
        self.converse(dialects.OllamaGenerate(self.read_json()))

    def post_chat(self) -> None:
        self.converse(dialects.OllamaChat(self.read_json()))

    def post_embeddings(self) -> None:
        self.embed(EMBEDDINGS[self.route](self.read_json()))

    def get_tags(self) -> None:
        self.send_json(dialects.ollama_tags(self.server.engine.models(), self.upstream_tags()))

    def post_show(self) -> None:
        self.read_json()
        if self.model is None:
            raise WireError(400, "model is required")
        engine = self.server.engine
        local = engine.resolve(self.model)
        template, generation = engine.show(local)
        self.send_json(dialects.ollama_show(local, engine.context_length(local), template, generation, self.model,
                                            engine.preset(self.model)))

    def delete_model(self) -> None:
        self.read_json()
        if self.model is None:
            raise WireError(400, "model is required")
        self.server.engine.delete(self.model)
        self.send(200, b"", "text/plain; charset=utf-8")

    def post_copy(self) -> None:
        body = self.read_json()
        source, name = (dialects.checked_name(body.get(key), f"{key} {json.dumps(body.get(key))} is invalid")
                        for key in ("source", "destination"))
        self.server.engine.keep(dataclasses.replace(self.base(source), name=name, modified=time.time()))
        self.send(200, b"", "text/plain; charset=utf-8")

    def post_create(self) -> None:
        body = self.read_json()
        name = dialects.checked_name(self.model, "invalid model name")
        source = dialects.take(body, "from", str, default="")
        if not source and not body.get("files"):
            raise WireError(400, "neither 'from' or 'files' was specified")
        preset = dialects.ollama_create(body, name, self.base(source) if source else Preset(name, ""))

        def create() -> Iterator[Object]:
            self.server.engine.keep(preset)
            yield {"status": "writing manifest"}
            yield {"status": "success"}

        self.progress(create(), dialects.take(body, "stream", bool, default=True))

    def base(self, source: str) -> Preset:
        """The preset that a name means, or an empty one of its model."""
        engine = self.server.engine
        local = engine.resolve(source)
        return engine.preset(source) or Preset(local.name, local.name)

    def post_pull(self) -> None:
        body = self.read_json()
        name = dialects.checked_name((self.model or "").removeprefix("https://"), "invalid model name")
        self.progress(Hub(self.server.engine.hub).pull(name), dialects.take(body, "stream", bool, default=True))

    def post_push(self) -> None:
        self.read_json()
        raise WireError(400, "models cannot be pushed from here" if self.model else "model is required")

    def get_blob(self) -> None:
        raise WireError(404, "this server keeps no blobs")

    def post_blob(self) -> None:
        raise WireError(400, "this server keeps no blobs: a model can be created 'from' an installed one")

    def get_ps(self) -> None:
        self.send_json(dialects.ollama_ps(self.server.engine.loaded()))

    def get_status(self) -> None:
        self.send_json({"cloud": {"disabled": True, "source": "config"}})

    def get_version(self) -> None:
        self.send_json({"version": OLLAMA_VERSION})


ROUTES: dict[str, dict[str, Callable[[Handler], None]]] = {
    "/": {"GET": Handler.get_root},
    "/health": {"GET": Handler.get_health},
    "/metrics": {"GET": Handler.get_metrics},
    "/v1/messages": {"POST": Handler.post_messages},
    "/v1/messages/count_tokens": {"POST": Handler.post_count_tokens},
    "/v1/models": {"GET": Handler.get_models},
    "/v1/chat/completions": {"POST": Handler.post_chat_completions},
    "/v1/completions": {"POST": Handler.post_completions},
    "/v1/responses": {"POST": Handler.post_responses},
    "/v1/embeddings": {"POST": Handler.post_embeddings},
    "/api/hello": {"GET": Handler.get_hello},
    "/api/generate": {"POST": Handler.post_generate},
    "/api/chat": {"POST": Handler.post_chat},
    "/api/embed": {"POST": Handler.post_embeddings},
    "/api/embeddings": {"POST": Handler.post_embeddings},
    "/api/tags": {"GET": Handler.get_tags},
    "/api/show": {"POST": Handler.post_show},
    "/api/delete": {"DELETE": Handler.delete_model},
    "/api/copy": {"POST": Handler.post_copy},
    "/api/create": {"POST": Handler.post_create},
    "/api/pull": {"POST": Handler.post_pull},
    "/api/push": {"POST": Handler.post_push},
    "/api/ps": {"GET": Handler.get_ps},
    "/api/status": {"GET": Handler.get_status},
    "/api/version": {"GET": Handler.get_version},
}

OPENAI = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
EMBEDDINGS = {"/api/embed": dialects.OllamaEmbed, "/api/embeddings": dialects.OllamaEmbeddings,
              "/v1/embeddings": dialects.OpenAIEmbeddings}


class Stream:
    """A streamed answer: objects as server-sent events or NDJSON lines, each sent at once, chunked for HTTP/1.1. A string is
    a server-sent event already."""

    def __init__(self, handler: Handler, framing: str, headers: dict[str, str]):
        self._file = handler.wfile
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

    def write(self, objects: list[Object | str], means_something: bool = True) -> None:
        if objects:
            self._send(b"".join(map(self._frame, objects)))
            self._last_meant = self._last if means_something else self._last_meant

    def end(self) -> None:
        if self._chunked:
            self._file.write(_chunk(b""))

    def _send(self, data: bytes) -> None:
        self._file.write(_chunk(data) if self._chunked else data)
        self._last = time.monotonic()

    def _frame(self, body: Object | str) -> bytes:
        if isinstance(body, str):
            return body.encode() + b"\n\n"
        if self._framing == "lines":
            return _encode(body) + b"\n"
        name = b"event: " + body["type"].encode() + b"\n" if self._framing == "events" else b""
        return name + b"data: " + _encode(body) + b"\n\n"


def _chunk(data: bytes) -> bytes:
    """A piece of a chunked body; an empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _reuse(generation: Any, cached: int | None = None) -> dict[str, str]:
    """The header that tells what of a prompt was read before, as far as that is known, and where it parts from what was."""
    value = f"reused={generation.cached_tokens if cached is None else cached}; prompt={generation.prompt_tokens}"
    if generation.miss:
        value += f"; parts-at={generation.miss.at}; in={_place(generation.miss)}"
    return {"x-prompt-cache": value}


def _place(miss: Any) -> str:
    return "the prompt" if miss.message is None else f"message {miss.message} ({miss.role})"


def _readable(connection: socket.socket | socket.SocketIO, seconds: float) -> bool:
    """Whether there is something to read, or the end, within some seconds."""
    poll = select.poll()  # select() fails with many open files
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _after(generations: list[Iterable]) -> Iterable:
    """Nothing, for what is to be sent at once, then the generations' events."""
    yield None
    for generation in generations:
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


# ------------------------------------------------------------------ the upstream

RELAYED = {"/api/chat", "/api/generate", "/api/show", "/api/embed", "/api/embeddings", "/v1/messages",
           "/v1/messages/count_tokens", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"}
RELAY = "mlx-server"  # our name in the Via header (RFC 9110, 7.6.3)
_NOT_RELAYED = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",  # of one connection (RFC 9110, 7.6.1)
    "host", "content-length", "expect", "date",  # said anew
    "authorization", "x-api-key", "cookie", "origin", "access-control-allow-origin", "x-request-id"}  # between client and us
_CLOUD = re.compile(r".*:([^/:]*-)?cloud", re.I)  # names that Ollama sends on to its cloud, listed or not


class Upstream:
    """A server at `url` (http://HOST:PORT) with Ollama's API, for the models that are not here.

    With `overflow` it also gets requests for which the engine's queue has no room.
    """

    def __init__(self, url: str, overflow: bool = False):
        self.url, self.overflow = url, overflow
        self._lock = threading.Lock()
        self._asked, self._tags, self._trouble = -math.inf, [], None

    def tags(self) -> list[Object]:
        """The objects of its `GET /api/tags`, at most `FRESH` seconds old; none if it cannot be asked."""
        with self._lock:
            if time.monotonic() - self._asked > FRESH:
                try:
                    self._tags, self._trouble = self._ask(), None
                except (OSError, http.client.HTTPException, ValueError, WireError) as error:
                    self._tags, self._trouble = [], f"the upstream {self.url} cannot be asked: {_why(error)}"
                    log.warning("%s", self._trouble)
                self._asked = time.monotonic()
            return self._tags

    def find(self, name: str) -> Object | None:
        """What it lists for a model of that name. Raises WireError if it cannot be asked."""
        tags, trouble = self.tags(), self._trouble
        if trouble:
            raise WireError(404, f"model '{name}' not found here, and {trouble}")
        return dialects.find_tag(tags, name) or ({"name": name} if _CLOUD.fullmatch(name) else None)

    @contextlib.contextmanager
    def open(self, client: Handler) -> Iterator[http.client.HTTPResponse]:
        """Its answer to a client's request. It and its reads raise UpstreamError and HTTPException when the upstream fails,
        and HungUp as soon as the client goes away."""
        with contextlib.closing(self._connection()) as connection:
            try:
                connection.connect()
                connection.sock.settimeout(PATIENCE)
                connection.putrequest(client.command, client.path, skip_accept_encoding=True)
                for name, value in _end_to_end(client.headers).items():
                    connection.putheader(name, value)
                connection.putheader("Via", f"1.1 {RELAY}")
                connection.putheader("Content-Length", str(len(client.body)))
                connection.endheaders(client.body)
            except (OSError, ValueError) as error:
                raise UpstreamError(_why(error)) from None
            with http.client.HTTPResponse(connection.sock, method=client.command) as answer:
                answer.fp.close()
                answer.fp = io.BufferedReader(_Watched(connection.sock, client))
                answer.begin()
                yield answer

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=ASKING)

    def _ask(self) -> list[Object]:
        with contextlib.closing(self._connection()) as connection:
            connection.request("GET", "/api/tags", headers={"Via": f"1.1 {RELAY}"})
            answer = connection.getresponse()
            body = json.loads(answer.read()) if answer.status == 200 else None
        if not isinstance(body, dict):
            raise ValueError(f"GET /api/tags gave status {answer.status} and no list")
        return [tag for tag in items(body, "models", dict) if is_a(tag.get("name"), str)]


class _Watched(socket.SocketIO):
    """What the upstream sends, while the client is there: when it hangs up, reading ends with HungUp."""

    def __init__(self, upstream: socket.socket, client: Handler):
        super().__init__(upstream, "r")
        self._client, self._poll = client, select.poll()
        for side in (upstream, client.connection):
            self._poll.register(side, select.POLLIN)

    def readinto(self, buffer: Any) -> int | None:
        while self.fileno() not in dict(self._poll.poll()):
            if self._client.hung_up():
                raise HungUp
            self._poll.unregister(self._client.connection)  # it has sent its next request already
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise UpstreamError(_why(error)) from None


def _end_to_end(headers: http.client.HTTPMessage) -> dict[str, str]:
    """The headers to relay, by lower-case name."""
    dropped = _NOT_RELAYED | {name.strip().lower() for name in ",".join(headers.get_all("Connection", [])).split(",")}
    return {name: ", ".join(headers.get_all(name)) for name in map(str.lower, headers) if name not in dropped}


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# ------------------------------------------------------------------ the hub


@dataclasses.dataclass
class RemoteFile:
    """A file of a repo: its size in bytes and its digest, SHA-256 of its content or, for small files, what Git has."""

    name: str
    size: int
    digest: str

    def progress(self, completed: int) -> Object:
        """Ollama's word on how many bytes of it are there."""
        return {"status": f"pulling {self.digest[:12]}", "digest": f"sha256:{self.digest}", "total": self.size,
                "completed": completed}

    def hasher(self) -> Any:
        """What has `digest` in the end."""
        return hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)


class Hub:
    """The models of a Hugging Face hub ($HF_ENDPOINT, with $HF_TOKEN), and the folder they are downloaded to.

    https://huggingface.co/docs/hub/api, https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """

    FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # what a model is loaded from
    SILENCE = 60.0  # seconds without a byte after which a download has failed
    TELL = 0.2  # seconds between two reports of progress

    def __init__(self, cache: Path):
        self._cache = cache
        self._url = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._token = os.environ.get("HF_TOKEN", "")
        self._trust = ssl.create_default_context()
        with contextlib.suppress(ImportError):  # python.org's Python knows no authorities; mlx-lm's packages bring some
            import certifi

            self._trust.load_verify_locations(certifi.where())

    def pull(self, name: str) -> Iterator[Object]:
        """Downloads the model that a name means, or what is missing of it, and yields Ollama's progress objects. Nothing is
        visible in the cache before all is there and checked. Raises WireError."""
        repo = self.find(name)
        commit, files = self._list(repo)
        yield {"status": "pulling manifest"}
        folder = self._cache / f"models--{repo.replace('/', '--')}"
        try:
            (folder / "blobs").mkdir(parents=True, exist_ok=True)
            missing = [file for file in files if not (folder / "blobs" / file.digest).exists()]
            yield from (file.progress(file.size) for file in files if file not in missing)
            needed, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
            if needed > free:
                raise WireError(507, f"{repo} needs {needed} bytes, and {free} are free on the disk")
            for file in missing:
                yield from self._download(f"/{repo}/resolve/{commit}/{quote(file.name)}", file, folder / "blobs" / file.digest)
            yield {"status": "verifying sha256 digest"}
            yield {"status": "writing manifest"}
            self._link(folder, commit, files)
        except OSError as error:
            raise WireError(500, f"{repo} cannot be written to the model cache: {_why(error)}") from None
        log.info("pulled %s", repo)
        yield {"status": "success"}

    def size(self, repo: str) -> int:
        """Bytes of a repo's model. Raises WireError."""
        return sum({file.digest: file.size for file in self._list(repo)[1]}.values())

    def choose(self, name: str, memory: int) -> tuple[str, int, str]:
        """The repo that a name means to a machine whose GPU may use so many bytes, its size, and why. Where the name says no
        quantisation that is the 8-bit one, if half of the memory can hold it. Raises WireError."""
        repo = self.find(name)
        size, most = self.size(repo), f"the {gigabytes(memory)} of memory that can be used"
        if "/" in name or parse_name(name).bits:
            return repo, size, "as asked"
        if size > memory:
            raise WireError(507, f"{repo} takes {gigabytes(size)}, more than {most}; pull a smaller model, or just '{repo}'")
        try:
            better = self.find(re.sub(r"(?i)[4-6](-?bit)", r"8\1", repo.partition("/")[2]))
        except WireError as error:
            if error.status != 404:
                raise
            better = repo
        if better == repo:
            return repo, size, "there is no 8-bit version"
        if (larger := self.size(better)) <= memory // 2:
            return better, larger, f"8-bit fits into half of {most}"
        return repo, size, f"8-bit takes {gigabytes(larger)}, more than half of {most}"

    def find(self, name: str) -> str:
        """The repo that a name means: itself, or the best of mlx-community's. Raises WireError if there is none."""
        plain = re.sub(r"^(hf\.co|huggingface\.co)/", "", name).removesuffix(":latest")
        if "/" in plain:
            return plain
        for words in dict.fromkeys((plain.partition(":")[0], re.match(r"[a-z]*", plain, re.I)[0])):
            query = urlencode({"author": "mlx-community", "search": words, "sort": "downloads", "limit": 1000})
            listed = self._ask(f"/api/models?{query}")
            repo = best_repo(plain, [one["id"] for one in listed if is_a(one.get("id"), str)])
            if repo:
                return repo
        raise WireError(404, f"mlx-community has no model '{name}'; any repo can be pulled as ORG/NAME")

    def _list(self, repo: str) -> tuple[str, list[RemoteFile]]:
        """A repo's last commit and those of its files that are wanted."""
        info = self._ask(f"/api/models/{repo}/revision/main?blobs=true")
        commit, files = info.get("sha"), []
        for one in items(info, "siblings", dict):
            name, lfs = dialects.take(one, "rfilename", str, required=True), dialects.take(one, "lfs", dict, default={})
            digest = lfs.get("sha256") or one.get("blobId")
            size = dialects.take(one, "size", int, required=True)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.FILES):
                files.append(RemoteFile(name, size, digest))
        if not all(re.fullmatch(r"[\da-f]{40}([\da-f]{24})?", str(one)) for one in [commit, *(f.digest for f in files)]) or any(
                {"..", "/", ""} & {*PurePosixPath(file.name).parts, file.name} for file in files):
            raise WireError(502, f"the hub {self._url} describes {repo} in a way that makes no sense")
        if not any(file.name.endswith(".safetensors") for file in files):
            names = [dialects.take(one, "rfilename", str) for one in items(info, "siblings", dict)]
            raise WireError(400, f"{repo} holds no MLX model: {shortcoming(names)}")
        return commit, files

    def _download(self, path: str, file: RemoteFile, blob: Path) -> Iterator[Object]:
        """Brings a file, or the rest of one that was begun, to `blob`."""
        part, told, hasher = blob.with_name(f"{blob.name}.incomplete"), -math.inf, file.hasher()
        with part.open("a+b") as out:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WireError(409, f"{file.name} is being downloaded already") from None
            out.seek(0)
            while piece := out.read(1 << 20):
                hasher.update(piece)
            for piece in self._pieces(path, out, file.size) if out.tell() < file.size else ():
                if piece is None:  # from the beginning
                    hasher = file.hasher()
                    continue
                out.write(piece)
                hasher.update(piece)
                if time.monotonic() - told > self.TELL:
                    told = time.monotonic()
                    yield file.progress(out.tell())
            if out.tell() < file.size:
                raise WireError(502, f"{file.name} broke off after {out.tell()} of {file.size} bytes; pull again to go on")
            if hasher.hexdigest() != file.digest:
                part.unlink()
                raise WireError(502, f"{file.name} has arrived damaged; pull again")
            os.replace(part, blob)
        yield file.progress(file.size)

    def _pieces(self, path: str, out: BinaryIO, size: int) -> Iterator[bytes | None]:
        """What follows in a file behind what `out` has; after None it is all of it."""
        with self._open(path, out.tell()) as answer:
            if out.tell() and answer.status != 206:
                out.truncate(0)
                yield None
            try:
                while piece := answer.read1(1 << 20):
                    yield piece
            except (OSError, http.client.HTTPException) as error:
                raise WireError(502, f"the hub {self._url} failed: {_why(error)}; pull again to go on") from None

    def _link(self, folder: Path, commit: str, files: list[RemoteFile]) -> None:
        """Makes downloaded files a snapshot, the one that `main` means."""
        for file in files:
            link = folder / "snapshots" / commit / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(folder / "blobs" / file.digest, link.parent))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)

    def _ask(self, path: str) -> Any:
        try:
            with self._open(path) as answer:
                return json.load(answer)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise WireError(502, f"the hub {self._url} failed: {_why(error)}") from None

    def _open(self, path: str, start: int = 0) -> Any:
        """The hub's answer, from byte `start` on if it can. Raises WireError."""
        request = urllib.request.Request(self._url + path, headers={"Range": f"bytes={start}-"} if start else {})
        if self._token:  # for the hub alone, not for where it keeps its files
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            return urllib.request.urlopen(request, timeout=self.SILENCE, context=self._trust)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                raise WireError(404, f"the hub {self._url} says {error.code} to {path}: there is no such repo, or it takes "
                                     "a token, in HF_TOKEN, that may read it") from None
            raise WireError(502, f"the hub {self._url} says {error.code} {error.reason} to {path}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise WireError(502, f"the hub {self._url} cannot be asked: {_why(getattr(error, 'reason', error))}") from None


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
    if not text.strip():  # everyone would have it
        raise argparse.ArgumentTypeError("a key cannot be empty")
    key, _, priority = text.rpartition("=")
    return (key, _priority(priority)) if key and priority.upper() in Priority.__members__ else (text, Priority.NORMAL)


def _key_file(name: str) -> list[tuple[str, Priority]]:
    try:
        with open(name, encoding="utf-8") as file:
            mode, lines = os.fstat(file.fileno()).st_mode, file.read().split("\n")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from None
    keys = [_key(line.strip()) for line in lines if line.strip()]
    if not keys:
        raise argparse.ArgumentTypeError(f"{name} holds no key")
    if mode & 0o044:
        print(f"mlx-server: others may read the keys in {name}; to stop that: chmod 600 {shlex.quote(name)}", file=sys.stderr)
    return keys


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


def _url(text: str) -> str:
    match = re.fullmatch(r"(http://(?:[\w.-]+|\[[\da-f:]+\])(?::(\d+))?)/?", text, re.I | re.A)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form http://HOST:PORT")
    _port(match[2] or "80")
    return match[1]


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port number")
    return int(text)


def _state_file() -> str:
    """https://specifications.freedesktop.org/basedir-spec/latest/"""
    return os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "mlx-server", "presets.json")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="mlx-server", allow_abbrev=False,
        description="Serves local MLX models to Claude Code, Ollama clients and scripts.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=11435, help="port to listen on, 0 for any (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="default model, loaded at once")
    parser.add_argument("--models-dir", metavar="DIR", action="append", default=[], help="a folder of models (repeatable)")
    parser.add_argument("--alias", metavar="PATTERN=NAME", type=_pair, action="append", default=[],
                        help="serve names like PATTERN (a glob) with model NAME (repeatable)")
    parser.add_argument("--state", metavar="FILE", default=_state_file(),
                        help="where names given by Ollama's copy and create are kept (default: %(default)s)")
    parser.add_argument("--context", metavar="N", type=_positive, help="most tokens of prompt and answer together")
    parser.add_argument("--max-tokens", metavar="N", type=_positive, help="most tokens of an answer")
    parser.add_argument("--prompt-cache", metavar="SIZE", type=_bytes,
                        help="memory for the KV states of earlier prompts, e.g. 8GB (default: a quarter of --memory)")
    parser.add_argument("--cache-dir", metavar="DIR", help="keep these states in DIR, too, where they survive a restart")
    parser.add_argument("--cache-dir-size", metavar="SIZE", type=_bytes, default=32 * 2**30,
                        help="most bytes of files in DIR (default: 32GB)")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8),
                        help="keep the KV cache quantised: half or a quarter of its size")
    parser.add_argument("--memory", metavar="SIZE", type=_bytes,
                        help="memory for models and KV states together (default: nine tenths of what the GPU may use)")
    parser.add_argument("--max-loaded", metavar="N", type=_positive, help="most models in memory (default: what fits)")
    parser.add_argument("--pipeline", action="store_true",
                        help="with mlx.launch: give each process some of the layers, instead of a part of each")
    parser.add_argument("--keep-alive", metavar="DURATION", type=_seconds,
                        help="unload models that were idle for so long, e.g. 30m (default: when their memory is needed)")
    parser.add_argument("--max-queue", metavar="N", type=_positive, default=64,
                        help="most requests that may wait, before more are refused (default: %(default)s)")
    parser.add_argument("--priority", metavar="PATTERN=PRIORITY", type=_rule, action="append", default=[],
                        help="high, normal or low for requests to models, or in dialects, like PATTERN (repeatable)")
    parser.add_argument("--upstream", metavar="URL", type=_url,
                        help="relay requests for models that are not here, e.g. to http://localhost:11434")
    parser.add_argument("--overflow", action="store_true",
                        help="relay what finds the queue full, too, if the upstream has a model of that name")
    parser.add_argument("--api-key", metavar="KEY[=PRIORITY]", type=_key, action="append", default=[],
                        help="demand this key (repeatable; default: $MLX_SERVER_API_KEY, else none)")
    parser.add_argument("--api-key-file", metavar="FILE", type=_key_file, default=[],
                        help="demand one of the keys in FILE, a KEY or KEY=PRIORITY per line")
    parser.add_argument("--drain", metavar="DURATION", type=_seconds, default=10.0,
                        help="time for running answers when the server is told to end (default: 10s)")
    parser.add_argument("--log-file", metavar="FILE", help="log to FILE, anew after every 10 MB; three old ones are kept")
    parser.add_argument("--print-env", nargs="?", const="claude", choices=["claude"],
                        help="print the shell commands that make Claude Code use this server, and end")
    parser.add_argument("--log-json", action="store_true", help="log JSON objects, one a line")
    parser.add_argument("--verbose", action="store_true", help="log every detail")
    parser.add_argument("--print-launchd", dest="service", action="store_const", const=launchd_job,
                        help="print a launchd job that runs the server with the other flags")
    parser.add_argument("--print-systemd", dest="service", action="store_const", const=systemd_unit,
                        help="print a systemd user unit that does so")
    parser.add_argument("--version", action="version", version=f"mlx-server {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=COMMANDS,
                        help="instead of serving: pull NAME (download a model, by a name like qwen3:8b or as ORG/NAME), "
                        "list, show NAME, rm NAME (what is installed)")
    parser.add_argument("name", metavar="NAME", nargs="?")
    return parser


# ------------------------------------------------------------------ the commands


def _program() -> str:
    """What starts this program, from any folder."""
    path = os.path.abspath(sys.argv[0])
    return shlex.join([path] if os.path.basename(path) == "mlx-server" else [sys.executable, path])


def _library(args: argparse.Namespace) -> Library:
    return Library(args.models_dir, args.alias, Path(args.state).expanduser())


def _api_keys(args: argparse.Namespace) -> dict[str, Priority]:
    shell_key = os.environ.get("MLX_SERVER_API_KEY", "").strip()
    return dict(args.api_key + args.api_key_file or ([_key(shell_key)] if shell_key else []))


def _url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _reached(host: str, port: int) -> str:
    """Where a server that listens there is reached from this machine."""
    return _url_of({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def print_env(args: argparse.Namespace) -> None:
    """Prints shell commands for Claude Code's variables: https://code.claude.com/docs/en/settings#environment-variables"""
    library = _library(args)
    default = library.resolve(args.model, trusted=True) if args.model else _default(library.resolve)
    tiers = {tier: library.resolve(f"claude-{tier}-5-5", default=default).name for tier in ("opus", "sonnet", "haiku")}
    context = min(filter(None, [default.context_length, args.context]))
    if context < 32_000:
        log.warning("%s reads at most %s tokens, and Claude Code's first prompt alone has 15,000", default.name, f"{context:,}")
    variables = {
        "ANTHROPIC_BASE_URL": _reached(args.host, args.port),
        "ANTHROPIC_AUTH_TOKEN": next(iter(_api_keys(args)), "none"),  # without one it asks for a login
        "ANTHROPIC_API_KEY": "",  # a real one is none of ours
        "ANTHROPIC_MODEL": default.name,
        **{f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL": name for tier, name in tiers.items()},
        "ANTHROPIC_SMALL_FAST_MODEL": tiers["haiku"],
        "CLAUDE_CODE_SUBAGENT_MODEL": default.name,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": 0,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": context,
        # Claude Code compacts this and 13,000 tokens before the window's end, and its first prompt has 15,000.
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": min(filter(None, [32000, context // 8, args.max_tokens])),
        "API_TIMEOUT_MS": 3_000_000, "API_FORCE_IDLE_TIMEOUT": 0, "CLAUDE_STREAM_IDLE_TIMEOUT_MS": 900_000}
    if not importlib.util.find_spec("llguidance"):
        variables["CLAUDE_CODE_DISABLE_TERMINAL_TITLE"] = 1  # titles are asked for as structured output
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(str(value))}")


def pull_model(args: argparse.Namespace) -> None:
    """Downloads the model called `args.name`."""
    name = dialects.checked_name(args.name.removeprefix("https://"), f"'{args.name}' is not a model's name")
    hub = Hub(_library(args).hub)
    repo, size, why = hub.choose(name, args.memory or usable_memory())
    print(f"pulling {repo}, {gigabytes(size)}: {why}", flush=True)
    progress = Progress(size)
    try:
        for step in hub.pull(repo):
            progress.show(step)
    finally:
        progress.end()
    print(f"pulled {repo}; to serve it: {_program()} --model {shlex.quote(repo)}")


class Progress:
    """Draws on stderr how much of `total` bytes has come: a bar in a terminal, otherwise a line now and then."""

    WIDTH = 24
    TELL = 5.0  # seconds between two lines

    def __init__(self, total: int):
        self._total, self._bar = max(total, 1), sys.stderr.isatty()
        self._came: dict[str, int] = {}
        self._there: dict[str, int] = {}  # bytes of each file at first sight: they tell nothing of the speed
        self._began = self._told = time.monotonic()

    def show(self, step: Object) -> None:
        """Takes in one of Ollama's progress objects."""
        if "completed" not in step:
            return
        before, self._came[step["digest"]] = sum(self._came.values()), step["completed"]
        self._there.setdefault(step["digest"], step["completed"])
        came, now = sum(self._came.values()), time.monotonic()
        if came == before or not (self._bar or came >= self._total or now - self._told >= self.TELL):
            return
        self._told = now
        speed = (came - sum(self._there.values())) / max(now - self._began, 0.1)
        line = f"{100 * came // self._total:3} %, {gigabytes(came)} of {gigabytes(self._total)}"
        if speed > 0:
            left = (self._total - came) / speed
            line += f", {gigabytes(speed)}/s, " + (f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left")
        full = self.WIDTH * came // self._total
        sys.stderr.write(f"\r[{'#' * full:{self.WIDTH}}] {line}\x1b[K" if self._bar else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leaves the line to others."""
        sys.stderr.write("\n" if self._bar and self._came else "")


def list_models(args: argparse.Namespace) -> None:
    """Prints a table of the installed models, the newest first."""
    models = sorted(_library(args).catalog(), key=lambda model: model.modified, reverse=True)
    width = max([len(model.name) for model in models], default=0)
    print(f"{'NAME':{width}}  {'SIZE':>8}  MODIFIED")
    for model in models:
        print(f"{model.name:{width}}  {gigabytes(model.size):>8}  {_ago(time.time() - model.modified)}")


def _ago(seconds: float) -> str:
    for unit, length in (("month", 30 * 86400), ("week", 7 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if count := int(seconds // length):
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def show_model(args: argparse.Namespace) -> None:
    """Prints what is known of the model called `args.name`."""
    model = _library(args).resolve(args.name, trusted=True)
    for key, value in {
        "name": model.name, "architecture": model.family, "parameters": model.parameter_size,
        "quantization": model.quantization, "context": f"{model.context_length:,} tokens",
        "capabilities": ", ".join(model.capabilities), "size": gigabytes(model.size), "path": model.path,
    }.items():
        print(f"{key:<14}{value}")


def remove_model(args: argparse.Namespace) -> None:
    """Deletes the model or preset called `args.name`."""
    library = _library(args)
    if not library.presets.remove(args.name):
        library.delete(args.name, library.resolve(args.name))
    print(f"deleted {args.name}")


COMMANDS = {"pull": pull_model, "list": list_models, "show": show_model, "rm": remove_model}


# ------------------------------------------------------------------ a service

_PATHS = ("--api-key-file", "--cache-dir", "--log-file", "--models-dir", "--state")
_CARRIED = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")  # variables that name places


def _command(argv: Sequence[str]) -> list[str]:
    """What starts the server with these flags from any folder."""
    command, words = [sys.executable, os.path.abspath(__file__)], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in (*_PATHS, "--model", "--alias"):
            value = value if equals else next(words)
            pattern, equals, target = value.partition("=") if flag == "--alias" else ("", "", value)
            is_path = flag in _PATHS or target[:1] in ("/", "~", ".") or os.path.exists(os.path.join(target, "config.json"))
            command += [flag, pattern + equals + (os.path.abspath(os.path.expanduser(target)) if is_path else target)]
        elif flag not in ("--print-launchd", "--print-systemd"):
            command.append(word)
    return command


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _CARRIED if os.environ.get(name)}


def _stop_seconds(args: argparse.Namespace) -> int:
    return math.ceil(max(0.0, args.drain)) + 10


def launchd_job(args: argparse.Namespace, command: list[str]) -> str:
    """A property list for ~/Library/LaunchAgents, whose job runs from login on and again after a failure: `man launchd.plist`.

    The server rotates its log itself. What ends the interpreter is said on stderr, to a file of its own.
    """
    logs = os.path.expanduser("~/Library/Logs")
    job = {
        "Label": "local.mlx-server",
        "ProgramArguments": command if args.log_file else [*command, "--log-file", f"{logs}/mlx-server.log"],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},  # `Crashed` would not count what the system kills to get memory
        "ThrottleInterval": 30,
        "ExitTimeOut": _stop_seconds(args),
        "ProcessType": "Interactive",  # others are slowed down
        "StandardOutPath": f"{logs}/mlx-server.err",
        "StandardErrorPath": f"{logs}/mlx-server.err",
        "EnvironmentVariables": _environment(),
    }
    return plistlib.dumps({key: value for key, value in job.items() if value}, sort_keys=False).decode()


def systemd_unit(args: argparse.Namespace, command: list[str]) -> str:
    """A unit for ~/.config/systemd/user. Quoting: https://www.freedesktop.org/software/systemd/man/latest/systemd.syntax.html,
    `%` and `$` as systemd.unit and systemd.service say."""
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'

    start = " ".join([quoted(command[0]), *(quoted(word).replace("$", "$$") for word in command[1:])])
    environment = "".join(f"Environment={quoted(f'{name}={value}')}\n" for name, value in _environment().items())
    return f"""[Unit]
Description=mlx-server

[Service]
ExecStart={start}
{environment}Restart=on-failure
RestartSec=30
TimeoutStopSec={_stop_seconds(args)}

[Install]
WantedBy=default.target
"""


def print_service(args: argparse.Namespace) -> None:
    """Prints what makes the system run the server with the flags given."""
    if _api_keys(args) != dict(args.api_key_file):
        arguments().error("a service takes its keys from --api-key-file")
    print(args.service(args, _command(args.argv)), end="")


# ------------------------------------------------------------------ the program


def _log_file(name: str) -> logging.Handler:
    os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
    return logging.handlers.RotatingFileHandler(name, maxBytes=10 * 2**20, backupCount=3, encoding="utf-8")


class OneLine(logging.Formatter):
    """A record is one line, whatever names and errors it quotes; only a traceback may follow it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().formatMessage(record))


class JSONLine(logging.Formatter):
    """A record is one JSON object: `time` (RFC 3339), `level`, `message`, a request's figures, `traceback` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": dialects.timestamp(record.created), "level": record.levelname.lower(), "message": record.getMessage(),
                **getattr(record, "figures", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _start_logging(args: argparse.Namespace) -> None:
    """Raises OSError when the log file cannot be written."""
    rank = os.environ.get("MLX_RANK", "0")
    form = "mlx-server: %(message)s" if args.run else "%(asctime)s " + f"rank {rank}: " * (rank != "0") + "%(message)s"
    to_file = args.log_file and not args.run
    lines = _log_file(args.log_file) if to_file else logging.StreamHandler(sys.stderr)
    lines.setFormatter(JSONLine() if args.log_json else OneLine(form, "%Y-%m-%d %H:%M:%S" if to_file else "%H:%M:%S"))
    level = logging.DEBUG if args.verbose else logging.WARNING if args.run else logging.INFO
    last_words = logging.StreamHandler(sys.stderr)  # why it did not start is for who starts it
    last_words.setLevel(logging.CRITICAL)
    logging.basicConfig(level=level, handlers=[lines, last_words] if to_file else [lines])
    if not args.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on model types concern nobody here
        logging.getLogger("httpx").setLevel(logging.WARNING)


def _run_command(args: argparse.Namespace) -> int:
    """Does what is to be done instead of serving; returns the exit status."""
    try:
        args.run(args)
        return 0
    except KeyboardInterrupt:
        log.error("broken off; the same command goes on from there")
    except (EngineError, WireError, ImportError) as error:
        log.error("%s", _missing() if isinstance(error, ImportError) else error)
    if args.print_env:
        print("false")  # for eval: what follows it must not go to another server
    return 1


def _missing() -> str | None:
    """Why MLX cannot work here."""
    system = os.uname()
    if system.sysname == "Darwin" and system.machine != "arm64":
        return (f"MLX needs Apple silicon, and {sys.executable} is made for Intel's processors; on a Mac with an M chip "
                "install an arm64 Python, from python.org for one")
    try:
        usable_memory()
        if not importlib.util.find_spec("mlx_lm"):
            raise ImportError("No module named 'mlx_lm'")
    except ImportError as error:
        return f"MLX cannot be imported ({error}); install it: {shlex.quote(sys.executable)} -m pip install mlx mlx-lm"
    except RuntimeError as error:
        return f"MLX finds no GPU: {error}"
    return None


def _is_taken(host: str, port: int) -> bool:
    """Whether someone listens there. macOS lets one server listen at an address and another one at all of them, and clients
    reach only the former: https://stackoverflow.com/a/14388707"""
    try:
        socket.create_connection((urlsplit(_reached(host, port)).hostname, port), ASKING).close()
    except OSError:
        return False
    return True


def _holder(host: str, port: int) -> str:
    """Who listens at an address, as far as that can be found out."""
    def ask(path: str) -> tuple[int, bytes]:
        netloc = urlsplit(_reached(host, port)).netloc
        with contextlib.closing(http.client.HTTPConnection(netloc, timeout=ASKING)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read(100)

    with contextlib.suppress(OSError, http.client.HTTPException):
        if ask("/") == (200, b"Ollama is running"):
            return "Ollama" if ask("/health")[0] == 404 else "another mlx-server"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"], stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True, timeout=ASKING)
        if found := re.search(r"^p(\d+)\nc(.+)", listed.stdout, re.M):
            return f"{found[2]} (process {found[1]})"
    return "another program"


def _welcome(args: argparse.Namespace, engine: Engine, port: int) -> None:
    """Logs what there is and what to type next."""
    if not args.model:
        models = sorted(engine.models(), key=lambda model: model.modified, reverse=True)
        found = [f"{model.name} ({gigabytes(model.size)})" for model in models if model.name != "demo"]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        log.info("models: %s%s", ", ".join(found[:8]) or "none but the built-in demo", more)
        with contextlib.suppress(ModelNotFound):  # not even the demo is there
            _default(engine.resolve)
    shell = f'eval "$({_env_command(args, port)})" && claude --permission-mode acceptEdits'
    log.info("Claude Code, in another terminal: %s", shell)


def _default(resolve: Callable[[str], LocalModel]) -> LocalModel:
    """The default model where no --model says it; logs why."""
    model = resolve("default")
    if model.name == "demo":
        log.warning("DEFAULT: demo, A TOY that cannot program; get a model: %s pull qwen3:8b", _program())
    else:
        tools = "that can use tools" if "tools" in model.capabilities else "(NONE CAN USE TOOLS, which Claude Code needs)"
        log.info("default: %s, the newest %s; others: --model NAME, or %s pull NAME", model.name, tools, _program())
    return model


def _env_command(args: argparse.Namespace, port: int) -> str:
    """What prints Claude Code's variables for this server, without its keys."""
    words, untouched = ["--print-env", "--port", str(port)], arguments()
    for name in ("host", "model", "models_dir", "alias", "state", "context", "max_tokens"):
        given = getattr(args, name)
        for value in [] if given == untouched.get_default(name) else given if isinstance(given, list) else [given]:
            value = "=".join(value) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", os.path.abspath(value) if os.path.exists(value) else value]
    keys = ["--api-key", "YOUR_KEY"] if _api_keys(args) else []
    return f"{_program()} {shlex.join(words + keys)}"


def _check(args: argparse.Namespace) -> None:
    """Ends the program where flags do not go together."""
    launched = "MLX_RANK" in os.environ  # by mlx.launch
    if args.overflow and not args.upstream:
        arguments().error("--overflow needs --upstream")
    if args.pipeline and not launched:
        arguments().error("--pipeline needs mlx.launch")
    if launched and (not args.model or args.cache_dir):
        arguments().error("with mlx.launch there is one model, named by --model, and no --cache-dir")
    if bool(args.name) != (args.command in ("pull", "show", "rm")):
        arguments().error("pull, show and rm take one NAME, and nothing else does")


def _engine(args: argparse.Namespace, group: Group) -> Engine:
    """Raises EngineError."""
    try:
        return Engine(args.model, models_dirs=args.models_dir, aliases=args.alias, context=args.context,
                      max_tokens=args.max_tokens, cache_limit=args.prompt_cache, cache_dir=args.cache_dir,
                      cache_dir_limit=args.cache_dir_size, kv_bits=args.kv_bits, memory=args.memory,
                      max_loaded=args.max_loaded, max_queue=args.max_queue, keep_alive=args.keep_alive,
                      state=args.state, group=group)
    except ModelNotFound as error:
        raise EngineError(f"{error}; to download it: {_program()} pull {shlex.quote(args.model)}") from None
    except OSError as error:
        raise EngineError(f"cannot keep a prompt cache in {args.cache_dir}: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until SIGINT or SIGTERM, as a rank above 0 as long as rank 0 runs, or a command; returns the exit
    status."""
    args = arguments().parse_intermixed_args(argv)
    _check(args)
    args.argv = sys.argv[1:] if argv is None else argv
    args.run = print_env if args.print_env else print_service if args.service else COMMANDS.get(args.command)
    try:
        _start_logging(args)
    except OSError as error:
        print(f"mlx-server: cannot log to {args.log_file}: {error.strerror}", file=sys.stderr)
        return 1
    if args.run:
        return _run_command(args)
    if missing := _missing():
        log.critical("%s", missing)
        return 1
    _allow_files()
    try:
        group = Ranks(args.pipeline) if "MLX_RANK" in os.environ else Group()
        if group.rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 gets it as well, and ends all
            return int(not _engine(args, group).follow())
        server = _listen(args)
    except EngineError as error:
        log.critical("%s", error)
        return 1
    try:
        server.engine = _engine(args, group)
    except EngineError as error:
        log.critical("%s", error)
        server.server_close()
        return 1
    _serve(args, server)
    if not server.engine.close(0) or group.lost:
        logging.shutdown()
        os._exit(server.engine.broken)  # an engine in the midst of a step would crash or stop the interpreter's own way out
    return int(server.engine.broken)


def _allow_files() -> None:
    """macOS lets a process open 256 files, unless it asks for more."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FILES:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES if most == resource.RLIM_INFINITY else min(FILES, most), most))


def _listen(args: argparse.Namespace) -> MLXServer:
    """A server, still without an engine. Raises EngineError if it cannot listen."""
    try:
        if args.port and _is_taken(args.host, args.port):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        upstream = Upstream(args.upstream, args.overflow) if args.upstream else None
        return MLXServer((args.host, args.port), api_keys=_api_keys(args), priorities=args.priority, upstream=upstream)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise EngineError(f"port {args.port} is already in use by {_holder(args.host, args.port)}; take another one: "
                              f"--port {args.port + 1}") from None
        raise EngineError(f"cannot listen on {args.host}:{args.port}: {error}") from None


def _serve(args: argparse.Namespace, server: MLXServer) -> None:
    """Answers until a signal says that it is enough."""
    stopper = threading.Thread(target=server.stop, args=(args.drain,))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the second one does not wait
        signal.signal(number, lambda *_: server.engine.close(0) if stopper.ident else stopper.start())
    if not sys.stderr or not sys.stderr.isatty():  # only a terminal that is closed hangs up to end its programs
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.info("mlx-server %s is listening on %s", __version__, _url_of(args.host, server.server_port))
    if not server.loopback and not server.api_keys:
        log.warning("whoever reaches this machine may use the server: demand a key with --api-key-file, or leave out --host")
    _welcome(args, server.engine, server.server_port)
    server.serve_forever(poll_interval=0.1)
    stopper.join()
    try:
        sys.stderr.flush()
    except (OSError, AttributeError):
        sys.stderr = None  # nobody reads it, which the interpreter would take for a failure


if __name__ == "__main__":
    sys.exit(main())
