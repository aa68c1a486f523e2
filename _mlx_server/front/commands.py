"""The commands: what is done instead of serving. The server itself needs none of them, so those
that are slow to import are imported when they run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass

from _mlx_server.front.agents import AGENTS
from _mlx_server.front.installed import (
    list_loaded,
    list_models,
    remove_model,
    show_model,
    unload_model,
)
from _mlx_server.front.startup import mlx_trouble
from _mlx_server.inference.protocol import EngineError
from _mlx_server.wire.fields import WireError

log = logging.getLogger("mlx_server")

Run = Callable[[argparse.Namespace], int | None]
"""Carries out a command; returns the exit status, None for success."""


@dataclass(frozen=True)
class Command:
    """`takes` is what stands behind the command's name; in brackets if it need not. Without `run`
    it is the server itself."""

    about: str
    run: Run | None = None
    takes: str = ""

    def mistake(self, word: str | None) -> str | None:
        """What is wrong with the word behind the command, None if nothing is."""
        if self.takes == "AGENT" and word not in AGENTS:
            return f"it takes one of {', '.join(AGENTS)}"
        if word is None:
            return "it takes a model's NAME" if self.takes == "NAME" else None
        return None if self.takes else f"nothing stands behind it, not '{word}' either"


def _launch(args: argparse.Namespace) -> int:
    from _mlx_server.front.launch import launch

    return launch(args)


def _pull(args: argparse.Namespace) -> None:
    from _mlx_server.front.pulling import pull_model

    pull_model(args)


def _examine(args: argparse.Namespace) -> int:
    from _mlx_server.front.doctor import examine

    return examine(args)


def _help(args: argparse.Namespace) -> None:
    print(args.help_text, end="")


_LIST = Command("the installed models", list_models)
COMMANDS = {
    "serve": Command("answer requests, as without a command"),
    "launch": Command("start an agent that uses this server", _launch, "AGENT"),
    "pull": Command("download a model: qwen3:8b, ORG/NAME, or choose one", _pull, "[NAME]"),
    "list": _LIST,
    "ls": _LIST,
    "show": Command("what is known of an installed model", show_model, "NAME"),
    "rm": Command("delete an installed model", remove_model, "NAME"),
    "ps": Command("the models in the running server's memory", list_loaded),
    "stop": Command("unload a model from the running server's memory", unload_model, "NAME"),
    "doctor": Command("what a bug report needs", _examine),
    "help": Command("this text", _help, "[COMMAND]"),
}


def commands_text() -> str:
    """The commands, for --help."""
    lines = [
        f"  {f'{name} {command.takes}'.rstrip():<20}  {command.about}"
        for name, command in COMMANDS.items()
    ]
    agents = ", ".join(AGENTS)
    return "\n".join(["commands:", *lines, "", f"AGENT is {agents}; -- ARGS are the agent's own."])


def run_command(run: Run, args: argparse.Namespace) -> int:
    """Does what is to be done instead of serving; returns the exit status."""
    try:
        return run(args) or 0
    except KeyboardInterrupt:
        again = "; the same command goes on from there" if args.command == "pull" else ""
        log.error("broken off%s", again)
        return 130
    except (EngineError, WireError, ImportError) as error:
        log.error("%s", mlx_trouble() if isinstance(error, ImportError) else error)
        return 1
