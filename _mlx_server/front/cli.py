"""The command line."""

from __future__ import annotations

import argparse
import os

from _mlx_server import __version__
from _mlx_server.front.commands import COMMANDS
from _mlx_server.front.options import (
    _bytes,
    _key_file,
    _pair,
    _port,
    _positive,
    _rule,
    _seconds,
    _state_file,
    _url,
    api_key,
    api_keys,
)
from _mlx_server.front.service import launchd_job, start_command, systemd_unit


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="mlx-server",
        allow_abbrev=False,
        description="Serves local MLX models to Claude Code, Ollama clients and scripts.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=11435,
        help="port to listen on, 0 for any (default: %(default)s)",
    )
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="default model, loaded at once")
    parser.add_argument(
        "--models-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder of models (repeatable)",
    )
    parser.add_argument(
        "--alias",
        metavar="PATTERN=NAME",
        type=_pair,
        action="append",
        default=[],
        help="serve names like PATTERN (a glob) with model NAME (repeatable)",
    )
    parser.add_argument(
        "--state",
        metavar="FILE",
        default=_state_file(),
        help="where names given by Ollama's copy and create are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--context", metavar="N", type=_positive, help="most tokens of prompt and answer together"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=_positive, help="most tokens of an answer"
    )
    parser.add_argument(
        "--prompt-cache",
        metavar="SIZE",
        type=_bytes,
        help="memory for the KV states of earlier prompts, e.g. 8GB (default: a quarter of --memory)",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="keep these states in DIR, too, where they survive a restart",
    )
    parser.add_argument(
        "--cache-dir-size",
        metavar="SIZE",
        type=_bytes,
        default=32 * 2**30,
        help="most bytes of files in DIR (default: 32GB)",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(4, 8),
        help="keep the KV cache quantised: half or a quarter of its size",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=_bytes,
        help="memory for models and KV states together (default: nine tenths of what the GPU may use)",
    )
    parser.add_argument(
        "--max-loaded",
        metavar="N",
        type=_positive,
        help="most models in memory (default: what fits)",
    )
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="with mlx.launch: give each process some of the layers, instead of a part of each",
    )
    parser.add_argument(
        "--keep-alive",
        metavar="DURATION",
        type=_seconds,
        help="unload models that were idle for so long, e.g. 30m (default: when their memory is needed)",
    )
    parser.add_argument(
        "--max-queue",
        metavar="N",
        type=_positive,
        default=64,
        help="most requests that may wait, before more are refused (default: %(default)s)",
    )
    parser.add_argument(
        "--priority",
        metavar="PATTERN=PRIORITY",
        type=_rule,
        action="append",
        default=[],
        help="high, normal or low for requests to models, or in dialects, like PATTERN (repeatable)",
    )
    parser.add_argument(
        "--upstream",
        metavar="URL",
        type=_url,
        help="relay requests for models that are not here, e.g. to http://localhost:11434",
    )
    parser.add_argument(
        "--overflow",
        action="store_true",
        help="relay what finds the queue full, too, if the upstream has a model of that name",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY[=PRIORITY]",
        type=api_key,
        action="append",
        default=[],
        help="demand this key (repeatable; default: $MLX_SERVER_API_KEY, else none)",
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        type=_key_file,
        default=[],
        help="demand one of the keys in FILE, a KEY or KEY=PRIORITY per line",
    )
    parser.add_argument(
        "--drain",
        metavar="DURATION",
        type=_seconds,
        default=10.0,
        help="time for running answers when the server is told to end (default: 10s)",
    )
    parser.add_argument(
        "--log-file",
        metavar="FILE",
        help="log to FILE, anew after every 10 MB; three old ones are kept",
    )
    parser.add_argument(
        "--print-env",
        nargs="?",
        const="claude",
        choices=["claude"],
        help="print the shell commands that make Claude Code use this server, and end",
    )
    parser.add_argument("--log-json", action="store_true", help="log JSON objects, one a line")
    parser.add_argument("--verbose", action="store_true", help="log every detail")
    parser.add_argument(
        "--print-launchd",
        dest="service",
        action="store_const",
        const=launchd_job,
        help="print a launchd job that runs the server with the other flags",
    )
    parser.add_argument(
        "--print-systemd",
        dest="service",
        action="store_const",
        const=systemd_unit,
        help="print a systemd user unit that does so",
    )
    parser.add_argument("--version", action="version", version=f"mlx-server {__version__}")
    parser.add_argument(
        "command",
        metavar="COMMAND",
        nargs="?",
        choices=COMMANDS,
        help="instead of serving: pull NAME (download a model, by a name like qwen3:8b or as ORG/NAME), "
        "list, show NAME, rm NAME (what is installed)",
    )
    parser.add_argument("name", metavar="NAME", nargs="?")
    return parser


def print_service(args: argparse.Namespace) -> None:
    """Prints what makes the system run the server with the flags given."""
    if api_keys(args) != dict(args.api_key_file):
        arguments().error("a service takes its keys from --api-key-file")
    print(args.service(args, start_command(args.argv)), end="")


def check_arguments(args: argparse.Namespace) -> None:
    """Ends the program where flags do not go together."""
    launched = "MLX_RANK" in os.environ  # by mlx.launch
    if args.overflow and not args.upstream:
        arguments().error("--overflow needs --upstream")
    if args.pipeline and not launched:
        arguments().error("--pipeline needs mlx.launch")
    if launched and (not args.model or args.cache_dir):
        arguments().error(
            "with mlx.launch there is one model, named by --model, and no --cache-dir"
        )
    if bool(args.name) != (args.command in ("pull", "show", "rm")):
        arguments().error("pull, show and rm take one NAME, and nothing else does")
