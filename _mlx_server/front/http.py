"""HTTP: one connection's requests in, their answers out. It knows bytes and no models."""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import logging
import math
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

from _mlx_server.front import body, page
from _mlx_server.front.budget import BUDGET, BodyClaim
from _mlx_server.front.connections import ConnectionServer
from _mlx_server.front.head import check_key, checked_origin, framing_error, has_body
from _mlx_server.front.logs import shortened
from _mlx_server.front.sockets import (
    CLIENT_TIMEOUT,
    REQUEST_DEADLINE,
    AnswerWriter,
    HeaderReader,
    RequestSocket,
    is_disconnected,
    is_readable,
)
from _mlx_server.front.stream import BodyWriter, Stream, content_type, encode_json, json_pieces
from _mlx_server.front.turns import Turn, Turns
from _mlx_server.inference.images.images import IMAGE_TURN
from _mlx_server.inference.images.pdf import FILE_TURN, IS_CLIENT_GONE
from _mlx_server.inference.protocol import EngineBusy, EngineError, Priority
from _mlx_server.wire.fields import Object, WireError

LINGER = 2.0  # seconds for which a client may go on sending what is not read any more
OPEN_ROUTES = ("/", *page.ROUTES, "/health")  # need no API key

log = logging.getLogger("mlx_server")


class Dialect(Protocol):
    """What HTTP needs to know of a vendor's API; `dialects.Dialect` says what the fields mean."""

    @property
    def name(self) -> str: ...
    @property
    def request_id_header(self) -> str | None: ...
    @property
    def content_type(self) -> str: ...
    @property
    def strict_json(self) -> bool: ...
    def error(self, error: Exception, request_id: str, /) -> tuple[int, dict[str, str], Object]: ...


@functools.lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


@dataclass
class Exchange:
    """One request and what has become of it."""

    id: str = ""
    route: str = ""  # the path, decoded and without its query
    query: dict[str, str] = field(default_factory=dict)
    origin: str = ""  # the Origin header, once it is allowed
    highest_priority: Priority = Priority.HIGH  # that the request's API key allows
    owner: str = ""  # what stands for that key, where there are several
    body: bytes = b""  # as it was sent, perhaps compressed
    body_read: bool = True  # whether the whole request has been read from the socket
    answered: bool = False  # whether an answer has begun
    model: str | None = None  # the name in the body

    @property
    def low_priority(self) -> bool:
        """Whether the request's API key is one for low priority."""
        return self.highest_priority is Priority.LOW


class HTTPHandler(BaseHTTPRequestHandler):
    """One connection. A subclass says what is answered (`answer`) and in which dialect; all other
    public methods are for it to use. `exchange` is the request that is being answered."""

    server: ConnectionServer
    rfile: HeaderReader
    wfile: AnswerWriter
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = CLIENT_TIMEOUT

    @property
    def dialect(self) -> Dialect:
        """The dialect of the route that was asked for."""
        raise NotImplementedError

    def answer(self) -> None:
        """Answers the request. Any exception is answered as an error."""
        raise NotImplementedError

    # -- a request's way through

    def setup(self) -> None:
        super().setup()
        self._place = self.server.connection(self.request)
        self.wfile = AnswerWriter(self.connection, self._place.waits, self._place.works)
        self._requests = RequestSocket(self.connection)
        self.rfile = HeaderReader(self._requests)
        IS_CLIENT_GONE.set(self.is_client_gone)

    def handle_one_request(self) -> None:
        self._requests.left = None
        self._place.waits()
        self.rfile.begin_head()
        super().handle_one_request()

    def handle_request(self) -> None:
        """Serves the request whose head has been read."""
        self.rfile.end_head()
        path, _, query = self.path.partition("?")
        self.exchange = Exchange(
            id=f"req_{secrets.token_hex(12)}",
            route=unquote(path).rstrip("/") or "/",
            query=dict(parse_qsl(query)),
            body_read=not has_body(self.headers),
        )
        self._claim = BodyClaim(self.server.bodies, BUDGET)
        self._place.works()
        try:
            self._check_head()
            if self.command == "OPTIONS":
                self.send(204, b"")
            else:
                self.answer()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except (WireError, EngineError) as error:
            self.send_failure(error)
        except RecursionError:  # the parser has taken it, but what is done with it goes deeper
            self.send_failure(WireError(400, "the body is nested too deeply"))
        except Exception as error:
            log.error("%s %s failed", self.command, shortened(self.exchange.route), exc_info=True)
            self.send_failure(error)
        finally:
            self.exchange.body = b""  # the connection may stay
            self._claim.release()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_request

    def _check_head(self) -> None:
        if not self._place.served:
            self.close_connection = True
            raise EngineBusy("there are too many connections")
        key, refused = None, True
        try:
            self._check_framing()
            self.exchange.origin = checked_origin(self.headers, self.server.is_own_name)
            if self._needs_key:
                key = check_key(self.headers, self.server.api_keys)
                self.exchange.highest_priority = self.server.api_keys[key]
                self.exchange.owner = self.server.owners.get(key, "")
            refused = False
        finally:
            self._keep_pace(key, refused)
        low, owner = self.exchange.low_priority, self.exchange.owner
        self._place.low_owner = owner if low else None
        if low and not self.server.has_room_for_low(owner):
            raise EngineBusy("requests with such keys have too many connections")
        self._claim = BodyClaim(self.server.bodies, BUDGET // 2 if low else BUDGET)

    def _check_framing(self) -> None:
        wrong = framing_error(self.requestline, self.headers, self.request_version)
        if self.rfile.bare_newline:
            wrong = "a line of the head does not end with CR LF"
        if wrong:
            self.exchange.body_read = False  # where the body ends is not known
            raise WireError(400, wrong)

    @property
    def _needs_key(self) -> bool:
        is_open = self.command == "OPTIONS" or self.exchange.route in OPEN_ROUTES
        return bool(self.server.api_keys) and not is_open

    def _keep_pace(self, key: str | None, refused: bool) -> None:
        """Waits if many others come with keys for low priority, without a key, or are refused, as
        those of foreign web pages are."""
        if refused or key is None and self.server.api_keys:
            self._place.pause(self.server.keyless_pace.delay())
        elif self.exchange.low_priority:
            self._place.pause(self.server.low_pace.delay())

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    # -- reading

    def handle_expect_100(self) -> bool:
        return True  # `_send_continue` answers, once it is certain that the body is wanted

    def read_json(self) -> Object:
        """Reads the request's body and returns the JSON object in it. Raises WireError if it is
        none."""
        self.read_body()
        with self.preparing():
            return self.parse_body()

    def parse_body(self) -> Object:
        """The JSON object in the body that was read, in the request's turn. Raises WireError if it
        is none."""
        raw = self.exchange.body
        coding = self.headers.get("Content-Encoding", "identity")
        data = body.decompress(raw, coding, self._claim)
        value = body.parse_json(data, self.dialect.strict_json, self._claim)
        if data is not raw:
            self._claim.reduce(len(data))
        return value

    def read_body(self) -> None:
        """Waits for the request's body. Raises WireError, EngineBusy and ClientDisconnected."""
        length = body.check_length(self.headers)
        self._send_continue()
        self._place.waits()
        try:
            self.exchange.body = self._read_raw(length)
        except TimeoutError:
            late = f"the request has not arrived within {REQUEST_DEADLINE:.0f} s"
            raise WireError(408, late) from None
        finally:
            self._place.works()
        self.exchange.body_read = True

    def _read_raw(self, length: int | None) -> bytes:
        """The body as it was sent. Chunks of a byte each take seconds of Python: they are read in
        the request's turn, but waited for outside of it."""
        if length is not None:
            return body.read_raw(self.rfile, length, self._claim)
        turns, priority = self.server.chunk_turns, self._turn_priority
        with turns.take(priority, self.is_client_gone, math.inf, self.client) as turn:
            self._requests.waiting = turn.paused
            try:
                return body.read_raw(self.rfile, None, self._claim)
            finally:
                self._requests.waiting = contextlib.nullcontext

    def claim(self, size: int) -> None:
        """Counts so many bytes of an answer as this request's. Raises WireError and EngineBusy if
        there is no room for them."""
        try:
            self._claim.add(size)
        except WireError:
            fewer = "ask for fewer texts, tokens or log probabilities"
            raise WireError(413, f"the answer takes too much memory; {fewer}") from None

    def _send_continue(self) -> None:
        """Tells a client that waits for it to send its body (RFC 9110, 10.1.1)."""
        expected = self.headers.get("Expect", "").lower() == "100-continue"
        if expected and self.request_version != "HTTP/1.0":
            self.send_response_only(100)
            self.end_headers()

    def is_client_gone(self) -> bool:
        """Whether the client has closed the connection."""
        return is_disconnected(self.connection)

    @contextlib.contextmanager
    def preparing(self, most: float | None = None) -> Iterator[Turn]:
        """Within it what costs time is done for the request, once it is its turn among those of
        other clients. Entering raises EngineBusy, if `most` others wait, and
        ClientDisconnected."""
        turns, priority = self.server.turns, self._turn_priority
        if not self.server.owners:
            most = math.inf
        with turns.take(priority, self.is_client_gone, most, self.client) as turn:
            FILE_TURN.set(functools.partial(self._file_turn, turn, self.server.file_turns))
            IMAGE_TURN.set(functools.partial(self._file_turn, turn, self.server.image_turns))
            yield turn

    @contextlib.contextmanager
    def _file_turn(self, preparing: Turn, turns: Turns) -> Iterator[None]:
        """Within it a PDF of the request that is being prepared is read by another process, or an
        image of it decoded, once it is its turn. Others are prepared meanwhile."""
        priority = self._turn_priority
        with (
            preparing.paused(),
            turns.take(priority, self.is_client_gone, math.inf, self.client),
        ):
            yield

    @property
    def client(self) -> str:
        """What stands for the client among those whose turn comes."""
        return self.exchange.owner or self._place.address

    @property
    def _turn_priority(self) -> Priority:
        """Where there are no others with a key, only other machines wait."""
        if self.server.owners:
            return self.exchange.highest_priority
        return Priority.NORMAL if self._place.address else Priority.HIGH

    # -- writing

    def send(
        self,
        status: int,
        data: bytes,
        kind: str = "text/plain; charset=utf-8",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Sends a whole answer of Content-Type `kind`. The connection ends with it if the request's
        body was not read. Raises OSError."""
        self.close_connection |= not self.exchange.body_read
        own = {"Content-Type": kind, "Content-Length": str(len(data))} if status != 204 else {}
        with self.wfile.together():
            self._send_head(status, {**own, **(headers or {})})
            if self.command != "HEAD":
                self.wfile.write(data)
        if not self.exchange.body_read:
            self._discard_input()

    def send_json(
        self, value: Object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends a whole answer in JSON. Raises OSError."""
        self.send(status, encode_json(value), self.dialect.content_type, headers)

    def send_large_json(self, value: Object, headers: Mapping[str, str] | None = None) -> None:
        """Sends a whole answer in JSON, whose body follows in pieces if it is long. Raises
        OSError."""
        kind, pieces = self.dialect.content_type, json_pieces(value)
        with self.preparing(most=math.inf) as turn:
            first, second = next(pieces), next(pieces, None)
            if second is not None:
                with turn.paused():
                    out = self.start_body(200, {**(headers or {}), "Content-Type": kind})
                for piece in itertools.chain((first, second), pieces):
                    with turn.paused():
                        out.write(piece)
        if second is None:
            self.send(200, first, kind, headers)
        else:
            out.end()

    def send_found(self, find: Callable[[], Object]) -> None:
        """Sends what `find` returns in JSON; it is looked for in the request's turn. Raises what
        `find` raises, EngineBusy and OSError."""
        with self.preparing():
            data = encode_json(find())
        self.send(200, data, self.dialect.content_type)

    def start_body(
        self, status: int, headers: Mapping[str, str], length: int | None = None
    ) -> BodyWriter:
        """Sends the head of an answer whose body follows, of `length` bytes if that is known.
        Without it the body is chunked, for HTTP/1.0 ended by the connection's end. Raises
        OSError."""
        chunked = length is None and self.request_version != "HTTP/1.0"
        if length is not None:
            headers = {**headers, "Content-Length": str(length)}
        elif chunked:
            headers = {**headers, "Transfer-Encoding": "chunked"}
        else:
            self.close_connection = True
        self._send_head(status, headers)
        return BodyWriter(self.wfile, chunked)

    def start_stream(self, framing: str, headers: Mapping[str, str] | None = None) -> Stream:
        """Sends the head of a streamed answer, framed as `Stream` says. A client that asks for
        server-sent events gets them instead of lines. Raises OSError."""
        if framing == "lines" and "text/event-stream" in self.headers.get("Accept", ""):
            framing = "data"
        own = {"Cache-Control": "no-cache", "Content-Type": content_type(framing)}
        return Stream(self.start_body(200, {**(headers or {}), **own}), framing)

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        exchange, dialect = self.exchange, self.dialect
        exchange.answered = True
        self.server.metrics.answered(dialect.name, status)
        headers = dict(headers)
        if exchange.origin:
            headers |= {"Access-Control-Allow-Origin": exchange.origin, "Vary": "Origin"}
        if self.command == "OPTIONS" and status == 204:
            headers |= self._preflight_headers()
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response_only(status)
        self.send_header("Date", _date(int(time.time())))
        if dialect.request_id_header:
            self.send_header(dialect.request_id_header, exchange.id)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _preflight_headers(self) -> dict[str, str]:
        """https://fetch.spec.whatwg.org/#cors-preflight-fetch"""
        asked = self.headers.get("Access-Control-Request-Headers", "*")
        return {
            "Allow": "GET, POST, DELETE, HEAD, OPTIONS",
            "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS",
            "Access-Control-Allow-Headers": asked,
            "Access-Control-Max-Age": "600",
        }

    def send_failure(self, error: Exception) -> None:
        """Sends any exception as an error of the dialect. An answer that has begun is broken off
        instead, by closing the connection."""
        exchange = self.exchange
        if exchange.answered:
            self.close_connection = True
            return
        status, headers, value = self.dialect.error(error, exchange.id)
        said = error if status < 500 else type(error).__name__
        route, said = shortened(exchange.route), shortened(str(said))
        log.info("%s %s -> %d %s", shortened(self.command), route, status, said)
        try:
            with self.server.answering():  # a server that ends waits for it
                self.send_json(value, status, headers)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by the standard library for a request line or headers that it cannot read."""
        self.exchange, self.headers = Exchange(body_read=False), http.client.HTTPMessage()
        self.command, self.request_version = self.command or "GET", self.protocol_version
        self.close_connection = True
        self._keep_pace(None, refused=True)
        self.send_failure(WireError(int(code), message or "bad request"))

    def _discard_input(self) -> None:
        """Reads what the client still sends. Closing the socket before that would reset the
        connection, and the client might lose the answer."""
        # On macOS the error for a client that has gone is no ConnectionError
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self._place.waits()
        deadline = time.monotonic() + LINGER
        while (left := deadline - time.monotonic()) > 0 and is_readable(self.connection, left):
            if not self.connection.recv(1 << 16):
                break
