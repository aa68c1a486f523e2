"""How each family of models writes its thinking and its tool calls: one table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.call_syntax import BARE_KEY, JSON_START, CallSyntax, call_syntax
from _mlx_server.inference.grammar import ArgumentsGrammar, json_rule
from _mlx_server.inference.json_calls import Calls, ParseCalls, parse_json_calls
from _mlx_server.inference.protocol import InvalidRequest
from _mlx_server.inference.schema import EMPTY_SCHEMA, can_end


def _wrap(parse: Callable[[str, list[dict]], Any]) -> ParseCalls:
    """An mlx-lm parser in our form. The ids some of them return are not unique and are left
    behind."""

    def parse_calls(text: str, tools: list[dict]) -> Calls:
        calls = parse(text, tools)
        return [
            (call["name"], call["arguments"])
            for call in (calls if isinstance(calls, list) else [calls])
        ]

    return parse_calls


def _pairs(prefix: str = "") -> CallSyntax:
    """`N<arg_key>K</arg_key><arg_value>V</arg_value>…` (GLM)."""
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    return call_syntax(
        rf"\s*([^<>\n{{]+?)\s*(?=<{key}>|</{prefix}tool_call>)",
        r"\s*",
        (f"<{key}>",),
        rf"\s*<{key}>([^<]*)</{key}>\s*<{value}>",
        close=f"</{value}>",
        opening="NAME\n",
        written=(f"<{key}>KEY</{key}>\n<{value}>", f"</{value}>\n", "", ""),
    )


def _invokes(prefix: str = "", kind: Callable[[str], str] | None = None) -> CallSyntax:
    """`<invoke name="N"><parameter name="K">V</parameter></invoke>` (MiniMax, DeepSeek, Muse), with
    a prefix in each tag."""
    name = r"""\bname=["']?([^"'<>\n]+)["']?"""
    mark = ' string="KIND"' if kind else ""
    return call_syntax(
        rf"\s*<{prefix}invoke [^<>]*?{name}[^<>]*>(?=\s*<(?:{prefix}parameter|/{prefix}invoke))",
        rf"\s*(?:</{prefix}invoke>)?\s*",
        (f"<{prefix}parameter ", f"</{prefix}invoke>", f"<{prefix}invoke "),
        rf"""\s*<{prefix}parameter [^<>]*?{name}(?: string="(\w+)")?[^<>]*>""",
        close=f"</{prefix}parameter>",
        opening=f'\n<{prefix}invoke name="NAME">\n',
        kind=kind,
        written=(
            f'<{prefix}parameter name="KEY"{mark}>',
            f"</{prefix}parameter>\n",
            "",
            f"</{prefix}invoke>\n",
        ),
    )


NAME_AND_JSON = call_syntax(
    r'\s*(?:```(?:json)?)?[\s,;{}\[\]]*\{\s*(?:"(?:type|id|index)"\s*:\s*(?:"[^"\\<]*"|\d+)\s*,\s*){0,3}'
    r'(?:"function"\s*:\s*\{\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*(?:"id"\s*:\s*"[^"\\<]*"\s*,\s*)?'
    r'"(?:arguments|parameters)"\s*:\s*' + JSON_START,
    r"[\s,;}\]`]*",
    outer=True,
    begins=("{",),
    opening='\n{"name": "NAME", "arguments": ',
    written=("}\n",),
)
_FUNCTIONS = call_syntax(
    r"\s*<function=([^<>\n]+)>(?=\s*<(?:parameter=|/function>|function=|/(?:seed:)?tool_call>))",
    r"\s*(?:</function>)?\s*",
    ("<parameter=", "</function>", "<function="),
    r"\s*<parameter=([^<>\n]+)>(?:\n|(?=[^\n]))",
    close="</parameter>",
    newlines=True,
    begins=("<function=",),
    opening="\n<function=NAME>\n",
    written=("<parameter=KEY>\n", "\n</parameter>\n", "", "</function>\n"),
)
_LISTED = dataclasses.replace(
    NAME_AND_JSON, opening='[{"name": "NAME", "arguments": ', written=("}]",)
)
_MISTRAL = call_syntax(
    r"[\s,;]*(?:\[TOOL_CALLS\]\s*)?([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\]\s*)?" + JSON_START,
    r"[\s,;\]]*",
    begins=("NAME[", "NAME{", "[TOOL_CALLS]"),
    opening="NAME[ARGS]",
    written=("",),
)
PYTHON_CALL = call_syntax(
    r"[\s,\[]*([\w.-]+)\((?=\s*(?:\)|\w+\s*=))",
    r"[\s,\]]*",
    (")", ","),
    r"(\w+)\s*=\s*(?=\S)",
    quotes=('"', "'"),
    begins=("NAME(", "["),
    opening="[NAME(",
    written=("KEY=", "", ", ", ")]"),
)
_KIMI_K2 = call_syntax(
    r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?([^:<\s]+)(?::\d*)?\s*<\|tool_call_argument_begin\|>\s*"
    + JSON_START,
    r"\s*(?:<\|tool_call_end\|>)?\s*",
    written=("<|tool_call_end|>",),
    opening="<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
)
_KIMI_K3_HEAD = r'\s*<\|open\|>call [^<]*?\btool="([^"<]+)"[^<]*<\|sep\|>\s*'
_KIMI_K3_OVER = r"(?:\s*<\|close\|>(?:json|call)<\|sep\|>)*\s*"
_KIMI_K3 = (
    call_syntax(
        _KIMI_K3_HEAD + r"(?=<\|(?:open\|>argument|close\|>call))",
        _KIMI_K3_OVER,
        ("<|open|>argument ", "<|close|>call<|sep|>"),
        r'\s*<\|open\|>argument [^<]*?\bkey="([^"<]*)"(?:[^<]*?\btype="(\w+)")?[^<]*<\|sep\|>',
        close="<|close|>argument<|sep|>",
        opening='<|open|>call tool="NAME" index="1"<|sep|>',
        kind=lambda kind: "number" if kind == "integer" else kind,
        written=(
            '<|open|>argument key="KEY" type="KIND"<|sep|>',
            "<|close|>argument<|sep|>",
            "",
            "<|close|>call<|sep|>",
        ),
    ),
    call_syntax(_KIMI_K3_HEAD + r"<\|open\|>json[^<]*<\|sep\|>\s*" + JSON_START, _KIMI_K3_OVER),
)
_DEEPSEEK = call_syntax(  # V3 and R1 name a type first and fence the JSON, V3.1 does not
    r"\s*<｜tool▁call▁begin｜>\s*(?:function<｜tool▁sep｜>)?\s*([^\s<`]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*"
    + JSON_START,
    r"(?:[\s`]*<｜tool▁call▁end｜>)?\s*",
    opening="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
    written=("<｜tool▁call▁end｜>",),
)
_DEEPSEEK_FENCED = dataclasses.replace(
    _DEEPSEEK,
    opening="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
    written=("\n```<｜tool▁call▁end｜>",),
)
_HARMONY = call_syntax(
    r"(?:[^{]{0,40}?to=)?(?:functions\.)?([\w.-]+)[^{]*?<\|message\|>\s*" + JSON_START,
    r"\s*",
    opening="functions.NAME <|constrain|>json<|message|>",
    written=("",),
)
_NS = "]<]minimax[>["
_MINIMAX_M3 = call_syntax(
    rf"""\s*{re.escape(_NS)}<invoke name=["']?([^"'<>\n]+)["']?>(?=\s*{re.escape(_NS)}<)""",
    rf"\s*(?:{re.escape(_NS)}</invoke>)?\s*",
    (_NS + "<", _NS + "</invoke>", _NS + "<invoke "),
    rf"\s*{re.escape(_NS)}<(?!invoke|/)([^<>\s]+)>",
    close=_NS + "</KEY>",
    opening=f'\n{_NS}<invoke name="NAME">\n',
    written=(_NS + "<KEY>", _NS + "</KEY>\n", "", _NS + "</invoke>\n"),
)


def _gemma(quote: str) -> CallSyntax:
    """`call:N{k:<|"|>v<|"|>,n:1}`."""
    return call_syntax(
        rf"[\s,]*call:([\w.-]+)\s*\{{(?=\s*(?:\}}|{BARE_KEY}))",
        r"[\s,}]*",
        ("}", ","),
        rf"{BARE_KEY}\s*(?=[^\s<]|{re.escape(quote)})",
        quotes=(quote,),
        begins=("call:",),
        opening="call:NAME{",
        written=("KEY:", "", ",", "}"),
    )


@dataclass
class OutputFormat:
    """How one model writes its thinking and its tool calls; built once per model.

    Calls stand between the `call` tags in one of `shapes` or else in a text that `parse` turns into
    names and arguments (it raises ValueError when it is no call); `untagged` models leave the tags
    out. `openers` begin a call, too, at the beginning of a line. `structural_markers` is markup
    around visible text, `final` are the tags after which nothing follows."""

    thinking: tuple[str, str] | None = None
    # An empty end tag: the call lasts as long as its text makes sense
    call: tuple[str, str] | None = None
    parse: ParseCalls | None = None
    shapes: tuple[CallSyntax, ...] = ()
    openers: tuple[str, ...] = ()
    untagged: bool = False
    structural_markers: tuple[str, ...] = ()
    final: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> OutputFormat:
        """The format of an mlx-lm TokenizerWrapper. What mlx-lm found in the chat template decides;
        where it finds nothing or the wrong thing, the tags that the template or else the vocabulary
        knows."""
        template = getattr(tokenizer, "chat_template", None)
        template = template if isinstance(template, str) else ""
        vocabulary = " ".join(
            token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        )
        thinking = (
            (tokenizer.think_start, tokenizer.think_end)
            if tokenizer.has_thinking
            else next(
                (
                    tags
                    for tags in (("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))
                    if tags[0] in template
                ),
                None,
            )
        )
        if tokenizer.has_tool_calling and _NS not in template:
            parser = tokenizer.tool_parser
            family = parser.__module__.rpartition(".")[2]
            family += ", listed" if family == "mistral" and "[ARGS]" not in template else ""
            format = _FAMILIES.get(family) or cls(parse=_wrap(parser))
            return dataclasses.replace(
                format,
                thinking=thinking,
                call=(tokenizer.tool_call_start, tokenizer.tool_call_end),
                structural_markers=tuple(getattr(tokenizer, "_structural_markers", ())),
            )
        format = next(
            (
                format
                for known in (template, vocabulary)
                for mark, format in _MARKED.items()
                if mark in known
            ),
            cls(),
        )
        if _DEEPSEEK in format.shapes and "```json" in template:
            format = dataclasses.replace(format, shapes=(_DEEPSEEK_FENCED,))
        return format if format.thinking else dataclasses.replace(format, thinking=thinking)

    def opening(self, choice: str) -> str:
        """What begins the answer when a call is demanded: `choice` is "any" or a tool's name; ""
        for "auto" and "none", or when this format has no call tag."""
        if choice in ("auto", "none") or self.call is None:
            return ""
        return self.call[0] + (
            self.shapes[0].opens(choice) if choice != "any" and self.shapes else ""
        )

    def grammar(self, tools: Sequence[dict], parallel: bool, literal: Callable[[str], str]) -> str:
        """The grammar (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md) of an
        answer that is one call to one of `tools`, or several calls if `parallel`; "" when it is not
        known how this format writes its calls. `literal` makes an expression of a text. Raises
        InvalidRequest for a tool that nothing can be passed to."""
        if self.call is None or not self.shapes or not self.shapes[0].written:
            return ""
        shape = self.shapes[0]
        newline, calls, rules = literal("\n"), [], []
        for number, tool in enumerate(tools):
            schema = tool["function"].get("parameters") or EMPTY_SCHEMA
            if not can_end(schema):
                raise InvalidRequest(f"no arguments match the schema of {tool['function']['name']}")
            rules += (
                ArgumentsGrammar(shape, schema, f"a{number}", literal).rules
                if len(shape.written) > 1
                else [f"a{number}: {json_rule(schema)}"]
            )
            calls.append(
                f"{literal(shape.opens(tool['function']['name']))} a{number} {literal(shape.written[-1])}"
            )
        return "\n".join(
            [
                f"start: call ({newline} call)*" if parallel else "start: call",
                f"call: {literal(self.call[0])} ({' | '.join(calls)}) {literal(self.call[1])}",
                *rules,
            ]
        )


HERMES = OutputFormat(None, ("<tool_call>", "</tool_call>"), parse_json_calls, (NAME_AND_JSON,))
"""`<tool_call>{"name": N, "arguments": {…}}</tool_call>`: the form for models that have none of
their own."""


def _dsml(tag: str, gap: str = "") -> OutputFormat:
    """DeepSeek from V3.2 on; its markup tells strings from JSON."""
    mark = f"｜DSML｜{gap}"
    return OutputFormat(
        call=(f"<{mark}{tag}>", f"</{mark}{tag}>"),
        shapes=(_invokes(mark, lambda kind: "true" if kind == "string" else "false"),),
    )


_FAMILIES = {  # by the name of mlx-lm's parser; some models fall back to JSON
    "json_tools": HERMES,
    "qwen3_coder": OutputFormat(
        parse=parse_json_calls, shapes=(_FUNCTIONS, NAME_AND_JSON), openers=("<function=",)
    ),
    "glm47": OutputFormat(parse=parse_json_calls, shapes=(_pairs(), NAME_AND_JSON)),
    "laguna": OutputFormat(parse=parse_json_calls, shapes=(_pairs(), NAME_AND_JSON)),
    "longcat": OutputFormat(parse=parse_json_calls, shapes=(_pairs("longcat_"), NAME_AND_JSON)),
    "minimax_m2": OutputFormat(shapes=(_invokes(),)),
    "muse_spark": OutputFormat(shapes=(_invokes("atem:"),)),
    "mistral": OutputFormat(parse=parse_json_calls, shapes=(_MISTRAL, NAME_AND_JSON)),
    "mistral, listed": OutputFormat(parse=parse_json_calls, shapes=(_LISTED, _MISTRAL)),
    "gemma4": OutputFormat(shapes=(_gemma('<|"|>'),)),
    "function_gemma": OutputFormat(shapes=(_gemma("<escape>"),)),
    "kimi_k2": OutputFormat(shapes=(_KIMI_K2,)),
    "kimi_k3": OutputFormat(shapes=_KIMI_K3),
    "pythonic": OutputFormat(shapes=(PYTHON_CALL,)),
}
_MARKED = {  # by a tag, the surest first
    _NS: OutputFormat(call=(_NS + "<tool_call>", _NS + "</tool_call>"), shapes=(_MINIMAX_M3,)),
    # https://cookbook.openai.com/articles/openai-harmony
    "<|channel|>": OutputFormat(
        ("<|channel|>analysis<|message|>", "<|end|>"),
        ("<|channel|>commentary to=", ""),
        shapes=(_HARMONY,),
        openers=(" to=functions.", "<|channel|>analysis to="),
        structural_markers=(
            "<|channel|>final<|message|>",
            "<|channel|>commentary<|message|>",
            "<|start|>assistant",
            "<|end|>",
        ),
        final=("<|call|>", "<|return|>"),
    ),
    "<｜DSML｜ calls>": _dsml("calls", " "),
    "<｜DSML｜tool_calls>": _dsml("tool_calls"),
    "｜DSML｜": _dsml("function_calls"),
    "<｜tool▁calls▁begin｜>": OutputFormat(
        call=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), shapes=(_DEEPSEEK,)
    ),
    "<seed:tool_call>": OutputFormat(
        call=("<seed:tool_call>", "</seed:tool_call>"),
        shapes=(_FUNCTIONS,),
        openers=("<function=",),
    ),
    "<TOOLCALL>": dataclasses.replace(HERMES, call=("<TOOLCALL>", "</TOOLCALL>")),
    "<tool_call>": HERMES,
    "functools[": dataclasses.replace(HERMES, call=("functools", "")),
    "<|/tool_call|>": dataclasses.replace(
        HERMES, call=("<|tool_call|>", "<|/tool_call|>"), openers=("functools[",)
    ),
    "<|tool_call|>": dataclasses.replace(HERMES, call=("<|tool_call|>", "")),
    "<|python_start|>": OutputFormat(
        call=("<|python_start|>", "<|python_end|>"),
        shapes=(PYTHON_CALL, NAME_AND_JSON),
        untagged=True,
    ),
    "<|python_tag|>": dataclasses.replace(HERMES, call=("<|python_tag|>", ""), untagged=True),
}
