"""Tells the end of an argument's value from what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from _mlx_server.inference.output.call_syntax import ValueSyntax
from _mlx_server.inference.output.marks import comes_next
from _mlx_server.inference.output.nesting import BEHIND, Nesting, begins_string


@dataclass
class TextBuffer:
    """The text that was not understood yet, whether no more will come, and whether that is because
    the answer was cut."""

    text: str = ""
    ended: bool = False
    cut: bool = False


class ValueEnd:
    """Finds where a value ends. The value may hold calls of its own family: it may be a file that
    shows some, or that reads them.

    What was opened within the value is counted: its end belongs to the value. But a file may well
    hold half a call. So what follows a possible end decides where it can: if the value is over,
    whatever ends there has begun there. Where that is not likely, because something was opened
    within the value or the argument that follows is not expected, FAR characters are waited for;
    else NEAR characters, or less if an argument or a call begins in them. `is_expected` tells
    whether a text begins with an argument that the tool has and the call not yet; None while more
    text may tell.
    """

    NEAR, FAR = 1000, 4000

    def __init__(
        self,
        syntax: ValueSyntax,
        call_tags: tuple[str, str],
        is_expected: Callable[[str], bool | None],
    ):
        self._syntax = syntax
        self._start_tag, self._end_tag = call_tags
        self._is_expected = is_expected
        self._values = self._calls = 0  # opened within the value
        self._behind = ""  # what came last of the value
        self._position = 0  # how long the value is so far
        self._nesting = Nesting(syntax, self._start_tag)
        counted = () if syntax.escapes else (syntax.opener, self._start_tag)
        self.marks = (*syntax.ends, *counted, self._end_tag)

    def pass_text(self, text: str) -> None:
        """Go on behind a text of the value."""
        self._behind = (self._behind + text)[-BEHIND:]
        self._position += len(text)

    def is_at(self, mark: str, rest: str, buffer: TextBuffer) -> bool | None:
        """Whether the value ends at a mark behind which the buffer holds `rest`; None while more
        text may tell."""
        if mark in self._syntax.ends:
            over = self._ends_value(self._position + len(mark), rest, buffer)
            if over is False:
                self._values = max(0, self._values + (1 if self._quote_opens else -1))
        elif mark == self._end_tag:
            over = self._ends_call(self._position + len(mark), rest, buffer)
            if over is False:
                self._calls = max(0, self._calls - 1)
        else:
            over = False
            self._values += mark == self._syntax.opener
            self._calls += mark == self._start_tag
        if over is False:
            self.pass_text(mark)
        return over

    def _ends_value(self, at: int, rest: str, buffer: TextBuffer) -> bool | None:
        syntax = self._syntax
        closing = (*syntax.arguments_end, self._end_tag)
        over = comes_next(rest, (*syntax.next_argument, *closing), buffer.ended)
        if not over or syntax.escapes:
            return over
        inside, strange = self._values + self._quote_opens > 0, False
        if syntax.opener and not inside:
            closes = comes_next(rest, closing, buffer.ended)
            if closes is None:
                return None
            if not closes:
                expected = self._is_expected(rest)
                if expected is not False:
                    return expected
                strange = True
        return self._look_ahead(at, rest, inside, strange, buffer)

    def _ends_call(self, at: int, rest: str, buffer: TextBuffer) -> bool | None:
        """Whether an end tag is the call's, and not a part of the value. Then nothing follows or
        another call."""
        over = comes_next(rest, (self._start_tag,), buffer.ended)
        return self._look_ahead(at, rest, self._calls > 0, False, buffer) if over else over

    def _look_ahead(
        self, at: int, rest: str, inside: bool, strange: bool, buffer: TextBuffer
    ) -> bool | None:
        """Whether `rest`, which stands at a position, goes on behind the value, not within it.
        `inside` is whether something was opened within the value, `strange` whether the next
        argument is not expected."""
        doubtful = inside or strange
        reach = self.FAR if doubtful else self.NEAR
        if doubtful:
            if self._nesting.closes_more(at, rest, reach):
                return False
        elif (closes := self._nesting.first_closes(at, rest, reach)) is not None:
            return not closes
        if len(rest) >= reach:
            return not inside or self._is_expected(rest) is True
        if buffer.ended:
            return not (inside and buffer.cut)
        return None

    @property
    def _quote_opens(self) -> bool:
        """Whether a quote that comes next looks like one that begins a string."""
        return begins_string(self._syntax, self._behind)
