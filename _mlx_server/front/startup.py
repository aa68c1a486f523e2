"""What is looked at before the server starts."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
from urllib.parse import urlsplit

from _mlx_server.front.http import ASKING
from _mlx_server.front.options import reached
from _mlx_server.inference.memory import usable_memory

FILES = 4096  # to be open at the same time, if that is allowed: a large model alone has hundreds


def mlx_trouble() -> str | None:
    """Why MLX cannot work here."""
    system = os.uname()
    if system.sysname == "Darwin" and system.machine != "arm64":
        return (
            f"MLX needs Apple silicon, and {sys.executable} is made for Intel's processors; on a Mac with an M chip "
            "install an arm64 Python, from python.org for one"
        )
    try:
        usable_memory()
        if not importlib.util.find_spec("mlx_lm"):
            raise ImportError("No module named 'mlx_lm'")
    except ImportError as error:
        return f"MLX cannot be imported ({error}); install it: {shlex.quote(sys.executable)} -m pip install mlx mlx-lm"
    except RuntimeError as error:
        return f"MLX finds no GPU: {error}"
    return None


def is_taken(host: str, port: int) -> bool:
    """Whether someone listens there. macOS lets one server listen at an address and another one at
    all of them, and clients reach only the former: https://stackoverflow.com/a/14388707"""
    try:
        socket.create_connection((urlsplit(reached(host, port)).hostname, port), ASKING).close()
    except OSError:
        return False
    return True


def holder(host: str, port: int) -> str:
    """Who listens at an address, as far as that can be found out."""

    def ask(path: str) -> tuple[int, bytes]:
        netloc = urlsplit(reached(host, port)).netloc
        with contextlib.closing(http.client.HTTPConnection(netloc, timeout=ASKING)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read(100)

    with contextlib.suppress(OSError, http.client.HTTPException):
        if ask("/") == (200, b"Ollama is running"):
            return "Ollama" if ask("/health")[0] == 404 else "another mlx-server"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(
            ["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=ASKING,
        )
        if found := re.search(r"^p(\d+)\nc(.+)", listed.stdout, re.M):
            return f"{found[2]} (process {found[1]})"
    return "another program"


def allow_files() -> None:
    """macOS lets a process open 256 files, unless it asks for more."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FILES:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE,
                (FILES if most == resource.RLIM_INFINITY else min(FILES, most), most),
            )
