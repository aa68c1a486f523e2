"""The command line."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from _mlx_server import __version__
from _mlx_server.front import options
from _mlx_server.front.service import launchd_job, service_mistake, start_command, systemd_unit
from _mlx_server.inference.images.image_layout import DEFAULT_TOKENS

if TYPE_CHECKING:
    from _mlx_server.front.commands import Command, Run

ABOUT = "Serves local MLX models to Claude Code, Ollama clients and scripts."


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, and the commands only to who asks for help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def format_help(self) -> str:
        from _mlx_server.front.commands import commands_text  # which the server does not need

        self.description = f"{ABOUT}\n\n{commands_text()}"
        return super().format_help()


def arguments() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="mlx-server",
        usage="%(prog)s [COMMAND] [FLAGS] [-- ARGS]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_models(parser)
    _add_prompt_cache(parser)
    _add_models_in_memory(parser)
    _add_requests(parser)
    _add_access(parser)
    _add_running(parser)
    _add_launch(parser)
    _add_other(parser)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    """Where the server listens, which models it has, and how their answers are."""
    add = parser.add_argument_group("where it listens, and its models").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add(
        "--port",
        type=options.port,
        default=11435,
        help="port to listen on, 0 for any (default: %(default)s)",
    )
    add("--model", metavar="NAME_OR_PATH", help="default model, loaded at once")
    add(
        "--models-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder of models (repeatable)",
    )
    add(
        "--alias",
        metavar="PATTERN=NAME",
        type=options.alias,
        action="append",
        default=[],
        help="serve names like PATTERN (a glob) with model NAME (repeatable)",
    )
    add(
        "--state",
        metavar="FILE",
        default=options.presets_file(),
        help="where names given by Ollama's copy and create are kept (default: %(default)s)",
    )
    add(
        "--context",
        metavar="N",
        type=options.tokens,
        help="most tokens of prompt and answer together, e.g. 128k",
    )
    add("--max-tokens", metavar="N", type=options.tokens, help="most tokens of an answer")
    add(
        "--thinking",
        metavar="[PATTERN=]on|off|N",
        type=options.thinking_rule,
        action="append",
        default=[],
        help="whether models think, or for at most N tokens, where a request leaves it open; for "
        "requests to models, or in dialects, like PATTERN (repeatable)",
    )


def _add_prompt_cache(parser: argparse.ArgumentParser) -> None:
    """What is kept of earlier prompts, in memory and on disk."""
    add = parser.add_argument_group("prompt cache").add_argument
    add(
        "--prompt-cache",
        metavar="SIZE",
        type=options.size,
        help="memory for the KV states of earlier prompts, e.g. 8GB "
        "(default: a quarter of --memory)",
    )
    add(
        "--cache-dir",
        metavar="DIR",
        help="keep these states in DIR, too, where they survive a restart "
        "(default: ~/.cache/mlx-server/prompts, on macOS under ~/Library/Caches)",
    )
    add(
        "--no-cache-dir",
        dest="cache_dir",
        action="store_const",
        const="",
        help="keep these states in memory only",
    )
    add(
        "--cache-dir-size",
        metavar="SIZE",
        type=options.size,
        help="most bytes of files in DIR "
        "(default: 16GB, or a tenth of the free disk if that is less)",
    )


def _add_models_in_memory(parser: argparse.ArgumentParser) -> None:
    """What models may take of memory, and for how long."""
    add = parser.add_argument_group("memory").add_argument
    add(
        "--kv-bits",
        type=int,
        choices=(4, 8),
        help="keep the KV cache quantised: half or a quarter of its size",
    )
    add(
        "--no-speculation",
        dest="speculation",
        action="store_false",
        help="generate one token a pass, to compare: answers are the same",
    )
    add(
        "--image-tokens",
        type=options.positive,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="most tokens of an image, which is made smaller for it (default: %(default)s)",
    )
    add(
        "--memory",
        metavar="SIZE",
        type=options.size,
        help="memory for models and KV states together "
        "(default: nine tenths of what the GPU may use)",
    )
    add(
        "--max-loaded",
        metavar="N",
        type=options.positive,
        help="most models in memory (default: what fits)",
    )
    add(
        "--pipeline",
        action="store_true",
        help="with mlx.launch: give each process some of the layers, instead of a part of each",
    )
    add(
        "--keep-alive",
        metavar="DURATION",
        type=options.seconds,
        help="unload models that were idle for so long, e.g. 30m "
        "(default: when their memory is needed)",
    )


def _add_requests(parser: argparse.ArgumentParser) -> None:
    """Which requests wait, which are refused, and which another server answers."""
    add = parser.add_argument_group("many requests, and another server").add_argument
    add(
        "--max-queue",
        metavar="N",
        type=options.positive,
        default=64,
        help="most requests that may wait, before more are refused (default: %(default)s)",
    )
    add(
        "--priority",
        metavar="PATTERN=PRIORITY",
        type=options.priority_rule,
        action="append",
        default=[],
        help="high, normal or low for requests to models, or in dialects, like PATTERN "
        "(repeatable)",
    )
    add(
        "--upstream",
        metavar="URL",
        type=options.url,
        help="relay requests for models that are not here, e.g. to http://localhost:11434",
    )
    add(
        "--overflow",
        action="store_true",
        help="relay what finds the queue full, too, if the upstream has a model of that name",
    )


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Who may use the server."""
    add = parser.add_argument_group("access").add_argument
    add(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="answer requests for this name of the machine, too (repeatable)",
    )
    add(
        "--api-key",
        metavar="KEY[=PRIORITY]",
        type=options.api_key,
        action="append",
        default=[],
        help="demand this key (repeatable; default: $MLX_SERVER_API_KEY, else none)",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        type=options.key_file,
        default=[],
        help="demand one of the keys in FILE, a KEY or KEY=PRIORITY per line",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    """How the server ends, what it logs, and what makes it run."""
    add = parser.add_argument_group("log, end and service").add_argument
    add(
        "--drain",
        metavar="DURATION",
        type=options.seconds,
        default=10.0,
        help="time for running answers when the server is told to end (default: 10s)",
    )
    add(
        "--log-file",
        metavar="FILE",
        help="log to FILE, anew after every 10 MB; three old ones are kept",
    )
    add("--log-json", action="store_true", help="log JSON objects, one a line")
    add("--verbose", action="store_true", help="log every detail")
    add(
        "--print-launchd",
        dest="service",
        action="store_const",
        const=launchd_job,
        help="print a launchd job that runs the server with the other flags",
    )
    add(
        "--print-systemd",
        dest="service",
        action="store_const",
        const=systemd_unit,
        help="print a systemd user unit that does so",
    )


def _add_launch(parser: argparse.ArgumentParser) -> None:
    """How an agent is started."""
    add = parser.add_argument_group("launch").add_argument
    add("--keep", action="store_true", help="let a server that was started run on")
    add("--print", action="store_true", help="print the line that starts the agent, and end")
    add(
        "--print-env",
        nargs="?",
        const="claude",
        choices=["claude"],
        help="print the shell commands that make Claude Code use this server, and end",
    )


def _add_other(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"mlx-server {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("name", nargs="?", help=argparse.SUPPRESS)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags' values. Mistakes are told on stderr and end the program with status 2, as argparse
    does it. `agent_words` are those behind `--`, `server_words` the flags without command."""
    parser = arguments()
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    args, unknown = parser.parse_known_intermixed_args(words[:end])
    if unknown:
        parser.error(_unknown(args.command, args.name, unknown))
    args.agent_words = words[end + 1 :]
    args.server_words = _without(words[:end], args.command, args.name, "--keep")
    args.help_text = parser.format_help() if args.command == "help" else ""  # takes 5 ms
    mistake = _mistake(args)
    if args.service and not mistake:
        mistake = service_mistake(start_command(argv))
    if mistake:
        parser.error(mistake)
    return args


def _unknown(command: str | None, name: str | None, words: list[str]) -> str:
    """What is said of words that mean nothing here. Those of an agent's own are easily taken for
    flags of `launch`."""
    from _mlx_server.front.agents import AGENTS  # which the server does not need

    said = f"unrecognized arguments: {shlex.join(words)}"
    if command == "launch" and name in AGENTS:
        return f"{said}; if that is for {name}: launch {name} -- {shlex.join(words)}"
    return said


def _without(words: list[str], *dropped: str | None) -> list[str]:
    """The words without the first of each of these."""
    left = words.copy()
    for word in dropped:
        if word in left:
            left.remove(word)
    return left


def _mistake(args: argparse.Namespace) -> str | None:
    """What is wrong with flags that do not go together."""
    launched = "MLX_RANK" in os.environ  # by mlx.launch
    if args.overflow and not args.upstream:
        return "--overflow needs --upstream"
    if args.pipeline and not launched:
        return "--pipeline needs mlx.launch"
    if launched and (not args.model or args.cache_dir):
        return "with mlx.launch there is one model, named by --model, and no --cache-dir"
    if args.command and (mistake := _command_mistake(args.command, args.name)):
        return mistake
    if args.command == "launch" and not args.port:
        return "launch: the agent needs a --port that is known"
    if args.command != "launch" and (args.agent_words or args.keep or args.print):
        return "--keep, --print and -- ARGS belong to launch"
    if not args.command and options.has_blank_key(args):
        return "MLX_SERVER_API_KEY is set but blank: give it a key, or unset it to serve without"
    if args.service and options.api_keys(args) != dict(args.api_key_file):
        return "a service takes its keys from --api-key-file"
    return None


def _command_mistake(name: str, word: str | None) -> str | None:
    """What is wrong with a command and the word behind it."""
    if name not in _commands():
        return f"there is no command '{name}'"
    mistake = _commands()[name].mistake(word)
    return f"{name}: {mistake}" if mistake else None


def _commands() -> dict[str, Command]:
    from _mlx_server.front.commands import COMMANDS  # which the server does not need

    return COMMANDS


def selected_command(args: argparse.Namespace, argv: Sequence[str]) -> Run | None:
    """What is to be done instead of serving, None for serving."""
    if args.print_env:
        from _mlx_server.front.launch import print_env  # which the server itself does not need

        return print_env
    if args.service:
        return functools.partial(_print_service, argv)
    return _commands()[args.command].run if args.command else None


def _print_service(argv: Sequence[str], args: argparse.Namespace) -> None:
    """Prints what makes the system run the server with the flags in `argv`."""
    print(args.service(args, start_command(argv)), end="")


def is_for_eval(argv: Sequence[str]) -> bool:
    """Whether a shell may read the output as commands, also where the flag has a typo."""
    files = ("--print-launchd", "--print-systemd")
    printing = any(word.startswith("--print") or "env" in word for word in argv)
    return printing and not any(word in files for word in argv) and not sys.stdout.isatty()
