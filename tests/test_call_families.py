"""Each family's own way to write a call, and how a model's family is found."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
from call_families import FAMILIES, M3, NASTY, NASTY_TOOL
from parsing import (
    GLM,
    HERMES,
    LS,
    PLAIN,
    QWEN_CODER,
    TOOLS,
    bash,
    marked,
    of_kind,
    parse,
    tokenizer,
)

from _mlx_server.inference.output.families import detect_format
from _mlx_server.inference.output.parser import OutputParser
from engine import ToolInput, ToolStart


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
    assert "Bash" not in squeezed[len(opening) :]
    assert parse(format.call_prefix("Bash"), format)[:1] != [bash()]


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
            '[TOOL_CALLS][{"name": "Bash", "arguments": {"command": "ls"}, "id": "12345678a"}]'
            " Done.",
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
            "<|tool_calls_section_begin|><|tool_call_begin|>"
            "functions.Bash:0<|tool_call_argument_begin|>"
            '{"command": "ls"}<|tool_call_end|><|tool_calls_section_end|>',
            [bash()],
        ),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>"
            "functions.Bash:0<|tool_call_argument_begin|>"
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
            r"<|tool_call_start|>Set(flag=True, options={'a': [None, 'x']}, maybe='it\'s')"
            "<|tool_call_end|>",
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
        (
            "minicpm5",
            '<function name="Bash"><param name="command"> \n<![CDATA[a </param> b]]>\n</param>'
            "\n<param name='timeout'>5</param>\n</function>",
            [bash("a </param> b", timeout=5)],
        ),
        (
            "minicpm5",
            '<function name="Bash"><param name="command"><![x]></param></function>',
            [bash("<![x]>")],
        ),
        ("minicpm5", '<function name="Bash"><param name="command">ls</par', [bash("ls</par")]),
        ("minicpm5", '<function name="Bash"> runs </function>', None),
    ],
)
def test_parsers_of_mlx_lm(kind, text, expected):
    assert parse(text, of_kind(kind)) == (expected or [("text", text)])


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
    seen += "".join(event.json for event in parser.finish() if isinstance(event, ToolInput))
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


HARMONY = marked("<|channel|>")


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "<|channel|>analysis<|message|>hm<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Hi<|return|>",
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
            "<|channel|>analysis<|message|>hm<|end|>"
            "<|start|>assistant to=functions.Bash<|channel|>commentary json<|message|>"
            '{"command":"ls"}',
            [("thinking", "hm"), bash()],
        ),
        (
            "<|channel|>commentary<|message|>I look.<|end|>"
            "<|start|>assistant<|channel|>analysis to=functions.Bash code<|message|>"
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


@pytest.mark.slow
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


def test_text_that_looks_like_a_call_of_another_family_streams():
    parser = OutputParser(of_kind("pythonic"), TOOLS)
    assert [bool(parser.feed(piece)) for piece in ("[Bash", "(x)", " is")] == [True] * 3
