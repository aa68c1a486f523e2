"""A client's socket: reading requests from it, and seeing whether the client is still there."""

from __future__ import annotations

import contextlib
import http.client
import io
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

# Seconds that a client may take to read some of an answer, or to send its next request
CLIENT_TIMEOUT = 300.0
# Seconds that a client may be waited for until a whole request is there, from its first byte on
REQUEST_DEADLINE = 120.0
# Bytes of a request line and all its headers
MAX_HEAD = 65536


class ClientDisconnected(ConnectionError):
    """The client has closed its side of the connection."""


class RequestSocket(socket.SocketIO):
    """The bytes that a client or another server sends.

    `left` are the seconds for which the rest of a message is waited for; what the reader does in
    between does not count. The first read of a request sets it, and None means that no request has
    begun. Reading raises TimeoutError after these seconds, and when no request begins within
    CLIENT_TIMEOUT. It waits within `waiting`."""

    def __init__(self, connection: socket.socket, left: float | None = None):
        super().__init__(connection, "r")
        self.left = left
        self.waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def readinto(self, buffer: Any) -> int | None:
        with self.waiting():
            began = time.monotonic()
            if not is_readable(self, CLIENT_TIMEOUT if self.left is None else self.left):
                raise TimeoutError("timed out")
            waited = time.monotonic() - began
        self.left = REQUEST_DEADLINE if self.left is None else max(0.0, self.left - waited)
        return super().readinto(buffer)


class HeaderReader(io.BufferedReader):
    """Reads the lines of a request. A CR alone ends no line (RFC 9112, 2.2): it becomes a folded
    line, which `head.framing_error` refuses.

    Between `begin_head` and `end_head` a line raises HTTPException if the head is then larger than
    MAX_HEAD. `bare_newline` says whether a line of the head ended with LF alone."""

    bare_newline = False
    _head_bytes: int | None = None  # read of the head so far, None outside of it

    def begin_head(self) -> None:
        self.bare_newline, self._head_bytes = False, 0

    def end_head(self) -> None:
        self._head_bytes = None

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        end = line[-2:] if line.endswith(b"\r\n") else b""
        if self._head_bytes is not None:
            self.bare_newline |= line.endswith(b"\n") and not end
            if self._head_bytes and self._head_bytes + len(line) > MAX_HEAD:
                raise http.client.HTTPException("the head is too large")
            self._head_bytes += len(line)
        return line.removesuffix(end).replace(b"\r", b"\r\n ") + end


class AnswerWriter(io.BufferedIOBase):
    """Writes to a client; `waits` and `works` are called before and after each write, which takes
    until the client has read enough of what came before."""

    _held: list[bytes] | None = None

    def __init__(
        self, connection: socket.socket, waits: Callable[[], None], works: Callable[[], None]
    ):
        self._connection, self._waits, self._works = connection, waits, works

    def writable(self) -> bool:
        return True

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Sends all that is written inside at once, behind the block's end; nothing if it fails."""
        self._held = []
        try:
            yield
            data = b"".join(self._held)
        finally:
            self._held = None
        self.write(data)

    def write(self, data: Any, /) -> int:
        if self._held is not None:
            self._held.append(bytes(data))
            return len(data)
        self._waits()
        try:
            self._connection.sendall(data)
        finally:
            self._works()
        return memoryview(data).nbytes


def is_readable(connection: socket.socket | socket.SocketIO, seconds: float) -> bool:
    """Whether there is something to read, or the end of the stream, within so many seconds."""
    poll = select.poll()  # select() fails with many open files
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def is_disconnected(connection: socket.socket) -> bool:
    """Whether the other side has closed the connection. Returns at once and reads nothing."""
    # A socket with a timeout would wait that long in recv, even with MSG_DONTWAIT
    return is_readable(connection, 0) and connection.recv(1, socket.MSG_PEEK) == b""
