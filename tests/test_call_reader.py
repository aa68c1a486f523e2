"""Tool calls, whole and broken ones: what becomes of their arguments."""

from __future__ import annotations

import json

import pytest
from parsing import (
    GLM,
    HERMES,
    LS,
    MINIMAX,
    QWEN_CODER,
    TOOLS,
    bash,
    joined,
    of_kind,
    parse,
    pieces,
    tool,
)

from _mlx_server.inference.output.parser import OutputParser
from engine import ToolInput

GET_TIME = ("call", "get_time", {})
LS_JSON = '{"name":"Bash","arguments":{"command":"ls"}}'
LS_FUNCTION = "<function=Bash><parameter=command>ls</parameter></function>"
LS_INVOKE = '<invoke name="Bash"><parameter name="command">ls</parameter></invoke>'


def set_(**arguments):
    return ("call", "Set", arguments)


def hermes(text, *expected):
    return HERMES, f"<tool_call>{text}</tool_call>", list(expected)


def qwen(text, *expected):
    return QWEN_CODER, f"<tool_call>{text}</tool_call>", list(expected)


def glm(text, *expected):
    return GLM, f"<tool_call>{text}</tool_call>", list(expected)


def minimax(text, *expected):
    return MINIMAX, f"<minimax:tool_call>{text}</minimax:tool_call>", list(expected)


def cut(case):
    """A case without its end tag."""
    format, text, expected = case
    return format, text.removesuffix(format.call[1]), expected


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
        hermes('{"name":"Bash","parameters":{"command":"ls"}}', bash()),
        hermes(r'{"name":"Bash","arguments":"{\"command\": \"ls\"}"}', bash()),
        hermes('{"name":"Bash","arguments":{"command":"ls",},}', bash()),
        hermes('{"name":"Bash","arguments":{"command":",} ",}}', bash(",} ")),
        hermes('{"name":"Bash","arguments":{"command":"a\nb\tc"}}', bash("a\nb\tc")),
        hermes('{"name":"Bash","arguments":{"command":"ls"}} thanks', bash()),
        hermes(f'{LS_JSON}\n{{"name":"get_time"}}', bash(), GET_TIME),
        hermes(f'[{LS_JSON},{{"name":"get_time","arguments":{{}}}}]', bash(), GET_TIME),
        hermes(f"{{{LS_JSON}}}", bash()),
        hermes('{"name":"get_time","arguments":null}', GET_TIME),
        hermes('{"name":"bASH","arguments":{"command":"ls"}}', bash()),
        hermes(
            '{"name":"Bash","arguments":{"command":"a </tool_call> b"}}', bash("a </tool_call> b")
        ),
        (HERMES, "Use <tool_call> so: " + LS, [("text", "Use <tool_call> so: "), bash()]),
        # Qwen3-Coder
        qwen(
            "\n<function=Bash>\n<parameter=command>\nls\n</parameter>\n"
            "<parameter=timeout>\n5\n</parameter>\n</function>\n",
            bash(timeout=5),
        ),
        qwen(f"{LS_FUNCTION}{LS_FUNCTION.replace('ls', 'pwd')}", bash(), bash("pwd")),
        qwen(f"{LS_FUNCTION} ok", bash()),
        qwen("<function=Bash><parameter=command>ls</parameter>", bash()),
        qwen(
            "<function=Bash><parameter=command>ls</parameter><function=get_time>", bash(), GET_TIME
        ),
        qwen(
            "<function=Bash><parameter=command>\n\n  a\t\n\n</parameter></function>",
            bash("\n  a\t\n"),
        ),
        qwen(
            "<function=Bash><parameter=command>a</parameter>b</function>c <parameter=x>"
            "</tool_call>d\n</parameter>\n</function>",
            bash("a</parameter>b</function>c <parameter=x></tool_call>d"),
        ),
        cut(qwen(LS_FUNCTION, bash())),
        qwen("<function=get_time>\n</function>", GET_TIME),
        (
            QWEN_CODER,
            "I look.\n<function=Bash>\n<parameter=command>\nls\n</parameter>\n</function>\n"
            "</tool_call>\n",
            [("text", "I look.\n"), bash()],
        ),
        (QWEN_CODER, f"{LS_FUNCTION}\n<function=get_time></function>", [bash(), GET_TIME]),
        (
            QWEN_CODER,
            "so: <function=get_time></function>",
            [("text", "so: <function=get_time></function>")],
        ),
        (QWEN_CODER, "<function=other></function>", [("text", "<function=other></function>")]),
        # GLM
        glm(
            "Bash\n<arg_key>command</arg_key>\n<arg_value>ls</arg_value>\n"
            "<arg_key>timeout</arg_key>\n<arg_value>5</arg_value>\n",
            bash(timeout=5),
        ),
        glm(
            "Bash<arg_key>command</arg_key><arg_value>\n  a </arg_value>",
            bash("\n  a "),
        ),
        glm(
            "Bash<arg_key>command</arg_key><arg_value>a</arg_value>b</tool_call>c</arg_value>",
            bash("a</arg_value>b</tool_call>c"),
        ),
        glm("get_time\n", GET_TIME),
        # MiniMax
        minimax(
            '\n<invoke name="Bash">\n<parameter name="command">\n a </parameter>\n'
            '<parameter name="timeout">5</parameter>\n</invoke>\n'
            '<invoke name="get_time">\n</invoke>\n',
            bash("\n a ", timeout=5),
            GET_TIME,
        ),
        minimax(LS_INVOKE.replace("ls", "a</parameter>b"), bash("a</parameter>b")),
        cut(minimax(LS_INVOKE, bash())),
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
        cut(hermes('{"name":"Bash","arguments":{"command":"l', bash("l"))),
        cut(hermes('{"name":"Bash","arguments":{"command":"l\\', bash("l"))),
        cut(hermes('{"name":"Bash","arguments":{"command":"l\\ud83d\\ude', bash("l"))),
        cut(hermes('{"name":"Bash","arguments":{"command":"ls"}', bash())),
        cut(hermes('{"name":"Bash","arguments":{"command":"ls", "timeo', bash())),
        cut(hermes('{"name":"Set","arguments":{"items":[1,{"a":"b', set_(items=[1, {"a": "b"}]))),
        cut(hermes('{"name":"Set","arguments":{"items":[1,tr', set_(items="[1,tr"))),
        cut(qwen("<function=Bash><parameter=command>ls</parameter>\n<para", bash())),
        cut(qwen("<function=Bash><parameter=command>\n l\n", bash(" l\n"))),
        (QWEN_CODER, "<function=Bash><parameter=command>ls</parameter>", [bash()]),
        cut(glm("Bash<arg_key>command</arg_key><arg_value>ls</arg_value>", bash())),
        cut(minimax('<invoke name="Bash"><parameter name="command">ls</parameter>', bash())),
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
            [set_(items=[1, 2]), ("text", "x")],
        ),
        qwen("<function=Bash><parameter=command>ls", bash()),
        glm("Bash<arg_key>command</arg_key><arg_value>ls", bash()),
        # what is no JSON
        hermes('{"name":"Bash","arguments":{"timeout":NaN}}', ("call", "Bash", {"timeout": "NaN"})),
        hermes(
            '{"name":"Bash","arguments":{"timeout":1e400}}', ("call", "Bash", {"timeout": "1e400"})
        ),
        hermes(r'{"name":"Bash","arguments":{"command":"\ud83d"}}', bash("?")),
        hermes(
            r'{"name":"Bash","arguments":{"command":"grep \d \' \\n \u00e9"}}',
            bash("grep \\d ' \\n é"),
        ),
        hermes('{"name":"Bash","arguments":{"command":"echo "hi", you"}}', bash('echo "hi", you')),
        hermes(
            """{"name":"Set","arguments":{"items":[1,],"options":{'a': None}}}""",
            set_(items=[1], options={"a": None}),
        ),
        (
            HERMES,
            '<tool_call>{"name":"Set","arguments":{"flag":true, oops}}</tool_call>x',
            [set_(flag=True), ("text", "oops}}</tool_call>x")],
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


def test_argument_text_keeps_unicode():
    events = OutputParser(HERMES, TOOLS).feed(LS.replace("ls", "Привет 🙂"))
    assert [event.json for event in events if isinstance(event, ToolInput)] == [
        '{"command": "Привет 🙂"}'
    ]


def test_values_that_the_schema_may_change_wait():
    parser = OutputParser(HERMES, TOOLS)
    parser.feed('<tool_call>{"name": "Bash", "arguments": {"timeout": "50')
    assert joined(parser.feed("00")) == []
    assert [event.json for event in parser.feed('", "command": "l')] == ['5000, "command": "l']


def coerced(property, schema, written):
    """What `written` inside parameter tags becomes."""
    function = f"<function=T><parameter={property}>\n{written}\n</parameter></function>"
    tools = [tool("T", **({property: schema} if schema is not None else {}))]
    return parse(f"<tool_call>{function}</tool_call>", QWEN_CODER, tools)[0][2][property]


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


def test_a_backslash_before_a_quote_that_is_a_tag_escapes_nothing():
    text = '<|tool_call>call:Bash{command:[<|"|>a\\<|"|>,<|"|>b<|"|>]}<tool_call|>'
    schema = {"type": "object", "properties": {"command": {"type": "array"}}}
    tools = [{"type": "function", "function": {"name": "Bash", "parameters": schema}}]
    assert parse(text, of_kind("gemma4"), tools) == [bash(["a\\", "b"])]
