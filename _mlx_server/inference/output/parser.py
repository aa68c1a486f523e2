"""Turns the decoded text of one answer into events.

    decoded text -> tags -> thinking ------------------------> Thinking
                        |-> text: StopMatcher ---------------> Text
                        `-> calls: CallReader, ArgumentReader -> ToolStart, ToolInput, ToolEnd

Every decision waits until no further text can change it, so events do not depend on how the text
was cut into pieces. Until a call's name and the form of its arguments are certain, a failure turns
only its opening tag into text: what follows the tag is read again. From then on it is a call, and
all that follows is made into arguments.

Where the vocabulary has a control token for a tag, only that token counts: spelled by other tokens,
in prose or in a file, the same characters are text. A tag that is ordinary text to its model opens
no call where it is quoted or stands in a code block.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection, Sequence
from enum import Enum, auto
from typing import Any, Literal

from _mlx_server.inference.constrained.schema import ToolTypes
from _mlx_server.inference.output.call_reader import CallReader
from _mlx_server.inference.output.code_tracker import CodeTracker
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.output.marks import Beginnings, Marks
from _mlx_server.inference.output.stops import StopMatcher
from _mlx_server.inference.prompt.control_tokens import alternatives, escape_at, unescape
from _mlx_server.inference.protocol import Event, Text, Thinking, ToolEnd, ToolInput, ToolStart

log = logging.getLogger("mlx_server")

State = Literal["text", "thinking", "call"]


class Tag(Enum):
    """What a tag means where it is found."""

    THINKING = auto()  # thinking begins
    TEXT = auto()  # text begins
    CALL = auto()  # a call begins
    LINE_CALL = auto()  # a call begins, if this is the beginning of a line
    CLOSING = auto()  # an end tag: markup right behind a call, elsewhere text
    MARKER = auto()  # markup within text
    TURN_END = auto()  # nothing follows


def _text_tags(format: OutputFormat, calls: bool) -> dict[str, Tag]:
    """The tags to look for in text; `calls` tells whether there are tools to call. Of tags that
    begin alike the first one counts."""
    tags: dict[str, Tag] = {}
    if format.thinking:
        tags |= {format.thinking[0]: Tag.THINKING, format.thinking[1]: Tag.CLOSING}
    tags |= dict.fromkeys(format.structural_markers, Tag.MARKER)
    tags |= dict.fromkeys(format.turn_ends, Tag.TURN_END)
    if format.call and calls:
        start, end = format.call
        if end:
            tags[end] = Tag.CLOSING
        tags |= dict.fromkeys(format.line_starts, Tag.LINE_CALL)
        tags[start] = Tag.CALL
    return tags


def _thinking_tags(format: OutputFormat, calls: bool) -> dict[str, Tag]:
    """The tags to look for in thinking. One newline before a tag belongs to it."""
    tags = dict.fromkeys(format.structural_markers, Tag.TEXT)
    tags |= dict.fromkeys(format.turn_ends, Tag.TURN_END)
    if format.thinking:
        end = format.thinking[1]
        tags |= {end: Tag.TEXT, f"\n{end}": Tag.TEXT}
    if format.call and calls:
        start = format.call[0]
        tags |= {start: Tag.CALL, f"\n{start}": Tag.CALL}
    return tags


class OutputParser:
    """Turns the decoded text of one answer, in pieces of any size, into events.

    Feed it until `finished` or until the turn ends, then call `finish`. `state` tells what the text
    last fed belongs to; `called` whether a tool call came out, and `call_ids` the ids of all.
    `finished` is set by a stop string, by a tag after which nothing follows and, without
    `parallel`, by the first call; nothing comes out afterwards. `tools` are in OpenAI form; without
    any, call markup is plain text. `control_tokens` are the texts of the vocabulary's control
    tokens: tags that hold one count only in what was fed as `markup`.
    """

    def __init__(
        self,
        format: OutputFormat,
        tools: Sequence[dict[str, Any]] = (),
        stop: Sequence[str] = (),
        *,
        in_thinking: bool = False,
        parallel: bool = True,
        control_tokens: Collection[str] = (),
    ):
        self.state: State = "text"
        if in_thinking and format.thinking:
            self.state = "thinking"
        self.called = self.finished = False
        self.call_ids: list[str] = []
        self._format, self._parallel, self._tools = format, parallel, tools
        self._stops = StopMatcher(stop)
        self._events: list[Event] = []
        self._buffer = ""  # text that is not understood yet
        self._cut = False

        self._tags = {
            "text": _text_tags(format, bool(tools)),
            "thinking": _thinking_tags(format, bool(tools)),
        }
        self._marks = {state: Marks(tags) for state, tags in self._tags.items()}
        tags = [tag for tags in self._tags.values() for tag in tags]
        tags += [tag for syntax in format.syntaxes if tools for tag in syntax.markup]
        controls = [token for token in control_tokens if any(token in tag for tag in tags)]
        self._control, self._controls = re.compile(alternatives(controls)), Marks(controls)
        self._fed = 0  # characters
        self._markup: set[int] = set()  # where in these control tokens begin
        self._code = CodeTracker()
        self._line_start = True
        # Blanks at the beginning of text or thinking wait for what follows; None when that came.
        self._blanks: str | None = "" if format.thinking or tools else None
        self._drop_blanks = self.state == "thinking"

        self._reader: CallReader | None = None  # of the call that is being read
        self._call_tag = ""
        self._state_before_call: State = "text"
        # Whether nothing was written yet that rules out a call without a call tag.
        self._may_be_bare = bool(tools)
        self._bare_length = 0  # how much of the buffer was read as such a call
        self._bare_events: list[Event] = []  # and what came of it
        self._bare_heads = Beginnings(
            head.replace("NAME", tool["function"]["name"].lower())
            for tool in tools
            for syntax in format.bare_syntaxes
            for head in syntax.bare_heads
        )

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.stop_sequence

    def feed(self, text: str, markup: bool = False) -> list[Event]:
        """Take the next piece of decoded text; returns what has become certain. `markup` tells that
        it was written with control tokens."""
        if markup:
            found = self._control.finditer(text)
            self._markup.update(self._fed + control.start() for control in found)
        self._fed += len(text)
        return self._read(text, last=False)

    def finish(self, cut: bool = False) -> list[Event]:
        """The turn has ended, or was `cut` (by `max_tokens`, say): returns what was held back. A
        call that is not complete is completed as far as possible, but not if it was cut: half a
        command must not be run."""
        reader, self._cut = self._reader, cut
        events = self._read("", last=True)
        if cut and reader and reader.cut and events and isinstance(events[-1], ToolEnd):
            # The last piece of its arguments is the one that completes them.
            closing = 2 if isinstance(events[-2:][0], ToolInput) else 1
            events[-closing:] = [ToolEnd({}, cut=True)]
        return events

    def verbatim(self) -> None:
        """From here on there is no markup: all that follows is text, whatever it looks like."""
        self._tags["text"], self._marks["text"] = {}, Marks(())
        self._may_be_bare = False

    def _read(self, text: str, last: bool) -> list[Event]:
        self._events = []
        self._buffer += text
        while not self.finished and self._step(last):
            pass
        if last and not self.finished:
            if self._blanks and not self._drop_blanks:
                self._match_stops(self._blanks)
            self._emit(Text, self._stops.flush())
            self._blanks = None
        return self._events

    def _step(self, last: bool) -> bool:
        """Take what is certain from the buffer, up to the next tag; returns whether another step
        may follow."""
        if self.state == "text":
            return self._read_text(last)
        if self.state == "thinking":
            return self._read_thinking(last)
        return self._read_call(last)

    def _read_text(self, last: bool) -> bool:
        if self._may_be_bare and self._buffer.strip() and self._read_bare_calls(last):
            return self._reader is None
        found = self._read_to_tag(self._write_text, last)
        if found is None or self.finished:
            return False
        tag = self._tags["text"][found]
        if tag is Tag.THINKING:
            self._begin("thinking")
        elif tag is Tag.TURN_END:
            self._end_turn()
        elif self._opens_call(found, tag):
            self._begin_call(found)
        elif tag is Tag.MARKER:
            self._line_start = True
        elif tag is not Tag.CLOSING or not (self.called and self._blanks is not None):
            self._write_text(found)
        return True

    def _opens_call(self, text: str, tag: Tag) -> bool:
        """Whether a tag in text, behind what was written already, opens a call."""
        if tag is Tag.LINE_CALL and not self._line_start:
            return False
        is_example = self._code.quotes and not self._control.search(text)
        return tag in (Tag.CALL, Tag.LINE_CALL) and not is_example

    def _read_thinking(self, last: bool) -> bool:
        found = self._read_to_tag(self._write_thinking, last)
        if found is None:
            return False
        tag = self._tags["thinking"][found]
        if tag is Tag.CALL:
            self._begin_call(found)
        elif tag is Tag.TURN_END:
            self._end_turn()
        else:
            self._begin("text")
        return True

    def _read_to_tag(self, write: Callable[[str], None], last: bool) -> str | None:
        """Write all text that is certainly no tag; take and return the first tag, if there is
        one."""
        marks, buffer = self._marks[self.state], self._buffer
        if found := self._search_tag(marks.pattern, buffer):
            self._buffer = buffer[found.end() :]
            write(buffer[: found.start()])
            return found[0]
        certain = len(buffer) - (0 if last else marks.partial_length(buffer))
        self._buffer = buffer[certain:]
        write(buffer[:certain])
        return None

    def _search_tag(self, tags: re.Pattern[str], buffer: str) -> re.Match[str] | None:
        """The first tag in the buffer, apart from those that only look like one."""
        start = self._fed - len(buffer)
        found = tags.search(buffer)
        while found and (control := self._control.search(found[0])):
            if start + found.start() + control.start() in self._markup:
                break
            found = tags.search(buffer, found.start() + 1)
        return found

    # -- calls

    @functools.cached_property
    def _types(self) -> ToolTypes:
        return ToolTypes(self._tools)

    def _begin_call(self, tag: str) -> None:
        assert self._format.call is not None
        call_tags = self._format.call
        if tag in self._format.line_starts:
            call_tags, self._buffer = (call_tags[0], ""), tag + self._buffer
        self._call_tag, self._state_before_call, self.state = tag, self.state, "call"
        self._reader = CallReader(self._format, call_tags, self._types, self._parallel)

    def _read_call(self, last: bool) -> bool:
        assert self._reader is not None
        try:
            events, over = self._reader.read(self._take_escaped(last), last, self._cut)
        except ValueError:
            self._call_failed(unescape(self._reader.rest))
            return True
        self._emit_calls(events, over)
        return over

    def _take_escaped(self, last: bool) -> str:
        """Take from the buffer what is certainly a control token or none; those that are only
        spelled like one are escaped, so that they are no markup within a call."""
        buffer, first = self._buffer, self._fed - len(self._buffer)
        held = 0 if last else self._controls.partial_length(buffer)
        text, self._buffer = buffer[: len(buffer) - held], buffer[len(buffer) - held :]
        spelled, found = [], self._control.search(text)
        while found:
            is_markup = first + found.start() in self._markup
            if not is_markup:
                spelled.append(found.start())
            found = self._control.search(text, found.end() if is_markup else found.start() + 1)
        return escape_at(text, spelled)

    def _call_failed(self, rest: str) -> None:
        """It was no call: its opening tag is text, and what follows it is read again."""
        self._log_undeclared(rest)
        tag, self.state = self._call_tag, self._state_before_call
        if self._tags["text"].get(tag) is Tag.LINE_CALL:
            rest = rest[len(tag) :]
        self._buffer = rest + self._buffer
        if self.state == "text":
            self._write_text(tag)
        else:
            self._write_thinking(tag)

    def _log_undeclared(self, text: str) -> None:
        """Logs the tool's name if a text is the beginning of a call to one that is not declared."""
        heads = (syntax.head.match(text) for syntax in self._format.syntaxes)
        name = next((head[1].strip() for head in heads if head), "")
        if name and name not in self._types:
            log.warning("the model has called %.80r, which is not among its tools", name)

    def _read_bare_calls(self, last: bool) -> bool:
        """Whether the text so far may be nothing but calls without call tags. Their events leave
        when the text has ended, or at once if this model writes such calls."""
        head = "".join(self._buffer.lstrip()[:256].split()).lower()
        if not self._bare_heads.match(head):
            return False
        if self._reader is None:
            format = OutputFormat(syntaxes=self._format.bare_syntaxes)
            self._reader = CallReader(format, ("", ""), self._types, self._parallel)
            self._call_tag, self._bare_length, self._bare_events = "", 0, []
        reader = self._reader
        try:
            events, over = reader.read(self._buffer[self._bare_length :], last, self._cut)
        except ValueError:
            self._reader = None
            return False
        self._bare_length = len(self._buffer)
        self._bare_events += events
        rest = reader.rest.strip("`,;}] \n\t\r")
        whole = last and not rest and not reader.cut
        if self._bare_events and (self._format.untagged or whole):
            self.state, self._buffer, self._state_before_call = "call", "", "text"
            self._emit_calls(self._bare_events, over)
        elif over and (rest or last):
            self._reader = None
            return False
        return True

    def _emit_calls(self, events: list[Event], over: bool) -> None:
        """Emit what was read of calls; with the calls `over`, go on with the text behind them."""
        if events:
            self._begin(self.state)
            self._events += events
            self.call_ids += [event.id for event in events if isinstance(event, ToolStart)]
            self.called, self._may_be_bare = True, False
        if over:
            assert self._reader is not None
            self._buffer = unescape(self._reader.rest) + self._buffer
            self._reader = None
            self.finished = not self._parallel
            self._begin("text")

    # -- thinking and text

    def _begin(self, state: State) -> None:
        """Begin thinking or, behind thinking or a call, text."""
        self._emit(Text, self._stops.flush())
        self.state = state
        self._blanks, self._drop_blanks, self._line_start = "", True, True

    def _end_turn(self) -> None:
        self._begin("text")
        self.finished = True

    def _write_thinking(self, text: str) -> None:
        self._emit(Thinking, self._after_blanks(text))

    def _write_text(self, text: str) -> None:
        if text:
            self._line_start = text.endswith("\n")
            self._code.feed(text)
        if text := self._after_blanks(text):
            self._may_be_bare = False
            self._match_stops(text)

    def _after_blanks(self, text: str) -> str:
        """`text` without the blanks at the beginning of its stretch, if these are to be dropped or
        nothing else came yet."""
        if self._blanks is None:
            return text
        text = self._blanks + text
        if not text.strip():
            self._blanks = text
            return ""
        self._blanks = None
        return text.lstrip() if self._drop_blanks else text

    def _match_stops(self, text: str) -> None:
        self._emit(Text, self._stops.feed(text))
        if self._stops.stop_sequence is not None:
            self.finished = True

    def _emit(self, kind: type[Text] | type[Thinking], text: str) -> None:
        if not text:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, kind):
            last.text += text
        else:
            self._events.append(kind(text))
