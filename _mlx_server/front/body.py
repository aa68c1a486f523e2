"""A request's body: plain or chunked, perhaps compressed, bounded in size; and the JSON in it."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from email.message import Message

from _mlx_server.front.budget import FREE, BodyClaim
from _mlx_server.front.sockets import MAX_HEAD, ClientDisconnected
from _mlx_server.wire.fields import Object, WireError, encodable
from _mlx_server.wire.json_text import (
    INTEGERS,
    MAX_VALUES,
    count_marks,
    count_values,
    decoder,
    without_strings,
)

MAX_BODY = 32 * 2**20  # bytes, the Messages API's own limit
PIECE = 65536  # most bytes that are read or unpacked at once
# Bytes that a value takes beside its text, parsed and as what requests are made of, by the mark
# that begins or precedes it
VALUE_SIZES = {b"{": 1024, b"[": 192, b",": 64}
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~\w-]+:[^\r\n]*\r\n")


def check_length(headers: Message) -> int | None:
    """The body's length in bytes, None for a chunked one. Raises WireError if there is no length or
    too large a one."""
    if "Transfer-Encoding" in headers:
        return None
    length = headers.get("Content-Length")
    if length is None:
        raise WireError(411, "Length Required")
    if not re.fullmatch(r"\d{1,18}", length, re.ASCII):
        raise WireError(400, "bad Content-Length")
    if int(length) > MAX_BODY:
        raise _too_large()
    return int(length)


def read_raw(file: io.BufferedIOBase, length: int | None, claim: BodyClaim) -> bytes:
    """The body as it was sent, without its chunk headers. `length` is `check_length`'s. Raises
    WireError, EngineBusy, ClientDisconnected, and TimeoutError when the client was waited
    for too long."""
    body = io.BytesIO()  # a list of the smallest chunks would take many times their size
    pieces = _read_chunks(file) if length is None else _read_exactly(file, length)
    for piece in pieces:
        claim.add(len(piece))
        body.write(piece)
    return body.getvalue()


def _read_chunks(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The data of each chunk, in pieces. Chunk headers and trailers count towards MAX_BODY as well.
    Only CR LF ends a line: other servers do not agree on what else does (RFC 9112, 7.1)."""
    total = 0
    while True:
        line = file.readline(1024)
        match = re.fullmatch(rb"([\da-fA-F]{1,15})[ \t]*(;.*)?\r\n", line)
        if not match:
            raise WireError(400, "malformed chunked body")
        size = int(match[1], 16)
        total += len(line) + size
        if total > MAX_BODY:
            raise _too_large()
        if size == 0:
            break
        yield from _read_exactly(file, size)
        if b"".join(_read_exactly(file, 2)) != b"\r\n":
            raise WireError(400, "malformed chunked body")
    while (line := file.readline(MAX_HEAD)) != b"\r\n":
        total += len(line)
        if total > MAX_BODY:
            raise _too_large()
        if not _TRAILER.fullmatch(line):
            raise WireError(400, "malformed trailer")


def _read_exactly(file: io.BufferedIOBase, size: int) -> Iterator[bytes]:
    """`size` bytes in pieces."""
    while size:
        piece = file.read(min(size, PIECE))
        if not piece:
            raise ClientDisconnected
        size -= len(piece)
        yield piece


def decompress(raw: bytes, coding: str, claim: BodyClaim) -> bytes:
    """A body without its Content-Encoding. Raises WireError for an unknown coding, and for a body
    that is damaged or too large; EngineBusy."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return raw
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise WireError(400, f"Content-Encoding '{coding[:100]}' is not supported")
    body = io.BytesIO()
    try:
        for piece in _inflated(raw):
            if body.tell() + len(piece) > MAX_BODY:
                raise _too_large()
            claim.add(len(piece))
            body.write(piece)
    except zlib.error:
        raise WireError(400, f"the body is not valid {coding}") from None
    return body.getvalue()


def _inflated(raw: bytes) -> Iterator[bytes]:
    """What gzip or zlib has packed into `raw`, in pieces. Raises zlib.error."""
    inflater, packed = zlib.decompressobj(zlib.MAX_WBITS | 32), memoryview(raw)
    for start in range(0, len(packed), PIECE):
        rest: bytes | memoryview = packed[start : start + PIECE]
        while rest:
            yield inflater.decompress(rest, PIECE)
            rest = inflater.unconsumed_tail


def parse_json(raw: bytes, strict: bool, claim: BodyClaim) -> Object:
    """The JSON object in a body. With `strict` nothing may follow it. Raises WireError and
    EngineBusy."""
    if not raw.strip():
        raise WireError(400, "missing request body")
    marks = _claim_values(raw, claim)
    try:
        text = raw.decode("utf-8-sig")
        if strict:
            body = decoder(marks).decode(text)
        else:
            body, _ = decoder(marks).raw_decode(text.lstrip())
        body = encodable(body, text)
    except (ValueError, RecursionError) as error:
        known = {
            RecursionError: "it is nested too deeply",
            ValueError: "a number in it has too many digits; send it as a string",
        }
        reason = known.get(type(error), error)
        raise WireError(400, f"the body cannot be read as JSON: {reason}") from None
    if not isinstance(body, dict):
        raise WireError(400, "the body should be a JSON object")
    return body


def _claim_values(raw: bytes, claim: BodyClaim) -> int:
    """Claims what the values in some JSON will take, about, and returns as how many they are to
    parse, at most. Raises WireError and EngineBusy."""
    most = _value_bytes(raw)
    if most <= FREE:  # nearly always, even if marks within strings count
        claim.add(most)
        return count_marks(raw)
    values = integers = 0
    for text in without_strings(raw):
        claim.add(_value_bytes(text))
        found = count_values(text)
        values, integers = values + found, integers + count_marks(text) - found
        if values > MAX_VALUES:
            raise WireError(413, f"the body has more than {MAX_VALUES} values")
    return values + integers // INTEGERS


def _value_bytes(text: bytes) -> int:
    return sum(text.count(mark) * size for mark, size in VALUE_SIZES.items())


def _too_large() -> WireError:
    return WireError(413, f"the body is larger than {MAX_BODY // 2**20} MB")
