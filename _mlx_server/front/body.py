"""A request's body: plain or chunked, perhaps compressed, bounded in size; and the JSON in it."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator
from email.message import Message

from _mlx_server.front.sockets import ClientDisconnected
from _mlx_server.wire.fields import Object, WireError, encodable

MAX_BODY = 32 * 2**20  # bytes, the Messages API's own limit


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


def read_raw(file: io.BufferedIOBase, length: int | None) -> bytes:
    """The body as it was sent, without its chunk headers. `length` is `check_length`'s. Raises
    WireError, ClientDisconnected, and TimeoutError when the request's deadline is over."""
    if length is not None:
        return _read_exactly(file, length)
    body = io.BytesIO()  # a list of the smallest chunks would take many times their size
    body.writelines(_read_chunks(file))
    return body.getvalue()


def _read_chunks(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The data of each chunk. Chunk headers and trailers count towards MAX_BODY as well."""
    total = 0
    while True:
        line = file.readline(1024)
        match = re.fullmatch(rb"([\da-fA-F]{1,15})[ \t]*(;.*)?\r?\n", line)
        if not match:
            raise WireError(400, "malformed chunked body")
        size = int(match[1], 16)
        total += len(line) + size
        if total > MAX_BODY:
            raise _too_large()
        if size == 0:
            break
        yield _read_exactly(file, size)
        if _read_exactly(file, 2) != b"\r\n":
            raise WireError(400, "malformed chunked body")
    while (line := file.readline(65536)).strip():  # trailers
        total += len(line)
        if total > MAX_BODY:
            raise _too_large()


def _read_exactly(file: io.BufferedIOBase, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ClientDisconnected
    return data


def decompress(raw: bytes, coding: str) -> bytes:
    """A body without its Content-Encoding. Raises WireError for an unknown coding, and for a body
    that is damaged or too large."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return raw
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise WireError(400, f"Content-Encoding '{coding}' is not supported")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        data = inflater.decompress(raw, MAX_BODY)
    except zlib.error:
        raise WireError(400, f"the body is not valid {coding}") from None
    if inflater.unconsumed_tail:
        raise _too_large()
    return data


def parse_json(raw: bytes, strict: bool) -> Object:
    """The JSON object in a body. With `strict` nothing may follow it. Raises WireError."""
    if not raw.strip():
        raise WireError(400, "missing request body")
    try:
        text = raw.decode("utf-8-sig")
        if strict:
            body = json.loads(text)
        else:
            body, _ = json.JSONDecoder().raw_decode(text.lstrip())
        body = encodable(body, text)
    except (ValueError, RecursionError) as error:
        known = {
            RecursionError: "it is nested too deeply",
            ValueError: "a number in it has too many digits",
        }
        reason = known.get(type(error), error)
        raise WireError(400, f"the body cannot be read as JSON: {reason}") from None
    if not isinstance(body, dict):
        raise WireError(400, "the body should be a JSON object")
    return body


def _too_large() -> WireError:
    return WireError(413, f"the body is larger than {MAX_BODY // 2**20} MB")
