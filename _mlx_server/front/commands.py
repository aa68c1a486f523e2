"""The commands that are carried out instead of serving."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import shlex
import sys
import time
from collections.abc import Callable

from _mlx_server.front.hub import Hub
from _mlx_server.front.options import api_keys, library_of, program, reached
from _mlx_server.front.startup import mlx_trouble
from _mlx_server.inference.memory import gigabytes, usable_memory
from _mlx_server.inference.models import LocalModel
from _mlx_server.inference.protocol import EngineError
from _mlx_server.wire.fields import Object, WireError
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
    progress = Progress(size)
    try:
        for step in hub.pull(repo):
            progress.show(step)
    finally:
        progress.end()
    print(f"pulled {repo}; to serve it: {program()} --model {shlex.quote(repo)}")


class Progress:
    """Draws on stderr how much of `total` bytes has come: a bar in a terminal, otherwise a line now
    and then."""

    WIDTH = 24
    TELL = 5.0  # seconds between two lines

    def __init__(self, total: int):
        self._total, self._bar = max(total, 1), sys.stderr.isatty()
        self._came: dict[str, int] = {}
        # Bytes of each file at first sight: they tell nothing of the speed
        self._there: dict[str, int] = {}
        self._began = self._told = time.monotonic()

    def show(self, step: Object) -> None:
        """Takes in one of Ollama's progress objects."""
        if "completed" not in step:
            return
        before, self._came[step["digest"]] = sum(self._came.values()), step["completed"]
        self._there.setdefault(step["digest"], step["completed"])
        came, now = sum(self._came.values()), time.monotonic()
        if came == before or not (
            self._bar or came >= self._total or now - self._told >= self.TELL
        ):
            return
        self._told = now
        speed = (came - sum(self._there.values())) / max(now - self._began, 0.1)
        line = f"{100 * came // self._total:3} %, {gigabytes(came)} of {gigabytes(self._total)}"
        if speed > 0:
            left = (self._total - came) / speed
            line += f", {gigabytes(speed)}/s, " + (
                f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left"
            )
        full = self.WIDTH * came // self._total
        sys.stderr.write(
            f"\r[{'#' * full:{self.WIDTH}}] {line}\x1b[K" if self._bar else f"{line}\n"
        )
        sys.stderr.flush()

    def end(self) -> None:
        """Leaves the line to others."""
        sys.stderr.write("\n" if self._bar and self._came else "")


def list_models(args: argparse.Namespace) -> None:
    """Prints a table of the installed models, the newest first."""
    models = sorted(library_of(args).catalog(), key=lambda model: model.modified, reverse=True)
    width = max([len(model.name) for model in models], default=0)
    print(f"{'NAME':{width}}  {'SIZE':>8}  MODIFIED")
    for model in models:
        print(
            f"{model.name:{width}}  {gigabytes(model.size):>8}  {_ago(time.time() - model.modified)}"
        )


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
        print(f"{key:<14}{value}")


def remove_model(args: argparse.Namespace) -> None:
    """Deletes the model or preset called `args.name`."""
    library = library_of(args)
    if not library.presets.remove(args.name):
        library.delete(args.name, library.resolve(args.name))
    print(f"deleted {args.name}")


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
