"""The processes that run one model together; this is the group of one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from _mlx_server.inference.memory import usable_memory

if TYPE_CHECKING:
    import mlx.core as mx

log = logging.getLogger("mlx_server")

Value = TypeVar("Value")


class GroupLost(BaseException):
    """The group is no more, and the MLX thread ends with it. Not an Exception: no handler that
    fails a single request may take it for such a failure."""


class Group:
    """The processes that run one model together, each with its part of the weights. This one is
    alone. All methods are for the MLX thread.

    All processes take the same steps. Only rank 0 has callers: what differs between processes (who
    has come and gone, clocks, bytes) rank 0 finds and broadcasts; what follows from it each process
    finds by itself. `lost` says why the group is no more."""

    rank, size = 0, 1
    lost = ""

    def start(self, replicate: Callable[..., Any], on_lost: Callable[[str], None]) -> None:
        """Comes before all else. `replicate` makes this process's `Sequence` of one of rank 0's,
        `on_lost` is called with the reason when the group ends, on a thread of its own."""

    def broadcast(self, find: Callable[[], Value]) -> Value:
        """What `find` returns on rank 0; it is called there alone. Raises GroupLost."""
        return find()

    def sync_tokens(self, tokens: mx.array) -> mx.array:
        """The tokens that rank 0 has picked: on other hardware the logits may differ in their last
        bits."""
        return tokens

    def memory(self) -> int:
        """Bytes that each process may use."""
        return usable_memory()

    def load(self, path: Path, **options: Any) -> Any:
        """This process's part of a model; `options` are those of mlx-lm's `load_model`."""
        from mlx_lm.utils import load_model

        return load_model(path, **options)[0]

    def failed(self, error: Exception) -> None:
        """Says that this process goes on after a failure, which all processes must have had. If
        macOS refuses further GPU work from this process, the group is lost instead:
        https://github.com/jundot/omlx/issues/3706"""
        if "SubmissionsIgnored" in str(error):
            self.lost = "the GPU takes no more work from this process"
            log.critical("%s, which has to start anew", self.lost)

    def give_up(self, reason: str) -> None:
        """Says that this process cannot go on."""

    def close(self) -> None:
        """Says that the work is done."""
