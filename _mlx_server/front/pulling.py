"""`pull`: downloads a model."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import termios
import time
import tty

from _mlx_server.front.client import ServerClient
from _mlx_server.front.installed import print_table
from _mlx_server.front.logs import printable
from _mlx_server.front.options import library_of, program
from _mlx_server.inference.catalog.choices import offer
from _mlx_server.inference.catalog.hub import Hub, PullStage
from _mlx_server.inference.memory import gigabytes, usable_memory
from _mlx_server.inference.protocol import EngineError
from _mlx_server.wire.ollama_models import checked_name

MOST = 9  # models that are offered: each has a key


def pull_model(args: argparse.Namespace) -> None:
    """Downloads the model called `args.name`, or one that is chosen at the terminal."""
    hub, memory = Hub(library_of(args).hub), args.memory or usable_memory()
    if args.name is None:
        repo, size, why = _chosen(hub, memory)
    else:
        said = f"'{args.name}' is not a model's name"
        name = checked_name(args.name.removeprefix("https://"), said)
        repo, size, why = hub.choose(name, memory)
    _tell(f"pulling {repo}, {gigabytes(size)}: {why}")
    with contextlib.closing(hub.pull(repo)) as steps, ProgressBar(size) as bar:
        for step in steps:
            if step.stage is PullStage.HEAD:
                _tell(step.said)
                bar.expect(step.more)
            if step.file:
                bar.show(step.file.digest, step.completed)
    _tell(f"pulled {repo}; {_next(args, repo)}")


def _tell(text: str) -> None:
    print(printable(text), flush=True)


def _next(args: argparse.Namespace, repo: str) -> str:
    """What to do with a model that has come."""
    client = ServerClient.of(args)
    with contextlib.suppress(EngineError):
        if client.answers() and client.model("default").name == repo:
            return f"the server at {client.url} takes it as its default model from now on"
    return f"to serve it: {program()} --model {shlex.quote(repo)}"


def _chosen(hub: Hub, memory: int) -> tuple[str, int, str]:
    """Repo, size in bytes and reason of the model that one keystroke has taken. Raises EngineError
    if none was."""
    print("asking the hub which models suit this machine ...", file=sys.stderr, flush=True)
    choices = offer(hub, memory)[:MOST]
    if not choices:
        raise EngineError(f"the hub lists no model for {gigabytes(memory)} of memory")
    print(f"models that suit the {gigabytes(memory)} of memory that can be used:\n")
    rows = [("", "NAME", "SIZE", "CONTEXT", "TOOLS", "SEES", "WHY")]
    for number, one in enumerate(choices, 1):
        window, sees = f"{one.context_length:,}", "yes" if one.sees else "no"
        rows.append((f"{number}", one.repo, gigabytes(one.size), window, "yes", sees, one.why))
    print_table(rows, right=(2, 3))
    if not sys.stdin.isatty():
        raise EngineError("say which: pull NAME")
    key = _keystroke(f"\n1 to {len(choices)}, Enter for 1, any other key for none: ")
    print(key if key.isprintable() else "")
    number = 1 if key in ("\r", "\n") else int(key) if key.isdecimal() else 0
    if not 1 <= number <= len(choices):
        raise EngineError("nothing was pulled")
    chosen = choices[number - 1]
    return chosen.repo, chosen.size, chosen.why


def _keystroke(question: str) -> str:
    """The key that answers a question at the terminal. Those typed before do not count."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        print(question, end="", flush=True)
        return os.read(sys.stdin.fileno(), 8).decode("utf-8", "replace")
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


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

    def expect(self, more: int) -> None:
        """Takes in that so many bytes are to come besides."""
        self._bar.total += more

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
