"""Checks and settings before the server starts: MLX, the port, open files, memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from _mlx_server.front.client import PROBE, ServerClient
from _mlx_server.front.options import reached
from _mlx_server.inference.catalog.library import expanded
from _mlx_server.inference.memory import usable_memory

_M_ARENA_MAX = -8  # of mallopt(3)
# Seconds after which a thread that runs Python lets another one go on. A first token needs dozens
# of such turns: beside a request with a large body, waiting for them at Python's 5 ms takes longer
# than all of its work. Shorter ones than this cost all threads more than they give.
SWITCH_INTERVAL = 0.001
OPEN_FILES = 4096  # wanted at the same time: a large model alone has hundreds


def mlx_trouble() -> str | None:
    """Why MLX cannot work here, None if it can."""
    system = os.uname()
    if system.sysname == "Darwin" and system.machine != "arm64":
        return (
            f"MLX needs Apple silicon, and {sys.executable} is made for Intel's processors; "
            "on a Mac with an M chip install an arm64 Python, from python.org for one"
        )
    try:
        usable_memory()
        if not importlib.util.find_spec("mlx_lm"):
            raise ImportError("No module named 'mlx_lm'")
    except ImportError as error:
        install = f"{shlex.quote(sys.executable)} -m pip install mlx mlx-lm"
        return f"MLX cannot be imported ({error}); install it: {install}"
    except RuntimeError as error:
        return f"MLX finds no GPU: {error}"
    return None


def is_taken(host: str, port: int) -> bool:
    """Whether a program listens there. macOS lets one server listen at an address and another one
    at all of them, and clients reach only the former: https://stackoverflow.com/a/14388707"""
    address = urlsplit(reached(host, port)).hostname, port
    try:
        socket.create_connection(address, PROBE).close()
    except OSError:
        return False
    return True


def port_holder(host: str, port: int) -> str:
    """Which program listens there, as far as that can be found out."""
    if holder := ServerClient(host, port).holder():
        return holder
    command = ["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=PROBE,
        )
        if found := re.search(r"^p(\d+)\nc(.+)", listed.stdout, re.M):
            return f"{found[2]} (process {found[1]})"
    return "another program"


def port_trouble(host: str, port: int) -> str:
    """What is said of a port that is taken."""
    holder = port_holder(host, port)
    return f"port {port} is already in use by {holder}; take another one: --port {port + 1}"


def folder_troubles(folders: Iterable[str]) -> Iterator[str]:
    """What is wrong with folders that are to hold models, for those in which none is found."""
    return filter(None, map(_folder_trouble, folders))


def _folder_trouble(folder: str) -> str | None:
    """Why no model is found in a folder that is to hold models, None if one may be. It looks as
    deep as models are looked for: DIR, DIR/NAME, DIR/ORG/NAME."""
    path = expanded(folder)
    if not os.path.exists(path):
        return f"{folder} does not exist"
    if not path.is_dir():
        return f"{folder} is a file, not a folder of models"
    below = [path, *path.glob("*/"), *path.glob("*/*/"), *path.glob("*/snapshots/*/")]
    names = [name for one in below for name in _names(one)]
    if any(name == "config.json" for name in names):
        return None
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        return f"{folder} holds GGUF weights ({gguf}), which MLX cannot load; get MLX versions"
    return f"{folder} holds no model" if names else f"{folder} is empty"


def _names(folder: Path) -> list[str]:
    """What is in a folder, as far as it can be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def prepare_process() -> None:
    """Sets what is set for a whole process, before it has threads."""
    # The least that Python allows: the time that a number takes grows with the square of its length
    sys.set_int_max_str_digits(640)
    raise_file_limit()
    share_arena()
    sys.setswitchinterval(SWITCH_INTERVAL)


def share_arena() -> None:
    """Lets all threads share one pool of memory, where the allocator is glibc's. It has a pool for
    nearly every thread, each keeps what the largest request took, and of the others than the first
    `malloc_trim` does not give back what is free at the end, which may be 64 MB. Python lets only
    one thread allocate at a time, apart from what MLX and tokenizers do. Nothing happens elsewhere.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_ARENA_MAX, 1)


def raise_file_limit() -> None:
    """Asks for OPEN_FILES open files, or as many as are allowed. macOS lets a process open 256
    unless it asks for more."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or files >= OPEN_FILES:
        return
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
