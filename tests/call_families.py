"""How each family of models writes tool calls."""

from __future__ import annotations

import json
import re

from parsing import GLM, HERMES, MINIMAX, QWEN_CODER, marked, of_kind, tokenizer, tool

from _mlx_server.inference.output.families import detect_format

NASTY = {
    "command": "\n  \tdef f(x):\n\treturn \"a\\n\" + '\\\\' # </parameter> </arg_value> "
    '<x> [/] }{ "}" 🙂 \u2028 é\n\n',
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


def minicpm(name, arguments):
    def write(value):
        text = plain(value)
        return f"<![CDATA[{text}]]>" if re.search("[<&\n]", text) else text

    parameters = (f'<param name="{key}">{write(value)}</param>' for key, value in arguments.items())
    return f'"{name}">{"".join(parameters)}'


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
    "minicpm 5": (
        of_kind("minicpm5"),
        "<function name=",
        minicpm,
        "</function>\n<function name=",
        "</function>",
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
