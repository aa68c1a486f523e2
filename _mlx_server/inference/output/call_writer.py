"""Turns what was read of tool calls into events."""

from __future__ import annotations

import json
import secrets
import string
from typing import Any

from _mlx_server.inference.prompt.control_tokens import unescape
from _mlx_server.inference.protocol import Event, ToolEnd, ToolInput, ToolStart

_LETTERS = string.ascii_letters + string.digits


class CallWriter:
    """Collects the events of tool calls: for each call a ToolStart, ToolInputs whose texts are
    together one JSON object, and a ToolEnd. Texts may be escaped (see control_tokens.py), what
    comes out is not. `calls` is the number of calls that have begun."""

    def __init__(self) -> None:
        self.calls = 0
        self._events: list[Event] = []
        self._json: list[str] = []  # what is written of the present call's arguments

    def take_events(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def begin_call(self, name: str) -> None:
        self.calls += 1
        tool_id = "toolu_" + "".join(secrets.choice(_LETTERS) for _ in range(24))
        self._events.append(ToolStart(tool_id, name))
        self._json = []
        self._write("{")

    def end_call(self) -> None:
        self._write("}")
        self._events.append(ToolEnd(json.loads("".join(self._json))))

    def write_key(self, key: str) -> None:
        comma = ", " if len(self._json) > 1 else ""
        self._write(f"{comma}{json.dumps(key, ensure_ascii=False)}: ")

    def write_quote(self) -> None:
        """Begin or end a string that is written in pieces."""
        self._write('"')

    def write_text(self, text: str) -> None:
        """Write a piece of a string."""
        self._write(json.dumps(text, ensure_ascii=False)[1:-1])

    def write_value(self, value: Any, text: Any) -> None:
        """Write `value` or, if JSON has no such value, its `text`."""
        try:
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
            json.loads(f"[[{written}]]")  # within the arguments it is nested more deeply
        except (TypeError, ValueError, RecursionError):
            written = json.dumps(text, ensure_ascii=False)
        self._write(written)

    def _write(self, text: str) -> None:
        # Half a surrogate pair cannot be sent.
        text = unescape(text.encode("utf-8", "replace").decode())
        if not text:
            return
        self._json.append(text)
        last = self._events[-1] if self._events else None
        if isinstance(last, ToolInput):
            last.json += text
        else:
            self._events.append(ToolInput(text))
