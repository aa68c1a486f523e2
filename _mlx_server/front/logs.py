"""How log records are written."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import stat
import sys
from typing import Any

from _mlx_server.wire.fields import timestamp

MAX_MESSAGE = 4000  # characters
MAX_TRACEBACK = 20_000  # characters
MAX_QUOTE = 200  # characters of what a client has sent


def shortened(text: str, most: int = MAX_QUOTE) -> str:
    """A text's first characters, at most so many."""
    return text if len(text) <= most else text[: most - 3] + "..."


def printable(text: str) -> str:
    """A text of others as a terminal or a log may get it: on one line, without control
    sequences."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def log_file(name: str) -> logging.Handler:
    """Writes to a file of at most 10 MB and keeps three old ones. Raises OSError."""
    from logging.handlers import RotatingFileHandler  # slow to import, and few servers use it

    class PrivateFile(RotatingFileHandler):
        """A log file that only its owner may read. A link that somebody else has put in its place
        is not followed."""

        def _open(self) -> io.TextIOWrapper:
            return open(self.baseFilename, "a", encoding=self.encoding, opener=_open_private)

    os.makedirs(os.path.dirname(os.path.abspath(name)), mode=0o700, exist_ok=True)
    return PrivateFile(name, maxBytes=10 * 2**20, backupCount=3, encoding="utf-8")


def _open_private(name: str, flags: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(name)
        if stat.S_ISLNK(found.st_mode) and found.st_uid in (0, os.geteuid()):
            return os.open(name, flags, 0o600)
    return os.open(name, flags | os.O_NOFOLLOW, 0o600)


class Bounded(logging.Formatter):
    """Tracebacks that quote little, and no control sequences."""

    def formatException(self, ei: Any) -> str:
        text = shortened(super().formatException(ei), MAX_TRACEBACK)
        return "\n".join(map(printable, text.split("\n")))


class OneLine(Bounded):
    """A record is one line, whatever names and errors it quotes; only a traceback may follow it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(shortened(super().formatMessage(record), MAX_MESSAGE))


class JSONLine(Bounded):
    """A record is one JSON object: `time` (RFC 3339), `level`, `message`, a request's figures,
    `traceback` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "message": shortened(record.getMessage(), MAX_MESSAGE),
            **getattr(record, "figures", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging(args: argparse.Namespace, serving: bool) -> None:
    """Logs as the flags say; a command that does not serve logs its warnings to stderr. Raises
    OSError when the log file cannot be written."""
    to_file = bool(args.log_file) and serving
    handler = log_file(args.log_file) if to_file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(args, serving, to_file))
    handlers = [handler]
    if to_file:  # whoever starts the program at a terminal learns why it does not start
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setLevel(logging.CRITICAL)
    level = logging.INFO if serving else logging.WARNING
    logging.basicConfig(level=logging.DEBUG if args.verbose else level, handlers=handlers)
    if not args.verbose:
        # Its remarks on model types concern nobody here
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        for name in ("httpx", "httpx2"):  # the latter is what huggingface_hub 2 uses
            logging.getLogger(name).setLevel(logging.WARNING)


def _formatter(args: argparse.Namespace, serving: bool, to_file: bool) -> logging.Formatter:
    if args.log_json:
        return JSONLine()
    if not serving:
        return OneLine("mlx-server: %(message)s")
    rank = os.environ.get("MLX_RANK", "0")
    form = "%(asctime)s " + f"rank {rank}: " * (rank != "0") + "%(message)s"
    return OneLine(form, "%Y-%m-%d %H:%M:%S" if to_file else "%H:%M:%S")
