"""From decoded text to events: thinking, visible text, stops and calls without call tags, however
the text is cut into pieces."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import pytest
from parsing import GLM, HERMES, LS, MINIMAX, PLAIN, QWEN_CODER, TOOLS, bash, joined, parse

from _mlx_server.inference.output.families import detect_format
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.output.parser import OutputParser
from engine import ToolEnd, ToolInput, ToolStart


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Hello", [("text", "Hello")]),
        ("", []),
        ("  indented\n", [("text", "  indented\n")]),
        (" \n", [("text", " \n")]),
        ("<think>\nhm\n</think>\n\nHi", [("thinking", "hm"), ("text", "Hi")]),
        ("<think>a\n\n</think>Hi", [("thinking", "a\n"), ("text", "Hi")]),
        ("<think>\n\n</think>\n\nHi", [("text", "Hi")]),
        ("\n<think>a</think>b", [("thinking", "a"), ("text", "b")]),
        ("Well<think>a</think> b", [("text", "Well"), ("thinking", "a"), ("text", "b")]),
        (
            "<think>a</think>b<think>c</think>d",
            [("thinking", "a"), ("text", "b"), ("thinking", "c"), ("text", "d")],
        ),
        ("<think>cut off\n", [("thinking", "cut off\n")]),
        ("<think>cut off\n</thi", [("thinking", "cut off\n</thi")]),
        ("<think>a < b</think>c", [("thinking", "a < b"), ("text", "c")]),
        ("half a tag <thin", [("text", "half a tag <thin")]),
        ("x < y <b>", [("text", "x < y <b>")]),
        ("a </think> b", [("text", "a </think> b")]),
        ("<think>a</think>  \n", [("thinking", "a")]),
    ],
)
def test_thinking(text, expected):
    assert parse(text, tools=[]) == expected


def test_thinking_opened_by_the_prompt():
    assert parse("hm\n</think>\n\nHi", in_thinking=True) == [("thinking", "hm"), ("text", "Hi")]
    assert parse("\n\n</think>Hi", in_thinking=True) == [("text", "Hi")]


def test_thinking_tags_are_text_for_a_model_that_does_not_think():
    assert parse("<think>a</think>b", PLAIN, []) == [("text", "<think>a</think>b")]


def test_state_tells_what_was_fed():
    parser = OutputParser(HERMES, TOOLS)
    states = []
    for piece in ("<think>", "a", "</think>", "b", "<tool_call>", LS[11:], "c"):
        parser.feed(piece)
        states.append(parser.state)
    assert states == ["thinking", "thinking", "text", "text", "call", "text", "text"]


@pytest.mark.parametrize(
    "text, stop, expected, fired",
    [
        ("one STOP two", ["STOP"], "one ", "STOP"),
        ("one STOX two", ["STOP"], "one STOX two", None),
        ("one STO", ["STOP"], "one STO", None),
        ("STOP", ["STOP"], "", "STOP"),
        ("xabcd", ["abcd", "bc"], "xa", "bc"),  # the one that completes first
        ("xabc", ["c", "bc", "abc"], "x", "abc"),  # of those that complete together the longest
        ("b then a", ["a", "b"], "", "b"),
        ("aaab", ["aab"], "a", "aab"),
        ("line\nnext", ["\n"], "line", "\n"),
        ("\n\nnext", ["\n"], "", "\n"),
        ("\n", ["\n"], "", "\n"),
        ("Привет, мир", [", "], "Привет", ", "),
        ("abc", ["", "zz"], "abc", None),
        ("a<think>b", ["<think>"], "a", None),  # a tag is not visible text
    ],
)
def test_stops(text, stop, expected, fired):
    for tools in ([], TOOLS):
        out = parse(text, HERMES, tools, stop)
        assert "".join(piece for kind, piece in out if kind == "text") == expected
        assert parse.parser.stop_sequence == fired and parse.parser.finished == (fired is not None)


def test_stops_fire_only_in_visible_text():
    assert parse("<think>STOP</think>a", stop=["STOP"]) == [("thinking", "STOP"), ("text", "a")]
    call = LS.replace("ls", "STOP")
    assert parse(call + "\nSTOP", stop=["STOP"]) == [bash("STOP")]
    assert parse.parser.stop_sequence == "STOP"
    # Blanks between calls are not visible
    assert parse(LS + "\n" + LS, stop=["\n"]) == [bash(), bash()]
    assert parse.parser.stop_sequence is None
    assert parse("a<think>x</think>b", stop=["ab"]) == [
        ("text", "a"),
        ("thinking", "x"),
        ("text", "b"),
    ]
    assert parse("<tool_call>no STOP call</tool_call>", stop=["STOP"]) == [
        ("text", "<tool_call>no ")
    ]


def test_nothing_comes_after_a_stop():
    parser = OutputParser(HERMES, TOOLS, ["."])
    assert joined(parser.feed("a.b<think>c")) == [("text", "a")]
    assert parser.feed("more" + LS) == [] and parser.finish() == [] and not parser.called


def test_text_leaves_as_soon_as_it_is_certain():
    parser = OutputParser(HERMES, TOOLS, ["STOP"])
    assert [
        joined(parser.feed(piece))
        for piece in ("Hello ", "wor", "ld S", "T", "A", "<b", "<tool", "s>")
    ] == [
        [("text", "Hello ")],
        [("text", "wor")],
        [("text", "ld ")],
        [],
        [("text", "STA")],
        [("text", "<b")],
        [],
        [("text", "<tools>")],
    ]


def test_a_tag_that_thinking_only_mentions_leaves_it_thinking():
    assert parse("<think>use <tool_call>\n or not\n</think>Hi") == [
        ("thinking", "use <tool_call>\n or not"),
        ("text", "Hi"),
    ]
    assert parse("<think>no\n<tool_call>x</tool_call>\ny") == [
        ("thinking", "no\n<tool_call>x</tool_call>\ny")
    ]


@pytest.mark.parametrize(
    "format, text",
    [
        (HERMES, LS),
        (QWEN_CODER, "<function=get_time></function>"),
        (HERMES, '{"name":"Bash","arguments":{}}'),
        (MINIMAX, '<minimax:tool_call><invoke name="get_time"></invoke></minimax:tool_call>'),
    ],
)
def test_without_tools_nothing_is_a_call(format, text):
    assert parse(text, format, tools=[]) == [("text", text)]
    assert parse(f"<think>{text}", format, tools=[]) == [("thinking", text)]


def test_one_call_only():
    assert parse("a" + LS + LS, parallel=False) == [("text", "a"), bash()]
    assert parse.parser.finished
    both = '{"name":"Bash","arguments":{"command":"ls"}}{"name":"get_time"}'
    assert parse(f"<tool_call>{both}</tool_call> text", parallel=False) == [bash()]


def test_ids_are_unique():
    parser = OutputParser(HERMES, TOOLS)
    events = parser.feed(LS * 50)
    assert parser.call_ids == [event.id for event in events if isinstance(event, ToolStart)]
    ids = {event.id for event in events if isinstance(event, ToolStart)}
    assert len(ids) == 50 and all(re.fullmatch(r"toolu_[A-Za-z0-9]{24}", id) for id in ids)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Bash", "arguments": {"command": "ls"}}',
        '\n{"name":"bash","parameters":{"command":"ls"}}\n',
        '```json\n{\n  "name": "Bash",\n  "arguments": {"command": "ls"}\n}\n```',
        '```\n{"name": "Bash", "arguments": {"command": "ls"}}\n```\n',
        '```json\n{"name": "Bash", "arguments": {"command": "ls",}}',
    ],
)
@pytest.mark.parametrize("format", [HERMES, QWEN_CODER, PLAIN])
def test_a_message_that_is_one_bare_call(text, format):
    assert parse(text, format, stop=["STOP"]) == [bash()]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Unknown", "arguments": {}}',
        '{"name": "Bash"}',
        '{"name": "Bash", "arguments": {"command": "l',
        '{"arguments": {}, "name": "Bash"}',
        '{"name": "Bash", "arguments": {}} is how',
        '{"a": 1}',
        "{",
        "```",
        "``` ",
        '```json\n{"name": "Bash", "arguments": {}}\n```\nThis runs it.',
        "```python\nprint()\n```",
        "```json\n[1]\n```",
        'So: {"name": "Bash", "arguments": {}}',
        '{"name": "Bash", "arguments": [1]}',
        '```json\n{"name": "package"}\n```',
    ],
)
def test_other_json_is_text(text):
    assert parse(text) == [("text", text)]


def test_a_bare_call_after_thinking_and_its_stops():
    assert parse('<think>a</think>{"name":"Bash","arguments":{"command":"ls"}}', stop=["ls"]) == [
        ("thinking", "a"),
        bash(),
    ]
    assert parse('{"name":"Bash","arguments":{"command":"ls"}} and', stop=["ls"]) == [
        ("text", '{"name":"Bash","arguments":{"command":"')
    ]


@pytest.mark.parametrize(
    "pieces, first",
    [
        (["```", "py", "thon"], 1),
        (["{", '"na', 'me": "x'], 2),
        (["{", '"id'], 1),
        (["```json\n", "{\n", '"a"'], 2),
        (['{"name":"get_time","arguments":{}}', " ", "and"], 2),
        (["```js", "c"], 1),
    ],
)
def test_text_that_cannot_be_a_bare_call_streams(pieces, first):
    parser = OutputParser(HERMES, TOOLS)
    out = [joined(parser.feed(piece)) for piece in pieces]
    assert [bool(events) for events in out] == [at >= first for at in range(len(pieces))]


@pytest.mark.parametrize(
    "error", [AttributeError, KeyError, OverflowError, RecursionError, TypeError]
)
def test_whatever_a_parser_raises_the_call_is_text(error):
    def fail(text, tools):
        raise error("inside")

    text = "a<tool_call>x</tool_call>b"
    assert parse(text, OutputFormat(None, ("<tool_call>", "</tool_call>"), fail)) == [
        ("text", text)
    ]


@pytest.mark.parametrize(
    "calls", [None, [], [("Bash",)], [(None, {})], [("Bash", {"a": {1, 2}})], [("Bash", 5)], 7]
)
def test_whatever_a_parser_returns_the_call_is_text(calls):
    text = "a<tool_call>x</tool_call>b"
    format = OutputFormat(None, ("<tool_call>", "</tool_call>"), lambda text, tools: calls)
    assert parse(text, format) == [("text", text)]


def test_a_model_without_formats():
    tokenizer = SimpleNamespace(has_thinking=False, has_tool_calling=False)
    assert detect_format(tokenizer) == PLAIN
    assert parse("<tool_call>x<think>", detect_format(tokenizer)) == [
        ("text", "<tool_call>x<think>")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_events_depend_on_the_text_alone(seed):
    """Random soups of markup and text: any cutting gives the same events, and no text is lost but
    blanks and tags."""
    dice = random.Random(seed)
    format = dice.choice([HERMES, QWEN_CODER, GLM, MINIMAX])
    parts = [
        "<think>",
        "</think>",
        "\n",
        " ",
        "a",
        "STOP",
        "ST",
        "{",
        "}",
        "```",
        "json",
        "<",
        LS,
        LS[11:],
        LS[:25],
        "x</",
        "<tool_call>",
        "</tool_call>",
        "<function=Bash>",
        "<function=get_time></function>",
        "</function>",
        "<parameter=command>",
        "</parameter>",
        "Bash",
        "<arg_key>command</arg_key>",
        "<arg_value>",
        "</arg_value>",
        '<invoke name="Bash">',
        "</invoke>",
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        "🙂",
        '"name"',
        ':"Bash"',
        '{"name":"Bash","arguments":{',
        "}}",
    ]
    for _ in range(40):
        text = "".join(dice.choice(parts) for _ in range(dice.randrange(1, 14)))
        out = parse(
            text,
            format,
            dice.choice([TOOLS, []]),
            stop := ["STOP"] if dice.random() < 0.7 else [],
            in_thinking=dice.random() < 0.3,
            parallel=dice.random() < 0.8,
        )
        shown = "".join(piece for kind, piece, *_ in out if kind == "text")
        assert "STOP" not in shown or not stop


@pytest.mark.parametrize(
    "format, text",
    [
        (HERMES, '<tool_call>\n{"name": "Bash", "arguments": {"command": "rm -rf /tmp/'),
        (QWEN_CODER, "<tool_call>\n<function=Bash>\n<parameter=command>\nrm -rf /tmp/"),
        (HERMES, '<tool_call>\n{"name": "Bash", "arguments": {"command": "rm -rf /tmp/"'),
    ],
)
def test_half_a_command_is_never_run(format, text):
    parser = OutputParser(format, TOOLS)
    events = parser.feed(text) + parser.finish(cut=True)
    assert events[-1] == ToolEnd({}, cut=True)
    pieces = "".join(event.json for event in events if isinstance(event, ToolInput))
    assert pieces.startswith('{"command": "') and '{"command": "rm -rf /tmp/"'.startswith(pieces)


def test_a_whole_call_before_the_cut_one_is_kept():
    parser = OutputParser(HERMES, TOOLS)
    one = '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>'
    events = parser.feed(
        one + '\n<tool_call>\n{"name": "Bash", "arguments": {"comm'
    ) + parser.finish(cut=True)
    ends = [event for event in events if isinstance(event, ToolEnd)]
    assert ends[0] == ToolEnd({"command": "ls"}) and all(end.cut for end in ends[1:])


def test_a_call_that_lacks_only_its_end_tag_is_whole():
    parser = OutputParser(HERMES, TOOLS)
    events = parser.feed(
        '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}'
    ) + parser.finish(cut=True)
    assert events[-1] == ToolEnd({"command": "ls"})
