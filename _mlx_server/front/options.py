"""The values of command-line flags, and what follows from them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from _mlx_server.inference.library import Library
from _mlx_server.inference.protocol import Priority
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.ollama import parse_keep_alive


def _pair(text: str) -> tuple[str, str]:
    pattern, separator, name = text.partition("=")
    if not (pattern and separator and name):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form PATTERN=NAME")
    return pattern, name


def _priority(text: str) -> Priority:
    if text.upper() not in Priority.__members__:
        raise argparse.ArgumentTypeError(f"'{text}' is not high, normal or low")
    return Priority[text.upper()]


def _rule(text: str) -> tuple[str, Priority]:
    pattern, separator, priority = text.rpartition("=")
    if not (pattern and separator):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form PATTERN=PRIORITY")
    return pattern, _priority(priority)


def api_key(text: str) -> tuple[str, Priority]:
    if not text.strip():  # everyone would have it
        raise argparse.ArgumentTypeError("a key cannot be empty")
    key, _, priority = text.rpartition("=")
    return (
        (key, _priority(priority))
        if key and priority.upper() in Priority.__members__
        else (text, Priority.NORMAL)
    )


def _key_file(name: str) -> list[tuple[str, Priority]]:
    try:
        with open(name, encoding="utf-8") as file:
            mode, lines = os.fstat(file.fileno()).st_mode, file.read().split("\n")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{name} cannot be read: {getattr(error, 'strerror', 'it is no text')}"
        ) from None
    keys = [api_key(line.strip()) for line in lines if line.strip()]
    if not keys:
        raise argparse.ArgumentTypeError(f"{name} holds no key")
    if mode & 0o044:
        print(
            f"mlx-server: others may read the keys in {name}; to stop that: chmod 600 {shlex.quote(name)}",
            file=sys.stderr,
        )
    return keys


def _seconds(text: str) -> float:
    try:
        return parse_keep_alive(text)
    except WireError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")) if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size like 512MB or 8GB")
    return size


def _url(text: str) -> str:
    match = re.fullmatch(r"(http://(?:[\w.-]+|\[[\da-f:]+\])(?::(\d+))?)/?", text, re.I | re.A)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form http://HOST:PORT")
    _port(match[2] or "80")
    return match[1]


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port number")
    return int(text)


def _state_file() -> str:
    """https://specifications.freedesktop.org/basedir-spec/latest/"""
    return os.path.join(
        os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"),
        "mlx-server",
        "presets.json",
    )


def program() -> str:
    """What starts this program, from any folder."""
    path = os.path.abspath(sys.argv[0])
    return shlex.join([path] if os.path.basename(path) == "mlx-server" else [sys.executable, path])


def _library(args: argparse.Namespace) -> Library:
    return Library(args.models_dir, args.alias, Path(args.state).expanduser())


def api_keys(args: argparse.Namespace) -> dict[str, Priority]:
    shell_key = os.environ.get("MLX_SERVER_API_KEY", "").strip()
    return dict(args.api_key + args.api_key_file or ([api_key(shell_key)] if shell_key else []))


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reached(host: str, port: int) -> str:
    """Where a server that listens there is reached from this machine."""
    return url_of({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
