"""Real servers for the tests: the program itself in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from models import CONFIGS, build_model
from phases import Phases

import mlx_server
from engine import Engine

ROOT = Path(__file__).parent.parent
PATIENCE = 240.0  # seconds after which something hangs, however busy the machine is

# A shell lets what it starts in the background ignore Ctrl-C, and so would all that is started here
signal.signal(signal.SIGINT, signal.default_int_handler)


def until(done: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Waits for what another thread or process does: until `done` is true of it, and returns what
    that was."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


CACHES = ("qwen2", "llama_sliding", "hybrid")  # kinds of random models, one of each cache class


def kinds(*fast: str, among: Iterable[str] = CACHES) -> list:
    """Parameters of a fixture: kinds of random models, of which those not named are slow."""
    slow = pytest.mark.slow
    return [kind if kind in fast else pytest.param(kind, marks=slow) for kind in among]


@dataclass(frozen=True)
class Example:
    """A fenced block of a page. `title` is the heading above it."""

    page: str
    title: str
    code: str


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


def examples(*pages: str) -> Iterator[Example]:
    """The examples of pages, of all if none is named."""
    for page in pages or PAGES:
        text = (ROOT / page).read_text("utf-8")
        for block in re.finditer(r"^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            title = re.findall(r"^#+ (.+)$", text[: block.start()], re.MULTILINE)[-1]
            yield Example(page, title, block[1])


def example(part: str) -> str:
    """The first line of the examples that holds `part`."""
    lines = (line for shown in examples() for line in shown.code.splitlines())
    return next(line for line in lines if part in line)


class Server:
    """`python mlx_server.py`, or another command, on a free port, which shares no prompt cache
    with others unless it is `cached`. `lines` are what it has logged so far."""

    def __init__(
        self,
        *flags: str,
        env: dict[str, str] | None = None,
        command: Sequence[str] = (sys.executable, str(ROOT / "mlx_server.py")),
        folder: Path = ROOT,
        cached: bool = False,
    ):
        nowhere = {"HF_HUB_CACHE": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"}
        self.process = subprocess.Popen(
            [*command, "--port", "0", *([] if cached else ["--no-cache-dir"]), *flags],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **nowhere, **(env or {})},
        )
        self.lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self.wait_for(r"listening on http://\S+:(\d+)")[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern: str, seconds: float = PATIENCE, since: int = 0) -> re.Match:
        """The first line logged that matches, waiting for it if need be, as long as the server
        runs; lines before `since` do not count."""

        def found() -> re.Match | None:
            matches = (re.search(pattern, line) for line in self.lines[since:])
            return next(filter(None, matches), None)

        with self._news:
            self._news.wait_for(lambda: self._ended or found(), seconds)
            match = found()
            assert match, f"no {pattern!r} in:\n{''.join(self.lines)}"
            return match

    def stop(self) -> int:
        """Ends the server as a service manager would; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random-weight model of each cache class."""
    path = tmp_path_factory.mktemp("models")
    for kind in CONFIGS:
        build_model(kind, path / kind)
    return path


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> Phases:
    return Phases(monkeypatch)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture
def serve() -> Iterator[Callable[..., mlx_server.MLXServer]]:
    """Starts servers in this process; each knows its `port`."""
    with ExitStack() as stack:

        def serve(engine: Engine | None = None, host: str = "127.0.0.1", **options):
            server = mlx_server.MLXServer((host, 0), engine, **options)
            server.port = server.server_port
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return server

        yield serve
