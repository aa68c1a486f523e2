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
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from _mlx_server.front.http import ASKING, PATIENCE, HungUp, why
from _mlx_server.wire.fields import Object, WireError, is_type, items
from _mlx_server.wire.ollama_models import find_tag

log = logging.getLogger("mlx_server")


FRESH = 5.0  # seconds for which the upstream's last word on that counts


class UpstreamError(Exception):
    """The upstream cannot be reached or has failed; the message says why."""


RELAY = "mlx-server"  # our name in the Via header (RFC 9110, 7.6.3)
_NOT_RELAYED = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",  # of one connection (RFC 9110, 7.6.1)
    "host",
    "content-length",
    "expect",
    "date",  # said anew
    # Between client and us
    "authorization",
    "x-api-key",
    "cookie",
    "origin",
    "access-control-allow-origin",
    "x-request-id",
}
# Names that Ollama sends on to its cloud, listed or not
_CLOUD = re.compile(r".*:([^/:]*-)?cloud", re.I)


class Upstream:
    """A server at `url` (http://HOST:PORT) with Ollama's API, for the models that are not here.

    With `overflow` it also gets requests for which the engine's queue has no room.
    """

    def __init__(self, url: str, overflow: bool = False):
        self.url, self.overflow = url, overflow
        self._lock = threading.Lock()
        self._asked, self._tags, self._trouble = -math.inf, [], None

    def tags(self) -> list[Object]:
        """The objects of its `GET /api/tags`, at most `FRESH` seconds old; none if it cannot be
        asked."""
        with self._lock:
            if time.monotonic() - self._asked > FRESH:
                try:
                    self._tags, self._trouble = self._ask(), None
                except (OSError, http.client.HTTPException, ValueError, WireError) as error:
                    self._tags, self._trouble = (
                        [],
                        f"the upstream {self.url} cannot be asked: {why(error)}",
                    )
                    log.warning("%s", self._trouble)
                self._asked = time.monotonic()
            return self._tags

    def find(self, name: str) -> Object | None:
        """What it lists for a model of that name. Raises WireError if it cannot be asked."""
        tags, trouble = self.tags(), self._trouble
        if trouble:
            raise WireError(404, f"model '{name}' not found here, and {trouble}")
        return find_tag(tags, name) or ({"name": name} if _CLOUD.fullmatch(name) else None)

    @contextlib.contextmanager
    def open(self, client: Any) -> Iterator[http.client.HTTPResponse]:
        """Its answer to a client's request. It and its reads raise UpstreamError and HTTPException
        when the upstream fails, and HungUp as soon as the client goes away."""
        with contextlib.closing(self._connection()) as connection:
            try:
                connection.connect()
                connection.sock.settimeout(PATIENCE)
                connection.putrequest(client.command, client.path, skip_accept_encoding=True)
                for name, value in end_to_end(client.headers).items():
                    connection.putheader(name, value)
                connection.putheader("Via", f"1.1 {RELAY}")
                connection.putheader("Content-Length", str(len(client.body)))
                connection.endheaders(client.body)
            except (OSError, ValueError) as error:
                raise UpstreamError(why(error)) from None
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
        return [tag for tag in items(body, "models", dict) if is_type(tag.get("name"), str)]


class _Watched(socket.SocketIO):
    """What the upstream sends, while the client is there: when it hangs up, reading ends with
    HungUp."""

    def __init__(self, upstream: socket.socket, client: Any):
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
            raise UpstreamError(why(error)) from None


def end_to_end(headers: http.client.HTTPMessage) -> dict[str, str]:
    """The headers to relay, by lower-case name."""
    dropped = _NOT_RELAYED | {
        name.strip().lower() for name in ",".join(headers.get_all("Connection", [])).split(",")
    }
    return {
        name: ", ".join(headers.get_all(name))
        for name in map(str.lower, headers)
        if name not in dropped
    }
