"""Relaying a request to the upstream, and its answer to the client."""

from __future__ import annotations

import http.client

from _mlx_server.front.http import HTTPHandler
from _mlx_server.front.request_log import RequestLog
from _mlx_server.front.rules import chosen_priority
from _mlx_server.front.stream import encode_json
from _mlx_server.front.upstream import (
    Upstream,
    UpstreamError,
    UpstreamSocket,
    end_to_end,
    error_text,
)
from _mlx_server.inference.protocol import Priority
from _mlx_server.wire.fields import WireError

PIECE = 65536  # most bytes that are read of a chunk of an answer at once


def relay(client: HTTPHandler, upstream: Upstream) -> None:
    """Sends the request that `client` has read, and passes the answer on as it arrives. Both are
    unchanged, but keys mean there what they mean here: holders of one for low priority do not say
    how long a model stays in memory, and nobody asks for more than their key allows. Raises
    WireError if the upstream fails before its answer begins; an answer that breaks off later is
    left without its end, so that the client sees it."""
    exchange, status = client.exchange, 0
    if exchange.low_priority:
        _remove_keep_alive(client)
    _limit_priority(client)
    record = RequestLog(exchange.route, exchange.id, client.dialect.name)
    try:
        with upstream.open(client) as (answer, arriving):
            status = answer.status
            _pass_on(client, answer, arriving)
        record.ending = "done"
    except (UpstreamError, http.client.HTTPException) as error:
        said = error_text(error)
        record.ending = f"failed: {said}"
        raise WireError(502, f"the upstream {upstream.url} failed: {said}") from None
    finally:
        record.relay(exchange.model, upstream.url, status)


def _remove_keep_alive(client: HTTPHandler) -> None:
    with client.preparing():
        body = client.parse_body()
    # Ollama's decoder takes names in any case: https://pkg.go.dev/encoding/json#Unmarshal
    kept = {name: value for name, value in body.items() if name.casefold() != "keep_alive"}
    if len(kept) < len(body):
        del client.headers["Content-Encoding"]
        client.exchange.body = encode_json(kept)


def _limit_priority(client: HTTPHandler) -> None:
    asked, highest = client.headers.get("x-priority", ""), client.exchange.highest_priority
    if highest is Priority.LOW or asked and highest is not Priority.HIGH:
        del client.headers["x-priority"]
        client.headers["x-priority"] = chosen_priority(asked, highest, highest).name.lower()


def _pass_on(
    client: HTTPHandler, answer: http.client.HTTPResponse, arriving: UpstreamSocket
) -> None:
    """Sends what there is before more is read from the socket: many chunks that come at once go out
    as one."""
    headers = end_to_end(answer.headers)
    client.exchange.id = headers.pop("request-id", client.exchange.id)
    body = client.start_body(answer.status, headers, answer.length)
    pieces: list[bytes] = []

    def send() -> None:
        if pieces:
            body.write(b"".join(pieces))
            pieces.clear()

    arriving.before_read = send
    try:
        while piece := answer.read1(PIECE):
            pieces.append(piece)
    finally:
        send()
    if answer.length:
        raise UpstreamError(f"{answer.length} bytes are missing")
    body.end()
