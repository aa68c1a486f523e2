"""A client's socket: reading requests from it, and seeing whether the client is still there."""

from __future__ import annotations

import io
import select
import socket
import time
from typing import Any

# Seconds that a client may take to read some of an answer, or to send its next request
CLIENT_TIMEOUT = 300.0
# Seconds that a whole request may take to arrive, from its first byte on
REQUEST_DEADLINE = 120.0


class ClientDisconnected(ConnectionError):
    """The client has closed its side of the connection."""


class RequestSocket(socket.SocketIO):
    """The bytes that a client sends.

    `deadline`, in monotonic seconds, is when the whole request has to be there. The first read of a
    request sets it, and None means that no request has begun. Reading raises TimeoutError after
    the deadline, and when no request begins within CLIENT_TIMEOUT."""

    deadline: float | None = None

    def readinto(self, buffer: Any) -> int | None:
        seconds = CLIENT_TIMEOUT
        if self.deadline is not None:
            seconds = max(0.0, self.deadline - time.monotonic())
        if not is_readable(self, seconds):
            raise TimeoutError
        if self.deadline is None:
            self.deadline = time.monotonic() + REQUEST_DEADLINE
        return super().readinto(buffer)


class HeaderReader(io.BufferedReader):
    """Reads the lines of a request. A CR alone ends no line (RFC 9112, 2.2): it becomes a folded
    line, which `head.framing_error` refuses."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        end = line[-2:] if line.endswith(b"\r\n") else b""
        return line.removesuffix(end).replace(b"\r", b"\r\n ") + end


def is_readable(connection: socket.socket | socket.SocketIO, seconds: float) -> bool:
    """Whether there is something to read, or the end of the stream, within so many seconds."""
    poll = select.poll()  # select() fails with many open files
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def is_disconnected(connection: socket.socket) -> bool:
    """Whether the other side has closed the connection. Returns at once and reads nothing."""
    # A socket with a timeout would wait that long in recv, even with MSG_DONTWAIT
    return is_readable(connection, 0) and connection.recv(1, socket.MSG_PEEK) == b""
