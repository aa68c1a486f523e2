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
from multiprocessing import connection
from pathlib import Path
from typing import Any

from _mlx_server.inference.generation import Generation
from _mlx_server.inference.group import Group
from _mlx_server.inference.memory import usable_memory
from _mlx_server.inference.protocol import EngineError, first_line
from _mlx_server.inference.weights import model_body

log = logging.getLogger("mlx_server")


class Ranks(Group):
    """The processes that `mlx.launch` has started, on one machine or several. They share each
    tensor or, with `pipeline`, the layers.

    Rank 0 has a TCP connection to every other one, on which it tells what it decides: waiting there
    costs nothing, and whoever is gone is missed at once. MLX's collectives wait for ever for a
    process that does not take part. So the group ends, on rank 0 by `on_lost` and elsewhere at
    once, when a connection closes or is silent, or when one process fails alone. Raises EngineError
    if the group does not come together."""

    BEAT = 5.0  # seconds between two signs of life
    SILENCE = 30.0  # seconds without one after which a process counts as gone
    SKEW = 15.0  # seconds within which a failure that all have in common shows everywhere
    _BEAT, _FAILED, _END = b"", b"failed", b"end"  # what is no pickle
    _GONE, _APART = "a machine of the group is gone", "the machines of the group are out of step"

    def __init__(self, pipeline: bool):
        import mlx.core as mx

        try:
            group = mx.distributed.init(strict=True)
            self.rank, self.size, self._pipeline = group.rank(), group.size(), pipeline
            self._peers = self._connect(_leader())
            self._memory = self._least(usable_memory())
        except (
            RuntimeError,
            ValueError,
            LookupError,
            OSError,
            EOFError,
            connection.AuthenticationError,
        ) as error:
            raise EngineError(f"the group does not come together: {first_line(error)}") from error
        # That all know
        self._jobs: weakref.WeakValueDictionary[str, Generation] = weakref.WeakValueDictionary()
        self._told: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # Ranks with one that rank 0 has not had yet
        self._failures: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._sending = threading.Lock()  # the MLX thread and `_watch` both do
        self._closed = False

    def _connect(self, host: str) -> dict[connection.Connection, int]:
        """Connections by the rank at their other end. Nobody gets one without the key, which MLX's
        own connections carry."""
        import mlx.core as mx

        key = secrets.token_bytes(32)
        listener = (
            None if self.rank else connection.Listener((host, 0), backlog=self.size, authkey=key)
        )
        ours = [listener.address[1], *key] if listener else [0] * 33
        port, *key = mx.distributed.all_sum(mx.array(ours), stream=mx.cpu).tolist()
        if listener:
            with listener:
                peers = {
                    peer: peer.recv() for peer in (listener.accept() for _ in range(1, self.size))
                }
        else:
            peers = {connection.Client((host, port), authkey=bytes(key)): 0}
            next(iter(peers)).send(self.rank)
        for peer in peers:
            with socket.fromfd(peer.fileno(), socket.AF_INET, socket.SOCK_STREAM) as end:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peers

    def start(self, replicate: Callable[..., Generation], on_lost: Callable[[str], None]) -> None:
        self._replicate, self._on_lost = replicate, on_lost
        threading.Thread(target=self._watch, name="group", daemon=True).start()

    def broadcast(self, find: Callable[[], Any]) -> Any:
        if self.rank:
            unpickler = pickle.Unpickler(io.BytesIO(self._told.get()))
            unpickler.persistent_load = self._named
            return unpickler.load()
        found, out = find(), io.BytesIO()
        if self.lost:
            raise SystemExit  # ends the thread
        pickler = pickle.Pickler(out)
        pickler.persistent_id = self._name
        pickler.dump(found)
        self._tell(out.getvalue())
        return found

    def _name(self, value: Any) -> tuple[str, tuple | None] | None:
        """How a request is sent: once as a whole, and by its id from then on."""
        if not isinstance(value, Generation):
            return None
        fields = None
        if value.id not in self._jobs:
            fields = value.request, value._prompt, value._limit, value._by_context, value._born
            self._jobs[value.id] = value
        return value.id, fields

    def _named(self, name: tuple[str, tuple | None]) -> Generation:
        key, fields = name
        if fields is None:
            return self._jobs[key]
        self._jobs[key] = job = self._replicate(*fields)
        return job

    def sync_tokens(self, tokens: Any) -> Any:
        import mlx.core as mx

        agreed = mx.distributed.all_sum(tokens * int(self.rank == 0))
        mx.async_eval(agreed)  # everywhere before the next collective, which need not depend on it
        return agreed

    def memory(self) -> int:
        return self._memory

    def _least(self, number: int) -> int:
        """The smallest of the numbers that the processes have."""
        import mlx.core as mx

        return mx.distributed.all_min(mx.array(number, mx.int64), stream=mx.cpu).item()

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
            raise ValueError(
                f"mlx-lm cannot split it so; try {'without' if self._pipeline else 'with'} --pipeline"
            )
        getattr(whole, split)(mx.distributed.init())
        mx.eval(model.parameters())
        self._least(0)  # waits for the slowest disk: a GPU must not
        return model

    def failed(self, error: Exception) -> None:
        if str(error).startswith(("[ring]", "[jaccl]")):
            self.give_up(f"{self._GONE}: {error}")
        elif self.rank:
            return self._tell(self._FAILED)
        try:
            for _ in self._peers:
                self._failures.get(timeout=0 if self.lost else self.SKEW)
        except queue.Empty:
            self.give_up(self._APART)
            raise SystemExit from None

    def close(self) -> None:
        self._closed = True
        if not self.rank:
            self._tell(self._END)

    def _tell(self, message: bytes) -> None:
        with self._sending:
            for peer in self._peers:
                with contextlib.suppress(OSError):  # `_watch` finds out
                    peer.send_bytes(message)

    def _watch(self) -> None:
        """Takes what the others send, until one of them is gone."""
        told = failed = time.monotonic()
        heard = dict.fromkeys(self._peers, told)
        while True:
            for peer in connection.wait(self._peers, self.BEAT):
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
                    self._told.put(message)
            now = time.monotonic()
            silent = next(
                (rank for peer, rank in self._peers.items() if now - heard[peer] > self.SILENCE),
                None,
            )
            if silent is not None:
                return self.give_up(f"{self._GONE}: rank {silent} is silent")
            if not self._failures.empty() and now - failed > self.SKEW:
                return self.give_up(self._APART)
            if now - told >= self.BEAT and not self._sending.locked():  # whoever sends shows life
                self._tell(self._BEAT)
                told = now

    def give_up(self, reason: str) -> None:
        if self._closed or self.lost:
            return
        self.lost = reason
        log.critical("%s; the server ends", reason)
        if self.rank:
            os._exit(1)
        self._on_lost(reason)


def _leader() -> str:
    """Rank 0's address, from what `mlx.launch` tells of its back ends ring and jaccl:
    https://ml-explore.github.io/mlx/build/html/usage/distributed.html"""
    hosts = os.environ.get("MLX_HOSTFILE")
    address = (
        json.loads(Path(hosts).read_text())[0][0] if hosts else os.environ["MLX_JACCL_COORDINATOR"]
    )
    return address.rpartition(":")[0]
