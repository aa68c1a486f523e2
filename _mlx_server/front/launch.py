"""`launch`: an agent that uses this server, which is started for it if none runs yet."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Protocol, TypeVar

from _mlx_server.front.agents import AGENTS, TIERS, Target, claude_variables, claude_window
from _mlx_server.front.client import ServerClient
from _mlx_server.front.logs import printable
from _mlx_server.front.options import api_keys, library_of, log_folder, program
from _mlx_server.front.service import start_command
from _mlx_server.front.startup import folder_troubles, is_taken, mlx_trouble, port_trouble
from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.protocol import EngineError

POLL = 0.2  # seconds between two looks at a server that starts
DRAIN = 5.0  # seconds that the server may take to end, beyond its --drain

log = logging.getLogger("mlx_server")


class AnyModel(Protocol):
    """What agents are told of a model."""

    @property
    def name(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def capabilities(self) -> list[str]: ...


Checked = TypeVar("Checked", bound=AnyModel)


def print_env(args: argparse.Namespace) -> None:
    """Prints shell commands that set Claude Code's variables."""
    _check_folders(args)
    target = _target(args)
    if warning := claude_window(target):
        log.warning("%s", warning)
    for name, value in claude_variables(target).items():
        print(f"export {name}={shlex.quote(value)}")


def launch(args: argparse.Namespace) -> int:
    """Becomes the agent `args.name`, or prints the line that starts it; returns the exit
    status."""
    _check_folders(args)
    agent = AGENTS[args.name]
    if args.print:
        print(agent.line(_target(args), args.agent_words))
        return 0
    path, client = agent.find(), ServerClient.of(args)
    if client.answers():
        return _become(args, path, _target(args))
    model = _checked(library_model(args))
    if trouble := mlx_trouble():
        raise EngineError(trouble)
    if is_taken(args.host, args.port):
        raise EngineError(port_trouble(args.host, args.port))
    with _server(args, model) as server:
        _load(client, server, model)
        target = _target(args, "default")  # which a path names as well
        if args.keep:
            return _become(args, path, target)
        status = _run(args, path, target)
        server.end()
        return status


def _check_folders(args: argparse.Namespace) -> None:
    """Raises EngineError where --models-dir names a folder without models: an agent would work with
    another model, or with the demo, and its user would not see that."""
    for trouble in folder_troubles(args.models_dir):
        raise EngineError(f"--models-dir: {trouble}")


def library_model(args: argparse.Namespace) -> LocalModel:
    """The installed model that --model names, or the default one. Raises EngineError."""
    return library_of(args).resolve(args.model or "default", trusted=True)


def _checked(model: Checked) -> Checked:
    """A model that an agent can use. Raises EngineError for others."""
    if "tools" in model.capabilities:
        return model
    raise EngineError(
        f"'{model.name}' cannot use tools, which an agent needs; take a model that can: "
        f"--model NAME ({program()} list shows which), or get one: {program()} pull"
    )


def _target(args: argparse.Namespace, name: str | None = None) -> Target:
    """What the flags mean, with the model that `name`, else --model, says, asked of the server that
    runs at their address, or found out here. Raises EngineError."""
    name = name or args.model
    client = ServerClient.of(args)
    key = next(iter(api_keys(args)), None)
    resolve: Callable[[str], AnyModel]
    if client.answers():
        resolve = client.model
    else:
        log.warning("no server listens at %s yet; to start it: %s", client.url, program())
        library = library_of(args)
        chosen = library_model(args)

        def resolve(name: str) -> AnyModel:
            return library.resolve(name, default=chosen, trusted=True)

    standard = resolve("default")
    model = _checked(resolve(name) if name else standard)
    if model.name == "demo":
        log.warning("demo is A TOY that cannot program; get a model: %s pull", program())
    tiers = {tier: resolve(f"claude-{tier}-5-5").name for tier in TIERS}
    # Where an alias says nothing else, they mean the default model of the server
    tiers = {tier: model.name if name == standard.name else name for tier, name in tiers.items()}
    context = min(filter(None, [model.context_length, args.context]))
    sees = "vision" in model.capabilities
    return Target(client.url, key, model.name, context, args.max_tokens, tiers, sees)


class _Server:
    """A server in the background, with what it has printed instead of logging."""

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes], patience: float):
        self._process, self._said, self._patience = process, said, patience

    def check(self) -> None:
        """Raises EngineError if it has ended."""
        if self._process.poll() is not None:
            self._said.seek(0)
            lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
            raise EngineError(lines[-1].removeprefix("mlx-server: ") if lines else "it has ended")

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _server(args: argparse.Namespace, model: LocalModel) -> Iterator[_Server]:
    """Starts a server with the command line's flags; if what follows fails, it ends."""
    flags = [*args.server_words, *([] if args.model else ["--model", model.name])]
    file = args.log_file or os.path.join(log_folder(), f"launch-{args.port}.log")
    if not args.log_file:
        flags += ["--log-file", file]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            start_command(flags),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # Ctrl-C is the agent's
        )
        _tell(f"a server is started on port {args.port}; its log: {file}")
        server = _Server(process, said, args.drain + DRAIN)
        try:
            yield server
        except BaseException:
            server.end()
            raise


def _load(client: ServerClient, server: _Server, model: LocalModel) -> None:
    """Waits until the server has loaded the model, and shows how far it is. Raises EngineError."""
    while not client.answers():
        server.check()
        time.sleep(POLL)
    failure: list[EngineError] = []

    def ask() -> None:
        # Without a prompt the model is only loaded
        body = {"model": model.name, "stream": False}
        try:
            client.ask("POST", "/api/generate", body, patience=None)
        except EngineError as error:
            failure.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    started, terminal, shown = time.monotonic(), sys.stderr.isatty(), printable(model.name)
    while asking.is_alive():
        server.check()
        asking.join(POLL)
        if terminal and (held := client.memory()) is not None:
            there = gigabytes(min(held, model.size))
            sys.stderr.write(f"\r\033[Kloading {shown}: {there} of {gigabytes(model.size)}")
            sys.stderr.flush()
    if terminal:
        sys.stderr.write("\r\033[K")
    if failure:
        server.check()
        raise failure[0]
    _tell(f"{model.name} was loaded in {time.monotonic() - started:.1f} s")


def _tell(text: str) -> None:
    print(f"mlx-server: {printable(text)}", file=sys.stderr, flush=True)


def _command(
    args: argparse.Namespace, path: str, target: Target
) -> tuple[list[str], dict[str, str]]:
    """The agent's words and environment."""
    agent = AGENTS[args.name]
    if args.name == "claude" and (warning := claude_window(target)):
        log.warning("%s", warning)
    words = [path, *agent.flags(target, args.agent_words), *args.agent_words]
    return words, {**os.environ, **agent.variables(target)}


def _become(args: argparse.Namespace, path: str, target: Target) -> int:
    """The agent takes this process over."""
    words, env = _command(args, path, target)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python ignores, and programs inherit
    try:
        os.execve(path, words, env)
    except OSError as error:
        raise EngineError(f"{path} cannot be started: {error.strerror}") from None


def _run(args: argparse.Namespace, path: str, target: Target) -> int:
    """Runs the agent in the foreground; returns its exit status."""
    words, env = _command(args, path, target)
    # The terminal sends these to both. The agent decides what they mean.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)
    try:
        agent = subprocess.Popen(words, env=env)
    except OSError as error:
        raise EngineError(f"{path} cannot be started: {error.strerror}") from None
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: agent.send_signal(number))
    while True:
        _, status = os.waitpid(agent.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        # Stops as the agent does, so that the shell comes back, and goes on with it
        os.kill(os.getpid(), signal.SIGSTOP)
        os.kill(agent.pid, signal.SIGCONT)
    agent.returncode = code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
