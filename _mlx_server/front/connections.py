"""The listening socket and the connections that it accepts."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import ipaddress
import logging
import resource
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from _mlx_server.front.activity import Activity
from _mlx_server.front.budget import BodyBudget
from _mlx_server.front.head import names_this_machine
from _mlx_server.front.metrics import Metrics
from _mlx_server.front.turns import FILES, Pace, Turns
from _mlx_server.inference.protocol import Priority

MAX_CONNECTIONS = 512  # fewer where the process may not open twice as many files
# The part of them that one remote address may have. All programs of this machine have the same
ADDRESS_SHARE = 1 / 4
# The part of them that requests with keys for low priority may keep the server at work for
LOW_SHARE = 1 / 2
# Connections beyond these that still get an answer, an error; what comes after them is closed
MAX_REFUSALS = 32

log = logging.getLogger("mlx_server")


class Connection:
    """An open connection, for the choice of one that has to go when there are too many."""

    def __init__(self, client: socket.socket, address: str):
        self.address = address
        self.served = True  # otherwise its requests are refused
        self.closed = False
        self.low_owner: str | None = None  # of the latest request, if its key is for low priority
        self._socket = client
        self._closing = threading.Lock()  # the socket is not closed, and its number reused, within
        self._ended = threading.Event()
        self._waiting_since: float | None = time.monotonic()

    @property
    def waiting_since(self) -> float | None:
        """Since when the server waits for the client, in monotonic seconds: for a whole request, or
        for the client to read some of an answer. None while a request is worked on."""
        return self._waiting_since

    def waits(self) -> None:
        """From now on the server waits for the client, if it does not yet."""
        self._waiting_since = self._waiting_since or time.monotonic()

    def works(self) -> None:
        """From now on the server works for the client."""
        self._waiting_since = None

    def pause(self, seconds: float) -> None:
        """Lets a request that matters little wait, which may be what makes room for another
        connection. Raises ConnectionAbortedError if it is."""
        if seconds > 0:
            self.waits()
            if self._ended.wait(seconds):
                raise ConnectionAbortedError(
                    errno.ECONNABORTED, "another connection took its place"
                )
            self.works()

    def close(self) -> None:
        """Ends the connection; the thread that serves it finds that out."""
        self.closed = True
        self._ended.set()
        with self._closing, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self, close: Callable[[], None]) -> None:
        """Lets `close` close the socket."""
        with self._closing:
            close()


class ConnectionServer(ThreadingHTTPServer):
    """Listens at `address` (host, port) and serves each connection in a thread with an instance of
    `handler`. Raises OSError when the address is taken.

    `api_keys` are the keys that clients may have, each with the highest priority it allows; without
    any no key is demanded. With several of them, `owners` has for each key what stands for it
    wherever something is kept. `allowed_hosts` are names by which clients reach the server, beside
    those that it knows (`head.names_this_machine`). `metrics` counts the answers, `bodies` the
    bytes of requests, `activity` has those that are in work.

    When all connections are taken, the one whose client has been waited for longest is closed for a
    new one. If none waits, the new one's requests are refused."""

    daemon_threads = True
    request_queue_size = 128
    server_address: tuple[Any, ...]

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        api_keys: Mapping[str, Priority] | None = None,
        allowed_hosts: Iterable[str] = (),
    ):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.api_keys, self.metrics, self.bodies = api_keys or {}, Metrics(), BodyBudget()
        self.turns, self.activity = Turns(), Activity()
        self.chunk_turns = Turns()  # of those whose bodies come in chunks
        # Of those whose PDFs are read and whose images are decoded
        self.file_turns, self.image_turns = Turns(FILES), Turns(FILES)
        self.low_pace, self.keyless_pace = Pace(), Pace()
        self.owners = {key: _owner(key) for key in self.api_keys if self.shared}
        self._hosts = {host.lower() for host in (address[0], *allowed_hosts)}
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = MAX_CONNECTIONS
        if files != resource.RLIM_INFINITY:
            self.max_connections = min(MAX_CONNECTIONS, files // 2)
        self._connections: dict[Any, Connection] = {}  # by socket
        self._answering: set[threading.Thread] = set()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the DNS for a name that is not needed
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return ipaddress.ip_address(self.server_address[0]).is_loopback

    @property
    def shared(self) -> bool:
        """Whether there are several keys, whose holders may not trust each other."""
        return len(self.api_keys) > 1

    def is_own_name(self, host: str) -> bool:
        """Whether a request with that name in its Host header is answered. Where other machines
        reach the server, keys keep web pages out."""
        if self.api_keys and not self.loopback:
            return True
        return host in self._hosts or names_this_machine(host, self.loopback)

    def process_request(self, request: Any, client_address: Any) -> None:
        new = Connection(request, network_of(client_address[0]))
        new.served = self._make_room(new.address)
        self._connections[request] = new
        if len(self._connections) > self.max_connections + MAX_REFUSALS:
            log.warning("a connection is closed: there are too many")
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def _make_room(self, address: str) -> bool:
        """Whether one more connection from `address` is served; another may be closed for it."""
        connections = list(self._connections.values())
        served = [one for one in connections if one.served and not one.closed]
        neighbours = [one for one in served if one.address == address]
        share = max(1, int(self.max_connections * ADDRESS_SHARE))
        if address and len(neighbours) >= share:
            served = neighbours
        elif len(served) < self.max_connections:
            return True
        waiting = [(one.waiting_since, one) for one in served]
        _, oldest = min(
            ((since, one) for since, one in waiting if since is not None),
            key=lambda pair: pair[0],
            default=(0.0, None),
        )
        if oldest is not None:
            oldest.close()
        return oldest is not None

    def shutdown_request(self, request: Any) -> None:
        close = functools.partial(super().shutdown_request, request)
        if connection := self._connections.pop(request, None):
            connection.release(close)
        else:
            close()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    @property
    def waiting(self) -> int:
        """How many of them have no request that is worked on."""
        connections = list(self._connections.values())
        return sum(one.waiting_since is not None for one in connections)

    def has_room_for_low(self, owner: str) -> bool:
        """Whether a request of an owner with a key for low priority may be worked on, which counts
        already. Half of what such requests may have is for those of any key, the other half is
        shared among the keys, so that those of one leave room for others."""
        connections = list(self._connections.values())
        working = Counter(one.low_owner for one in connections if one.waiting_since is None)
        del working[None]
        keys = sum(priority is Priority.LOW for priority in self.api_keys.values())
        most = self.max_connections * LOW_SHARE
        shared = most if keys == 1 else most / 2
        return working.total() <= shared or working[owner] <= (most - shared) / keys

    def connection(self, client: Any) -> Connection:
        """What is known of a client's socket."""
        return self._connections[client]

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("connection failed", exc_info=True)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within it `join_answers` waits for the calling thread."""
        thread = threading.current_thread()
        self._answering.add(thread)
        try:
            yield
        finally:
            self._answering.discard(thread)

    @property
    def answers(self) -> int:
        """How many answers are being generated."""
        return len(self._answering)

    def join_answers(self, deadline: float) -> None:
        """Waits for the threads that are answering, at most until `deadline` in monotonic
        seconds."""
        for thread in list(self._answering):
            thread.join(max(0.0, deadline - time.monotonic()))


def _owner(key: str) -> str:
    """What stands for a key in memory and in the files of the prompt cache. Whoever sees it does
    not learn the key: to try out even short ones takes long."""
    return hashlib.pbkdf2_hmac("sha256", key.encode(), b"mlx-server", 10_000).hex()[:32]


def network_of(address: str) -> str:
    """What stands for a client: its address, for IPv6 its network, as one client has all addresses
    in it. Empty for this machine."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return ""
    return str(ip) if ip.version == 4 else ip.exploded[:19]
