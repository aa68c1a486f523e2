"""Which values and calls begin and end in a text."""

from __future__ import annotations

import functools
import re
from collections import defaultdict, deque

from _mlx_server.inference.output.call_syntax import ValueSyntax

BEHIND = 150  # characters before a quote that tell whether it begins a string


class Nesting:
    """Searches what follows a possible end of a value for what begins and ends values and calls,
    each place once, however many possible ends it follows. Positions count from the value's
    beginning; the ones asked about never go back."""

    def __init__(self, syntax: ValueSyntax, start_tag: str):
        self._syntax = syntax
        texts = [syntax.closer, syntax.opener, "" if syntax.escapes else start_tag]
        self._pattern = _pattern(tuple(texts), syntax.escapes)
        self._unsure = max(map(len, texts)) - 1 or int(syntax.escapes)
        self._searched = 0
        # The places not passed yet, by their ends: how many more values are open behind each
        self._places: deque[tuple[int, int]] = deque()
        self._depth = self._last_depth = 0  # values that are open: at the position, and at the end
        self._closings: defaultdict[int, deque[int]] = defaultdict(deque)  # by the depth behind

    def first_closes(self, position: int, rest: str, reach: int) -> bool | None:
        """Whether what comes first in `reach` characters of `rest`, which stands at a position, is
        the end of a value; None if there is nothing."""
        self._search(position, rest, reach)
        end, opened = self._places[0] if self._places else (position + reach + 1, 0)
        return opened < 0 if end <= position + reach else None

    def closes_more(self, position: int, rest: str, reach: int) -> bool:
        """Whether a value ends in `reach` characters of `rest` that has begun before it."""
        self._search(position, rest, reach)
        closings = self._closings[self._depth - 1]
        while closings and closings[0] <= position:
            closings.popleft()
        return bool(closings) and closings[0] <= position + reach

    def _search(self, position: int, rest: str, reach: int) -> None:
        if position > self._searched:
            self._places.clear()
            self._closings.clear()
            self._searched, self._depth, self._last_depth = position, 0, 0
        while self._places and self._places[0][0] <= position:
            self._depth += self._places.popleft()[1]
        end = min(len(rest), reach)
        for found in self._pattern.finditer(rest, self._searched - position, end):
            self._searched = position + found.end()
            if found[0][0] != "\\" or not self._syntax.escapes:
                self._note(rest, found)
        self._searched = max(self._searched, position + end - self._unsure)

    def _note(self, rest: str, found: re.Match[str]) -> None:
        text, opened = found[0], 0
        if text == self._syntax.opener:
            opened = 1
        elif text == self._syntax.closer:
            opens = begins_string(
                self._syntax, rest[max(0, found.start() - BEHIND) : found.start()]
            )
            opened = 1 if opens else -1
        self._last_depth += opened
        self._places.append((self._searched, opened))
        if opened < 0:
            self._closings[self._last_depth].append(self._searched)


def begins_string(syntax: ValueSyntax, before: str) -> bool:
    """Whether a quote that follows the text `before` looks like one that begins a string."""
    return bool(syntax.before_string) and _before(syntax.before_string).search(before) is not None


@functools.lru_cache(256)
def _pattern(texts: tuple[str, ...], escapes: bool) -> re.Pattern[str]:
    alternatives = [r"\\."] * escapes + [re.escape(text) for text in texts if text]
    return re.compile("|".join(alternatives), re.DOTALL)


@functools.lru_cache(16)
def _before(before_string: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{before_string})\s*+\Z")
