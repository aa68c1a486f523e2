"""The values of command-line flags, and what follows from them.

The first functions read one flag's text each; they raise ArgumentTypeError, whose message argparse
prints."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from dataclasses import dataclass

from _mlx_server.inference.catalog.library import Library, expanded
from _mlx_server.inference.protocol import Priority
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.ollama_request import parse_keep_alive

MAX_KEYS = 2**20  # characters of a file of keys; a device has no end
MIN_SIZE = 2**20  # bytes; less is a unit that was forgotten


@dataclass(frozen=True)
class ThinkingDefault:
    """Whether a model thinks, and for at most how many tokens, where a request leaves it open."""

    on: bool
    budget: int | None = None


def alias(text: str) -> tuple[str, str]:
    """A glob and the model's name that it stands for."""
    pattern, separator, name = text.partition("=")
    if not (pattern and separator and name):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form PATTERN=NAME")
    return pattern, name


def priority_rule(text: str) -> tuple[str, Priority]:
    """A glob and the priority of the requests it matches."""
    pattern, separator, priority = text.rpartition("=")
    if not (pattern and separator):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form PATTERN=PRIORITY")
    if priority.upper() not in Priority.__members__:
        raise argparse.ArgumentTypeError(f"'{priority}' is not high, normal or low")
    return pattern, Priority[priority.upper()]


def api_key(text: str) -> tuple[str, Priority]:
    """A key and the highest priority it allows."""
    key, separator, priority = text.strip().rpartition("=")
    if not separator or priority.upper() not in Priority.__members__:
        key, priority = text, "normal"
    if not key.strip():  # everyone would have it; in a shell it is a variable that is not set
        raise argparse.ArgumentTypeError("a key cannot be empty")
    return key.strip(), Priority[priority.upper()]


def key_file(name: str) -> list[tuple[str, Priority]]:
    """The keys in a file. Warns on stderr if other users may read it."""
    try:
        with open(name, encoding="utf-8") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(MAX_KEYS + 1)
        if len(text) > MAX_KEYS:
            raise ValueError
        lines = text.split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", "it is no text, or too long a one")
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {reason}") from None
    keys = [api_key(line.strip()) for line in lines if line.strip()]
    if not keys:
        raise argparse.ArgumentTypeError(f"{name} holds no key")
    if mode & 0o044:
        print(
            f"mlx-server: others may read the keys in {name}; "
            f"to stop that: chmod 600 {shlex.quote(name)}",
            file=sys.stderr,
        )
    return keys


def seconds(text: str) -> float:
    """A duration such as 30m or 90."""
    try:
        value = parse_keep_alive(text)
    except WireError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    assert value is not None  # which only None means
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def tokens(text: str) -> int:
    """Tokens, such as 4096 or 128k."""
    match = re.fullmatch(r"(\d+)(k?)", text.strip().lower(), re.A)
    number = int(match[1]) * 1024 ** len(match[2]) if match else 0
    if not number:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number like 4096 or 128k")
    return number


def size(text: str) -> int:
    """Bytes, from a size such as 512MB or 8GB, in powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    number = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")) if match else 0
    if number < MIN_SIZE:
        reason = f"is {number:,} bytes" if match else "is not a size"
        raise argparse.ArgumentTypeError(f"'{text}' {reason}; say a size like 512MB or 8GB")
    return number


def thinking_rule(text: str) -> tuple[str, ThinkingDefault]:
    """A glob and what is the default for the requests it matches."""
    pattern, separator, value = text.rpartition("=")
    if separator and not pattern:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form PATTERN=on|off|N")
    if value in ("on", "off"):
        return pattern or "*", ThinkingDefault(value == "on")
    with contextlib.suppress(argparse.ArgumentTypeError):
        return pattern or "*", ThinkingDefault(True, tokens(value))
    raise argparse.ArgumentTypeError(f"'{value}' is not on, off or a number of tokens")


def url(text: str) -> str:
    """The upstream's URL, without a slash at its end."""
    match = re.fullmatch(r"(http://(?:[\w.-]+|\[[\da-f:]+\])(?::(\d+))?)/?", text, re.I | re.A)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form http://HOST:PORT")
    port(match[2] or "80")
    return match[1]


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port number")
    return int(text)


def presets_file() -> str:
    """https://specifications.freedesktop.org/basedir-spec/latest/"""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(config, "mlx-server", "presets.json")


def user_cache_folder() -> str:
    """Where the prompt cache is kept if no flag says otherwise:
    https://specifications.freedesktop.org/basedir-spec/latest/, and Apple's place on macOS."""
    system = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(system)
    return os.path.join(cache, "mlx-server", "prompts")


def log_folder() -> str:
    """Where logs are kept if no flag says otherwise:
    https://specifications.freedesktop.org/basedir-spec/latest/, and Apple's place on macOS."""
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Logs/mlx-server")
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "mlx-server")


def cache_folder(args: argparse.Namespace) -> str | None:
    """The folder of the prompt cache, None if it is kept in memory only."""
    if args.cache_dir is None and "MLX_RANK" not in os.environ:
        return user_cache_folder()
    return args.cache_dir or None


def program() -> str:
    """The shell command that starts this program from any folder."""
    path = os.path.abspath(sys.argv[0])
    return shlex.join([path] if os.path.basename(path) == "mlx-server" else [sys.executable, path])


def library_of(args: argparse.Namespace) -> Library:
    """The installed models."""
    return Library(args.models_dir, args.alias, expanded(args.state))


def api_keys(args: argparse.Namespace) -> dict[str, Priority]:
    """The keys of the flags, or else that of the environment."""
    if keys := args.api_key + args.api_key_file:
        return dict(keys)
    shell_key = os.environ.get("MLX_SERVER_API_KEY", "").strip()
    return dict([api_key(shell_key)]) if shell_key else {}


def has_blank_key(args: argparse.Namespace) -> bool:
    """Whether the environment has a key that is none, where the flags have no other."""
    flags = args.api_key + args.api_key_file
    return not flags and os.environ.get("MLX_SERVER_API_KEY", "key").strip() == ""


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reached(host: str, port: int) -> str:
    """The URL at which this machine reaches a server that listens there."""
    return url_of({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
