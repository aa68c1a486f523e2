"""What the tests of the parser share: tools, formats, and events in a form that can be compared."""

from __future__ import annotations

import itertools
import json
import random
from types import SimpleNamespace

import pytest

from _mlx_server.inference.output.families import detect_format
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.output.parser import OutputParser
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
    return [text[start:end] for start, end in itertools.pairwise(marks)]


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
