"""`doctor`: what whoever reads a bug report wants to know, on one screen."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from _mlx_server import __version__
from _mlx_server.front.agents import AGENTS
from _mlx_server.front.client import ServerClient
from _mlx_server.front.installed import print_table
from _mlx_server.front.options import library_of
from _mlx_server.front.startup import folder_troubles, is_taken, mlx_trouble, port_holder
from _mlx_server.inference.catalog.library import Library
from _mlx_server.inference.memory import gigabytes, usable_memory
from _mlx_server.inference.protocol import EngineError

MOST = 8  # models, or folders that are none, that are told
PACKAGES = ("mlx", "mlx-lm", "transformers", "huggingface_hub")
EXTRAS = {
    "constrained": "llguidance",
    "documents": "pypdf",
    "vision": "pillow",
    "scans": "pypdfium2",
}


def examine(args: argparse.Namespace) -> int:
    """Prints what was found; returns 1 if models cannot run here."""
    trouble = mlx_trouble()
    library = library_of(args)
    print_table(
        [
            ("mlx-server", f"{__version__}, in {Path(__file__).parents[2]}"),
            ("system", _system()),
            ("python", f"{platform.python_version()}, {sys.executable}"),
            ("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
            ("extras", ", ".join(f"{name}: {_version(EXTRAS[name])}" for name in EXTRAS)),
            ("agents", ", ".join(f"{name}: {shutil.which(name) or 'no'}" for name in AGENTS)),
            ("MLX", trouble or _gpu()),
            ("disk", _disk(library)),
            (f"port {args.port}", _port(args)),
            *(("models", line) for line in _models(library)),
            *(("skipped", line) for line in _skipped(args, library)),
        ]
    )
    return int(trouble is not None)


def _system() -> str:
    name = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{name}, {platform.machine()}, {os.cpu_count()} cores, {gigabytes(memory)} of memory"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "no"


def _gpu() -> str:
    import mlx.core as mx

    usable = f"{gigabytes(usable_memory())} can be used"
    if not mx.metal.is_available():
        return f"no GPU, the CPU computes; {usable}"
    return f"{mx.device_info().get('device_name', 'GPU')}; {usable}"


def _disk(library: Library) -> str:
    """What is free where models are downloaded to."""
    folder = library.hub
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{gigabytes(shutil.disk_usage(there).free)} free for {folder}"


def _port(args: argparse.Namespace) -> str:
    client = ServerClient.of(args)
    if not client.answers():
        taken = is_taken(args.host, args.port)
        return f"in use by {port_holder(args.host, args.port)}" if taken else "free"
    try:
        version = client.ask("GET", "/api/version").get("server", "of an older version")
        loaded = [model["name"] for model in client.ask("GET", "/api/ps")["models"]]
    except EngineError as error:
        return str(error)
    names = ", ".join(name.removesuffix(":latest") for name in loaded) or "no model"
    return f"a server runs, {version}, with {names} in memory"


def _models(library: Library) -> Iterator[str]:
    models = library.models()
    default = library.resolve("default").name if models else ""
    models.sort(key=lambda model: (model.name != default, -model.modified))
    for model in models[:MOST]:
        star = "*" if model.name == default else " "
        yield f"{star} {model.name}, {gigabytes(model.size)}, in {model.path}"
    if len(models) > MOST:
        yield f"  and {len(models) - MOST} more"


def _skipped(args: argparse.Namespace, library: Library) -> Iterator[str]:
    yield from folder_troubles(args.models_dir)
    skipped = library.shortcomings()
    for name, why in skipped[:MOST]:
        yield f"{name} {why}"
    if len(skipped) > MOST:
        yield f"and {len(skipped) - MOST} more"
