"""The listening socket and the connections that it accepts."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import resource
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from _mlx_server.front.metrics import Metrics
from _mlx_server.inference.protocol import Priority

MAX_CONNECTIONS = 512  # fewer where the process may not open twice as many files
# Connections beyond these that still get an answer, an error; what comes after them is closed
MAX_REFUSALS = 32

log = logging.getLogger("mlx_server")


class ConnectionServer(ThreadingHTTPServer):
    """Listens at `address` (host, port) and serves each connection in a thread with an instance of
    `handler`. Raises OSError when the address is taken.

    `api_keys` are the keys that clients may have, each with the highest priority it allows; without
    any no key is demanded. `metrics` counts the answers."""

    daemon_threads = True
    request_queue_size = 128
    server_address: tuple[Any, ...]

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        api_keys: Mapping[str, Priority] | None = None,
    ):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.api_keys, self.metrics = api_keys or {}, Metrics()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = MAX_CONNECTIONS
        if files != resource.RLIM_INFINITY:
            self.max_connections = min(MAX_CONNECTIONS, files // 2)
        self._served: dict[Any, bool] = {}  # open sockets, and whether their requests are served
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

    def process_request(self, request: Any, client_address: Any) -> None:
        self._served[request] = len(self._served) < self.max_connections
        if len(self._served) > self.max_connections + MAX_REFUSALS:
            log.warning("a connection is closed: there are too many")
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._served.pop(request, None)
        super().shutdown_request(request)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._served)

    def is_served(self, connection: Any) -> bool:
        """Whether a connection's requests are served; otherwise there were too many before it."""
        return self._served[connection]

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

    def join_answers(self, deadline: float) -> None:
        """Waits for the threads that are answering, at most until `deadline` in monotonic
        seconds."""
        for thread in list(self._answering):
            thread.join(max(0.0, deadline - time.monotonic()))
