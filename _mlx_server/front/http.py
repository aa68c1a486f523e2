"""Reading HTTP requests and writing answers."""

from __future__ import annotations

import io
import ipaddress
import json
import re
import select
import socket
import time
from collections.abc import Iterable
from typing import Any

from _mlx_server.wire.fields import Object, WireError

MAX_BODY = 32 * 1024 * 1024  # bytes, the Messages API's own limit
# Seconds without a byte after which a stream says that it is alive; clients count on 5
PING_AFTER = 4.0
# Seconds after which an answer in the making looks again whether its client is there
DISCONNECT_POLL = 0.1
# Seconds that a client may take to read some of an answer, or to send its next request
PATIENCE = 300.0
ARRIVAL = 120.0  # seconds that a request may take to arrive, from its first byte on
CONNECTIONS = 512  # at the same time; fewer where a process may not open twice as many files
TURNED_AWAY = 32  # more that are told that there is no room
ASKING = 2.0  # seconds that an upstream may take to accept a connection, or to say what it has
HOST = re.compile(r"([\w.-]*|\[[\da-f:.]+\])(:\d{1,5})?", re.I | re.A)
LOCAL_ORIGINS = re.compile(
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?|(app|file|tauri|vscode-webview|vscode-file)://.*",
    re.I,
)


class HungUp(ConnectionError):
    """The client has closed its side."""


class RequestSocket(socket.SocketIO):
    """What a client sends. Once a request has begun, `due` is when all of it has to be there, in
    monotonic seconds; reading raises TimeoutError then."""

    due: float | None = None

    def readinto(self, buffer: Any) -> int | None:
        if not readable(
            self, PATIENCE if self.due is None else max(0.0, self.due - time.monotonic())
        ):
            raise TimeoutError
        self.due = self.due or time.monotonic() + ARRIVAL
        return super().readinto(buffer)


class HeaderReader(io.BufferedReader):
    """What arrives, for reading its lines. A CR alone ends none (RFC 9112, 2.2): it becomes a fold,
    which is refused."""

    def readline(self, limit: int = -1) -> bytes:
        line = super().readline(limit)
        end = line[-2:] if line.endswith(b"\r\n") else b""
        return line.removesuffix(end).replace(b"\r", b"\r\n ") + end


def chunk(data: bytes) -> bytes:
    """A piece of a chunked body; an empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def reuse(generation: Any, cached: int | None = None) -> dict[str, str]:
    """The header that tells what of a prompt was read before, as far as that is known, and where it
    parts from what was."""
    value = f"reused={generation.cached_tokens if cached is None else cached}; prompt={generation.prompt_tokens}"
    if generation.miss:
        value += f"; parts-at={generation.miss.at}; in={place(generation.miss)}"
    return {"x-prompt-cache": value}


def place(miss: Any) -> str:
    return "the prompt" if miss.message is None else f"message {miss.message} ({miss.role})"


def readable(connection: socket.socket | socket.SocketIO, seconds: float) -> bool:
    """Whether there is something to read, or the end, within some seconds."""
    poll = select.poll()  # select() fails with many open files
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _after(generations: list[Iterable]) -> Iterable:
    """Nothing, for what is to be sent at once, then the generations' events."""
    yield None
    for generation in generations:
        yield from generation


def encode_json(body: Object) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def too_large() -> WireError:
    return WireError(413, f"the body is larger than {MAX_BODY // 2**20} MB")


def is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_private or address.is_unspecified
    except ValueError:
        return host in ("", "localhost", socket.gethostname().lower()) or host.endswith(
            (".localhost", ".local", ".internal")
        )


def why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
