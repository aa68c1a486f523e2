"""Texts that make launchd or systemd run the server."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_PATH_FLAGS = ("--api-key-file", "--cache-dir", "--log-file", "--models-dir", "--state")
_SERVICE_FLAGS = ("--print-launchd", "--print-systemd")
# Environment variables that name places
_VARIABLES = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
# Seconds beyond --drain after which the system kills a server that has not ended
_KILL_AFTER = 10


def start_command(argv: Sequence[str]) -> list[str]:
    """The command that starts the server with the flags in `argv` from any folder."""
    command, words = [sys.executable, str(Path(__file__).parents[2] / "mlx_server.py")], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in (*_PATH_FLAGS, "--model", "--alias"):
            command += [flag, _absolute(flag, value if equals else next(words))]
        elif flag not in _SERVICE_FLAGS:
            command.append(word)
    return command


def service_mistake(command: list[str]) -> str | None:
    """Why no service can be made of a command, None if one can. A line break, for one, would add a
    setting to a unit."""
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", "".join([*command, *_environment().values()])):
        return (
            "the flags and paths of a service cannot contain control characters, "
            "or bytes that are no text"
        )
    return None


def _absolute(flag: str, value: str) -> str:
    """A flag's value with an absolute path, if it has a path."""
    pattern, equals, target = value.partition("=") if flag == "--alias" else ("", "", value)
    is_path = (
        flag in _PATH_FLAGS
        or target[:1] in ("/", "~", ".")
        or os.path.exists(os.path.join(target, "config.json"))
    )
    if is_path:
        target = os.path.abspath(os.path.expanduser(target))
    return pattern + equals + target


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def _stop_seconds(args: argparse.Namespace) -> int:
    drain: float = args.drain
    return math.ceil(max(0.0, drain)) + _KILL_AFTER


def launchd_job(args: argparse.Namespace, command: list[str]) -> str:
    """A property list for ~/Library/LaunchAgents, whose job runs from login on and again after a
    failure: `man launchd.plist`.

    The server writes and rotates its own log. What it prints on stderr before or instead of logging
    goes to a file of its own."""
    logs = os.path.expanduser("~/Library/Logs")
    if not args.log_file:
        command = [*command, "--log-file", f"{logs}/mlx-server.log"]
    job = {
        "Label": "local.mlx-server",
        "ProgramArguments": command,
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
    import plistlib  # slow to import for the server itself, with the XML parser that it needs

    given = {key: value for key, value in job.items() if value}
    return plistlib.dumps(given, sort_keys=False).decode()


def systemd_unit(args: argparse.Namespace, command: list[str]) -> str:
    """A unit for ~/.config/systemd/user. Quoting:
    https://www.freedesktop.org/software/systemd/man/latest/systemd.syntax.html, `%` and `$` as
    systemd.unit and systemd.service say."""
    arguments = [_quoted(word).replace("$", "$$") for word in command[1:]]
    start = " ".join([_quoted(command[0]), *arguments])
    environment = "".join(
        f"Environment={_quoted(f'{name}={value}')}\n" for name, value in _environment().items()
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


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'
