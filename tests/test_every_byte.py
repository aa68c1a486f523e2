"""Every byte that the model writes arrives: as text, as thinking or inside a call, apart from its
family's own markup. Streamed and whole answers say the same."""

from __future__ import annotations

import itertools
import logging
import random
import re

import pytest
from call_families import FAMILIES
from parsing import LS, QWEN_CODER, TOOLS, bash, marked, parse, pieces

from _mlx_server.inference.output.parser import OutputParser
from engine import Text, Thinking, ToolInput, ToolStart

WORD = re.compile(r"word\d+x")
PACKAGE = (
    '{\n  "name": "left-pad",\n  "version": "1.0.0",\n  "arguments": {"main": "index.js"}\n}\n'
)


class Writer:
    """Writes answers of one family in which each word occurs once."""

    def __init__(self, family: str, seed: object):
        self.format, self.start, self.write, self.between, self.end = FAMILIES[family]
        self._numbers = itertools.count(100)
        self.dice = random.Random(f"{family} {seed}")

    def words(self, count: int = 2) -> str:
        return " ".join(f"word{next(self._numbers)}x" for _ in range(count))

    def call(self, name: str = "Write", content: str = "") -> str:
        arguments = {"file_path": self.words(1), "content": f"{self.words()} {content}"}
        return self.write(name, arguments)

    def block(self, *calls: str) -> str:
        return self.start + (self.between or "").join(calls or [self.call()]) + self.end

    def prose(self) -> str:
        return self.dice.choice(["", f"{self.words()}\n", f"{self.words()}. \n\n"])


DEFECTS = {
    "none": lambda w: w.prose() + w.block(),
    "never closed": lambda w: w.prose() + w.start + w.call(),
    "never closed, text behind": lambda w: w.start + w.call() + f"\n\n{w.words()}",
    "opened, and prose": lambda w: f"{w.prose()}{w.start}{w.words()}\n{w.words()}",
    "opened and closed, and prose": lambda w: f"{w.start}{w.words()}{w.end} {w.words()}",
    "opened, and half a head": lambda w: w.start + w.call()[: w.dice.randrange(1, 20)],
    "orphan closer": lambda w: w.prose() + w.call() + w.end + f" {w.words()}",
    "orphan closer behind": lambda w: w.block() + w.end + f" {w.words()}",
    "call in an argument": lambda w: w.block(w.call(content=w.block())),
    "a package in an argument": lambda w: w.block(w.call(content=f"{PACKAGE}{w.words()}")),
    "only a package": lambda w: f"{PACKAGE}{w.words()}",
    "glued": lambda w: w.block() + w.block(),
    "glued in one block": lambda w: w.start + w.call() + w.call() + w.end,
    "undeclared": lambda w: w.prose() + w.block(w.call("Nothing")) + f"\n{w.words()}",
    "undeclared, then declared": lambda w: w.block(w.call("Nothing")) + "\n" + w.block(),
    "declared, then undeclared": lambda w: w.block() + "\n" + w.block(w.call("Nothing")),
    "malformed": lambda w: malformed(w, w.block()) + f"\n{w.words()}",
}


def malformed(writer: Writer, text: str) -> str:
    """A text of which one character that is none of a word is lost or doubled."""
    places = [at for at, letter in enumerate(text) if not letter.isalnum() and letter not in "|_"]
    at = writer.dice.choice(places)
    return text[:at] + writer.dice.choice(["", text[at] * 2]) + text[at + 1 :]


def arrived(events: list) -> str:
    """All that a client is told."""
    told = []
    for event in events:
        if isinstance(event, Text | Thinking):
            told.append(event.text)
        elif isinstance(event, ToolStart):
            told.append(f" {event.name} ")
        elif isinstance(event, ToolInput):
            told.append(event.json)
    return "".join(told)


def check(text: str, format, cut: bool = False) -> str:
    """What is told of a text, in which every word of it must be; it is the same for any cutting."""
    for turn_end in format.turn_ends:  # the model stops there
        before, found, _ = text.partition(turn_end)
        text = before + found
    dice = random.Random(text)
    cuttings = [[text], list(text)]
    cuttings += [pieces(text, [dice.randrange(len(text) + 1) for _ in range(9)]) for _ in range(3)]
    told = []
    for cutting in cuttings:
        parser = OutputParser(format, TOOLS)
        events = [event for piece in cutting for event in parser.feed(piece)]
        events += parser.finish(cut)
        told.append(arrived(events))
    assert len(set(told)) == 1
    assert WORD.findall(told[0]) == WORD.findall(text), (text, told[0])
    return told[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_arrives(family: str):
    for defect, write in DEFECTS.items():
        writer = Writer(family, (defect, 0))
        check(write(writer), writer.format)


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_of_many_answers_arrives(family: str, defect: str):
    for seed in range(1, 9):
        writer = Writer(family, (defect, seed))
        check(DEFECTS[defect](writer), writer.format)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_of_an_answer_that_is_cut_arrives(family: str):
    """Also what was written of a call, whose end says that it was cut."""
    writer = Writer(family, "cut")
    text = writer.prose() + writer.block()
    for end in range(0, len(text), 47):
        check(text[:end], writer.format, cut=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_may_hold_what_looks_like_a_call(family: str):
    """A file that has a name and arguments; where strings are escaped, a whole call as well."""
    format, start, write, _, end = FAMILIES[family]
    contents = [PACKAGE]
    if getattr(format.syntaxes[0], "quotes", ("",))[0] == '"':
        contents.append(f"see:\n{start}{write('Bash', {'command': 'rm'})}{end}\ndone")
    for content in contents:
        arguments = {"file_path": "a", "content": content}
        written = start + write("Write", arguments) + end
        assert parse(written, format) == [("call", "Write", arguments)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_to_a_tool_that_is_not_declared_is_text_and_is_logged(
    family: str, caplog: pytest.LogCaptureFixture
):
    format, start, write, _, end = FAMILIES[family]
    with caplog.at_level(logging.WARNING):
        parser = OutputParser(format, TOOLS)
        events = parser.feed(start + write("Nothing", {"a": "word1x"}) + end) + parser.finish()
    assert "word1x" in arrived(events) and not parser.called
    if "untagged" not in family:
        assert "'Nothing'" in caplog.text


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "<function=Bash>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>",
            [bash()],
        ),
        (f"{LS}\n</tool_call>", [bash()]),
        (f"{LS}{LS}", [bash(), bash()]),
        (f"{PACKAGE}", [("text", PACKAGE)]),
        (f"<tool_call>\n{PACKAGE}</tool_call>", [("text", f"<tool_call>\n{PACKAGE}</tool_call>")]),
    ],
)
def test_what_becomes_of_a_defect(text: str, expected: list):
    assert parse(text, QWEN_CODER) == expected


def test_malformed_arguments_of_harmony_arrive():
    head = "<|channel|>commentary to=functions.Bash <|constrain|>json<|message|>"
    format = marked("<|channel|>")
    assert parse(f'{head}{{"command": "ls" "x": 1}}', format) == [bash('ls" "x": 1}')]
    assert parse(f'{head}{{"command": "ls", "x" 1}}', format) == [
        bash(),
        ("text", '"x" 1}'),
    ]
    assert parse(f"{head}ls<|call|>", format) == [("text", f"{head}ls")]
