"""Reads the text behind a call tag, piece by piece, into the events of tool calls."""

from __future__ import annotations

import ast
import collections
import functools
import json
import re
import secrets
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from _mlx_server.inference.call_syntax import BARE_KEY, CallSyntax
from _mlx_server.inference.formats import OutputFormat
from _mlx_server.inference.json_calls import CutShort, parse_json_calls, read_json
from _mlx_server.inference.protocol import Event, ToolEnd, ToolInput, ToolStart
from _mlx_server.inference.schema import coerce, declared_types


def _tool_id() -> str:
    return "toolu_" + "".join(
        secrets.choice(string.ascii_letters + string.digits) for _ in range(24)
    )


def held_back(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    return max(
        (
            n
            for mark in marks
            for n in range(1, min(len(mark) - 1, len(text)) + 1)
            if text.endswith(mark[:n])
        ),
        default=0,
    )


_ESCAPE = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\."
_HALF_ESCAPE = (
    r"\\(?:u[0-9a-fA-F]{0,3}|u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?)?\Z"
)
_BRACKETS = {"{": "}", "[": "]", "(": ")"}


def _unescape(text: str) -> str:
    """What stands in a quoted string; a backslash that begins no escape is one."""

    def spelled(escape: re.Match) -> str:
        try:
            return json.loads(f'"{escape[0]}"')
        except ValueError:
            return "'" if escape[0] == "\\'" else escape[0]

    return re.sub(_ESCAPE, spelled, text, flags=re.DOTALL)


def _spell(text: str, missing: str, quote: str) -> Any:
    """The value that `text` spells, if need be with the closing brackets it is `missing`; else
    `text` itself."""
    for source in (text.strip(), text.strip() + missing):
        if quote != '"':  # then keys stand without any
            token = re.compile(
                rf"{re.escape(quote)}(.*?){re.escape(quote)}|(?<=[{{,])\s*{BARE_KEY}", re.DOTALL
            )
            source = token.sub(
                lambda found: json.dumps(found[2] or found[1]) + ":" * bool(found[2]), source
            )
        for read in (lambda: read_json(source), lambda: (ast.literal_eval(source), "")):
            try:
                value, rest = read()
                if not rest.strip():
                    return value
            except Exception:  # literal_eval fails with almost any type of exception
                pass
    return text


def _comes_next(text: str, marks: Iterable[str], last: bool) -> bool | None:
    """Whether, blanks aside, one of `marks` or the end comes next; None while that is open."""
    text = "".join(text.lstrip()[:100].split())
    marks = ["".join(mark.split()) for mark in marks if mark]
    if any(text.startswith(mark) for mark in marks):
        return True
    return (last or None) if not text or any(mark.startswith(text) for mark in marks) else False


@functools.lru_cache(256)
def _stretch(marks: tuple[str, ...], escapes: bool) -> re.Pattern:
    """Matches text up to a mark, half an escape or its end."""
    ends = "|".join([re.escape(mark) for mark in marks] + [_HALF_ESCAPE] * escapes + [r"\Z"])
    return re.compile(
        rf"((?:[^\\]|{_ESCAPE})*?)({ends})" if escapes else f"(.*?)({ends})", re.DOTALL
    )


class CallReader:
    """Reads the text behind a call tag, in pieces of any size, into the events of one or several
    calls.

    Arguments leave as soon as they are certain: text of a string as it comes, other values, and
    strings that the tool's schema may turn into something else, when they are complete. Together
    they are exactly one JSON object. A call that is cut off (by `max_tokens`, say) or malformed in
    the middle ends there: its object holds all that has arrived, the last value as far as it goes,
    and `cut` is set. A value that is no JSON becomes the string of its text.

    `text` is what was not understood yet; when the calls are over it is what follows them.
    """

    LIMIT = 1000  # characters within which an argument must have begun

    def __init__(
        self,
        format: OutputFormat,
        call: tuple[str, str],
        tools: Sequence[dict],
        parallel: bool = True,
    ):
        self.text, self.cut, self.calls = "", False, 0
        self._format, self._parallel = format, parallel
        self._start, self._end = call
        self._tools = declared_types(tools)
        self._names = {name.lower(): name for name in self._tools} | {
            name: name for name in self._tools
        }
        self._begins = {
            begin.replace("NAME", name)
            for shape in format.shapes
            for begin in shape.begins
            for name in self._tools
        }
        self._last = False
        self._events: list[Event] = []
        self._written: list[str] = []  # of the open call's arguments
        self._steps = self._read_block()

    def read(self, text: str, last: bool) -> tuple[list[Event], bool]:
        """Takes the next piece of text; returns what has become certain and whether the calls are
        over. Raises ValueError, with everything in `text`, when it is no call."""
        self.text, self._last, self._events = self.text + text, last, []
        over = next(self._steps, True)
        return self._events, over or last

    # -- the grammar: each generator reads one part of it and yields when it needs more text

    def _read_block(self) -> Iterator[bool]:
        """Calls up to the end tag or, where there is none, to what can be no call."""
        shape, searched = None, 0
        while True:
            if shape:
                self.text = self.text[shape.over.match(self.text).end() :]
                if not self._end and not self._may_begin():
                    return
            if head := self._take_head():
                shape, searched = head[0], 0
                yield from self._read_call(*head)
                if (
                    not self._parallel
                    or self.cut
                    and not (self._end and self.text.startswith(self._end))
                ):
                    return
                continue
            end = self.text.find(self._end, searched) if self._end else -1
            if end >= 0 or self._last:
                if self._read_rest(end, searched):
                    return
                searched = end + len(self._end)
            else:
                searched = max(searched, len(self.text) - len(self._end) + 1)
                yield False

    def _take_head(self) -> tuple[CallSyntax, str] | None:
        """The beginning of a call to a declared tool; the end tag of the call before it may be
        missing."""
        text = self.text.removeprefix(self._start) if self.calls and self._end else self.text
        for shape in self._format.shapes:
            head = shape.head.match(text)
            name = head[1].strip() if head else ""
            if name := self._names.get(name) or self._names.get(name.lower()):
                self.text = text[head.end() :]
                return shape, name
        return None

    def _may_begin(self) -> bool:
        """Whether what follows a call can be the beginning of another."""
        return not self.text or any(
            begin.startswith(self.text) or self.text.startswith(begin) for begin in self._begins
        )

    def _read_rest(self, end: int, searched: int) -> bool:
        """The block is over, at an end tag or (`end` below 0) with the turn: what is left may be
        calls in a form that is not read bit by bit. False when that tag is part of a value."""
        text, behind = (
            (self.text[:end], end + len(self._end)) if end >= 0 else (self.text, len(self.text))
        )
        try:
            if searched and re.search(re.escape(self._end) + r"\s*" + re.escape(self._start), text):
                raise ValueError(
                    "the end tag that was skipped did end a call: the next one begins behind it"
                )
            if end < 0 and self._end and self._format.parse is not parse_json_calls:
                raise ValueError("cut off")
            self._emit(text)
        except ValueError as error:
            if not self.calls and end >= 0 and isinstance(error, CutShort):
                return False
            if not self.calls:
                raise
            if (
                "{" in text
                or "<" in text
                or end < 0
                and not _comes_next(text, [self._end], last=True)
            ):
                return True
        self.text = self.text[behind:]
        return True

    def _emit(self, text: str) -> None:
        """Emit the calls in `text`. Raises ValueError, having emitted nothing, unless all of them
        are right."""
        calls = []
        try:
            for name, arguments in self._format.parse(text, self._described()):
                if isinstance(arguments, str) and arguments.strip():
                    arguments = read_json(arguments.strip())[0]
                arguments = dict((arguments or {}).items())
                # Half a surrogate pair cannot be sent
                json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
                calls.append(
                    (self._names[name if name in self._names else name.lower()], arguments)
                )
        except CutShort:
            raise
        except Exception as error:  # mlx-lm's parsers fail with almost any type of exception
            raise ValueError("not a call") from error
        if not calls:
            raise ValueError("no call")
        for name, arguments in calls if self._parallel else calls[:1]:
            self._open(name)
            for key, value in arguments.items():
                self._write_key(key)
                self._write_value(coerce(value, self._tools[name][key]), value)
            self._close()

    def _described(self) -> list[dict]:
        return [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "parameters": {
                        "type": "object",
                        "properties": {
                            key: {"type": kind}
                            for key, kinds in types.items()
                            for kind in kinds
                            if len(kinds) == 1
                        },
                    },
                },
            }
            for name, types in self._tools.items()
        ]

    def _read_call(self, shape: CallSyntax, name: str) -> Iterator[bool]:
        """One call from its arguments to the end of the object they stand in, if that ends."""
        self._open(name)
        complete = yield from (self._read_tags if shape.close else self._read_object)(
            shape, self._tools[name]
        )
        self._close()
        self.cut = self.cut or not complete
        if complete and shape.outer:
            end, missing = yield from self._scan(shape, ["}"])
            self.text = self.text if missing else self.text[end:]

    def _read_object(
        self, shape: CallSyntax, types: collections.defaultdict[str, set[str]]
    ) -> Iterator[bool]:
        """The arguments up to the closing brace; returns whether that came."""
        brace = shape.after[0]
        while True:
            self.text = self.text.lstrip(" \t\r\n,")
            if self.text.startswith(brace):
                self.text = self.text[len(brace) :]
                return True
            argument = shape.key.match(self.text)
            if argument is None:
                if self._gives_up(('"',)):
                    return False
                yield False
                continue
            key, self.text = _unescape(argument[1]), self.text[argument.end() :]
            self._write_key(key)
            if quote := next((quote for quote in shape.quotes if self.text.startswith(quote)), ""):
                self.text = self.text[len(quote) :]
                yield from self._read_text(
                    (quote,), shape.after, types[key], escapes=len(quote) == 1
                )
            else:
                end, missing = yield from self._scan(shape, [])
                text, self.text = self.text[:end].strip(), self.text[end:]
                self._write_value(_spell(text, missing, shape.quotes[0]), text)

    def _read_tags(
        self, shape: CallSyntax, types: collections.defaultdict[str, set[str]]
    ) -> Iterator[bool]:
        """The arguments up to what ends the call, which is left; returns whether that came."""
        while True:
            argument = shape.key.match(self.text)
            if argument is None:
                if _comes_next(self.text, (*shape.after[1:], self._end), last=False):
                    return True
                if self._gives_up(shape.after):
                    return False
                yield False
                continue
            key, self.text = argument[1].strip(), self.text[argument.end() :]
            self._write_key(key)
            close = shape.close.replace("KEY", key)
            closes = (f"\n{close}", close) if shape.newlines else (close,)
            typed = argument.re.groups > 1 and argument[2] not in (None, "true", "string")
            yield from self._read_text(closes, shape.after, types[key], typed=typed)

    def _gives_up(self, begins: tuple[str, ...]) -> bool:
        """Whether what should be the next argument never will be: what is left is text, but a mere
        beginning is nothing."""
        if self._last and _comes_next(self.text, begins, last=True):
            self.text = ""
        return (
            self._last or len(self.text) > self.LIMIT or bool(self._end) and self._end in self.text
        )

    def _read_text(
        self,
        closes: tuple[str, ...],
        after: tuple[str, ...],
        types: set[str],
        *,
        escapes: bool = False,
        typed: bool = False,
    ) -> Iterator[bool]:
        """A value of text. What closes it counts only where the markup can go on; elsewhere it is
        part of the value. An end tag within the value counts when nothing or another call
        follows."""
        parts: list[str] = []
        streams = not typed and (not types or "string" in types)
        say = self._write_text if streams else parts.append
        self._write('"' * streams)
        marks = (*closes, self._end) if self._end else closes
        stretch, going_on = _stretch(marks, escapes), (*after, self._end)
        while True:
            text, mark = stretch.match(self.text).groups()
            if not mark and not self._last:
                text = text[: len(text) - held_back(text, marks)]
            say(_unescape(text) if escapes else text)
            self.text = self.text[len(text) :]
            behind = self.text[len(mark) :]
            if mark in marks:
                over = _comes_next(
                    behind, going_on if mark in closes else (self._start,), self._last
                )
                if over:
                    self.text = behind if mark in closes else self.text
                    break
                if over is False:
                    say(mark)
                    self.text = behind
                    continue
            elif self._last:  # perhaps half an escape is left
                self.text = ""
                break
            yield False
        self._write('"' * streams)
        if not streams:
            text = "".join(parts)
            self._write_value(_spell(text, "", '"') if typed else coerce(text, types), text)

    def _scan(self, shape: CallSyntax, closers: list[str]) -> Iterator[bool]:
        """Where a value ends that is not just text, or the object of which `closers` is the closing
        bracket, and which brackets are missing there because of an end tag or the end."""
        outside = re.compile(
            "|".join(re.escape(mark) for mark in (*shape.quotes, *"{}[](),", self._end) if mark)
        )
        at = 0
        while True:
            inside = bool(closers) and closers[-1] in shape.quotes
            found = (
                re.compile(rf"\\.|{re.escape(closers[-1])}", re.DOTALL) if inside else outside
            ).search(self.text, at)
            if found is None:
                if self._last:
                    return len(self.text), "".join(reversed(closers))
                at = max(
                    at, len(self.text) - max(1, held_back(self.text, (*shape.quotes, self._end)))
                )
                yield False
                continue
            mark = found[0]
            if not inside and (mark == self._end or not closers and mark in "}]),"):
                return found.start(), "".join(reversed(closers))
            at = found.end()
            if not inside and mark in _BRACKETS:
                closers.append(_BRACKETS[mark])
            elif not inside and mark in shape.quotes:
                closers.append(mark)
            elif mark != "," and not mark.startswith("\\"):
                closers.pop()
                if not closers:
                    return at, ""

    # -- the events

    def _open(self, name: str) -> None:
        self.calls += 1
        self._events.append(ToolStart(_tool_id(), name))
        self._written = []
        self._write("{")

    def _close(self) -> None:
        self._write("}")
        self._events.append(ToolEnd(json.loads("".join(self._written))))

    def _write_key(self, key: str) -> None:
        self._write(
            (", " if len(self._written) > 1 else "") + json.dumps(key, ensure_ascii=False) + ": "
        )

    def _write_text(self, text: str) -> None:
        self._write(json.dumps(text, ensure_ascii=False)[1:-1])

    def _write_value(self, value: Any, text: Any) -> None:
        """Write `value` or, if JSON has no such value, its `text`."""
        try:
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
            json.loads(f"[[{written}]]")
        except (TypeError, ValueError, RecursionError):
            written = json.dumps(text, ensure_ascii=False)
        self._write(written)

    def _write(self, text: str) -> None:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
        self._written.append(text)
        if text and self._events and isinstance(self._events[-1], ToolInput):
            self._events[-1].json += text
        elif text:
            self._events.append(ToolInput(text))
