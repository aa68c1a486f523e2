"""Bodies of answers that are sent piece by piece."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterator, Sequence
from io import BufferedIOBase

from _mlx_server.wire.fields import Object

PIECE = 4096  # tokens of JSON that are sent at once


def encode_json(body: Object) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_pieces(body: Object) -> Iterator[bytes]:
    """The same in pieces, which are never empty, with arrays as lists. The interpreter makes them,
    which takes half as long again, but other threads run meanwhile, and an answer of any size takes
    no memory."""
    encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=array.tolist)
    texts: list[str] = []
    for text in encoder.iterencode(body):
        texts.append(text)
        if len(texts) >= PIECE:
            yield "".join(texts).encode("utf-8", "replace")
            texts.clear()
    if texts:
        yield "".join(texts).encode("utf-8", "replace")


class BodyWriter:
    """Writes a body to `file`, chunked (RFC 9112, 7.1) or as it is. Raises OSError."""

    def __init__(self, file: BufferedIOBase, chunked: bool):
        self._file, self._chunked = file, chunked

    def write(self, data: bytes) -> None:
        """Sends a piece, which must not be empty."""
        self._file.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """Tells the client that the body is whole."""
        if self._chunked:
            self._file.write(b"0\r\n\r\n")


class Stream:
    """A streamed answer: objects as server-sent events or as lines of JSON, sent at once.

    `framing` is "events" (server-sent events named by the object's "type"), "data" (server-sent
    events without names) or "lines" (NDJSON)."""

    def __init__(self, body: BodyWriter, framing: str):
        self._body, self._framing = body, framing
        self._last_write = self._last_content = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since anything was sent."""
        return time.monotonic() - self._last_write

    @property
    def content_silence(self) -> float:
        """Seconds since something other than a keep-alive was sent."""
        return time.monotonic() - self._last_content

    def write(self, objects: Sequence[Object | str], keep_alive: bool = False) -> None:
        """Sends some objects; a string is a whole server-sent event. `keep_alive` says that they
        only tell that the server is alive. Raises OSError."""
        if not objects:
            return
        self._body.write(b"".join(map(self._frame, objects)))
        self._last_write = time.monotonic()
        if not keep_alive:
            self._last_content = self._last_write

    def end(self) -> None:
        """Ends the answer. Raises OSError."""
        self._body.end()

    def _frame(self, body: Object | str) -> bytes:
        if isinstance(body, str):
            return body.encode() + b"\n\n"
        if self._framing == "lines":
            return encode_json(body) + b"\n"
        name = b"event: " + body["type"].encode() + b"\n" if self._framing == "events" else b""
        return name + b"data: " + encode_json(body) + b"\n\n"


def content_type(framing: str) -> str:
    """The Content-Type of a stream."""
    return "application/x-ndjson" if framing == "lines" else "text/event-stream; charset=utf-8"
