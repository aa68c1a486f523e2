"""What is logged when the server has started."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
from collections.abc import Callable

from _mlx_server.front.cli import arguments
from _mlx_server.front.options import api_keys, program
from _mlx_server.front.startup import folder_troubles
from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.protocol import ModelNotFound

MOST_NAMES = 8  # models that are named, before only their number is told

log = logging.getLogger("mlx_server")


def welcome(
    args: argparse.Namespace,
    port: int,
    open_to_all: bool,
    models: Callable[[], list[LocalModel]],
    resolve: Callable[[str], LocalModel],
) -> None:
    """Logs which models there are and what to type next, and whether the server is `open_to_all`
    without a key. `models` and `resolve` are the engine's."""
    if open_to_all:
        log.warning(
            "whoever reaches this machine may use the server: "
            "demand a key with --api-key-file, or leave out --host"
        )
    for trouble in folder_troubles(args.models_dir):
        log.warning("no model in --models-dir: %s", trouble)
    if not args.model:
        newest = sorted(models(), key=lambda model: model.modified, reverse=True)
        names = [
            f"{model.name} ({gigabytes(model.size)})" for model in newest if model.name != "demo"
        ]
        listed = ", ".join(names[:MOST_NAMES]) or "none but the built-in demo"
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        log.info("models: %s%s", listed, more)
        with contextlib.suppress(ModelNotFound):  # not even the demo is there
            default_model(resolve)
    log.info("Claude Code, in another terminal: %s", _launch_command(args, port))


def _launch_command(args: argparse.Namespace, port: int) -> str:
    """The command that starts Claude Code with this server, without its keys."""
    words = ["launch", "claude", "--port", str(port)]
    if args.host != arguments().get_default("host"):
        words += ["--host", args.host]
    keys = ["--api-key", "YOUR_KEY"] if api_keys(args) else []
    return f"{program()} {shlex.join(words + keys)}"


def default_model(resolve: Callable[[str], LocalModel]) -> LocalModel:
    """The default model where no --model says it; logs why."""
    model = resolve("default")
    if model.name == "demo":
        log.warning(
            "DEFAULT: demo, A TOY that cannot program; get a model that fits this machine: %s pull",
            program(),
        )
    else:
        tools = (
            "that can use tools"
            if "tools" in model.capabilities
            else "(NONE CAN USE TOOLS, which Claude Code needs)"
        )
        log.info(
            "default: %s, the newest %s; others: --model NAME, or %s pull NAME",
            model.name,
            tools,
            program(),
        )
    return model
