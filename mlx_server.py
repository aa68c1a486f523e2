"""The front door: HTTP in, HTTP out.

`python mlx_server.py --port 11435` serves local MLX models to Claude Code, Ollama clients and
scripts. This module knows bytes, routes and sockets. What a body means is the business of
`dialects`, what a model does that of `engine`.

One thread serves one connection. It hands a request to the engine, then turns the engine's events
into bytes. Between two events it looks whether the client is still there; when it is not, the
generation is cancelled. What no local model answers to is relayed to the upstream, another server,
if there is one that has it."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # before anything that an older one does not understand
    sys.exit(
        f"mlx-server needs Python 3.11 or newer, not {sys.version.split()[0]} ({sys.executable}); get it from python.org"
    )

import argparse
import contextlib
import dataclasses
import errno
import fnmatch
import hmac
import http.client
import io
import ipaddress
import json
import logging
import logging.handlers
import os
import re
import resource
import secrets
import shlex
import signal
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from _mlx_server import __version__
from _mlx_server.front.cli import arguments, check_arguments, print_service
from _mlx_server.front.commands import COMMANDS, print_env, run_command
from _mlx_server.front.http import (
    ARRIVAL,
    CONNECTIONS,
    DISCONNECT_POLL,
    HOST,
    LOCAL_ORIGINS,
    MAX_BODY,
    PATIENCE,
    PING_AFTER,
    TURNED_AWAY,
    HeaderReader,
    HungUp,
    RequestSocket,
    _after,
    chunk,
    encode_json,
    is_local,
    place,
    readable,
    reuse,
    too_large,
)
from _mlx_server.front.logs import start_logging
from _mlx_server.front.metrics import Metrics
from _mlx_server.front.options import api_keys, program, url_of
from _mlx_server.front.startup import allow_files, holder, is_taken, mlx_trouble
from _mlx_server.front.upstream import RELAY, Upstream, UpstreamError, end_to_end
from _mlx_server.front.welcome import welcome
from _mlx_server.inference.group import Group
from _mlx_server.inference.hub import Hub
from _mlx_server.inference.presets import Preset
from _mlx_server.inference.protocol import (
    Done,
    EngineBusy,
    EngineError,
    ModelNotFound,
    Priority,
    Tick,
)
from _mlx_server.inference.ranks import Ranks
from _mlx_server.wire.anthropic import AnthropicMessages, anthropic_count, anthropic_error
from _mlx_server.wire.fields import Object, WireError, encodable, field
from _mlx_server.wire.ollama import (
    OllamaChat,
    OllamaEmbed,
    OllamaEmbeddings,
    OllamaGenerate,
    ollama_error,
)
from _mlx_server.wire.ollama_models import (
    checked_name,
    find_tag,
    ollama_create,
    ollama_ps,
    ollama_show,
)
from _mlx_server.wire.openai import OpenAIChat, OpenAICompletion, OpenAIEmbeddings, openai_error
from _mlx_server.wire.pull import ollama_pull
from _mlx_server.wire.reply import Embeddings, Reply
from _mlx_server.wire.responses import OpenAIResponses
from dialects import anthropic_model, anthropic_models, ollama_tags, upstream_model
from engine import Engine

log = logging.getLogger("mlx_server")


# The API level we speak; clients parse it as numbers and refuse what is too old
OLLAMA_VERSION = "0.35.0"


class MLXServer(ThreadingHTTPServer):
    """Serves `engine` at `address` (host, port), once `serve_forever` runs. Raises OSError when the
    address is taken.

    With `api_keys` every route but `/` and `/health` wants one of them, as `x-api-key` or bearer
    token; the priority that belongs to a key is the highest its holder can have. `priorities` are
    pairs of a glob, for a model's name or a dialect, and the priority of the requests that it
    matches, where they do not say themselves. `upstream` serves the models that are not here."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        engine: Engine | None = None,
        *,
        api_keys: dict[str, Priority] | None = None,
        priorities: Sequence[tuple[str, Priority]] = (),
        upstream: Upstream | None = None,
    ):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.engine, self.api_keys, self.priorities = engine, api_keys or {}, priorities
        self.upstream, self.metrics = upstream, Metrics()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.room = CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, files // 2)
        self.connected: dict[Any, bool] = {}  # sockets, and whether there is room for them
        self.answering: set[threading.Thread] = set()  # threads in the midst of an answer
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the DNS for a name nobody needs
        socketserver.TCPServer.server_bind(self)
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
        """Takes no new work, gives the running answers `drain` seconds, ends those left with an
        error their clients understand, then everything else, within `grace` seconds."""
        if self.engine is not None:
            self.engine.drain(drain)
        deadline = time.monotonic() + grace
        self.shutdown()
        if self.engine is not None:
            self.engine.close(grace - 1)
        for thread in list(self.answering):
            thread.join(max(0.0, deadline - time.monotonic()))
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection. Routes are at the end of the class."""

    server: MLXServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = PATIENCE

    # -- a request's way through

    def setup(self) -> None:
        super().setup()
        self.rfile = HeaderReader(RequestSocket(self.connection, "r"))

    def handle_one_request(self) -> None:
        self.rfile.raw.due = None
        super().handle_one_request()

    def serve(self) -> None:
        """Serves the request whose head has been read."""
        self.request_id = f"req_{secrets.token_hex(12)}"
        self.answered, self.origin, self.model = False, "", None
        self.body_read = not (
            {"content-length", "transfer-encoding"} & {name.lower() for name in self.headers}
        )
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
            raise WireError(
                404, "404 page not found" if not self.anthropic else f"Not found: {self.route}"
            )
        handle = methods.get("GET" if self.command == "HEAD" else self.command)
        if handle is None:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
            raise WireError(405, "405 method not allowed", {"Allow": allowed})
        return lambda: handle(self)

    def check_head(self) -> None:
        """What another server might read in another way is refused (RFC 9112, 3.2, 5 and 6.3)."""
        hosts, origins, lengths, codings = (
            self.headers.get_all(name, [])
            for name in ("Host", "Origin", "Content-Length", "Transfer-Encoding")
        )
        wrong = (
            "malformed header"
            if self.headers.defects or any("\n" in value for value in self.headers.values())
            else "Host, Origin and the body's length can be given only once"
            if max(len(hosts), len(origins), len(lengths + codings)) > 1
            else "the Host header is missing"
            if not hosts and self.request_version > "HTTP/1.0"
            else "malformed Host header"
            if not all(map(HOST.fullmatch, hosts))
            else f"Transfer-Encoding '{codings[0]}' is not supported"
            if codings and codings[0].lower() != "chunked"
            else None
        )
        if wrong:
            self.body_read = False  # where it ends is not known
            raise WireError(400, wrong)

    def check_origin(self) -> None:
        """A web page must not reach a local server by rebinding its own name to it, nor from a
        foreign origin."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin", "")
        try:
            name, foreign = urlsplit(f"//{host}").hostname or "", urlsplit(origin).netloc != host
        except ValueError:
            raise WireError(400, "malformed Host or Origin header") from None
        if self.server.loopback and not is_local(name):
            raise WireError(403, f"Host '{name}' is not served here")
        if origin and foreign and not LOCAL_ORIGINS.fullmatch(origin):
            raise WireError(403, f"Origin '{origin}' is not allowed")
        self.origin = origin

    def check_key(self) -> None:
        self.highest = Priority.HIGH
        if not self.server.api_keys or self.route in ("/", "/health"):
            return
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        given = [
            self.headers.get("x-api-key", ""),
            token.strip() if scheme.lower() == "bearer" else "",
        ]
        found = [
            priority
            for key, priority in self.server.api_keys.items()
            for one in given
            if hmac.compare_digest(one.encode("latin-1"), key.encode())
        ]
        if not found:
            raise WireError(401, "invalid x-api-key", {"x-should-retry": "false"})
        self.highest = min(found)

    def priority(self, reply: Reply, model: str) -> Priority:
        """Who the client is, what it asks for in `x-priority`, or what a rule says of its model or
        dialect."""
        asked = self.headers.get("x-priority", "").strip().upper()
        if asked and asked not in Priority.__members__:
            raise WireError(400, "x-priority: Input should be 'high', 'normal' or 'low'")
        names = [reply.request.model.lower(), model.lower(), reply.dialect]
        ruled = (
            priority
            for pattern, priority in self.server.priorities
            if any(fnmatch.fnmatchcase(name, pattern.lower()) for name in names)
        )
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
            body = encodable(body, text)
        except (ValueError, RecursionError) as error:
            known = {
                RecursionError: "it is nested too deeply",
                ValueError: "a number in it has too many digits",
            }
            raise WireError(
                400, f"the body cannot be read as JSON: {known.get(type(error), error)}"
            ) from None
        if not isinstance(body, dict):
            raise WireError(400, "the body should be a JSON object")
        name = body.get("model") or body.get("name")
        self.model = name if isinstance(name, str) else None
        return body

    def handle_expect_100(self) -> bool:
        return True  # said by `go_on`, once it is certain that the body is wanted

    def go_on(self) -> None:
        """Tells a client that waits for it to send its body (RFC 9110, 10.1.1)."""
        if (
            self.headers.get("Expect", "").lower() == "100-continue"
            and self.request_version != "HTTP/1.0"
        ):
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
                raise too_large()
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
            raise too_large()
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
                raise too_large()
            if size == 0:
                break
            yield self.read_exactly(size)
            if self.read_exactly(2) != b"\r\n":
                raise WireError(400, "malformed chunked body")
        while (line := self.rfile.readline(65536)).strip():  # trailers
            total += len(line)
            if total > MAX_BODY:
                raise too_large()

    def read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise HungUp
        return data

    # -- answers out

    def send(
        self,
        status: int,
        body: bytes,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        """A whole answer. The connection ends with it if the request's body was left unread."""
        self.answered = True
        self.close_connection |= not self.body_read
        self.start(
            status,
            {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
            if status != 204
            else headers or {},
        )
        if self.command != "HEAD":
            self.wfile.write(body)
        if not self.body_read:
            self.drain()

    def send_json(
        self, body: Object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send(
            status,
            encode_json(body),
            "application/json" if self.anthropic else "application/json; charset=utf-8",
            headers,
        )

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.server.metrics.answered(
            "openai" if self.openai else "anthropic" if self.anthropic else "ollama", status
        )
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        if self.anthropic:
            self.send_header("x-request-id" if self.openai else "request-id", self.request_id)
        if self.origin:
            headers = {**headers, "Access-Control-Allow-Origin": self.origin, "Vary": "Origin"}
        if self.command == "OPTIONS" and status == 204:
            headers = {
                **headers,
                "Allow": "GET, POST, DELETE, HEAD, OPTIONS",
                "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS",
                "Access-Control-Allow-Headers": self.headers.get(
                    "Access-Control-Request-Headers", "*"
                ),
                "Access-Control-Max-Age": "600",
            }
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
            status, headers, body = openai_error(error)
        elif self.anthropic:
            status, headers, body = anthropic_error(error, self.request_id)
        else:
            status, headers, body = ollama_error(error)
        log.info(
            "%s %s -> %d %s",
            self.command,
            self.route,
            status,
            error if status < 500 else type(error).__name__,
        )
        try:
            self.send_json(body, status, headers)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library found wrong with the request line or the headers."""
        self.request_id, self.anthropic, self.answered, self.body_read, self.origin = (
            "",
            False,
            False,
            True,
            "",
        )
        self.headers, self.command, self.route, self.request_version = (
            {},
            self.command or "GET",
            "",
            self.protocol_version,
        )
        self.openai, self.close_connection = False, True
        self.fail(WireError(int(code), message or "bad request"))

    def drain(self) -> None:
        """Lets a client finish sending what will not be read, or it would see a reset instead of
        the answer."""
        # A Mac's word for a client that has gone is no ConnectionError
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 2
        while (left := deadline - time.monotonic()) > 0 and readable(self.connection, left):
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
        self.server.answering.add(thread)
        try:
            for request in reply.requests:
                generations.append(engine.submit(request))
            stream = Stream(self, reply.framing, reuse(generations[0])) if reply.stream else None
            objects = reply.open(generations[0])
            for event in _after(generations):
                if event is not None:
                    if isinstance(event, Tick):
                        objects = (
                            reply.ping(stream.lull)
                            if stream and stream.silence >= PING_AFTER
                            else []
                        )
                    else:
                        first = first or (None if isinstance(event, Done) else time.monotonic())
                        objects = reply.event(event)
                if time.monotonic() - looked >= DISCONNECT_POLL:
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
                self.send_json(
                    reply.whole(), headers=reuse(generations[0], generations[0].usage.cached_tokens)
                )
        except EngineError as error:
            ending = f"failed: {error}"
            if not stream:
                raise
            stream.write(reply.failure(error))
            stream.end()
        finally:
            self.server.answering.discard(thread)
            if first:
                self.server.metrics.began(first - started)
            for generation in generations:
                generation.cancel()
                self.log_generation(generation, started, first, ending)

    def embed(self, reply: Embeddings) -> None:
        """Answers with the embeddings of texts, which are read one after the other, so that others
        get their turn."""
        engine, started, thread = self.server.engine, time.monotonic(), threading.current_thread()
        model = engine.resolve(reply.request.model)
        self.server.answering.add(thread)
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
            self.server.answering.discard(thread)
            seconds = time.monotonic() - started
            log.info(
                "%s %s: embedded %d of %d texts, %d tokens, %.2f s",
                self.route,
                model.name,
                len(reply.vectors),
                len(reply.requests),
                reply.tokens,
                seconds,
                extra={
                    "figures": {
                        "route": self.route,
                        "model": model.name,
                        "texts": len(reply.vectors),
                        "prompt_tokens": reply.tokens,
                        "seconds": seconds,
                    }
                },
            )

    def progress(self, steps: Iterator[Object], stream: bool) -> None:
        """Answers in Ollama's dialect with the steps of some work as they are done, or only with
        the last one."""
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
                out.write([ollama_error(error)[2]])
        if out:
            out.end()
        else:
            self.send_json(step)

    def hung_up(self) -> bool:
        # Asked first: a socket with a timeout would wait that long in recv, whatever the flags say.
        arrived = readable(self.connection, 0)
        return arrived and self.connection.recv(1, socket.MSG_PEEK) == b""

    def log_generation(
        self, generation: Any, started: float, first: float | None, ending: str
    ) -> None:
        usage = generation.usage
        rate = usage.completion_tokens / usage.decode_seconds if usage.decode_seconds else None
        speed = f"{rate:.1f} tokens/s" if rate else "- tokens/s"
        wait = f"first token {first - started:.2f} s" if first else "no token"
        miss = generation.miss
        parted = (
            f" (parts at {miss.at} in {place(miss)}: {miss.now!r} was {miss.was!r})" if miss else ""
        )
        figures = {
            "route": self.route,
            "model": generation.model.name,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "first_token_seconds": first and first - started,
            "tokens_per_second": rate,
            "seconds": time.monotonic() - started,
            "ending": ending,
            "miss": miss and dataclasses.asdict(miss),
        }
        log.info(
            "%s %s: prompt %d, reused %d%s, generated %d, %s, %s, %s",
            self.route,
            generation.model.name,
            usage.prompt_tokens,
            usage.cached_tokens,
            parted,
            usage.completion_tokens,
            wait,
            speed,
            ending,
            extra={"figures": figures},
        )

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    # -- relayed requests

    @property
    def upstream(self) -> Upstream | None:
        """The upstream, but not for a request that has come through a relay: it might go round in
        circles."""
        relayed = any(RELAY in value for value in self.headers.get_all("Via", []))
        return None if relayed else self.server.upstream

    def upstream_tags(self) -> list[Object]:
        return self.upstream.tags() if self.upstream else []

    def is_relayed(self, error: WireError | EngineError) -> bool:
        """Whether the upstream is to answer what has failed here. Raises WireError if it should but
        cannot be asked.

        An unknown name may fail for other reasons first: what is not for us need not be what we
        understand."""
        upstream = self.upstream
        if upstream is None or self.answered or self.model is None or self.route not in RELAYED:
            return False
        if isinstance(error, EngineBusy):
            return upstream.overflow and find_tag(upstream.tags(), self.model) is not None
        try:
            self.server.engine.resolve(self.model)
            return False
        except ModelNotFound:
            return upstream.find(self.model) is not None

    def relay(self) -> None:
        """Sends the request as it came to the upstream, and the answer as it comes to the
        client."""
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
            log.info(
                "%s %s: relayed to %s -> %d, %.2f s, %s",
                self.route,
                self.model,
                url,
                status,
                seconds,
                ending,
                extra={
                    "figures": {
                        "route": self.route,
                        "model": self.model,
                        "upstream": url,
                        "status": status,
                        "seconds": seconds,
                        "ending": ending,
                    }
                },
            )

    def pass_on(self, answer: http.client.HTTPResponse) -> None:
        """Copies an answer piece by piece. One that breaks off is left without its end, so that the
        client sees it."""
        headers = end_to_end(answer.headers)
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
            self.wfile.write(chunk(piece) if chunked else piece)
        if answer.length:
            raise UpstreamError(f"{answer.length} bytes are missing")
        if chunked:
            self.wfile.write(chunk(b""))

    # -- routes

    def get_root(self) -> None:
        # The words Ollama's clients look for
        self.send(200, b"Ollama is running", "text/plain; charset=utf-8")

    def get_hello(self) -> None:
        self.send(200, b"", "text/plain; charset=utf-8")

    def get_health(self) -> None:
        trouble = self.server.engine.health()
        self.send_json(
            {"status": "ok"} if trouble is None else {"status": "error", "error": trouble},
            503 if trouble else 200,
        )

    def get_metrics(self) -> None:
        self.send(
            200,
            self.server.metrics.text(self.server.engine).encode(),
            "text/plain; version=0.0.4; charset=utf-8",
        )

    def post_messages(self) -> None:
        self.converse(AnthropicMessages(self.read_json(), self.request_id))

    def post_count_tokens(self) -> None:
        request = anthropic_count(self.read_json())
        self.send_json({"input_tokens": self.server.engine.count_tokens(request)})

    def get_models(self) -> None:
        self.send_json(
            anthropic_models(self.server.engine.models(), self.query, self.upstream_tags())
        )

    def get_model(self) -> None:
        name = self.route.removeprefix("/v1/models/")
        try:
            model = anthropic_model(self.server.engine.resolve(name))
        except ModelNotFound:
            tag = self.upstream and self.upstream.find(name)
            if not tag:
                raise
            model = upstream_model(tag)
        self.send_json(model)

    def post_chat_completions(self) -> None:
        self.converse(OpenAIChat(self.read_json()))

    def post_completions(self) -> None:
        self.converse(OpenAICompletion(self.read_json()))

    def post_responses(self) -> None:
        self.converse(OpenAIResponses(self.read_json()))

    def post_generate(self) -> None:
        self.converse(OllamaGenerate(self.read_json()))

    def post_chat(self) -> None:
        self.converse(OllamaChat(self.read_json()))

    def post_embeddings(self) -> None:
        self.embed(EMBEDDINGS[self.route](self.read_json()))

    def get_tags(self) -> None:
        self.send_json(ollama_tags(self.server.engine.models(), self.upstream_tags()))

    def post_show(self) -> None:
        self.read_json()
        if self.model is None:
            raise WireError(400, "model is required")
        engine = self.server.engine
        local = engine.resolve(self.model)
        template, generation = engine.show(local)
        self.send_json(
            ollama_show(
                local,
                engine.context_length(local),
                template,
                generation,
                self.model,
                engine.preset(self.model),
            )
        )

    def delete_model(self) -> None:
        self.read_json()
        if self.model is None:
            raise WireError(400, "model is required")
        self.server.engine.delete(self.model)
        self.send(200, b"", "text/plain; charset=utf-8")

    def post_copy(self) -> None:
        body = self.read_json()
        source, name = (
            checked_name(body.get(key), f"{key} {json.dumps(body.get(key))} is invalid")
            for key in ("source", "destination")
        )
        self.server.engine.keep(
            dataclasses.replace(self.base(source), name=name, modified=time.time())
        )
        self.send(200, b"", "text/plain; charset=utf-8")

    def post_create(self) -> None:
        body = self.read_json()
        name = checked_name(self.model, "invalid model name")
        source = field(body, "from", str, default="")
        if not source and not body.get("files"):
            raise WireError(400, "neither 'from' or 'files' was specified")
        preset = ollama_create(body, name, self.base(source) if source else Preset(name, ""))

        def create() -> Iterator[Object]:
            self.server.engine.keep(preset)
            yield {"status": "writing manifest"}
            yield {"status": "success"}

        self.progress(create(), field(body, "stream", bool, default=True))

    def base(self, source: str) -> Preset:
        """The preset that a name means, or an empty one of its model."""
        engine = self.server.engine
        local = engine.resolve(source)
        return engine.preset(source) or Preset(local.name, local.name)

    def post_pull(self) -> None:
        body = self.read_json()
        name = checked_name((self.model or "").removeprefix("https://"), "invalid model name")
        steps = ollama_pull(Hub(self.server.engine.hub).pull(name))
        self.progress(steps, field(body, "stream", bool, default=True))

    def post_push(self) -> None:
        self.read_json()
        raise WireError(
            400, "models cannot be pushed from here" if self.model else "model is required"
        )

    def get_blob(self) -> None:
        raise WireError(404, "this server keeps no blobs")

    def post_blob(self) -> None:
        raise WireError(
            400, "this server keeps no blobs: a model can be created 'from' an installed one"
        )

    def get_ps(self) -> None:
        self.send_json(ollama_ps(self.server.engine.loaded()))

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
EMBEDDINGS = {
    "/api/embed": OllamaEmbed,
    "/api/embeddings": OllamaEmbeddings,
    "/v1/embeddings": OpenAIEmbeddings,
}


class Stream:
    """A streamed answer: objects as server-sent events or NDJSON lines, each sent at once, chunked
    for HTTP/1.1. A string is a server-sent event already."""

    def __init__(self, handler: Handler, framing: str, headers: dict[str, str]):
        self._file = handler.wfile
        self._chunked = handler.request_version != "HTTP/1.0"
        self._framing = framing
        if framing == "lines" and "text/event-stream" in handler.headers.get("Accept", ""):
            self._framing = "data"
        headers = {
            **headers,
            "Cache-Control": "no-cache",
            "Content-Type": "application/x-ndjson"
            if self._framing == "lines"
            else "text/event-stream; charset=utf-8",
        }
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
            self._file.write(chunk(b""))

    def _send(self, data: bytes) -> None:
        self._file.write(chunk(data) if self._chunked else data)
        self._last = time.monotonic()

    def _frame(self, body: Object | str) -> bytes:
        if isinstance(body, str):
            return body.encode() + b"\n\n"
        if self._framing == "lines":
            return encode_json(body) + b"\n"
        name = b"event: " + body["type"].encode() + b"\n" if self._framing == "events" else b""
        return name + b"data: " + encode_json(body) + b"\n\n"


RELAYED = {
    "/api/chat",
    "/api/generate",
    "/api/show",
    "/api/embed",
    "/api/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
}


def _engine(args: argparse.Namespace, group: Group) -> Engine:
    """Raises EngineError."""
    try:
        return Engine(
            args.model,
            models_dirs=args.models_dir,
            aliases=args.alias,
            context=args.context,
            max_tokens=args.max_tokens,
            cache_limit=args.prompt_cache,
            cache_dir=args.cache_dir,
            cache_dir_limit=args.cache_dir_size,
            kv_bits=args.kv_bits,
            memory=args.memory,
            max_loaded=args.max_loaded,
            max_queue=args.max_queue,
            keep_alive=args.keep_alive,
            state=args.state,
            group=group,
        )
    except ModelNotFound as error:
        raise EngineError(
            f"{error}; to download it: {program()} pull {shlex.quote(args.model)}"
        ) from None
    except OSError as error:
        raise EngineError(
            f"cannot keep a prompt cache in {args.cache_dir}: {error.strerror}"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until SIGINT or SIGTERM, as a rank above 0 as long as rank 0 runs, or a
    command; returns the exit status."""
    args = arguments().parse_intermixed_args(argv)
    check_arguments(args)
    args.argv = sys.argv[1:] if argv is None else argv
    args.run = (
        print_env
        if args.print_env
        else print_service
        if args.service
        else COMMANDS.get(args.command)
    )
    try:
        start_logging(args)
    except OSError as error:
        print(f"mlx-server: cannot log to {args.log_file}: {error.strerror}", file=sys.stderr)
        return 1
    if args.run:
        return run_command(args)
    if trouble := mlx_trouble():
        log.critical("%s", trouble)
        return 1
    allow_files()
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
        # An engine in the midst of a step would crash or stop the interpreter's own way out
        os._exit(server.engine.broken)
    return int(server.engine.broken)


def _listen(args: argparse.Namespace) -> MLXServer:
    """A server, still without an engine. Raises EngineError if it cannot listen."""
    try:
        if args.port and is_taken(args.host, args.port):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        upstream = Upstream(args.upstream, args.overflow) if args.upstream else None
        return MLXServer(
            (args.host, args.port),
            api_keys=api_keys(args),
            priorities=args.priority,
            upstream=upstream,
        )
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise EngineError(
                f"port {args.port} is already in use by {holder(args.host, args.port)}; take another one: "
                f"--port {args.port + 1}"
            ) from None
        raise EngineError(f"cannot listen on {args.host}:{args.port}: {error}") from None


def _serve(args: argparse.Namespace, server: MLXServer) -> None:
    """Answers until a signal says that it is enough."""
    stopper = threading.Thread(target=server.stop, args=(args.drain,))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the second one does not wait
        signal.signal(
            number, lambda *_: server.engine.close(0) if stopper.ident else stopper.start()
        )
    # Only a terminal that is closed hangs up to end its programs
    if not sys.stderr or not sys.stderr.isatty():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.info("mlx-server %s is listening on %s", __version__, url_of(args.host, server.server_port))
    if not server.loopback and not server.api_keys:
        log.warning(
            "whoever reaches this machine may use the server: demand a key with --api-key-file, or leave out --host"
        )
    welcome(args, server.engine, server.server_port)
    server.serve_forever(poll_interval=0.1)
    stopper.join()
    try:
        sys.stderr.flush()
    except (OSError, AttributeError):
        sys.stderr = None  # nobody reads it, which the interpreter would take for a failure


if __name__ == "__main__":
    sys.exit(main())
