"""From decoded text to events: thinking, visible text, stops and tool calls, however the text is
cut into pieces."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import pytest

from _mlx_server.inference.families import detect_format
from _mlx_server.inference.formats import OutputFormat
from _mlx_server.inference.parser import OutputParser
from engine import Text, Thinking, ToolEnd, ToolInput, ToolStart


def tool(name, **properties):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {"type": "object", "properties": properties},
        },
    }


STRING = {"type": "string"}
TOOLS = [
    tool("Bash", command=STRING, timeout={"type": "integer"}),
    tool("Write", file_path=STRING, content=STRING),
    tool(
        "Set",
        flag={"type": "boolean"},
        ratio={"type": "number"},
        items={"type": "array"},
        options={"type": "object"},
        maybe={"type": ["string", "null"]},
        count={"type": ["integer", "null"]},
    ),
    tool("get_time"),
]


def of_kind(kind, thinking=True, template=""):
    """The format of a tokenizer for which mlx-lm has chosen its parser `kind`."""
    module = pytest.importorskip(f"mlx_lm.tool_parsers.{kind}")
    return detect_format(
        SimpleNamespace(
            has_thinking=thinking,
            think_start="<think>" if thinking else None,
            think_end="</think>" if thinking else None,
            has_tool_calling=True,
            tool_call_start=module.tool_call_start,
            tool_call_end=module.tool_call_end,
            tool_parser=module.parse_tool_call,
            chat_template=template,
        )
    )


HERMES, QWEN_CODER, GLM, MINIMAX = map(
    of_kind, ("json_tools", "qwen3_coder", "glm47", "minimax_m2")
)
PLAIN = OutputFormat(None, None, None)


def joined(events):
    """Events as comparable pairs: neighbouring text joined, a call as one ("call", name,
    arguments)."""
    out = []
    for event in events:
        if isinstance(event, (Text, Thinking)):
            kind = type(event).__name__.lower()
            if out and out[-1][0] == kind:
                out[-1] = (kind, out[-1][1] + event.text)
            else:
                out.append((kind, event.text))
        elif isinstance(event, ToolStart):
            out.append(("call", event.name))
        elif isinstance(event, ToolInput):
            out[-1] += (event.json,)
        elif isinstance(event, ToolEnd):
            kind, name, *pieces = out[-1]
            assert json.loads("".join(pieces)) == event.arguments
            out[-1] = (kind, name, event.arguments)
    return out


def pieces(text, cuts):
    marks = [0, *sorted(cuts), len(text)]
    return [text[start:end] for start, end in zip(marks, marks[1:])]


def parse(text, format=HERMES, tools=TOOLS, stop=(), chunks=None, **options):
    """The events of the whole text, which are the same for one piece, single characters and random
    cuts."""
    dice = random.Random(text)
    cuttings = (
        [chunks]
        if chunks
        else [[text], list(text)]
        + [
            pieces(text, [dice.randrange(len(text) + 1) for _ in range(dice.randrange(1, 12))])
            for _ in range(15)
        ]
    )
    seen = []
    for cutting in cuttings:
        parser = OutputParser(format, tools, stop, **options)
        events = [event for piece in cutting for event in parser.feed(piece)] + parser.finish()
        seen.append((joined(events), parser.stop_sequence, parser.called, parser.finished))
        assert seen[-1] == seen[0], cutting
    parse.parser = parser
    return seen[0][0]


def bash(command="ls", **more):
    return ("call", "Bash", {"command": command, **more})


LS = '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>'


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


@pytest.mark.parametrize(
    "format, text, expected",
    [
        # JSON in tags
        (HERMES, LS, [bash()]),
        (HERMES, "Let me look.\n" + LS, [("text", "Let me look.\n"), bash()]),
        (HERMES, "\n\n" + LS + "\n" + LS + "\n\n", [bash(), bash()]),
        (HERMES, LS + "\nDone.", [bash(), ("text", "Done.")]),
        (HERMES, "<think>a</think>\n\n" + LS, [("thinking", "a"), bash()]),
        (HERMES, "<think>a\n" + LS, [("thinking", "a"), bash()]),
        (HERMES, "<think>a\n" + LS + "\n</think>\n\nb", [("thinking", "a"), bash(), ("text", "b")]),
        (HERMES, LS[: -len("</tool_call>")], [bash()]),
        (HERMES, '<tool_call>{"name":"Bash","parameters":{"command":"ls"}}</tool_call>', [bash()]),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":"{\\"command\\": \\"ls\\"}"}</tool_call>',
            [bash()],
        ),
        (HERMES, '<tool_call>{"name":"Bash","arguments":{"command":"ls",},}</tool_call>', [bash()]),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":",} ",}}</tool_call>',
            [bash(",} ")],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":"a\nb\tc"}}</tool_call>',
            [bash("a\nb\tc")],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":"ls"}} thanks</tool_call>',
            [bash()],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":"ls"}}\n{"name":"get_time"}</tool_call>',
            [bash(), ("call", "get_time", {})],
        ),
        (
            HERMES,
            '<tool_call>[{"name":"Bash","arguments":{"command":"ls"}},{"name":"get_time","arguments":{}}]</tool_call>',
            [bash(), ("call", "get_time", {})],
        ),
        (HERMES, '<tool_call>{{"name":"Bash","arguments":{"command":"ls"}}}</tool_call>', [bash()]),
        (
            HERMES,
            '<tool_call>{"name":"get_time","arguments":null}</tool_call>',
            [("call", "get_time", {})],
        ),
        (HERMES, '<tool_call>{"name":"bASH","arguments":{"command":"ls"}}</tool_call>', [bash()]),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":"a </tool_call> b"}}</tool_call>',
            [bash("a </tool_call> b")],
        ),
        (HERMES, "Use <tool_call> so: " + LS, [("text", "Use <tool_call> so: "), bash()]),
        # Qwen3-Coder
        (
            QWEN_CODER,
            "<tool_call>\n<function=Bash>\n<parameter=command>\nls\n</parameter>\n<parameter=timeout>\n5\n"
            "</parameter>\n</function>\n</tool_call>",
            [bash(timeout=5)],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=Bash><parameter=command>ls</parameter></function>"
            "<function=Bash><parameter=command>pwd</parameter></function></tool_call>",
            [bash(), bash("pwd")],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=Bash><parameter=command>ls</parameter></function> ok</tool_call>",
            [bash()],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=Bash><parameter=command>ls</parameter></tool_call>",
            [bash()],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=Bash><parameter=command>ls</parameter><function=get_time></tool_call>",
            [bash(), ("call", "get_time", {})],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=Bash><parameter=command>\n\n  a\t\n\n</parameter></function></tool_call>",
            [bash("\n  a\t\n")],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=Bash><parameter=command>a</parameter>b</function>c <parameter=x></tool_call>d\n"
            "</parameter>\n</function></tool_call>",
            [bash("a</parameter>b</function>c <parameter=x></tool_call>d")],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=Bash><parameter=command>ls</parameter></function>",
            [bash()],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=get_time>\n</function></tool_call>",
            [("call", "get_time", {})],
        ),
        (
            QWEN_CODER,
            "I look.\n<function=Bash>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>\n",
            [("text", "I look.\n"), bash()],
        ),
        (
            QWEN_CODER,
            "<function=Bash><parameter=command>ls</parameter></function>\n"
            "<function=get_time></function>",
            [bash(), ("call", "get_time", {})],
        ),
        (
            QWEN_CODER,
            "so: <function=get_time></function>",
            [("text", "so: <function=get_time></function>")],
        ),
        (QWEN_CODER, "<function=other></function>", [("text", "<function=other></function>")]),
        # GLM
        (
            GLM,
            "<tool_call>Bash\n<arg_key>command</arg_key>\n<arg_value>ls</arg_value>\n<arg_key>timeout</arg_key>\n"
            "<arg_value>5</arg_value>\n</tool_call>",
            [bash(timeout=5)],
        ),
        (
            GLM,
            "<tool_call>Bash<arg_key>command</arg_key><arg_value>\n  a </arg_value></tool_call>",
            [bash("\n  a ")],
        ),
        (
            GLM,
            "<tool_call>Bash<arg_key>command</arg_key><arg_value>a</arg_value>b</tool_call>c</arg_value></tool_call>",
            [bash("a</arg_value>b</tool_call>c")],
        ),
        (GLM, "<tool_call>get_time\n</tool_call>", [("call", "get_time", {})]),
        # MiniMax
        (
            MINIMAX,
            '<minimax:tool_call>\n<invoke name="Bash">\n<parameter name="command">\n a </parameter>\n'
            '<parameter name="timeout">5</parameter>\n</invoke>\n<invoke name="get_time">\n</invoke>\n</minimax:tool_call>',
            [bash("\n a ", timeout=5), ("call", "get_time", {})],
        ),
        (
            MINIMAX,
            '<minimax:tool_call><invoke name="Bash"><parameter name="command">a</parameter>b</parameter></invoke>'
            "</minimax:tool_call>",
            [bash("a</parameter>b")],
        ),
        (
            MINIMAX,
            '<minimax:tool_call><invoke name="Bash"><parameter name="command">ls</parameter></invoke>',
            [bash()],
        ),
    ],
)
def test_calls(format, text, expected):
    assert parse(text, format) == expected
    assert parse.parser.called == any(kind == "call" for kind, *_ in expected)


@pytest.mark.parametrize(
    "format, text",
    [
        (HERMES, "<tool_call>\nnot a call\n</tool_call> after"),
        (HERMES, "<tool_call></tool_call>"),
        (HERMES, "<tool_call>"),
        (HERMES, '<tool_call>{"name":"Bash","arguments":{"comm'),
        (HERMES, '<tool_call>{"name":"Bash","arg</tool_call> after'),
        (HERMES, '<tool_call>{"name":"Unknown","arguments":{}}</tool_call>'),
        (HERMES, '<tool_call>{"name":["Bash"],"arguments":{}}</tool_call>'),
        (HERMES, '<tool_call>{"name":null,"arguments":{}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments":{}}</tool_call>'),
        (HERMES, '<tool_call>["Bash"]</tool_call>'),
        (HERMES, '<tool_call>"Bash"</tool_call>'),
        (HERMES, '<tool_call>{"name":"Bash","arguments":[1]}</tool_call>'),
        (HERMES, '<tool_call>{"name":"Bash","arguments":"ls"}</tool_call>'),
        (HERMES, "<tool_call>{'name':'Bash','arguments':{'command':'ls'}}</tool_call>"),
        (HERMES, "nothing was <tool_call> here </tool_call> <tool_call>"),
        (QWEN_CODER, "<tool_call><function=Bash>"),
        (QWEN_CODER, "<tool_call><function=Bash>\n<para"),
        (QWEN_CODER, "<tool_call>prose</tool_call>"),
        (QWEN_CODER, "<tool_call><function=Other></function></tool_call>"),
        (QWEN_CODER, "<function=Bash>ls"),
        (GLM, "<tool_call>I think so</tool_call>"),
        (GLM, "<tool_call></tool_call>"),
        (GLM, "<tool_call>Bash"),
        (GLM, "<tool_call>Bash<arg_ke"),
        (MINIMAX, '<minimax:tool_call><invoke name="Bash">'),
        (MINIMAX, "<minimax:tool_call>prose</minimax:tool_call>"),
    ],
)
def test_what_is_no_call_is_plain_text(format, text):
    chunks = pieces(text, range(0, len(text), 60_000)) if len(text) > 10_000 else None
    assert parse(text, format, chunks=chunks) == [("text", text)]
    assert not parse.parser.called


@pytest.mark.parametrize(
    "format, text, expected",
    [
        # cut off
        (HERMES, '<tool_call>{"name":"Bash","arguments":{"command":"l', [bash("l")]),
        (HERMES, '<tool_call>{"name":"Bash","arguments":{"command":"l\\', [bash("l")]),
        (HERMES, '<tool_call>{"name":"Bash","arguments":{"command":"l\\ud83d\\ude', [bash("l")]),
        (HERMES, '<tool_call>{"name":"Bash","arguments":{"command":"ls"}', [bash()]),
        (HERMES, '<tool_call>{"name":"Bash","arguments":{"command":"ls", "timeo', [bash()]),
        (
            HERMES,
            '<tool_call>{"name":"Set","arguments":{"items":[1,{"a":"b',
            [("call", "Set", {"items": [1, {"a": "b"}]})],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Set","arguments":{"items":[1,tr',
            [("call", "Set", {"items": "[1,tr"})],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=Bash><parameter=command>ls</parameter>\n<para",
            [bash()],
        ),
        (QWEN_CODER, "<tool_call><function=Bash><parameter=command>\n l\n", [bash(" l\n")]),
        (QWEN_CODER, "<function=Bash><parameter=command>ls</parameter>", [bash()]),
        (GLM, "<tool_call>Bash<arg_key>command</arg_key><arg_value>ls</arg_value>", [bash()]),
        (
            MINIMAX,
            '<minimax:tool_call><invoke name="Bash"><parameter name="command">ls</parameter>',
            [bash()],
        ),
        # an end tag that comes too soon
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":"ls"\n</tool_call>\nwell',
            [bash(), ("text", "well")],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":"l</tool_call> after',
            [bash("l</tool_call> after")],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Set","arguments":{"items":[1,2</tool_call>x',
            [("call", "Set", {"items": [1, 2]}), ("text", "x")],
        ),
        (QWEN_CODER, "<tool_call><function=Bash><parameter=command>ls</tool_call>", [bash()]),
        (GLM, "<tool_call>Bash<arg_key>command</arg_key><arg_value>ls</tool_call>", [bash()]),
        # what is no JSON
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"timeout":NaN}}</tool_call>',
            [("call", "Bash", {"timeout": "NaN"})],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"timeout":1e400}}</tool_call>',
            [("call", "Bash", {"timeout": "1e400"})],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":"\\ud83d"}}</tool_call>',
            [bash("?")],
        ),
        (
            HERMES,
            r'<tool_call>{"name":"Bash","arguments":{"command":"grep \d \' \\n \u00e9"}}</tool_call>',
            [bash("grep \\d ' \\n é")],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Bash","arguments":{"command":"echo "hi", you"}}</tool_call>',
            [bash('echo "hi", you')],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Set","arguments":{"items":[1,],"options":{\'a\': None}}}</tool_call>',
            [("call", "Set", {"items": [1], "options": {"a": None}})],
        ),
        (
            HERMES,
            '<tool_call>{"name":"Set","arguments":{"flag":true, oops}}</tool_call>x',
            [("call", "Set", {"flag": True}), ("text", "oops}}</tool_call>x")],
        ),
    ],
)
def test_a_call_that_has_begun_keeps_what_arrives(format, text, expected):
    assert parse(text, format) == expected


def test_values_nested_too_deeply_are_text():
    nested = '{"a":' * 100_000
    text = f'<tool_call>{{"name":"Bash","arguments":{{"b":{nested}</tool_call>'
    assert parse(text, chunks=pieces(text, range(0, len(text), 60_000))) == [
        ("call", "Bash", {"b": nested})
    ]


def test_a_broken_call_does_not_swallow_its_neighbours():
    broken = '<tool_call>{"name":"Bash","arguments":{"command":"pwd</tool_call>\n'
    assert parse(broken + LS) == [bash("pwd"), bash()]
    broken = '<tool_call>{"name":"Bash","arguments":["pwd</tool_call>\n'
    assert parse(broken + LS) == [("text", broken), bash()]
    broken = "<tool_call><function=Bash><parameter=command>ls</tool_call>\n"
    call = "<tool_call><function=get_time></function></tool_call>"
    assert parse(broken + call, QWEN_CODER) == [bash(), ("call", "get_time", {})]
    # One that only forgets its end tag
    assert parse(LS[: -len("</tool_call>")] + LS) == [bash(), bash()]
    other = '{"name":"Other","arguments":{}}'
    assert parse(LS[: -len("</tool_call>")] + other + "</tool_call>") == [
        bash(),
        ("text", other + "</tool_call>"),
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
    both = '<tool_call>{"name":"Bash","arguments":{"command":"ls"}}{"name":"get_time"}</tool_call> text'
    assert parse(both, parallel=False) == [bash()]


@pytest.mark.parametrize(
    "format, choice, opening, rest",
    [
        (
            HERMES,
            "Bash",
            '<tool_call>\n{"name": "Bash", "arguments": ',
            '{"command": "ls"}}\n</tool_call>',
        ),
        (HERMES, "any", "<tool_call>", LS[len("<tool_call>") :]),
        (
            QWEN_CODER,
            "Bash",
            "<tool_call>\n<function=Bash>\n",
            "<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            GLM,
            "Bash",
            "<tool_call>Bash\n",
            "<arg_key>command</arg_key><arg_value>ls</arg_value></tool_call>",
        ),
        (PLAIN, "Bash", "", '{"name": "Bash", "arguments": {"command": "ls"}}'),
        (HERMES, "auto", "", LS),
        (HERMES, "none", "", LS),
    ],
)
def test_the_opening_of_a_demanded_call(format, choice, opening, rest):
    assert format.call_prefix(choice) == opening
    assert parse(opening + rest, format) == [bash()]


@pytest.mark.parametrize(
    "family",
    [
        "hermes",
        "qwen coder",
        "seed",
        "glm",
        "minimax m2",
        "minimax m3",
        "muse",
        "deepseek v3.1",
        "deepseek v4",
        "mistral",
        "mistral, list",
        "llama 4",
        "lfm",
        "gemma 4",
        "function gemma",
        "kimi k2",
        "harmony",
    ],
)
def test_the_opening_of_a_demanded_call_is_all_up_to_its_arguments(family):
    format, start, write, _, end = FAMILIES[family]
    written = start + write("Bash", {"command": "ls"}) + end
    squeezed, opening = ("".join(text.split()) for text in (written, format.call_prefix("Bash")))
    assert squeezed.startswith(opening) and opening.rfind("Bash") > 0 and "command" not in opening
    assert "Bash" not in squeezed[len(opening) :] and parse(format.call_prefix("Bash"), format)[:1] != [
        bash()
    ]


def test_ids_are_unique():
    parser = OutputParser(HERMES, TOOLS)
    events = parser.feed(LS * 50)
    assert parser.call_ids == [event.id for event in events if isinstance(event, ToolStart)]
    ids = {event.id for event in events if isinstance(event, ToolStart)}
    assert len(ids) == 50 and all(re.fullmatch(r"toolu_[A-Za-z0-9]{24}", id) for id in ids)


def test_argument_text_keeps_unicode():
    events = OutputParser(HERMES, TOOLS).feed(LS.replace("ls", "Привет 🙂"))
    assert [event.json for event in events if isinstance(event, ToolInput)] == [
        '{"command": "Привет 🙂"}'
    ]


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


def coerced(property, schema, written):
    """What `written` inside parameter tags becomes."""
    out = parse(
        f"<tool_call><function=T><parameter={property}>\n{written}\n</parameter></function></tool_call>",
        QWEN_CODER,
        [tool("T", **({property: schema} if schema is not None else {}))],
    )
    return out[0][2][property]


@pytest.mark.parametrize(
    "schema, written, expected",
    [
        ({"type": "string"}, "123", "123"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, " {} ", " {} "),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, "", ""),
        ({"type": "string"}, '"a"', '"a"'),
        ({"type": "string"}, '\t\\n "q" 🙂\n', '\t\\n "q" 🙂\n'),
        (None, "1", "1"),
        ({}, "1", "1"),
        ({"type": ["string", "null"]}, "123", "123"),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, " 5\n", 5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "3.5", "3.5"),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, "null", "null"),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["integer", "null"]}, "None", None),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "0.5", 0.5),
        ({"type": "number"}, "1e400", "1e400"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "array"}, '["a", 1]', ["a", 1]),
        ({"type": "array"}, "{}", "{}"),
        ({"type": "object"}, '{"a":1}', {"a": 1}),
        ({"type": "object"}, "{'a'", "{'a'"),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "7", 7),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", "7"),
        ({"oneOf": [{"type": "integer"}, {"$ref": "#/x"}]}, "7", "7"),
        ({"allOf": [{"type": "integer"}, {"minimum": 1}]}, "7", 7),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", 2]}, "2", "2"),
        ({"type": 5}, "5", "5"),
        ({"type": [[], 5]}, "5", "5"),
        ("bar", "5", "5"),
        ([], "5", "5"),
        ({"anyOf": "x", "enum": 3}, "5", "5"),
        ({"type": "strange"}, "5", "5"),
    ],
)
def test_coercion(schema, written, expected):
    if len(written) > 10_000:  # single characters would take long
        text = f"<tool_call><function=T><parameter=p>{written}</parameter></function></tool_call>"
        assert parse(text, QWEN_CODER, [tool("T", p=schema)], chunks=[text])[0][2] == {
            "p": expected
        }
    else:
        value = coerced("p", schema, written)
        assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "parameters", [None, {}, {"properties": None}, {"properties": [1]}, "x", {"type": "object"}]
)
def test_strange_parameter_schemas(parameters):
    tools = [{"type": "function", "function": {"name": "Bash", "parameters": parameters}}]
    assert parse(LS, tools=tools) == [bash()]
    assert parse(
        '<|tool_call>call:Bash{command:<|"|>ls<|"|>}<tool_call|>', of_kind("gemma4"), tools
    ) == [bash()]


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"p": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}},
        {"additionalProperties": {"type": "integer"}},
        {
            "$ref": "#/$defs/all",
            "$defs": {
                "all": {
                    "properties": {"p": {"anyOf": [{"const": 7}, {"$ref": "#/$defs/all"}]}},
                    "type": "object",
                }
            },
        },
        {"allOf": [{"properties": {"p": {"type": "integer"}}}]},
        {"oneOf": [{"properties": {"p": {"enum": [7]}}}, {"properties": {}}]},
    ],
)
def test_types_are_found_behind_references_and_combinations(parameters):
    tools = [{"type": "function", "function": {"name": "T", "parameters": parameters}}]
    assert parse(
        "<tool_call><function=T><parameter=p>7</parameter></function></tool_call>",
        QWEN_CODER,
        tools,
    ) == [("call", "T", {"p": 7})]


def test_json_arguments_are_coerced_and_strings_are_not():
    arguments = {
        "flag": "true",
        "ratio": "0.5",
        "items": "[1]",
        "options": '{"a": 1}',
        "maybe": "null",
        "count": "null",
        "undeclared": "5",
    }
    text = f"<tool_call>{json.dumps({'name': 'Set', 'arguments': arguments})}</tool_call>"
    assert parse(text) == [
        (
            "call",
            "Set",
            {
                "flag": True,
                "ratio": 0.5,
                "items": [1],
                "options": {"a": 1},
                "maybe": "null",
                "count": None,
                "undeclared": "5",
            },
        )
    ]


@pytest.mark.parametrize(
    "kind, text, expected",
    [
        (
            "mistral",
            '[TOOL_CALLS]Bash[ARGS]{"command": "ls"}get_time[ARGS]{}',
            [bash(), ("call", "get_time", {})],
        ),
        ("mistral", '[TOOL_CALLS][{"name": "Bash", "arguments": {"command": "ls"}}]', [bash()]),
        ("mistral", "[TOOL_CALLS]prose", None),
        ("mistral", "[TOOL_CALLS]Bash[CALL_ID]x[ARGS]{}", [("call", "Bash", {})]),
        ("mistral", '[TOOL_CALLS]{"name": "Bash", "arguments": {"command": "ls"}}', [bash()]),
        ("mistral", '[TOOL_CALLS]Bash{"command": "ls"}', [bash()]),
        (
            "mistral",
            '[TOOL_CALLS]Bash[ARGS]{"command": "ls"}[TOOL_CALLS]get_time[ARGS]{}',
            [bash(), ("call", "get_time", {})],
        ),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "Bash", "arguments": {"command": "ls"}, "id": "12345678a"}] Done.',
            [bash(), ("text", "Done.")],
        ),
        (
            "mistral",
            '[TOOL_CALLS]Bash[ARGS]{"command": "ls"}\nBash runs it.',
            [bash(), ("text", "Bash runs it.")],
        ),
        ("mistral", '[TOOL_CALLS]Bash[ARGS]{"comm', None),
        ("gemma4", '<|tool_call>call:Bash{command:<|"|>ls<|"|>}<tool_call|>', [bash()]),
        ("gemma4", "<|tool_call>call:Bash{command:ls}<tool_call|>", [bash()]),
        (
            "gemma4",
            '<|tool_call>call:Set{options:{a-b.c:[<|"|>{,x:<|"|>,true]},ratio:0.5}<tool_call|>',
            [("call", "Set", {"options": {"a-b.c": ["{,x:", True]}, "ratio": 0.5})],
        ),
        (
            "function_gemma",
            "<start_function_call>call:Bash{command:<escape>ls<escape>}<end_function_call>",
            [bash()],
        ),
        (
            "function_gemma",
            "<start_function_call>call:Bash{a:{b:1}}<end_function_call>",
            [("call", "Bash", {"a": {"b": 1}})],
        ),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.Bash:0<|tool_call_argument_begin|>"
            '{"command": "ls"}<|tool_call_end|><|tool_calls_section_end|>',
            [bash()],
        ),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.Bash:0<|tool_call_argument_begin|>"
            '{"command": "l<|tool_call_end|><|tool_calls_section_end|>',
            [bash("l<|tool_call_end|>")],
        ),
        (
            "pythonic",
            '<|tool_call_start|>[Bash(command="ls"), get_time()]<|tool_call_end|>',
            [bash(), ("call", "get_time", {})],
        ),
        ("pythonic", "<|tool_call_start|>Bash('ls')<|tool_call_end|>", None),
        (
            "pythonic",
            "<|tool_call_start|>[Bash(command={1, 2})]<|tool_call_end|>",
            [bash("{1, 2}")],
        ),
        (
            "pythonic",
            r"<|tool_call_start|>Set(flag=True, options={'a': [None, 'x']}, maybe='it\'s')<|tool_call_end|>",
            [("call", "Set", {"flag": True, "options": {"a": [None, "x"]}, "maybe": "it's"})],
        ),
        (
            "pythonic",
            '<|tool_call_start|>[Set(options={"a": [null]})]<|tool_call_end|>',
            [("call", "Set", {"options": {"a": [None]}})],
        ),
        ("longcat", "<longcat_tool_call>prose</longcat_tool_call>", None),
        (
            "longcat",
            "<longcat_tool_call>Bash<longcat_arg_key>command</longcat_arg_key><longcat_arg_value>ls"
            "</longcat_arg_value>",
            [bash()],
        ),
        ("minicpm5", '<function name="Bash"><param name="command">ls</param></function>', [bash()]),
        ("minicpm5", '<function name="Bash"><param name="command">ls</par', None),
    ],
)
def test_parsers_of_mlx_lm(kind, text, expected):
    assert parse(text, of_kind(kind)) == (expected or [("text", text)])


# ------------------------------------------------------------------ each family's own way to write a call


def tokenizer(template="", tokens=(), **more):
    """A tokenizer of which only the chat template's text or the special tokens are known."""
    return SimpleNamespace(
        has_thinking=False,
        has_tool_calling=False,
        chat_template=template,
        added_tokens_decoder={n: SimpleNamespace(content=token) for n, token in enumerate(tokens)},
        **more,
    )


def marked(*marks):
    return detect_format(tokenizer(" ".join(marks)))


NASTY = {
    "command": '\n  \tdef f(x):\n\treturn "a\\n" + \'\\\\\' # </parameter> </arg_value> <x> [/] }{ "}" 🙂 \u2028 é\n\n',
    "timeout": 5000,
    "flag": True,
    "ratio": -0.5,
    "items": ['a "b"', {"c": [1, None]}],
    "options": {"k-1.x": "}, {\n"},
    "maybe": "null",
    "count": None,
    "digits": "123",
    "empty": "",
    "blank": " \n",
    "truth": "true",
    "list": "[1, 2]",
    "tag": "</tool_call> no </function> no",
}
TYPES = {
    str: "string",
    int: "integer",
    bool: "boolean",
    float: "number",
    list: "array",
    dict: "object",
    type(None): ["integer", "null"],
}
NASTY_TOOL = tool("Nasty", **{key: {"type": TYPES[type(value)]} for key, value in NASTY.items()})


def plain(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def gemma(value, quote):
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(item, quote)}" for key, item in value.items()) + "}"
    return (
        "[" + ",".join(gemma(item, quote) for item in value) + "]"
        if isinstance(value, list)
        else json.dumps(value)
    )


def tags(call, argument, end, type_of=lambda value: ""):
    def write(name, arguments):
        return (
            call.replace("N", name, 1)
            + "".join(
                argument.replace("TYPE", type_of(value))
                .replace("KEY", key)
                .replace("VALUE", plain(value))
                for key, value in arguments.items()
            )
            + end
        )

    return write


def named_json(head, end, ascii=False):
    return lambda name, arguments: (
        head.replace("NAME", name) + json.dumps(arguments, ensure_ascii=ascii) + end
    )


def truth(value):
    return str(isinstance(value, str)).lower()


JSON = named_json('{"name": "NAME", "arguments": ', "}")
PARAMETERS = named_json('{"type": "function", "name": "NAME", "parameters": ', "}")
FUNCTION = tags("<function=N>\n", "<parameter=KEY>\nVALUE\n</parameter>\n", "</function>")
PAIRS = ("N\n", "<PREarg_key>KEY</PREarg_key>\n<PREarg_value>VALUE</PREarg_value>\n", "")
INVOKE = (
    '<PREinvoke name="N">\n',
    '<PREparameter name="KEY">VALUE</PREparameter>\n',
    "</PREinvoke>\n",
)
DSML = (INVOKE[0], '<PREparameter name="KEY" string="TYPE">VALUE</PREparameter>\n', INVOKE[2])
M3 = "]<]minimax[>["


def prefixed(parts, prefix, *type_of):
    return tags(*(part.replace("PRE", prefix) for part in parts), *type_of)


def kimi_type(value):
    return "string" if isinstance(value, str) else "object"


def python(name, arguments):
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def gemma_call(quote):
    return lambda name, arguments: f"call:{name}" + gemma(arguments, quote)


# Format, what opens a block, how one call is written, what separates calls, what closes the block
FAMILIES = {
    "hermes": (HERMES, "<tool_call>\n", JSON, "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    "hermes, ascii": (
        HERMES,
        "<tool_call>",
        named_json('{"name":"NAME","arguments":', "}", True),
        "\n",
        "</tool_call>",
    ),
    "qwen coder": (
        QWEN_CODER,
        "<tool_call>\n",
        FUNCTION,
        "\n</tool_call>\n<tool_call>\n",
        "\n</tool_call>",
    ),
    "seed": (
        marked("<seed:tool_call>"),
        "<seed:tool_call>\n",
        FUNCTION,
        "\n",
        "\n</seed:tool_call>",
    ),
    "glm": (GLM, "<tool_call>", prefixed(PAIRS, ""), "</tool_call>\n<tool_call>", "</tool_call>"),
    "longcat": (
        of_kind("longcat"),
        "<longcat_tool_call>",
        prefixed(PAIRS, "longcat_"),
        "</longcat_tool_call>\n<longcat_tool_call>",
        "</longcat_tool_call>",
    ),
    "minimax m2": (
        MINIMAX,
        "<minimax:tool_call>\n",
        prefixed(INVOKE, ""),
        "",
        "</minimax:tool_call>",
    ),
    "minimax m3": (
        marked(M3),
        f"{M3}<tool_call>\n",
        tags(f'{M3}<invoke name="N">', f"{M3}<KEY>VALUE{M3}</KEY>", f"{M3}</invoke>\n"),
        "",
        f"{M3}</tool_call>",
    ),
    "muse": (
        of_kind("muse_spark"),
        "<atem:function_calls>\n",
        prefixed(INVOKE, "atem:"),
        "",
        "</atem:function_calls>",
    ),
    "deepseek r1": (
        marked("<｜tool▁calls▁begin｜>"),
        "<｜tool▁calls▁begin｜>",
        named_json(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n", "\n```<｜tool▁call▁end｜>"
        ),
        "\n",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek v3.1": (
        marked("<｜tool▁calls▁begin｜>"),
        "<｜tool▁calls▁begin｜>",
        named_json("<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        "",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek v3.2": (
        detect_format(tokenizer(tokens=["｜DSML｜"])),
        "<｜DSML｜function_calls>\n",
        prefixed(DSML, "｜DSML｜", truth),
        "",
        "</｜DSML｜function_calls>",
    ),
    "deepseek v4": (
        marked("<｜DSML｜tool_calls>"),
        "<｜DSML｜tool_calls>\n",
        prefixed(DSML, "｜DSML｜", truth),
        "",
        "</｜DSML｜tool_calls>",
    ),
    "deepseek v4.1": (
        marked("<｜DSML｜ calls>"),
        "<｜DSML｜ calls>\n",
        prefixed(DSML, "｜DSML｜ ", truth),
        "",
        "</｜DSML｜ calls>",
    ),
    "mistral": (
        of_kind("mistral", template="[ARGS]"),
        "[TOOL_CALLS]",
        named_json("NAME[ARGS]", ""),
        "[TOOL_CALLS]",
        "",
    ),
    "mistral, ids": (
        of_kind("mistral", template="[ARGS]"),
        "[TOOL_CALLS]",
        named_json("NAME[CALL_ID]abcdefg12[ARGS]", ""),
        "",
        "",
    ),
    "mistral, list": (
        of_kind("mistral"),
        "[TOOL_CALLS][",
        named_json('{"name": "NAME", "arguments": ', ', "id": "123456789"}'),
        ", ",
        "]",
    ),
    "llama": (marked("<|python_tag|>"), "<|python_tag|>", PARAMETERS, "; ", ""),
    "llama, untagged": (
        detect_format(tokenizer(tokens=["<|python_tag|>"])),
        "",
        PARAMETERS,
        "; ",
        "",
    ),
    "llama 4": (marked("<|python_start|>"), "<|python_start|>[", python, ", ", "]<|python_end|>"),
    "llama 4, untagged": (marked("<|python_start|>"), "[", python, ", ", "]"),
    "lfm": (of_kind("pythonic"), "<|tool_call_start|>[", python, ", ", "]<|tool_call_end|>"),
    "gemma 4": (
        of_kind("gemma4"),
        "<|tool_call>",
        gemma_call('<|"|>'),
        "<tool_call|><|tool_call>",
        "<tool_call|>",
    ),
    "function gemma": (
        of_kind("function_gemma"),
        "<start_function_call>",
        gemma_call("<escape>"),
        "<end_function_call><start_function_call>",
        "<end_function_call>",
    ),
    "kimi k2": (
        of_kind("kimi_k2"),
        "<|tool_calls_section_begin|>",
        named_json(
            "<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>", "<|tool_call_end|>"
        ),
        "",
        "<|tool_calls_section_end|>",
    ),
    "kimi k3": (
        of_kind("kimi_k3"),
        "<|open|>tools<|sep|>",
        tags(
            '<|open|>call tool="N" index="1"<|sep|>',
            '<|open|>argument key="KEY" type="TYPE"<|sep|>VALUE<|close|>argument<|sep|>',
            "<|close|>call<|sep|>",
            kimi_type,
        ),
        "",
        "<|close|>tools<|sep|>",
    ),
    "kimi k3, json": (
        of_kind("kimi_k3"),
        "<|open|>tools<|sep|>",
        named_json(
            '<|open|>call tool="NAME" index="1"<|sep|><|open|>json type="object"<|sep|>',
            "<|close|>json<|sep|><|close|>call<|sep|>",
        ),
        "",
        "<|close|>tools<|sep|>",
    ),
    "granite": (marked("<|tool_call|>"), "<|tool_call|>[", JSON, ", ", "]"),
    "phi 4": (
        detect_format(tokenizer(tokens=["<|tool_call|>", "<|/tool_call|>"])),
        "<|tool_call|>[",
        JSON,
        ", ",
        "]<|/tool_call|>",
    ),
    "phi 4, functools": (marked("functools["), "functools[", JSON, ", ", "]"),
    "nemotron": (marked("<TOOLCALL>"), "<TOOLCALL>[", JSON, ", ", "]</TOOLCALL>"),
    "harmony": (
        marked("<|channel|>"),
        "",
        named_json("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", ""),
        None,
        "<|call|>",
    ),
    "harmony, recipient first": (
        marked("<|channel|>"),
        "",
        named_json(" to=functions.NAME<|channel|>commentary json<|message|>", ""),
        None,
        "<|call|>",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gets_its_own_calls_back(family):
    format, start, write, between, end = FAMILIES[family]
    tools = [NASTY_TOOL, *TOOLS]
    one = start + write("Nasty", NASTY) + end
    assert parse(one, format, tools) == [("call", "Nasty", NASTY)]
    assert parse(start + write("get_time", {}) + end, format, tools) == [("call", "get_time", {})]
    if between is not None:
        both = start + write("Nasty", NASTY) + between + write("Bash", {"command": "ls"}) + end
        assert parse(both, format, tools) == [("call", "Nasty", NASTY), bash()]
        assert parse(both, format, tools, parallel=False) == [("call", "Nasty", NASTY)]


@pytest.mark.parametrize("family", FAMILIES)
def test_long_strings_stream_in_every_family(family):
    format, start, write, _, end = FAMILIES[family]
    text = start + write("Write", {"content": "line\n" * 50, "file_path": "a"}) + end
    parser, started, seen = OutputParser(format, TOOLS), None, ""
    for at, letter in enumerate(text):
        for event in parser.feed(letter):
            started = at if isinstance(event, ToolStart) else started
            seen += event.json if isinstance(event, ToolInput) else ""
        arrived = text[: at + 1].rpartition("line")[0]
        # At most a few characters wait for what may end the value
        if started and arrived.endswith(("line\n", "line\\n")):
            assert seen.count("line") >= arrived.count("line") - 1
    assert (
        started < text.index("line")
        and seen.startswith('{"content": "line\\nline')
        and json.loads(seen)["file_path"] == "a"
    )


LLAMA = detect_format(tokenizer(tokens=["<|python_tag|>"]))


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            '{"name": "Bash", "parameters": {"command": "ls"}} and text',
            [bash(), ("text", "and text")],
        ),
        ('{"name": "Bash", "parameters": {"command": "l', [bash("l")]),
        ('{"name": "Bash"} is how', [("text", '{"name": "Bash"} is how')]),
        ('{"name": "Other", "parameters": {}}', [("text", '{"name": "Other", "parameters": {}}')]),
        ("<|python_tag|>print(1)", [("text", "<|python_tag|>print(1)")]),
    ],
)
def test_a_model_that_writes_calls_without_tags(text, expected):
    assert parse(text, LLAMA) == expected


def test_values_that_the_schema_may_change_wait():
    parser = OutputParser(HERMES, TOOLS)
    parser.feed('<tool_call>{"name": "Bash", "arguments": {"timeout": "50')
    assert joined(parser.feed("00")) == []
    assert [event.json for event in parser.feed('", "command": "l')] == ['5000, "command": "l']


HARMONY = marked("<|channel|>")


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
            [("thinking", "hm"), ("text", "Hi")],
        ),
        ("<|channel|>final<|message|>Hi", [("text", "Hi")]),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
            "<|channel|>commentary to=functions.Bash <|constrain|>json<|message|>"
            '{"command":"ls"}<|call|>',
            [("thinking", "hm"), bash()],
        ),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.Bash<|channel|>commentary json<|message|>"
            '{"command":"ls"}',
            [("thinking", "hm"), bash()],
        ),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>analysis to=functions.Bash code<|message|>"
            '{"command":"ls"}<|call|>',
            [("text", "I look."), bash()],
        ),
        (
            "<|channel|>analysis<|message|>hm<|channel|>final<|message|>Hi",
            [("thinking", "hm"), ("text", "Hi")],
        ),
        ("<|channel|>final<|message|>Hi<|return|>and more", [("text", "Hi")]),
        (
            "<|channel|>commentary to=python <|message|>1",
            [("text", "<|channel|>commentary to=python <|message|>1")],
        ),
    ],
)
def test_harmony(text, expected):
    assert parse(text, HARMONY) == expected


def test_what_tells_a_format():
    hermes = detect_format(tokenizer("... <tool_call> ..."))
    assert (
        hermes.call == ("<tool_call>", "</tool_call>")
        and detect_format(tokenizer(tokens=["<tool_call>"])) == hermes
    )
    # the template knows better than the vocabulary of the model it was made for
    assert detect_format(tokenizer("<tool_call>", ["<|python_tag|>"])) == hermes
    # mlx-lm takes MiniMax-M3 for a Hermes model
    found = detect_format(
        SimpleNamespace(**{**vars(tokenizer(M3)), "has_tool_calling": True, "tool_parser": parse})
    )
    assert found.call == (M3 + "<tool_call>", M3 + "</tool_call>")
    assert marked("<seed:think>").thinking == ("<seed:think>", "</seed:think>")
    assert marked("[THINK]").thinking == ("[THINK]", "[/THINK]")


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


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_calls_depend_on_the_text_alone(family):
    """Calls of each family with pieces cut out, put in or moved: any cutting gives the same valid
    events."""
    dice = random.Random(family)
    format, start, write, _, end = FAMILIES[family]
    parts = [
        '"',
        "{",
        "}",
        "]",
        ",",
        "\\",
        "\n",
        "x",
        "</tool_call>",
        "<tool_call>",
        "</parameter>",
        start,
        end,
    ]
    for _ in range(12):
        text = (
            start
            + write("Nasty", dict(dice.sample(list(NASTY.items()), 3)))
            + end
            + start
            + write("Bash", {"command": "ls"})
            + end
        )
        for _ in range(dice.randrange(1, 4)):
            at, other = dice.randrange(len(text)), dice.randrange(len(text))
            text = (
                text[:at]
                + dice.choice([dice.choice(parts), "", text[other : other + 20]])
                + text[at + dice.randrange(9) :]
            )
        parse(text, format, [NASTY_TOOL, *TOOLS])


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
