"""Turns the decoded text of one answer into events.

    feed(text) -> [state machine] -> thinking ------------------------------------> Thinking ->
    call: CallReader, by the family's Shape -----> ToolStart, ToolInput, ToolEnd -> visible text ->
    blanks at edges -> stops ----> Text

Every decision waits until no further text can change it, so events do not depend on how the text
was cut into pieces. Until a call's name and the form of its arguments are certain, a failure turns
only its opening tag into text: what follows the tag is read again. From then on it is a call, and
whatever comes is made into arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from _mlx_server.inference.call_reader import CallReader, held_back
from _mlx_server.inference.formats import NAME_AND_JSON, PYTHON_CALL, OutputFormat
from _mlx_server.inference.protocol import Event, Text, Thinking, ToolEnd, ToolInput, ToolStart


class OutputParser:
    """Turns the decoded text of one answer, in pieces of any size, into events.

    Feed it until `finished` or until the turn ends, then call `finish`. `state` says what the text
    last fed belongs to; `called` whether a tool call came out, `call_ids` the ids of all;
    `stop_sequence` which stop string fired: the one that completes first, and of several that
    complete together the longest. `finished` is set by a stop string, by a tag after which nothing
    follows and, without `parallel`, by the first call; nothing comes out afterwards. `tools` are in
    OpenAI form; without any, call markup is plain text."""

    def __init__(
        self,
        format: OutputFormat,
        tools: Sequence[dict] = (),
        stop: Sequence[str] = (),
        *,
        in_thinking: bool = False,
        parallel: bool = True,
    ):
        self.state = "thinking" if in_thinking and format.thinking else "text"
        self.called = self.finished = False
        self.call_ids: list[str] = []
        self.stop_sequence: str | None = None
        self._format, self._parallel, self._tools = format, parallel, tools
        self._stops = [text for text in stop if text]

        # The tags to find in each state and what each begins. A "left over" end tag is markup only
        # right after a call.
        text: dict[str, str] = dict.fromkeys(format.structural_markers, "nothing") | dict.fromkeys(
            format.final, "the end"
        )
        thinking: dict[str, str] = dict.fromkeys(format.structural_markers, "text") | dict.fromkeys(
            format.final, "the end"
        )
        if format.thinking:
            text = {format.thinking[0]: "thinking", format.thinking[1]: "left over"} | text
            thinking |= {format.thinking[1]: "text", "\n" + format.thinking[1]: "text"}
        if format.call and tools:
            text |= ({format.call[1]: "left over"} if format.call[1] else {}) | dict.fromkeys(
                format.openers, "bare call"
            )
            text[format.call[0]] = "call"
            thinking |= {format.call[0]: "call", "\n" + format.call[0]: "call"}
        self._marks = {"text": text, "thinking": thinking}
        self._reader: CallReader | None = None  # of the call that is being read
        self._opening, self._opened_in = "", "text"
        # How much of a possible bare call it has read, and what came of that
        self._heard, self._withheld = 0, []

        # A bare call to a declared tool begins like this, blanks aside.
        names = [tool["function"]["name"].lower() for tool in tools]
        self._heads = [
            f'{fence}{{{kind}"name":"{name}"'
            for name in names
            for fence in ("", "```", "```json")
            for kind in ("", '"type":"function",')
        ]
        self._heads += [f"[{name}(" for name in names if PYTHON_CALL in format.shapes]
        self._may_be_bare = bool(tools)  # nothing was said yet that rules out a bare call

        self._events: list[Event] = []
        self._buffer = ""  # text that is not understood yet
        self._pending = ""  # visible text that may be the beginning of a stop
        self._line_start = True
        # Blanks at the beginning of a stretch of text or thinking wait for something visible; None
        # when it came.
        self._blanks: str | None = "" if format.thinking or tools else None
        self._drop_blanks = self.state == "thinking"

    def feed(self, text: str) -> list[Event]:
        """Take the next piece of decoded text; returns what has become certain."""
        return self._read(text, last=False)

    def finish(self, cut: bool = False) -> list[Event]:
        """The turn has ended, or was `cut` (by `max_tokens`, say): returns what was held back. A
        call that is not complete is made so as well as can be, but not if it was cut: half a
        command must not be run."""
        reader = self._reader
        events = self._read("", last=True)
        if cut and events and reader is not None and reader.cut and isinstance(events[-1], ToolEnd):
            closing = 2 if isinstance(events[-2:][0], ToolInput) else 1
            events[-closing:] = [ToolEnd({}, cut=True)]
        return events

    def _read(self, text: str, last: bool) -> list[Event]:
        self._events = []
        self._buffer += text
        step = {"text": self._read_text, "thinking": self._read_thinking, "call": self._read_call}
        while not self.finished and step[self.state](last):
            pass
        if last and not self.finished:
            if self._blanks and not self._drop_blanks:
                self._match_stops(self._blanks)
            self._say(Text, self._pending)
            self._blanks, self._pending = None, ""
        return self._events

    def verbatim(self) -> None:
        """From here on there is no markup: all that follows is text, whatever it looks like."""
        self._marks["text"], self._may_be_bare = {}, False

    # -- the states: each step takes what is certain from the buffer and tells whether another step
    # may follow

    def _read_text(self, last: bool) -> bool:
        if self._may_be_bare and self._buffer.strip() and self._read_bare_calls(last):
            return self._reader is None
        mark = self._take_until_mark(self._show, last)
        if mark is None or self.finished:
            return False
        following = self._marks["text"][mark]
        if following == "thinking":
            self._enter("thinking")
        elif following == "the end":
            self._end_here()
        elif following == "call" or following == "bare call" and self._line_start:
            self._open(mark)
        elif following == "nothing":
            self._line_start = True
        elif following == "bare call" or not (self.called and self._blanks is not None):
            self._show(mark)
        return True

    def _read_thinking(self, last: bool) -> bool:
        mark = self._take_until_mark(self._think, last)
        if mark is None:
            return False
        following = self._marks["thinking"][mark]
        if following == "call":
            self._open(mark)
        elif following == "the end":
            self._end_here()
        else:
            self._enter("text")
        return True

    def _read_call(self, last: bool) -> bool:
        text, self._buffer = self._buffer, ""
        try:
            events, over = self._reader.read(text, last)
        except ValueError:  # it was no call: its opening tag is text, the rest is read again
            self.state = self._opened_in
            bare = self._marks["text"].get(self._opening) == "bare call"
            self._buffer = self._reader.text[len(self._opening) * bare :]
            (self._show if self.state == "text" else self._think)(self._opening)
            return True
        self._take(events, over)
        return over

    def _read_bare_calls(self, last: bool) -> bool:
        """Whether the visible text so far may be nothing but calls without tags. They are taken
        when it has ended, or at once if this model writes them so."""
        head = "".join(self._buffer.lstrip()[:256].split()).lower()
        if not any(head.startswith(known) or known.startswith(head) for known in self._heads):
            return False
        if self._reader is None:
            shapes = self._format.shapes if self._format.untagged else (NAME_AND_JSON,)
            self._reader = CallReader(
                OutputFormat(shapes=shapes), ("", ""), self._tools, self._parallel
            )
            self._opening, self._heard, self._withheld = "", 0, []
        try:
            events, over = self._reader.read(self._buffer[self._heard :], last)
        except ValueError:
            self._reader = None
            return False
        self._heard = len(self._buffer)
        self._withheld += events
        rest = self._reader.text.strip("`,;}] \n\t\r")
        if self._withheld and (self._format.untagged or last and not rest and not self._reader.cut):
            self.state, self._buffer, self._opened_in = "call", "", "text"
            self._take(self._withheld, over)
        elif over and (rest or last):
            self._reader = None
            return False
        return True

    # -- moving between states

    def _take_until_mark(self, sink: Callable[[str], None], last: bool) -> str | None:
        """Give the sink all text that is certainly not a tag; take and return the first tag, if
        there is one."""
        marks = self._marks[self.state]
        found = re.search("|".join(map(re.escape, marks)), self._buffer) if marks else None
        if found:
            text, self._buffer = self._buffer[: found.start()], self._buffer[found.end() :]
        else:
            certain = len(self._buffer) - (0 if last else held_back(self._buffer, marks))
            text, self._buffer = self._buffer[:certain], self._buffer[certain:]
        sink(text)
        return found[0] if found else None

    def _enter(self, state: str) -> None:
        """Begin a stretch of thinking or, behind thinking or a call, of text."""
        self._say(Text, self._pending)
        self._pending, self.state = "", state
        self._blanks, self._drop_blanks, self._line_start = "", True, True

    def _open(self, mark: str) -> None:
        self._opening, self._opened_in, self.state = mark, self.state, "call"
        tags = self._format.call
        if mark in self._format.openers:
            tags, self._buffer = (tags[0], ""), mark + self._buffer
        self._reader = CallReader(self._format, tags, self._tools, self._parallel)

    def _take(self, events: list[Event], over: bool) -> None:
        """Emit what the reader has read of its calls; with them over, go on behind them."""
        if events:
            self._enter(self.state)
            self._events += events
            self.call_ids += [event.id for event in events if isinstance(event, ToolStart)]
            self.called, self._may_be_bare = True, False
        if over:
            self._buffer, self._reader = self._reader.text, None
            self.finished = not self._parallel
            self._enter("text")

    def _end_here(self) -> None:
        self._enter("text")
        self.finished = True

    # -- thinking and visible text

    def _begin(self, text: str) -> str:
        """`text` without the blanks that open its stretch, as far as these are to be dropped or
        must wait."""
        if self._blanks is None:
            return text
        self._blanks += text
        if not self._blanks.strip():
            return ""
        text, self._blanks = self._blanks.lstrip() if self._drop_blanks else self._blanks, None
        return text

    def _think(self, text: str) -> None:
        self._say(Thinking, self._begin(text))

    def _show(self, text: str) -> None:
        if text:
            self._line_start = text.endswith("\n")
        if text := self._begin(text):
            self._may_be_bare = False
            self._match_stops(text)

    def _match_stops(self, text: str) -> None:
        text = self._pending + text
        hits = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if hits:
            _, certain, self.stop_sequence = min(hits)
            self.finished = True
        else:
            certain = len(text) - held_back(text, self._stops)
        self._say(Text, text[:certain])
        self._pending = "" if hits else text[certain:]

    def _say(self, kind: type[Text] | type[Thinking], text: str) -> None:
        if text and self._events and isinstance(self._events[-1], kind):
            self._events[-1].text += text
        elif text:
            self._events.append(kind(text))
