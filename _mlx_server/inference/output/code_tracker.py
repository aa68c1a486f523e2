"""Tells text that is an example from text that is meant."""

from __future__ import annotations


class CodeTracker:
    """Follows visible text, to tell whether what comes next is an example: `quotes` is True inside
    a code block or inline code, and right behind an opening quotation mark."""

    def __init__(self) -> None:
        self._in_block = False
        # Of the current line: how it begins, how it ends, and its backticks
        self._head, self._tail, self._ticks = "", "", 0

    def feed(self, text: str) -> None:
        """Take the next piece of text."""
        *lines, rest = text.split("\n")
        for line in lines:
            self._add(line)
            self._in_block ^= self._is_fence
            self._head, self._tail, self._ticks = "", "", 0
        self._add(rest)

    @property
    def quotes(self) -> bool:
        """Whether a tag that comes next is quoted."""
        in_code = self._in_block or self._is_fence or self._ticks % 2 == 1
        return in_code or self._tail.lstrip() in ('"', "'", '("', "('")

    @property
    def _is_fence(self) -> bool:
        return self._head.lstrip().startswith(("```", "~~~"))

    def _add(self, text: str) -> None:
        self._head = (self._head + text)[:80]
        self._tail = (self._tail + text)[-2:]
        self._ticks += text.count("`")
