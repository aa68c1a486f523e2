"""JSON from outside: its values are counted before there are any, and many of them hold up nobody.

The interpreter's own parser is written in C and lets no other thread run. A few hundred kilobytes,
packed, spell numbers and keys that take it many seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

# Values of a body, integers in lists apart: those may be the tokens of texts. All else goes through
# more steps that let nobody else run, and takes much more memory than its text
MAX_VALUES = 250_000
FEW = 32_768  # marks of values that are parsed at once, in some 50 ms at most
INTEGERS = 16  # of a list, such as tokens, take no longer than another value
PIECE = 65536  # bytes that are looked at at once
_MARKS = (b"{", b"[", b",")  # each begins or precedes a value
# Possessive, so that a search is linear
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_WHOLE = re.compile(rb'(?:[^"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_INTEGER = re.compile(rb"[\[,]\s*+-?\d{1,10}(?=\s*+[,\]])")


class _SteadyDecoder(json.JSONDecoder):
    """A decoder that lets other threads run between two values. It takes ten times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.scan_once = py_make_scanner(self)


def decoder(marks: int) -> json.JSONDecoder:
    """A decoder for a text with so many marks."""
    return json.JSONDecoder() if marks <= FEW else _SteadyDecoder()


def count_marks(text: bytes) -> int:
    """How many values a text has at most."""
    return sum(map(text.count, _MARKS))


def count_values(text: bytes) -> int:
    """How many values a text without strings has, integers in lists apart."""
    return count_marks(text) - sum(1 for _ in _INTEGER.finditer(text))


def without_strings(raw: bytes) -> Iterator[bytes]:
    """JSON without its strings, in pieces that are not cut within one."""
    at = 0
    while at < len(raw):
        found = _WHOLE.match(raw, at, at + PIECE)
        end = found.end() if found else at
        if end > at:
            yield _STRING.sub(b"", raw[at:end])
        elif found := _STRING.match(raw, at):  # longer than a piece
            end = found.end()
        at = end


class ValueCounter:
    """Counts the values of JSON texts that come in one body as strings."""

    CERTAIN = 32  # marks of a text, up to which they count even if they may be within its strings

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def load(self, text: str) -> Any:
        """The value that a text spells. Raises TooManyValues, ValueError and RecursionError."""
        if not text.lstrip().startswith(("{", "[")):  # one value, or a text that is no JSON
            return json.loads(text)
        raw = text.encode("utf-8", "replace")
        marks = count_marks(raw)
        if marks > self.CERTAIN:
            marks = sum(map(count_marks, without_strings(raw)))
        self._left -= marks
        if self._left < 0:
            raise TooManyValues
        return decoder(marks).decode(text)


class TooManyValues(Exception):
    """JSON texts have more than MAX_VALUES values together."""
