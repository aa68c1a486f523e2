"""The commands that are carried out instead of serving."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import shlex
import sys
import time
from collections.abc import Callable

from _mlx_server.front.options import api_keys, library_of, program, reached
from _mlx_server.front.startup import mlx_trouble
from _mlx_server.inference.hub import Hub
from _mlx_server.inference.memory import gigabytes, usable_memory
from _mlx_server.inference.models import LocalModel
from _mlx_server.inference.protocol import EngineError
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.ollama_models import checked_name

log = logging.getLogger("mlx_server")


def print_env(args: argparse.Namespace) -> None:
    """Prints shell commands for Claude Code's variables:
    https://code.claude.com/docs/en/settings#environment-variables"""
    library = library_of(args)
    default = (
        library.resolve(args.model, trusted=True) if args.model else default_model(library.resolve)
    )
    tiers = {
        tier: library.resolve(f"claude-{tier}-5-5", default=default).name
        for tier in ("opus", "sonnet", "haiku")
    }
    context = min(filter(None, [default.context_length, args.context]))
    if context < 32_000:
        log.warning(
            "%s reads at most %s tokens, and Claude Code's first prompt alone has 15,000",
            default.name,
            f"{context:,}",
        )
    variables = {
        "ANTHROPIC_BASE_URL": reached(args.host, args.port),
        # Without one it asks for a login
        "ANTHROPIC_AUTH_TOKEN": next(iter(api_keys(args)), "none"),
        "ANTHROPIC_API_KEY": "",  # a real one is none of ours
        "ANTHROPIC_MODEL": default.name,
        **{f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL": name for tier, name in tiers.items()},
        "ANTHROPIC_SMALL_FAST_MODEL": tiers["haiku"],
        "CLAUDE_CODE_SUBAGENT_MODEL": default.name,
        # The installed models in its /model menu
        "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": 1,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": 0,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": context,
        # Claude Code compacts this and 13,000 tokens before the window's end, and its first prompt
        # has 15,000.
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": min(filter(None, [32000, context // 8, args.max_tokens])),
        "API_TIMEOUT_MS": 3_000_000,
        "API_FORCE_IDLE_TIMEOUT": 0,
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": 900_000,
    }
    if not importlib.util.find_spec("llguidance"):
        # Titles are asked for as structured output
        variables["CLAUDE_CODE_DISABLE_TERMINAL_TITLE"] = 1
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(str(value))}")


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


def printable(text: str) -> str:
    """A text of a model's files as a terminal may get it, without control sequences."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def list_models(args: argparse.Namespace) -> None:
    """Prints a table of the installed models, the newest first, and what cannot be loaded."""
    library = library_of(args)
    models = sorted(library.catalog(), key=lambda model: model.modified, reverse=True)
    names = [printable(model.name) for model in models]
    width = max(map(len, names), default=0)
    print(f"{'NAME':{width}}  {'SIZE':>8}  MODIFIED")
    for name, model in zip(names, models, strict=True):
        ago = _ago(time.time() - model.modified)
        print(f"{name:{width}}  {gigabytes(model.size):>8}  {ago}")
    for error in library.unsupported():
        print(printable(str(error)))


def _ago(seconds: float) -> str:
    for unit, length in (
        ("month", 30 * 86400),
        ("week", 7 * 86400),
        ("day", 86400),
        ("hour", 3600),
        ("minute", 60),
    ):
        if count := int(seconds // length):
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def show_model(args: argparse.Namespace) -> None:
    """Prints what is known of the model called `args.name`."""
    model = library_of(args).resolve(args.name, trusted=True)
    for key, value in {
        "name": model.name,
        "architecture": model.family,
        "parameters": model.parameter_size,
        "quantization": model.quantization,
        "context": f"{model.context_length:,} tokens",
        "capabilities": ", ".join(model.capabilities),
        "size": gigabytes(model.size),
        "path": model.path,
    }.items():
        print(f"{key:<14}{printable(str(value))}")


def remove_model(args: argparse.Namespace) -> None:
    """Deletes the model or preset called `args.name`."""
    library = library_of(args)
    if not library.presets.remove(args.name):
        library.delete(args.name, library.resolve(args.name))
    print(f"deleted {printable(args.name)}")


COMMANDS = {"pull": pull_model, "list": list_models, "show": show_model, "rm": remove_model}


def run_command(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Does what is to be done instead of serving; returns the exit status."""
    try:
        command(args)
        return 0
    except KeyboardInterrupt:
        log.error("broken off; the same command goes on from there")
    except (EngineError, WireError, ImportError) as error:
        log.error("%s", mlx_trouble() if isinstance(error, ImportError) else error)
    if args.print_env:
        print("false")  # for eval: what follows it must not go to another server
    return 1


def default_model(resolve: Callable[[str], LocalModel]) -> LocalModel:
    """The default model where no --model says it; logs why."""
    model = resolve("default")
    if model.name == "demo":
        log.warning(
            "DEFAULT: demo, A TOY that cannot program; get a model: %s pull qwen3:8b", program()
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
