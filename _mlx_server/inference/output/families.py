"""Each family of models and how it writes tool calls; which family a model belongs to.

To add a family: describe its calls in an `ObjectSyntax` or a `TagSyntax`, put its `OutputFormat`
into one of the two tables at the end, and an example of its calls into `FAMILIES` of
tests/call_families.py, which every family's tests go through.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from _mlx_server.inference.output.call_syntax import (
    BARE_KEY,
    CDATA,
    JSON_START,
    CallSyntax,
    CallTemplate,
    ObjectSyntax,
    TagSyntax,
    pattern,
)
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.output.json_calls import JSON_CALL, Calls, ParseCalls, parse_json_calls

# Mistral's list: `[TOOL_CALLS][{"name": N, "arguments": {…}}]`
_JSON_LIST = dataclasses.replace(
    JSON_CALL, template=CallTemplate(head='[{"name": "NAME", "arguments": ', tail="}]")
)

# `N[ARGS]{…}`, with an id `N[CALL_ID]I[ARGS]{…}`, older `N{…}`
_MISTRAL = ObjectSyntax(
    head=pattern(
        r"[\s,;]*+(?:\[TOOL_CALLS\]\s*+)?+",
        r"([\w.-]++)",
        r"(?:\[CALL_ID\][\w-]*+)?+(?:\[ARGS\]\s*+)?+",
        JSON_START,
    ),
    tail=pattern(r"[\s,;\]]*+"),
    next_call=("NAME[", "NAME{", "[TOOL_CALLS]"),
    template=CallTemplate(head="NAME[ARGS]", tail=""),
)

# `[N(k='v', n=1)]`: Llama 4, LFM
_PYTHON = ObjectSyntax(
    head=pattern(
        r"[\s,\[]*+([\w.-]++)\(",
        r"(?=\s*+(?:\)|\w++\s*+=))",
    ),
    argument=pattern(r"(\w++)\s*+=\s*+(?=\S)"),
    next_argument=(",",),
    arguments_end=(")",),
    tail=pattern(r"[\s,\]]*+"),
    quotes=('"', "'"),
    next_call=("NAME(", "["),
    bare_heads=("[NAME(",),
    template=CallTemplate(head="[NAME(", before_value="KEY=", separator=", ", tail=")]"),
)

# https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/docs/tool_call_guidance.md
_KIMI_K2 = ObjectSyntax(
    head=pattern(
        r"\s*+<\|tool_call_begin\|>\s*+",
        r"(?:functions\.)?([^:<\s]++)(?::\d*+)?+\s*+",
        r"<\|tool_call_argument_begin\|>\s*+",
        JSON_START,
    ),
    tail=pattern(r"\s*+(?:<\|tool_call_end\|>)?+\s*+"),
    template=CallTemplate(
        head="<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
        tail="<|tool_call_end|>",
    ),
)

# Kimi K3: each argument in tags that tell its type, or all of them in one JSON object
_KIMI_K3_HEAD = r'\s*+<\|open\|>call (?>[^<]*?\btool=")([^"<]++)"[^<]*+<\|sep\|>\s*+'
_KIMI_K3_TAIL = pattern(r"(?:\s*+<\|close\|>(?:json|call)<\|sep\|>)*+\s*+")
_KIMI_K3_TAGS = TagSyntax(
    head=pattern(_KIMI_K3_HEAD, r"(?=<\|(?:open\|>argument|close\|>call))"),
    argument=pattern(
        r"\s*+<\|open\|>argument ",
        r'(?>[^<]*?\bkey=")([^"<]*+)"',
        r'(?:[^<]*?\btype="(\w++)")?+',
        r"[^<]*+<\|sep\|>",
    ),
    value_start="<|open|>argument ",
    value_end="<|close|>argument<|sep|>",
    next_argument=("<|open|>argument ",),
    arguments_end=("<|close|>call<|sep|>",),
    tail=_KIMI_K3_TAIL,
    template=CallTemplate(
        head='<|open|>call tool="NAME" index="1"<|sep|>',
        before_value='<|open|>argument key="KEY" type="KIND"<|sep|>',
        after_value="<|close|>argument<|sep|>",
        tail="<|close|>call<|sep|>",
        kind_of=lambda name: "number" if name == "integer" else name,
    ),
)
_KIMI_K3_JSON = ObjectSyntax(
    head=pattern(_KIMI_K3_HEAD, r"<\|open\|>json[^<]*+<\|sep\|>\s*+", JSON_START),
    tail=_KIMI_K3_TAIL,
)

# DeepSeek V3 and R1 name a type first and put the JSON into a code block, V3.1 does not.
_DEEPSEEK = ObjectSyntax(
    head=pattern(
        r"\s*+<｜tool▁call▁begin｜>\s*+",
        r"(?:function<｜tool▁sep｜>)?\s*+",
        r"([^\s<`{]++)\s*+",
        r"(?:<｜tool▁sep｜>)?+\s*+",
        r"(?:```(?:json)?+)?+\s*+",
        JSON_START,
    ),
    tail=pattern(r"(?:[\s`]*+<｜tool▁call▁end｜>)?+\s*+"),
    template=CallTemplate(
        head="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        tail="<｜tool▁call▁end｜>",
    ),
)
_DEEPSEEK_V3 = dataclasses.replace(
    _DEEPSEEK,
    template=CallTemplate(
        head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        tail="\n```<｜tool▁call▁end｜>",
    ),
)

# https://cookbook.openai.com/articles/openai-harmony
_HARMONY = ObjectSyntax(
    head=pattern(
        r"(?:[^{]{0,40}?to=)?(?:functions\.)?([\w.-]++)",
        r"(?>[^{]*?<\|message\|>)\s*+",
        JSON_START,
    ),
    tail=pattern(r"\s*+"),
    template=CallTemplate(head="functions.NAME <|constrain|>json<|message|>", tail=""),
)

# `<function=N><parameter=K>V</parameter></function>`: Qwen3-Coder, Seed
_FUNCTIONS = TagSyntax(
    head=pattern(
        r"\s*+<function=([^<>\n]++)>",
        r"(?=\s*+<(?:parameter=|/function>|function=|/(?:seed:)?tool_call>))",
    ),
    argument=pattern(r"\s*+<parameter=([^<>\n]++)>(?:\n|(?=[^\n]))"),
    value_start="<parameter=",
    value_end="</parameter>",
    own_lines=True,
    next_argument=("<parameter=",),
    arguments_end=("</function>", "<function="),
    tail=pattern(r"\s*+(?:</function>)?+\s*+"),
    next_call=("<function=",),
    template=CallTemplate(
        head="\n<function=NAME>\n",
        before_value="<parameter=KEY>\n",
        after_value="\n</parameter>\n",
        tail="</function>\n",
    ),
)


def _pairs(prefix: str = "") -> TagSyntax:
    """`N<arg_key>K</arg_key><arg_value>V</arg_value>`: GLM, Laguna, LongCat. `prefix` begins the
    names of the tags."""
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    return TagSyntax(
        head=pattern(
            r"\s*+([^<>\n{]++)\s*+",
            rf"(?=<{key}>|</{prefix}tool_call>)",
        ),
        argument=pattern(rf"\s*+<{key}>([^<]*+)</{key}>\s*+<{value}>"),
        value_start=f"<{key}>",
        value_end=f"</{value}>",
        next_argument=(f"<{key}>",),
        arguments_end=(),
        tail=pattern(r"\s*+"),
        template=CallTemplate(
            head="NAME\n",
            before_value=f"<{key}>KEY</{key}>\n<{value}>",
            after_value=f"</{value}>\n",
            tail="",
        ),
    )


def _invokes(prefix: str = "", kind_of: Callable[[str], str] | None = None) -> TagSyntax:
    """`<invoke name="N"><parameter name="K">V</parameter></invoke>`: MiniMax M2, Muse, DeepSeek
    from V3.2 on. `prefix` begins the names of the tags; with `kind_of` a parameter tells in
    `string="true"` whether it is a string or JSON.
    https://huggingface.co/MiniMaxAI/MiniMax-M2/blob/main/docs/tool_calling_guide.md"""
    name = r"""(?>[^<>]*?\bname=)["']?+([^"'<>\n]++)["']?+"""
    kind = ' string="KIND"' if kind_of else ""
    return TagSyntax(
        head=pattern(
            rf"\s*+<{prefix}invoke {name}[^<>]*+>",
            rf"(?=\s*+<(?:{prefix}parameter|/{prefix}invoke))",
        ),
        argument=pattern(rf'\s*+<{prefix}parameter {name}(?: string="(\w++)")?+[^<>]*+>'),
        value_start=f"<{prefix}parameter ",
        value_end=f"</{prefix}parameter>",
        next_argument=(f"<{prefix}parameter ",),
        arguments_end=(f"</{prefix}invoke>", f"<{prefix}invoke "),
        tail=pattern(rf"\s*+(?:</{prefix}invoke>)?+\s*+"),
        template=CallTemplate(
            head=f'\n<{prefix}invoke name="NAME">\n',
            before_value=f'<{prefix}parameter name="KEY"{kind}>',
            after_value=f"</{prefix}parameter>\n",
            tail=f"</{prefix}invoke>\n",
            kind_of=kind_of,
        ),
    )


_HALF_CDATA = "|".join(re.escape(CDATA[0][:length]) for length in range(1, len(CDATA[0])))

# `<function name="N"><param name="K">V</param></function>`, where a V with lines or markup is a
# CDATA section: MiniCPM 5. The call tag ends before the name.
_MINICPM = TagSyntax(
    head=pattern(
        r"""["']?+([^"'<>\n]++)["']?+\s*+>""",
        r"(?=\s*+<(?:param\s|/function>|function name=))",
    ),
    argument=pattern(
        r"""\s*+<param\s++name\s*+=\s*+["']?+([^"'<>\n]++)["']?+\s*+>""",
        rf"(?:\s*+{re.escape(CDATA[0])}|(?!\s*+(?:{_HALF_CDATA})\Z)(?=\s*+\S))",
    ),
    value_start="<param name=",
    value_end="</param>",
    cdata=True,
    next_argument=("<param name=",),
    arguments_end=(),
    tail=pattern(r"\s*+"),
    template=CallTemplate(
        head='"NAME">',
        before_value='<param name="KEY">',
        after_value="</param>",
        tail="",
    ),
)

# MiniMax M3: a mark before each tag, and a tag for each argument's name
_M3 = "]<]minimax[>["
_M3_RE = re.escape(_M3)
_MINIMAX_M3 = TagSyntax(
    head=pattern(
        rf"""\s*+{_M3_RE}<invoke name=["']?+([^"'<>\n]++)["']?+>""",
        rf"(?=\s*+{_M3_RE}<)",
    ),
    argument=pattern(rf"\s*+{_M3_RE}<(?!invoke|/)([^<>\s]++)>"),
    value_start=f"{_M3}<KEY>",
    value_end=f"{_M3}</KEY>",
    next_argument=(f"{_M3}<",),
    arguments_end=(f"{_M3}</invoke>", f"{_M3}<invoke "),
    tail=pattern(rf"\s*+(?:{_M3_RE}</invoke>)?+\s*+"),
    template=CallTemplate(
        head=f'\n{_M3}<invoke name="NAME">\n',
        before_value=f"{_M3}<KEY>",
        after_value=f"{_M3}</KEY>\n",
        tail=f"{_M3}</invoke>\n",
    ),
)


def _gemma(quote: str) -> ObjectSyntax:
    """`call:N{k:<|"|>v<|"|>,n:1}` with a `quote` of the family's own: Gemma 4, FunctionGemma.
    https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices"""
    return ObjectSyntax(
        head=pattern(
            r"[\s,]*+call:([\w.-]++)\s*+",
            rf"\{{(?=\s*+(?:\}}|{BARE_KEY}))",
        ),
        argument=pattern(rf"{BARE_KEY}\s*+(?=[^\s<]|{re.escape(quote)})"),
        next_argument=(",",),
        arguments_end=("}",),
        tail=pattern(r"[\s,}]*+"),
        quotes=(quote,),
        next_call=("call:",),
        template=CallTemplate(head="call:NAME{", before_value="KEY:", separator=",", tail="}"),
    )


def _dsml(tag: str, gap: str = "") -> OutputFormat:
    """DeepSeek from V3.2 on: its markup tells strings from JSON."""
    mark = f"｜DSML｜{gap}"
    return OutputFormat(
        call=(f"<{mark}{tag}>", f"</{mark}{tag}>"),
        syntaxes=(_invokes(mark, lambda name: "true" if name == "string" else "false"),),
    )


# `<tool_call>{"name": N, "arguments": {…}}</tool_call>`: the form for models that have none of
# their own. https://github.com/NousResearch/Hermes-Function-Calling
HERMES = OutputFormat(
    call=("<tool_call>", "</tool_call>"), parse=parse_json_calls, syntaxes=(JSON_CALL,)
)


def _or_json(*syntaxes: CallSyntax, line_starts: tuple[str, ...] = ()) -> OutputFormat:
    """The format of a family that writes JSON calls now and then."""
    return OutputFormat(
        parse=parse_json_calls, syntaxes=(*syntaxes, JSON_CALL), line_starts=line_starts
    )


# By the name of the parser that mlx-lm chooses; the call tags are mlx-lm's, too.
# https://github.com/ml-explore/mlx-lm/tree/main/mlx_lm/tool_parsers
_BY_PARSER = {
    "json_tools": HERMES,
    "qwen3_coder": _or_json(_FUNCTIONS, line_starts=("<function=",)),
    "glm47": _or_json(_pairs()),
    "laguna": _or_json(_pairs()),
    "longcat": _or_json(_pairs("longcat_")),
    "minimax_m2": OutputFormat(syntaxes=(_invokes(),)),
    "muse_spark": OutputFormat(syntaxes=(_invokes("atem:"),)),
    "mistral": _or_json(_MISTRAL),
    "mistral, list": OutputFormat(parse=parse_json_calls, syntaxes=(_JSON_LIST, _MISTRAL)),
    "minicpm5": OutputFormat(syntaxes=(_MINICPM,)),
    "gemma4": OutputFormat(syntaxes=(_gemma('<|"|>'),)),
    "function_gemma": OutputFormat(syntaxes=(_gemma("<escape>"),)),
    "kimi_k2": OutputFormat(syntaxes=(_KIMI_K2,)),
    "kimi_k3": OutputFormat(syntaxes=(_KIMI_K3_TAGS, _KIMI_K3_JSON)),
    "pythonic": OutputFormat(syntaxes=(_PYTHON,)),
}

# By a text that the chat template or the vocabulary holds, the surest first.
_BY_MARK = {
    _M3: OutputFormat(call=(f"{_M3}<tool_call>", f"{_M3}</tool_call>"), syntaxes=(_MINIMAX_M3,)),
    "<|channel|>": OutputFormat(
        thinking=("<|channel|>analysis<|message|>", "<|end|>"),
        call=("<|channel|>commentary to=", ""),
        syntaxes=(_HARMONY,),
        line_starts=(" to=functions.", "<|channel|>analysis to="),
        structural_markers=(
            "<|channel|>final<|message|>",
            "<|channel|>commentary<|message|>",
            "<|start|>assistant",
            "<|end|>",
        ),
        turn_ends=("<|call|>", "<|return|>"),
    ),
    "<｜DSML｜ calls>": _dsml("calls", " "),
    "<｜DSML｜tool_calls>": _dsml("tool_calls"),
    "｜DSML｜": _dsml("function_calls"),
    "<｜tool▁calls▁begin｜>": OutputFormat(
        call=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), syntaxes=(_DEEPSEEK,)
    ),
    "<seed:tool_call>": OutputFormat(
        call=("<seed:tool_call>", "</seed:tool_call>"),
        syntaxes=(_FUNCTIONS,),
        line_starts=("<function=",),
    ),
    # Nemotron
    "<TOOLCALL>": dataclasses.replace(HERMES, call=("<TOOLCALL>", "</TOOLCALL>")),
    "<tool_call>": HERMES,
    # Phi-4-mini, with special tokens and without
    "functools[": dataclasses.replace(HERMES, call=("functools", "")),
    "<|/tool_call|>": dataclasses.replace(
        HERMES, call=("<|tool_call|>", "<|/tool_call|>"), line_starts=("functools[",)
    ),
    # Granite
    "<|tool_call|>": dataclasses.replace(HERMES, call=("<|tool_call|>", "")),
    # Llama 4
    "<|python_start|>": OutputFormat(
        call=("<|python_start|>", "<|python_end|>"),
        syntaxes=(_PYTHON, JSON_CALL),
        untagged=True,
    ),
    # Llama 3
    "<|python_tag|>": dataclasses.replace(HERMES, call=("<|python_tag|>", ""), untagged=True),
}

# Tags of thinking that mlx-lm does not find.
_THINKING = (("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))


def detect_format(tokenizer: Any) -> OutputFormat:
    """The format of the model that an mlx-lm TokenizerWrapper belongs to.

    What mlx-lm found in the chat template decides. Where it finds nothing or the wrong thing, the
    marks that the template holds decide, or else those of the vocabulary.
    """
    template = getattr(tokenizer, "chat_template", None)
    template = template if isinstance(template, str) else ""
    thinking = _thinking_tags(tokenizer, template)
    if tokenizer.has_tool_calling and _M3 not in template:
        return dataclasses.replace(
            _by_parser(tokenizer.tool_parser, template),
            thinking=thinking,
            call=(tokenizer.tool_call_start, tokenizer.tool_call_end),
            structural_markers=tuple(getattr(tokenizer, "_structural_markers", ())),
        )
    tokens = getattr(tokenizer, "added_tokens_decoder", {}).values()
    vocabulary = " ".join(token.content for token in tokens)
    format = _by_mark(template) or _by_mark(vocabulary) or OutputFormat()
    if _DEEPSEEK in format.syntaxes and "```json" in template:
        format = dataclasses.replace(format, syntaxes=(_DEEPSEEK_V3,))
    return format if format.thinking else dataclasses.replace(format, thinking=thinking)


def _thinking_tags(tokenizer: Any, template: str) -> tuple[str, str] | None:
    if tokenizer.has_thinking:
        return tokenizer.think_start, tokenizer.think_end
    return next((tags for tags in _THINKING if tags[0] in template), None)


def _by_parser(parser: Callable[[str, list[dict[str, Any]]], Any], template: str) -> OutputFormat:
    """The format of the family whose calls one of mlx-lm's parsers reads."""
    name = parser.__module__.rpartition(".")[2]
    if name == "mistral" and "[ARGS]" not in template:
        name = "mistral, list"
    return _BY_PARSER.get(name) or OutputFormat(parse=_parse_with(parser))


def _parse_with(parser: Callable[[str, list[dict[str, Any]]], Any]) -> ParseCalls:
    """One of mlx-lm's parsers as a ParseCalls. The ids that some of them return are not unique and
    are dropped."""

    def parse_calls(text: str, tools: list[dict[str, Any]]) -> Calls:
        parsed = parser(text, tools)
        calls = parsed if isinstance(parsed, list) else [parsed]
        return [(call["name"], call["arguments"]) for call in calls]

    return parse_calls


def _by_mark(known: str) -> OutputFormat | None:
    return next((format for mark, format in _BY_MARK.items() if mark in known), None)
