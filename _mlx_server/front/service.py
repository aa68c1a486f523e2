"""Texts that make launchd or systemd run the server."""

from __future__ import annotations

import argparse
import math
import os
import plistlib
import sys
from collections.abc import Sequence
from pathlib import Path

_PATHS = ("--api-key-file", "--cache-dir", "--log-file", "--models-dir", "--state")
# Variables that name places
_CARRIED = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")


def start_command(argv: Sequence[str]) -> list[str]:
    """What starts the server with these flags from any folder."""
    command, words = [sys.executable, str(Path(__file__).parents[2] / "mlx_server.py")], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in (*_PATHS, "--model", "--alias"):
            value = value if equals else next(words)
            pattern, equals, target = value.partition("=") if flag == "--alias" else ("", "", value)
            is_path = (
                flag in _PATHS
                or target[:1] in ("/", "~", ".")
                or os.path.exists(os.path.join(target, "config.json"))
            )
            command += [
                flag,
                pattern
                + equals
                + (os.path.abspath(os.path.expanduser(target)) if is_path else target),
            ]
        elif flag not in ("--print-launchd", "--print-systemd"):
            command.append(word)
    return command


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _CARRIED if os.environ.get(name)}


def _stop_seconds(args: argparse.Namespace) -> int:
    return math.ceil(max(0.0, args.drain)) + 10


def launchd_job(args: argparse.Namespace, command: list[str]) -> str:
    """A property list for ~/Library/LaunchAgents, whose job runs from login on and again after a
    failure: `man launchd.plist`.

    The server rotates its log itself. What ends the interpreter is said on stderr, to a file of its
    own."""
    logs = os.path.expanduser("~/Library/Logs")
    job = {
        "Label": "local.mlx-server",
        "ProgramArguments": command
        if args.log_file
        else [*command, "--log-file", f"{logs}/mlx-server.log"],
        "RunAtLoad": True,
        # `Crashed` would not count what the system kills to get memory
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 30,
        "ExitTimeOut": _stop_seconds(args),
        "ProcessType": "Interactive",  # others are slowed down
        "StandardOutPath": f"{logs}/mlx-server.err",
        "StandardErrorPath": f"{logs}/mlx-server.err",
        "EnvironmentVariables": _environment(),
    }
    return plistlib.dumps(
        {key: value for key, value in job.items() if value}, sort_keys=False
    ).decode()


def systemd_unit(args: argparse.Namespace, command: list[str]) -> str:
    """A unit for ~/.config/systemd/user. Quoting:
    https://www.freedesktop.org/software/systemd/man/latest/systemd.syntax.html, `%` and `$` as
    systemd.unit and systemd.service say."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'

    start = " ".join(
        [quoted(command[0]), *(quoted(word).replace("$", "$$") for word in command[1:])]
    )
    environment = "".join(
        f"Environment={quoted(f'{name}={value}')}\n" for name, value in _environment().items()
    )
    return f"""[Unit]
Description=mlx-server

[Service]
ExecStart={start}
{environment}Restart=on-failure
RestartSec=30
TimeoutStopSec={_stop_seconds(args)}

[Install]
WantedBy=default.target
"""
