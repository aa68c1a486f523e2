"""The processes that `mlx.launch` has started, as one group."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import queue
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import AuthenticationError, connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.decoding.weights import model_body
from _mlx_server.inference.group import Group, GroupLost, Value
from _mlx_server.inference.memory import usable_memory
from _mlx_server.inference.protocol import EngineError, first_line
from _mlx_server.inference.sequence import Sequence

if TYPE_CHECKING:
    import mlx.core as mx

log = logging.getLogger("mlx_server")

SequenceName = tuple[str, tuple[Any, ...] | None]
"""A sequence between processes: its id on rank 0 and, the first time, what it is made of."""


class Ranks(Group):
    """The processes that `mlx.launch` has started, on one machine or several. They share each
    tensor or, with `pipeline`, the layers.

    Rank 0 has a TCP connection to every other rank for its broadcasts: waiting on a socket costs
    nothing, and a process that is gone is noticed at once. MLX's collectives wait for ever for a
    process that does not take part. So the group ends when a connection closes or is silent, or
    when one process fails alone: rank 0 calls `on_lost`, the other processes exit, since a
    collective cannot be interrupted. Raises EngineError if the group does not come together."""

    BEAT = 5.0  # seconds between two signs of life
    TOGETHER = 60.0  # seconds within which all ranks have connected
    SILENCE = 30.0  # seconds without one after which a process counts as gone
    SKEW = 15.0  # seconds within which a failure that all processes have shows everywhere
    _BEAT, _FAILED, _END = b"", b"failed", b"end"  # messages that are no pickle
    _GONE, _APART = "a machine of the group is gone", "the machines of the group are out of step"

    def __init__(self, pipeline: bool):
        import mlx.core as mx

        failures = (RuntimeError, ValueError, LookupError, OSError, EOFError, AuthenticationError)
        try:
            group = mx.distributed.init(strict=True)
            self.rank, self.size, self._pipeline = group.rank(), group.size(), pipeline
            self._peers = self._connect(_leader())
            self._memory = self._least(usable_memory())
        except failures as error:
            raise EngineError(f"the group does not come together: {first_line(error)}") from error
        # The sequences that all processes know, by their ids on rank 0
        self._sequences: weakref.WeakValueDictionary[str, Sequence] = weakref.WeakValueDictionary()
        self._broadcasts: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # from rank 0
        # Ranks that report a failure which rank 0 has not had yet
        self._failures: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._sending = threading.Lock()  # the MLX thread and `_watch` both send
        self._closed = False

    def _connect(self, host: str) -> dict[connection.Connection, int]:
        """Connections by the rank at their other end. Nobody gets one without the key, which MLX's
        own connections carry."""
        import mlx.core as mx

        key = secrets.token_bytes(32)
        listener, ours = None, [0] * 33
        if not self.rank:
            listener = socket.create_server((host, 0), backlog=128)
            ours = [listener.getsockname()[1], *key]
        shared: Any = mx.distributed.all_sum(mx.array(ours), stream=mx.cpu).tolist()
        port, key = shared[0], bytes(shared[1:])
        if listener:
            with listener:
                peers = accept_peers(listener, key, self.size - 1, self.TOGETHER)
        else:
            peers = {connection.Client((host, port), authkey=key): 0}
            next(iter(peers)).send(self.rank)
        for peer in peers:
            with socket.fromfd(peer.fileno(), socket.AF_INET, socket.SOCK_STREAM) as end:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peers

    def start(self, replicate: Callable[..., Sequence], on_lost: Callable[[str], None]) -> None:
        self._replicate, self._on_lost = replicate, on_lost
        threading.Thread(target=self._watch, name="group", daemon=True).start()

    def broadcast(self, find: Callable[[], Value]) -> Value:
        if self.rank:
            unpickler = pickle.Unpickler(io.BytesIO(self._broadcasts.get()))
            unpickler.persistent_load = self._sequence_of  # type: ignore[method-assign]
            value: Value = unpickler.load()
            return value
        found, out = find(), io.BytesIO()
        if self.lost:
            raise GroupLost
        pickler = pickle.Pickler(out)
        pickler.persistent_id = self._name_of  # type: ignore[method-assign]
        pickler.dump(found)
        self._send(out.getvalue())
        return found

    def _name_of(self, value: Any) -> SequenceName | None:
        """How a sequence is sent: as a whole the first time, and by its id from then on."""
        if not isinstance(value, Sequence):
            return None
        if value.id in self._sequences:
            return value.id, None
        self._sequences[value.id] = value
        limits = value.limit, value.limited_by_context
        return value.id, (value.request, value.prompt, *limits, value.submitted)

    def _sequence_of(self, name: SequenceName) -> Sequence:
        key, fields = name
        if fields is None:
            return self._sequences[key]
        self._sequences[key] = sequence = self._replicate(*fields)
        return sequence

    def sync_tokens(self, tokens: mx.array) -> mx.array:
        import mlx.core as mx

        picked = mx.distributed.all_sum(tokens * int(self.rank == 0))
        # All processes compute it before the next collective, which need not depend on it.
        mx.async_eval(picked)  # type: ignore[no-untyped-call]
        return picked

    def memory(self) -> int:
        return self._memory

    def _least(self, number: int) -> int:
        """The smallest of the numbers that the processes have."""
        import mlx.core as mx

        least: Any = mx.distributed.all_min(mx.array(number, mx.int64), stream=mx.cpu).item()
        return int(least)

    def load(self, path: Path, **options: Any) -> Any:
        import mlx.core as mx
        import mlx_lm
        from mlx_lm.utils import load_config, load_model

        files = sorted((file.name, file.stat().st_size) for file in path.glob("*.safetensors"))
        what = [load_config(path), files, mlx_lm.__version__]
        if self.broadcast(lambda: what) != what:
            raise ValueError("rank 0 has other files of that name, or another version of mlx-lm")
        model = load_model(path, lazy=True, **options)[0]
        whole, split = (model_body(model), "pipeline") if self._pipeline else (model, "shard")
        if not hasattr(whole, split):
            other = "without" if self._pipeline else "with"
            raise ValueError(f"mlx-lm cannot split it so; try {other} --pipeline")
        getattr(whole, split)(mx.distributed.init())
        mx.eval(model.parameters())
        self._least(0)  # waits for the slowest disk: a GPU must not
        return model

    def failed(self, error: Exception) -> None:
        if str(error).startswith(("[ring]", "[jaccl]")):
            self.give_up(f"{self._GONE}: {error}")
        elif self.rank:
            return self._send(self._FAILED)
        try:
            for _ in self._peers:
                self._failures.get(timeout=0 if self.lost else self.SKEW)
        except queue.Empty:
            self.give_up(self._APART)
            raise GroupLost from None

    def close(self) -> None:
        self._closed = True
        if not self.rank:
            self._send(self._END)

    def _send(self, message: bytes) -> None:
        with self._sending:
            for peer in self._peers:
                with contextlib.suppress(OSError):  # `_watch` finds out
                    peer.send_bytes(message)

    def _watch(self) -> None:
        """Takes what the others send, until one of them is gone."""
        sent = failed = time.monotonic()
        heard = dict.fromkeys(self._peers, sent)
        while True:
            ready: list[Any] = connection.wait(self._peers, self.BEAT)
            for peer in ready:
                try:
                    message = peer.recv_bytes()
                except (EOFError, OSError):
                    return self.give_up(f"{self._GONE}: rank {self._peers[peer]} has left")
                heard[peer] = time.monotonic()
                if message == self._END:
                    return
                if message == self._FAILED:
                    self._failures.put(self._peers[peer])
                    failed = heard[peer]
                elif message != self._BEAT:
                    self._broadcasts.put(message)
            now = time.monotonic()
            silent = [self._peers[peer] for peer in heard if now - heard[peer] > self.SILENCE]
            if silent:
                return self.give_up(f"{self._GONE}: rank {silent[0]} is silent")
            if not self._failures.empty() and now - failed > self.SKEW:
                return self.give_up(self._APART)
            # A process that is sending shows by that that it lives.
            if now - sent >= self.BEAT and not self._sending.locked():
                self._send(self._BEAT)
                sent = now

    def give_up(self, reason: str) -> None:
        if self._closed or self.lost:
            return
        self.lost = reason
        log.critical("%s; the server ends", reason)
        if self.rank:
            os._exit(1)
        self._on_lost(reason)


def accept_peers(
    listener: socket.socket, key: bytes, number: int, seconds: float
) -> dict[connection.Connection, int]:
    """Connections from so many processes that have the key, by their ranks. Others may connect as
    well, and say the wrong things or nothing. Raises ConnectionError if it takes too long."""
    known: queue.SimpleQueue[tuple[connection.Connection, int]] = queue.SimpleQueue()

    def authenticate(peer: connection.Connection) -> None:
        try:
            connection.deliver_challenge(peer, key)
            connection.answer_challenge(peer, key)
            known.put((peer, peer.recv()))
        except (OSError, EOFError, AuthenticationError) as error:
            log.warning("a stranger has connected to the group: %s", first_line(error))
            peer.close()

    peers: dict[connection.Connection, int] = {}
    until = time.monotonic() + seconds
    listener.settimeout(0.1)
    while len(peers) < number:
        if time.monotonic() > until:
            raise ConnectionError(f"only {len(peers) + 1} processes of {number + 1} have connected")
        with contextlib.suppress(TimeoutError):
            peer = connection.Connection(listener.accept()[0].detach())
            threading.Thread(target=authenticate, args=(peer,), daemon=True).start()
        with contextlib.suppress(queue.Empty):
            while len(peers) < number:
                found, rank = known.get_nowait()
                peers[found] = rank
    return peers


def _leader() -> str:
    """Rank 0's address, from what `mlx.launch` tells of its back ends ring and jaccl:
    https://ml-explore.github.io/mlx/build/html/usage/distributed.html"""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts:
        address: str = json.loads(Path(hosts).read_text())[0][0]
    else:
        address = os.environ["MLX_JACCL_COORDINATOR"]
    return address.rpartition(":")[0]
