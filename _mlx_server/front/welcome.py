"""What is said when the server has started."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
from typing import Any

from _mlx_server.front.cli import arguments
from _mlx_server.front.commands import default_model
from _mlx_server.front.options import api_keys, program
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.protocol import ModelNotFound

log = logging.getLogger("mlx_server")


def welcome(args: argparse.Namespace, engine: Any, port: int) -> None:
    """Logs what there is and what to type next."""
    if not args.model:
        models = sorted(engine.models(), key=lambda model: model.modified, reverse=True)
        found = [
            f"{model.name} ({gigabytes(model.size)})" for model in models if model.name != "demo"
        ]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        log.info("models: %s%s", ", ".join(found[:8]) or "none but the built-in demo", more)
        with contextlib.suppress(ModelNotFound):  # not even the demo is there
            default_model(engine.resolve)
    shell = f'eval "$({_env_command(args, port)})" && claude --permission-mode acceptEdits'
    log.info("Claude Code, in another terminal: %s", shell)


def _env_command(args: argparse.Namespace, port: int) -> str:
    """What prints Claude Code's variables for this server, without its keys."""
    words, untouched = ["--print-env", "--port", str(port)], arguments()
    for name in ("host", "model", "models_dir", "alias", "state", "context", "max_tokens"):
        given = getattr(args, name)
        for value in (
            []
            if given == untouched.get_default(name)
            else given
            if isinstance(given, list)
            else [given]
        ):
            value = "=".join(value) if isinstance(value, tuple) else str(value)
            words += [
                f"--{name.replace('_', '-')}",
                os.path.abspath(value) if os.path.exists(value) else value,
            ]
    keys = ["--api-key", "YOUR_KEY"] if api_keys(args) else []
    return f"{program()} {shlex.join(words + keys)}"
