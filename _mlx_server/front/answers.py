"""Answers that take their time: what the engine generates, and the progress of other work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from itertools import chain

from _mlx_server.front.http import HTTPHandler
from _mlx_server.front.request_log import RequestLog, prompt_cache_header
from _mlx_server.front.sockets import ClientDisconnected
from _mlx_server.inference.generation import Generation
from _mlx_server.inference.protocol import Done, EngineError, Event, Tick
from _mlx_server.wire.fields import Object, WireError
from _mlx_server.wire.reply import Frames, Reply

# Seconds without a byte after which a stream says that it is alive; clients count on 5
PING_AFTER = 4.0
# Seconds between two checks of whether a client that waits for events is still connected
DISCONNECT_POLL = 0.1


def send_stream(
    client: HTTPHandler, reply: Reply, generations: list[Generation], record: RequestLog
) -> None:
    """Sends the events of all generations as they come. A failure of the engine becomes the
    stream's last object. Raises OSError, ClientDisconnected included."""
    stream = client.start_stream(reply.framing, prompt_cache_header(generations[0]))
    try:
        stream.write(reply.open(generations[0]))
        for event in _events(client, generations, record):
            frames = [] if isinstance(event, Tick) else take_event(client, reply, event)
            stream.write(frames)
            # An event that the client is not shown, such as hidden thinking, is silence as well
            if not frames and stream.silence >= PING_AFTER:
                stream.write(reply.ping(stream.content_silence), keep_alive=True)
    except (WireError, EngineError) as error:
        record.fail(error)
        stream.write(reply.failure(error))
    stream.end()


def send_whole(
    client: HTTPHandler, reply: Reply, generations: list[Generation], record: RequestLog
) -> None:
    """Collects the events of all generations and sends one answer. Raises EngineError, WireError if
    it was cancelled, and OSError, ClientDisconnected included."""
    first = generations[0]
    reply.open(first)
    for event in _events(client, generations, record):
        if not isinstance(event, Tick):
            take_event(client, reply, event)
    headers = prompt_cache_header(first, first.usage.cached_tokens)
    client.send_large_json(reply.whole(), headers)


def take_event(client: HTTPHandler, reply: Reply, event: Event) -> Frames:
    """What to send for an event. Raises WireError and EngineBusy if there is no room for what the
    reply keeps of it."""
    before = reply.held
    frames = reply.event(event)
    if reply.held > before:
        client.claim(reply.held - before)
    return frames


def _events(
    client: HTTPHandler, generations: list[Generation], record: RequestLog
) -> Iterator[Event]:
    """The events of all generations, noted in `record`. Raises EngineError, WireError if `record`
    is cancelled, and ClientDisconnected when the client has gone."""
    checked = 0.0  # when the connection was, in monotonic seconds
    for event in chain.from_iterable(generations):
        record.check()
        now = time.monotonic()
        if record.first_event is None and not isinstance(event, (Tick, Done)):
            record.first_event = now
        if now - checked >= DISCONNECT_POLL:
            if client.is_client_gone():
                raise ClientDisconnected
            checked = now
        yield event
        if isinstance(event, Done):  # now that it has been sent
            record.ending = event.reason


def send_progress(client: HTTPHandler, steps: Generator[Object, None, None], stream: bool) -> None:
    """Sends the steps of some work as lines as they are done, or without `stream` only the last
    one. The work ends when the client goes away. Raises WireError or EngineError if the work fails
    before anything was sent, and OSError, ClientDisconnected included."""
    out, step = None, {}
    with contextlib.closing(steps):
        try:
            for step in steps:
                if client.is_client_gone():
                    raise ClientDisconnected
                if stream:
                    out = out or client.start_stream("lines")
                    out.write([step])
        except (WireError, EngineError) as error:
            if out is None:
                raise
            _, _, body = client.dialect.error(error, client.exchange.id)
            out.write([body])
    if out:
        out.end()
    else:
        client.send_json(step)
