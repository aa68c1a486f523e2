"""`list`, `show`, `rm`, `ps` and `stop`: what is installed, and what of it a server has loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from _mlx_server.front.client import ServerClient
from _mlx_server.front.logs import printable
from _mlx_server.front.options import library_of
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.protocol import EngineError

FOREVER = 60 * 24 * 365  # minutes; a model that is to stay longer has no time at which it goes


def list_models(args: argparse.Namespace) -> None:
    """Prints a table of the installed models, the newest first, the default one with a star, and
    what cannot be loaded."""
    library = library_of(args)
    models = sorted(library.catalog(), key=lambda model: model.modified, reverse=True)
    default = library.resolve(args.model or "default", trusted=True).name if models else ""
    rows = [("", "NAME", "SHORT", "SIZE", "CONTEXT", "TOOLS", "SEES")]
    for model in models:
        rows.append(
            (
                "*" if model.name == default else "",
                model.name,
                library.short_name(model),
                gigabytes(model.size),
                f"{model.context_length:,}",
                "yes" if "tools" in model.capabilities else "no",
                "yes" if "vision" in model.capabilities else "no",
            )
        )
    print_table(rows, right=(3, 4))
    for error in library.unsupported():
        print(printable(str(error)))


def print_table(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> None:
    """Prints rows in columns, those with the numbers `right` flush right. Cells may hold any
    text."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


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
    """Deletes the model or preset called `args.name`, once who sits at a terminal has said so."""
    library = library_of(args)
    if library.presets.get(args.name):
        _ask(f"remove the name '{args.name}'")
        library.presets.remove(args.name)
        print(f"deleted {printable(args.name)}")
        return
    meant = library.matches(args.name)
    if len(meant) > 1:
        names = ", ".join(model.name for model in meant)
        raise EngineError(f"'{args.name}' may mean several models; say which: {names}")
    model = meant[0] if meant else library.resolve(args.name)
    name = model.name if meant else args.name
    library.deletable(name, model)  # else the question would be in vain
    _ask(f"delete {model.name}, {gigabytes(model.size)}")
    library.delete(name, model)
    print(f"deleted {printable(model.name)}")


def _ask(what: str) -> None:
    """Raises EngineError if who sits at a terminal does not agree."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{printable(what)}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise EngineError("nothing was deleted")


def list_loaded(args: argparse.Namespace) -> None:
    """Prints the models that the running server has in memory."""
    rows = [("NAME", "SIZE", "CONTEXT", "UNTIL")]
    for model in ServerClient.of(args).ask("GET", "/api/ps")["models"]:
        expires = datetime.fromisoformat(model["expires_at"])
        minutes = (expires - datetime.now(UTC)).total_seconds() / 60
        until = "its memory is needed" if minutes > FOREVER else f"in {max(0, minutes):.0f} min"
        name = model["name"].removesuffix(":latest")
        rows.append((name, gigabytes(model["size"]), f"{model['context_length']:,}", until))
    print_table(rows, right=(1, 2))


def unload_model(args: argparse.Namespace) -> None:
    """Makes the running server unload the model called `args.name`."""
    body = {"model": args.name, "keep_alive": 0, "stream": False}
    ServerClient.of(args).ask("POST", "/api/generate", body, patience=None)
    print(f"unloaded {printable(args.name)}")
