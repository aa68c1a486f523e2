"""Texts that are looked for in a text of which more may arrive."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable


class Marks:
    """Texts to look for: tags, stop strings, what ends a value.

    `texts` are those that are not empty, `longest` is the length of the longest; `pattern` matches
    each of them, at one place the one that is listed first.
    """

    def __init__(self, marks: Iterable[str]):
        self.texts = tuple(filter(None, marks))
        self.longest = max(map(len, self.texts), default=0)
        self._first_letters = frozenset(text[0] for text in self.texts)
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")

    def partial_length(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a mark."""
        for start in range(max(0, len(text) - self.longest + 1), len(text)):
            if text[start] in self._first_letters:
                rest = text[start:]
                if any(mark.startswith(rest) and mark != rest for mark in self.texts):
                    return len(rest)
        return 0


class Beginnings:
    """Texts that another one may begin with. To look for them costs the same, however many there
    are."""

    def __init__(self, texts: Iterable[str]):
        self._texts = sorted(set(texts))
        self._known = frozenset(self._texts)
        self._lengths = sorted(set(map(len, self._texts)))

    def match(self, text: str) -> bool:
        """Whether a text begins with one of them, or may when more of it has come."""
        at = bisect.bisect_left(self._texts, text)
        if self._texts[at : at + 1] and self._texts[at].startswith(text):
            return True
        return any(text[:length] in self._known for length in self._lengths if length <= len(text))


MAX_BLANKS = 1000  # characters that are searched for what follows


def comes_next(text: str, marks: Iterable[str], last: bool) -> bool | None:
    """Whether, blanks aside, `text` begins with one of `marks`; None while more text may tell. When
    it is the `last` text, the beginning of a mark is enough, and so is nothing at all. What follows
    more than MAX_BLANKS blanks does not count."""
    if len(text) > MAX_BLANKS and text[:MAX_BLANKS].isspace():
        return False
    text = text[: MAX_BLANKS + 200]
    text = "".join(text.lstrip()[:100].split())
    marks = ["".join(mark.split()) for mark in marks if mark]
    if any(text.startswith(mark) for mark in marks):
        return True
    if not text or any(mark.startswith(text) for mark in marks):
        return last or None
    return False
