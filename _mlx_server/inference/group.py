"""The processes that run one model together; this is the group of one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _mlx_server.inference.memory import usable_memory

log = logging.getLogger("mlx_server")


class Group:
    """The processes that run one model together, each with its part of the weights. This one is
    alone.

    All of them take the same steps. Only rank 0 has callers: what differs between processes (who
    has come and gone, clocks, bytes) it finds, and the others are told; what follows from it each
    finds by itself. On the MLX thread."""

    rank, size = 0, 1
    lost = ""  # why the group is no more

    def start(self, replicate: Callable[..., Any], on_lost: Callable[[str], None]) -> None:
        """Comes before all else. `replicate` makes this process's `Generation` of one of rank 0's,
        `on_lost` ends what runs there."""

    def broadcast(self, find: Callable[[], Any]) -> Any:
        """What `find` returns on rank 0, where alone it is called."""
        return find()

    def sync_tokens(self, tokens: Any) -> Any:
        """The tokens that rank 0 has picked, an array: on other hardware the logits may differ in
        their last bits."""
        return tokens

    def memory(self) -> int:
        """Bytes that each process may use."""
        return usable_memory()

    def load(self, path: Path, **options: Any) -> Any:
        """This process's part of a model; `options` are those of mlx-lm's `load_model`."""
        from mlx_lm.utils import load_model

        return load_model(path, **options)[0]

    def failed(self, error: Exception) -> None:
        """Says that this process goes on after a failure, which all of them have to have had. It
        does not if macOS has lost its patience with it:
        https://github.com/jundot/omlx/issues/3706"""
        if "SubmissionsIgnored" in str(error):
            self.lost = "the GPU takes no more work from this process"
            log.critical("%s, which has to start anew", self.lost)

    def give_up(self, reason: str) -> None:
        """Says that this process cannot go on."""

    def close(self) -> None:
        """Says that the work is done."""
