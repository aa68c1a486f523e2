"""What is logged when the server has started."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
from collections.abc import Callable
from typing import Any

from _mlx_server.front.cli import arguments
from _mlx_server.front.commands import default_model
from _mlx_server.front.options import api_keys, program
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.models import LocalModel
from _mlx_server.inference.protocol import ModelNotFound

MOST_NAMES = 8  # models that are named, before only their number is told

log = logging.getLogger("mlx_server")


def welcome(
    args: argparse.Namespace,
    port: int,
    models: Callable[[], list[LocalModel]],
    resolve: Callable[[str], LocalModel],
) -> None:
    """Logs which models there are and what to type next. `models` and `resolve` are the
    engine's."""
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
    shell = f'eval "$({_env_command(args, port)})" && claude --permission-mode acceptEdits'
    log.info("Claude Code, in another terminal: %s", shell)


def _env_command(args: argparse.Namespace, port: int) -> str:
    """The command that prints Claude Code's variables for this server, without its keys."""
    words, parser = ["--print-env", "--port", str(port)], arguments()
    for name in ("host", "model", "models_dir", "alias", "state", "context", "max_tokens"):
        given = getattr(args, name)
        if given == parser.get_default(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        for value in given if isinstance(given, list) else [given]:
            words += [flag, _flag_value(value)]
    keys = ["--api-key", "YOUR_KEY"] if api_keys(args) else []
    return f"{program()} {shlex.join(words + keys)}"


def _flag_value(value: Any) -> str:
    """A flag's value as it is typed; paths are valid in every folder."""
    text = "=".join(value) if isinstance(value, tuple) else str(value)
    return os.path.abspath(text) if os.path.exists(text) else text
