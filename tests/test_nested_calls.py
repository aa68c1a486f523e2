"""Values of tool calls that hold calls of the same family, whole ones and parts of them: a file
that shows calls, or that reads them."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from call_families import FAMILIES
from parsing import QWEN_CODER, joined, pieces, tool

from _mlx_server.inference.output.parser import OutputParser
from _mlx_server.inference.output.value_end import ValueEnd
from engine import ToolEnd, ToolInput

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
TOOLS = [
    tool("Write", content=STRING, mode=INTEGER, file_path=STRING),
    tool("Bash", command=STRING, timeout=INTEGER),
    tool("get_time"),
]
Call = tuple[str, dict[str, Any]]
LS: Call = ("Bash", {"command": "ls\ncat a", "timeout": 5})
TIME: Call = ("get_time", {})


def write(content: str, last: bool = False) -> Call:
    """A call that writes a content, as its first argument or its last."""
    arguments = [("content", content), ("mode", 7), ("file_path", "a.txt")]
    return "Write", dict(reversed(arguments) if last else arguments)


class Family:
    """Renders calls as one family does."""

    def __init__(self, name: str):
        self.format, self.start, self._write, self.between, self.end = FAMILIES[name]

    def block(self, *calls: Call) -> str:
        return (
            self.start + (self.between or "\n").join(self._write(*one) for one in calls) + self.end
        )

    def contents(self) -> dict[str, str]:
        """Contents of files by what they hold."""
        ls, time = self.block(LS), self.block(TIME)
        once = self.block(write(ls))
        half = ls.index("ls") + len("ls")
        first, second = ls[:half], ls[half:]
        return {
            "a call": ls,
            "a call within text": f"Call it so:\n\n{ls}\n\nand not otherwise: \n",
            "a call without its tags": self._write(*LS),
            "a call without arguments": f"see {time}.",
            "a call of the same tool": self.block(write("x", last=True)),
            "two calls in one block": self.block(LS, ("Bash", {"command": "pwd"})),
            "two blocks": ls + ls,
            "three blocks on lines": f"{ls}\n{time}\n{ls}",
            "a call in a call": once,
            "a call in a call in a call": self.block(write(f"{once}\n", last=True)),
            "half a call": first,
            "half a call within text": f"- {first}\n- ",
            "the other half": second,
            "the other half within text": f"- {second}\n- ",
            "the start tag": self.start,
            "the end tag": self.end,
            "the end tag twice": f"{self.end}\n{self.end}",
        }


def told(parser: OutputParser, cutting: list[str]) -> list:
    """The events of a text that comes in pieces."""
    return joined([event for piece in cutting for event in parser.feed(piece)] + parser.finish())


def random_pieces(text: str, dice: random.Random) -> list[str]:
    return pieces(text, [dice.randrange(len(text)) for _ in range(9)])


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("qwen coder", "gemma 4") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_a_value_may_hold_calls(name: str):
    family, dice = Family(name), random.Random(name)
    followers: list[list[Call]] = [[], [LS], [TIME], [write("x")], [write("y", last=True), LS]]
    for kind, content in family.contents().items():
        for last in (False, True):
            more = dice.choice(followers) if family.between is not None else []
            calls = [write(content, last), *more]
            text = family.block(*calls)
            for cutting in ([text], list(text), random_pieces(text, dice)):
                events = told(OutputParser(family.format, TOOLS), cutting)
                assert events == [("call", *call) for call in calls], (kind, cutting)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "gemma 4" else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_strings_in_arrays_may_hold_calls(name: str):
    family, dice = Family(name), random.Random(name)
    tools = [tool("Edit", edits={"type": "array"}, file_path=STRING), *TOOLS]
    for kind, content in family.contents().items():
        arguments = {"edits": [{"old": "x", "new": content}, [content]], "file_path": "a.txt"}
        for call in (("Edit", arguments), ("Edit", dict(reversed(arguments.items())))):
            text = family.block(call)
            for cutting in ([text], list(text), random_pieces(text, dice)):
                events = told(OutputParser(family.format, tools), cutting)
                assert events == [("call", *call)], (kind, cutting)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_spelled_without_control_tokens_is_text_within_a_value(name: str):
    """Whatever it is: balanced or not, and at any length."""
    family, dice = Family(name), random.Random(name)
    tags = re.compile(r'(<\|"\|>|｜DSML｜|</?(?![/｜]*DSML)[^<>\s="]+>|\[[A-Z_]+\])')
    control = set(tags.findall(family.block(LS)))
    parts = list(family.contents().values())
    for _ in range(20):
        content = "\n".join(text[dice.randrange(20) :] for text in dice.choices(parts, k=5))
        call = write(f"FIRST{content}LAST", dice.random() < 0.5)
        before, inside, after = re.split("(FIRST.*LAST)", family.block(call), flags=re.DOTALL)
        parser = OutputParser(family.format, TOOLS, control_tokens=control)
        events: list = []
        for text in (before, inside, after):
            for piece in [inside] if text is inside else tags.split(text):
                markup = text is not inside and piece in control
                for part in [piece] if markup or not piece else random_pieces(piece, dice):
                    events += parser.feed(part, markup=markup)
        assert joined(events + parser.finish()) == [("call", *call)]


@pytest.mark.parametrize("opened", [False, True])
def test_text_waits_no_longer_than_is_said(opened: bool):
    """Behind what may be the end of a value."""
    family = Family("qwen coder")
    content = "<parameter=command>\n" * opened + "ls\n</parameter>\n</function>\n"
    before = family.block(write("")).partition("\n\n")[0]
    parser, fed, seen = OutputParser(QWEN_CODER, TOOLS), 0, 0
    parser.feed(f"{before}\n{content}")
    bound = ValueEnd.FAR if opened else ValueEnd.NEAR
    for _ in range(bound // 10 + 5):
        events, fed = parser.feed("some text\n"), fed + 10
        seen += sum(len(one.json) for one in events if isinstance(one, ToolInput))
        assert seen == 0 or fed > bound - len(content)
    assert opened is (seen >= fed)


@pytest.mark.parametrize("cut", [False, True])
def test_a_call_that_is_cut_within_a_call_in_its_value_is_not_run(cut: bool):
    family = Family("qwen coder")
    text = family.block(write(family.block(LS)))
    text = text[: text.index("</function>") + len("</function>")]
    parser = OutputParser(QWEN_CODER, TOOLS)
    [*_, end] = parser.feed(text) + parser.finish(cut)
    assert isinstance(end, ToolEnd) and end.cut is cut
