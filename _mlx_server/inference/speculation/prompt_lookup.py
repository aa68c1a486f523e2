"""Drafts an answer's next tokens by looking them up in what the model has read and written."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from _mlx_server.inference.speculation.pass_costs import WIDEST


class PromptLookup:
    """A drafter without weights: models copy much of what they have read. Where the last tokens
    stood before, what followed them there is expected to follow again.

    It searches the prompt, what was quoted of it in another spelling (`quotable`), and the answer;
    of several places the one that agrees for longest, of those the last. While a copy holds its
    place is followed without a search. Once it breaks, as at an edit, it is likely to go on nearby,
    so a match of two tokens is enough there.

    `drafted` and `accepted` count tokens."""

    name = "copy"

    KEY = 3  # tokens that must agree anywhere
    NEAR_KEY = 2  # tokens that must agree near the place where a copy broke
    NEAR = 64  # tokens around that place, and after it in the answer
    PLACES = 8  # where the key stands that are compared
    LONGEST = 64  # tokens of agreement that are told apart
    # Tokens of agreement and, from there on, how likely the next token is right. A request's own
    # tokens correct that, as if it were known from WEIGHT of them.
    PRIOR = ((2, 0.4), (3, 0.5), (5, 0.65), (8, 0.75), (16, 0.9), (32, 0.97), (64, 0.98))
    WEIGHT = 4.0
    OVERLAP = 16  # tokens of the text that the tail begins with
    TAIL = 512  # tokens in the tail before it joins the text

    def __init__(self, prompt: Sequence[int], quotable: Sequence[int] = ()):
        """The answer begins behind `prompt`."""
        # A character for each token: there is no faster search.
        self._text = _characters(prompt) + _characters(quotable)
        self._tail, self._base = "", 0  # what is behind the text, and where that begins
        self._join()
        self._recent = _characters(prompt[-self.LONGEST :])  # the last tokens
        self._length = len(prompt)
        self._at = -1  # where the next token is expected to stand, or -1
        self._agreed = 0  # tokens before that place that agree
        self._break = -1  # where a copy broke, or -1
        self._since = 0  # tokens since then
        self._tried = [self.WEIGHT] * len(self.PRIOR)
        self._right = [self.WEIGHT * chance for _, chance in self.PRIOR]
        self.drafted = self.accepted = 0

    def follow(self, tokens: Sequence[int], pending: int | None = None) -> None:
        """Takes note of all tokens that were read so far, the prompt's first, and of the one that
        was picked behind them, if it is known."""
        for token in tokens[self._length :]:
            self._take(chr(token))
        if pending is not None and self._length <= len(tokens):
            self._take(chr(pending))
        self._length = max(self._length, len(tokens) + (pending is not None))

    def chances(self) -> list[float]:
        """Of each token that it can draft now: how likely it is right if all before are."""
        if self._at < 0:
            return []
        rates = [right / tried for right, tried in zip(self._right, self._tried, strict=True)]
        count = len(self._read(self._at, self._at + WIDEST))
        return [rates[self._level(self._agreed + ahead)] for ahead in range(count)]

    def draft(self, row: Any, length: int) -> list[int]:
        """The tokens that may come next."""
        return list(map(ord, self._read(self._at, self._at + length)))

    def _take(self, character: str) -> None:
        self._score(character)
        self._recent = self._recent[1 - self.LONGEST :] + character
        self._tail += character
        if len(self._tail) > self.TAIL:
            self._join()
        if self._at < 0:
            self._search()

    def _join(self) -> None:
        """Makes the tail part of the text; a new one begins with the text's last tokens. Adding
        each token to the text would copy all of it."""
        self._text += self._tail[len(self._text) - self._base :]
        self._tail = self._text[-self.OVERLAP :]
        self._base = len(self._text) - len(self._tail)

    def _score(self, character: str) -> None:
        """Compares a token with what was expected."""
        self._since += 1
        if self._at < 0:
            return
        level, right = self._level(self._agreed), self._read(self._at, self._at + 1) == character
        self._tried[level] += 1
        self._right[level] += right
        if right:
            self._at, self._agreed = self._at + 1, self._agreed + 1
            return
        if self._agreed >= self.KEY:
            self._break, self._since = self._at, 0
        self._at = -1

    def _search(self) -> None:
        """Looks for the place where the last tokens stood before."""
        places = self._near_places() + self._places()
        if places:
            agreed, self._at = max((self._agreement(at), at) for at in places)
            self._agreed = agreed

    def _near_places(self) -> list[int]:
        """Where the last tokens stand near a place where a copy broke."""
        if self._break < 0 or self._since > self.NEAR:
            return []
        key = self._recent[-self.NEAR_KEY :]
        start = max(0, self._break - self.NEAR)
        before = self._read(start, self._break)
        behind = self._read(self._break, self._break + self.NEAR)
        found = [(start, before.rfind(key)), (self._break, behind.find(key))]
        places = [base + at + len(key) for base, at in found if at >= 0]
        return [at for at in places if self._read(at, at + 1)]

    def _places(self) -> list[int]:
        """Where the last tokens stand anywhere, the last places."""
        key = self._recent[-self.KEY :]
        places: list[int] = []
        end = len(self._tail) - 1
        while len(places) < self.PLACES and (end := self._tail.rfind(key, 0, end)) >= 0:
            places.append(self._base + end + len(key))
            end += len(key) - 1
        end = len(self._text)
        while len(places) < self.PLACES and (end := self._text.rfind(key, 0, end)) >= 0:
            places.append(end + len(key))
            end += len(key) - 1
        return places

    def _agreement(self, at: int) -> int:
        """How many of the last tokens stand before a place."""
        before = self._read(max(0, at - self.LONGEST), at)
        agreed = 0
        for one, other in zip(reversed(before), reversed(self._recent), strict=False):
            if one != other:
                break
            agreed += 1
        return agreed

    def _read(self, start: int, end: int) -> str:
        """A part of the text and of the tail behind it."""
        if start >= self._base:
            return self._tail[start - self._base : end - self._base]
        overlap = len(self._text) - self._base
        return self._text[start:end] + self._tail[overlap : max(overlap, end - self._base)]

    def _level(self, agreed: int) -> int:
        """The index in PRIOR of so many tokens' agreement."""
        return max(0, bisect.bisect_right(_LEASTS, agreed) - 1)


_LEASTS = [least for least, _ in PromptLookup.PRIOR]


def _characters(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))
