"""How log records are written."""

from __future__ import annotations

import argparse
import json
import logging.handlers
import os
import sys

from _mlx_server.wire.fields import timestamp


def log_file(name: str) -> logging.Handler:
    os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
    return logging.handlers.RotatingFileHandler(
        name, maxBytes=10 * 2**20, backupCount=3, encoding="utf-8"
    )


class OneLine(logging.Formatter):
    """A record is one line, whatever names and errors it quotes; only a traceback may follow it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return "".join(
            c if c.isprintable() else repr(c)[1:-1] for c in super().formatMessage(record)
        )


class JSONLine(logging.Formatter):
    """A record is one JSON object: `time` (RFC 3339), `level`, `message`, a request's figures,
    `traceback` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "figures", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging(args: argparse.Namespace) -> None:
    """Raises OSError when the log file cannot be written."""
    rank = os.environ.get("MLX_RANK", "0")
    form = (
        "mlx-server: %(message)s"
        if args.run
        else "%(asctime)s " + f"rank {rank}: " * (rank != "0") + "%(message)s"
    )
    to_file = args.log_file and not args.run
    lines = log_file(args.log_file) if to_file else logging.StreamHandler(sys.stderr)
    lines.setFormatter(
        JSONLine()
        if args.log_json
        else OneLine(form, "%Y-%m-%d %H:%M:%S" if to_file else "%H:%M:%S")
    )
    level = logging.DEBUG if args.verbose else logging.WARNING if args.run else logging.INFO
    last_words = logging.StreamHandler(sys.stderr)  # why it did not start is for who starts it
    last_words.setLevel(logging.CRITICAL)
    logging.basicConfig(level=level, handlers=[lines, last_words] if to_file else [lines])
    if not args.verbose:
        # Its remarks on model types concern nobody here
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("httpx").setLevel(logging.WARNING)
