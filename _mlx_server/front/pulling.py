"""`pull`: downloads a model."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import time

from _mlx_server.front.options import library_of, program
from _mlx_server.inference.hub import Hub
from _mlx_server.inference.memory import gigabytes, usable_memory
from _mlx_server.wire.ollama_models import checked_name


def pull_model(args: argparse.Namespace) -> None:
    """Downloads the model called `args.name`."""
    name = checked_name(args.name.removeprefix("https://"), f"'{args.name}' is not a model's name")
    hub = Hub(library_of(args).hub)
    repo, size, why = hub.choose(name, args.memory or usable_memory())
    print(f"pulling {repo}, {gigabytes(size)}: {why}", flush=True)
    with contextlib.closing(hub.pull(repo)) as steps, ProgressBar(size) as bar:
        for step in steps:
            if step.file:
                bar.show(step.file.digest, step.completed)
    print(f"pulled {repo}; to serve it: {program()} --model {shlex.quote(repo)}")


class ProgressBar:
    """Draws on stderr how much of `total` bytes has come: a bar in a terminal, otherwise a line now
    and then."""

    LINE = "{percentage:3.0f} %, {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"
    INTERVAL = 5.0  # seconds between two lines

    def __init__(self, total: int):
        from tqdm import tqdm  # comes with mlx-lm

        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            file=sys.stderr if self._terminal else io.StringIO(),
            bar_format="[{bar:24}] " * self._terminal + self.LINE,
            ascii=" #",
            ncols=80,  # terminals that tell no size have none for tqdm
            nrows=20,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            smoothing=0,  # the mean rate
        )
        self._came: dict[str, int] = {}
        self._told = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, file: str, completed: int) -> None:
        """Takes in how many bytes of a file are there."""
        if file not in self._came:
            self._bar.initial += completed  # was there before, and tells nothing of the rate
        new = completed - self._came.get(file, 0)
        self._came[file] = completed
        self._bar.update(new)
        now = time.monotonic()
        ended = self._bar.n >= self._bar.total
        if new and not self._terminal and (ended or now - self._told >= self.INTERVAL):
            self._told = now
            print(self._bar, file=sys.stderr, flush=True)
