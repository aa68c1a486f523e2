"""How a family of models writes one tool call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallSyntax:
    """How a family writes one call: `head`, the arguments, and what `over` skips behind them.

    `head` matches up to the arguments and captures the tool's name. `key` matches what precedes an
    argument's value and captures its name and, where the markup has it, its type. Without `close`
    the arguments are an object in JSON or much like it, its strings in one of `quotes`, and `outer`
    tells that it stands in an object of its own. With `close` (KEY for the argument's name) values
    are plain text that ends there; with `newlines` one newline behind and one before the value
    belong to its tags. `after` is what follows a value: the object's end and its next argument, or
    the next argument's tag and the tags that end the call. `begins` is how another call may begin
    where no end tag would tell, and `opening` what follows the call tag, both with NAME for the
    tool's name. `written` is how the rest is written where that is to be enforced: for arguments
    that are no JSON object, what precedes and what follows each value and what stands between two
    arguments; then the call's end. `kind` spells a value's JSON type where the markup has it
    (KIND)."""

    head: re.Pattern
    key: re.Pattern
    over: re.Pattern
    after: tuple[str, ...]
    begins: tuple[str, ...] = ()
    opening: str = ""
    written: tuple[str, ...] = ()
    kind: Callable[[str], str] | None = None
    quotes: tuple[str, ...] = ('"',)
    outer: bool = False
    close: str = ""
    newlines: bool = False

    def opens(self, name: str) -> str:
        """What follows the call tag in a call of a tool."""
        return self.opening.replace(
            "NAME", json.dumps(name, ensure_ascii=False)[1:-1] if self.outer else name
        )


# A call counts only when its first argument has begun: more than a name is needed to be sure. No
# name holds a "<", so that none reaches over an end tag.
_JSON_KEY = r'"((?:[^"\\<]|\\.){0,200})"\s*:\s*'
JSON_START = rf"\{{(?=\s*(?:\}}|{_JSON_KEY}))"


def call_syntax(
    head: str,
    over: str,
    after: tuple[str, ...] = ("}", ',"', ",}"),
    key: str = _JSON_KEY + r"(?=\S)",
    **more: Any,
) -> CallSyntax:
    return CallSyntax(
        re.compile(head, re.DOTALL), re.compile(key, re.DOTALL), re.compile(over), after, **more
    )


BARE_KEY = r"([^\s{}\[\]:,<](?:[^{}\[\]:,<]*[^\s{}\[\]:,<])?)\s*:"
