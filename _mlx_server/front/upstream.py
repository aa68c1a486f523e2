"""Another server, for the models that are not here."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import math
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from _mlx_server.front.http import HTTPHandler
from _mlx_server.front.logs import shortened
from _mlx_server.front.sockets import CLIENT_TIMEOUT, ClientDisconnected, RequestSocket
from _mlx_server.wire.fields import Object, WireError, is_type, items
from _mlx_server.wire.ollama_models import find_tag

CONNECT_TIMEOUT = 2.0  # seconds to accept a connection, and to say which models there are
MAX_TAGS = 16 * 2**20  # bytes of that list
TAGS_LIFETIME = 5.0  # seconds for which the list of its models is used before it is asked again
VIA_NAME = "mlx-server"  # our name in the Via header (RFC 9110, 7.6.3)
_NOT_RELAYED = {
    # Of one connection (RFC 9110, 7.6.1)
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    # Written anew for the other connection
    "host",
    "content-length",
    "expect",
    "date",
    # Between the client and this server
    "authorization",
    "x-api-key",
    "cookie",
    "set-cookie",
    "origin",
    "x-request-id",
    # What a browser would take for the word of this server's site
    "access-control-allow-origin",
    "access-control-allow-credentials",
    "access-control-expose-headers",
    "clear-site-data",
    "content-security-policy",
    "refresh",
    "service-worker-allowed",
    "strict-transport-security",
    "www-authenticate",
}
# Names that Ollama sends on to its cloud, whether it lists them or not
CLOUD = re.compile(r".*:([^/:]*-)?cloud", re.I)
# What asking for the list may raise
_FAILURES = (OSError, http.client.HTTPException, ValueError, RecursionError, WireError)

log = logging.getLogger("mlx_server")


class UpstreamError(Exception):
    """The upstream cannot be reached or has failed; the message says why."""


class Upstream:
    """A server at `url` (http://HOST:PORT) with Ollama's API, for the models that are not installed
    here. With `overflow` it also gets requests that find the engine's queue full. May be used from
    any thread."""

    def __init__(self, url: str, overflow: bool = False):
        self.url, self.overflow = url, overflow
        self._lock = threading.Lock()
        self._tags: list[Object] = []
        self._trouble: str | None = None  # why the tags could not be asked for
        self._asked_at = -math.inf  # monotonic seconds

    def tags(self) -> list[Object]:
        """The objects of its `GET /api/tags`, at most TAGS_LIFETIME seconds old; none if it cannot
        be asked."""
        return self._ask()[0]

    def find(self, name: str) -> Object | None:
        """Its tag for a model of that name, None if it has none. Raises WireError if it cannot be
        asked."""
        tags, trouble = self._ask()
        if trouble:
            raise WireError(404, f"model '{name}' not found here, and {trouble}")
        return find_tag(tags, name) or ({"name": name} if CLOUD.fullmatch(name) else None)

    def serves(self, name: str) -> bool:
        """Whether a name is known to be one of its models."""
        return find_tag(self.tags(), name) is not None or bool(CLOUD.fullmatch(name))

    @contextlib.contextmanager
    def open(
        self, client: HTTPHandler
    ) -> Iterator[tuple[http.client.HTTPResponse, UpstreamSocket]]:
        """Its answer to the request that `client` has read, and where that comes from. The call and
        the answer's reads raise UpstreamError or HTTPException when the upstream fails, and
        ClientDisconnected as soon as the client is gone."""
        with contextlib.closing(self._connection()) as connection:
            try:
                connection.connect()
                connection.sock.settimeout(CLIENT_TIMEOUT)
                self._send(connection, client)
            except (OSError, ValueError) as error:
                raise UpstreamError(error_text(error)) from None
            with http.client.HTTPResponse(connection.sock, method=client.command) as answer:
                answer.fp.close()
                arriving = UpstreamSocket(connection.sock, client)
                answer.fp = io.BufferedReader(arriving)
                answer.begin()
                yield answer, arriving

    @staticmethod
    def _send(connection: http.client.HTTPConnection, client: HTTPHandler) -> None:
        connection.putrequest(client.command, client.path, skip_accept_encoding=True)
        for name, value in end_to_end(client.headers).items():
            connection.putheader(name, value)
        connection.putheader("Via", f"1.1 {VIA_NAME}")
        connection.putheader("Content-Length", str(len(client.exchange.body)))
        connection.endheaders(client.exchange.body)

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=CONNECT_TIMEOUT)

    def _ask(self) -> tuple[list[Object], str | None]:
        """The tags, and why there are none if it could not be asked."""
        with self._lock:
            if time.monotonic() - self._asked_at > TAGS_LIFETIME:
                try:
                    self._tags, self._trouble = self._fetch_tags(), None
                except _FAILURES as error:
                    reason = f"the upstream {self.url} cannot be asked: {error_text(error)}"
                    self._tags, self._trouble = [], reason
                    log.warning("%s", reason)
                self._asked_at = time.monotonic()
            return self._tags, self._trouble

    def _fetch_tags(self) -> list[Object]:
        with contextlib.closing(self._connection()) as connection:
            connection.request("GET", "/api/tags", headers={"Via": f"1.1 {VIA_NAME}"})
            with http.client.HTTPResponse(connection.sock, method="GET") as answer:
                answer.fp.close()
                answer.fp = io.BufferedReader(RequestSocket(connection.sock, CONNECT_TIMEOUT))
                answer.begin()
                body = json.loads(answer.read(MAX_TAGS)) if answer.status == 200 else None
        if not isinstance(body, dict):
            raise ValueError(f"GET /api/tags gave status {answer.status} and no list")
        return [tag for tag in items(body, "models", dict) if is_type(tag.get("name"), str)]


class UpstreamSocket(socket.SocketIO):
    """The bytes that the upstream sends. Reading calls `before_read` first, since it may have to
    wait. It raises ClientDisconnected when the client goes away meanwhile, UpstreamError when the
    upstream fails."""

    def __init__(self, upstream: socket.socket, client: HTTPHandler):
        super().__init__(upstream, "r")
        self.before_read: Callable[[], None] = lambda: None
        self._client, self._poll = client, select.poll()
        for side in (upstream, client.connection):
            self._poll.register(side, select.POLLIN)

    def readinto(self, buffer: Any) -> int | None:
        self.before_read()
        ready: dict[int, int] = {}
        while self.fileno() not in ready:
            ready = dict(self._poll.poll())
            if self._client.connection.fileno() in ready:
                if self._client.is_client_gone():
                    raise ClientDisconnected
                # It has sent its next request already, and would wake every poll from now on
                self._poll.unregister(self._client.connection)
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise UpstreamError(error_text(error)) from None


def end_to_end(headers: Message) -> dict[str, str]:
    """The headers to relay, by lower-case name."""
    named = ",".join(headers.get_all("Connection", [])).split(",")
    dropped = _NOT_RELAYED | {name.strip().lower() for name in named}
    return {
        # A value may go on in the next line, which others read as a header of its own
        name: re.sub(r"[\r\n]+", " ", ", ".join(headers.get_all(name, [])))
        for name in map(str.lower, headers)
        if name not in dropped
    }


def is_relayed(headers: Message) -> bool:
    """Whether a request has come through a relay like this one."""
    return any(VIA_NAME in value for value in headers.get_all("Via", []))


def error_text(error: Exception) -> str:
    """The system's words for an error, or the first of the exception's own."""
    return shortened(getattr(error, "strerror", None) or str(error))
