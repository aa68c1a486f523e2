"""The fields that bodies of OpenAI's APIs share: https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

import re

from _mlx_server.inference.protocol import Request, Sampling
from _mlx_server.wire.conversation import Turn, ask_for_json, canonical
from _mlx_server.wire.documents import file_text, omitted, unknown
from _mlx_server.wire.fields import (
    Object,
    WireError,
    content_blocks,
    field,
    items,
    join_path,
    model_name,
    nested,
)
from _mlx_server.wire.images import Images
from _mlx_server.wire.tools import any_strict, forced_choice, function_tools


def openai_request(body: Object, *limits: str) -> Request:
    """A `Request` with what chats, completions and responses have in common. `limits` are the names
    of the field that bounds the answer's tokens; -1 means no bound.

    Raises WireError 400 with the path of what is wrong. Unknown fields are ignored, as is all that
    only concerns OpenAI's own caches, storage and billing."""
    model = model_name(body)
    bounds = [field(body, key, int, low=-1) for key in limits]
    max_tokens = next((bound for bound in bounds if bound is not None), None)
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else items(body, "stop", str)
    top_k = field(body, "top_k", int, low=-1)
    return Request(
        model,
        stop=[text for text in stop if text],
        max_tokens=None if max_tokens == -1 else max_tokens,
        sampling=Sampling(
            temperature=field(body, "temperature", float, low=0, high=2),
            top_p=field(body, "top_p", float, low=0, high=1),
            top_k=None if top_k is None else max(0, top_k),
            min_p=field(body, "min_p", float, low=0, high=1),
            repetition_penalty=field(body, "repetition_penalty", float, low=0),
            presence_penalty=field(body, "presence_penalty", float, low=-2, high=2),
            frequency_penalty=field(body, "frequency_penalty", float, low=-2, high=2),
            seed=field(body, "seed", int),
            logit_bias=_logit_bias(field(body, "logit_bias", dict, default={})),
        ),
    )


def _logit_bias(biases: Object) -> dict[int, float] | None:
    """Biases by token id; they are from -100 to 100."""
    for key in biases:
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII):
            raise WireError(400, f"logit_bias: '{key}' should be the id of a token")
    return {
        int(key): field(biases, key, float, "logit_bias", default=0.0, low=-100, high=100)
        for key in biases
    } or None


def fill_conversation(
    request: Request,
    body: Object,
    tools: list[Object],
    turns: list[Turn],
    *,
    effort: str | None,
    output_format: Object,
    format_path: str,
) -> None:
    """Adds to a request what only chats and responses have: messages, tools, thinking and the
    output format, which stands at `format_path` in the body. Raises WireError 400."""
    request.messages = canonical(turns)
    request.tool_choice, request.tools = _tool_choice(body, function_tools(tools))
    request.strict = any_strict(tools)
    request.parallel_tool_calls = field(body, "parallel_tool_calls", bool, default=True)
    # https://docs.vllm.ai/en/latest/features/reasoning_outputs.html
    template_options = field(body, "chat_template_kwargs", dict, default={})
    request.thinking = field(template_options, "enable_thinking", bool, "chat_template_kwargs")
    if request.thinking is None and effort:
        request.thinking = effort != "none"
    request.effort = effort if effort != "none" else None
    _fill_format(request, output_format, format_path)


def _fill_format(request: Request, output_format: Object, path: str) -> None:
    format_type = field(output_format, "type", str, path, default="text")
    if format_type == "json_schema":
        inner, path = nested(output_format, "json_schema", path)
        ask_for_json(request, field(inner, "schema", dict, path, default={}))
    elif format_type == "json_object":
        ask_for_json(request, None)
    elif format_type != "text":
        raise WireError(400, f"{path}.type: Input should be 'text', 'json_object' or 'json_schema'")


def _tool_choice(body: Object, tools: list[Object]) -> tuple[str, list[Object]]:
    """`Request.tool_choice`, and those of the tools that may be called."""
    choice = body.get("tool_choice")
    if isinstance(choice, str):
        choice = {"type": choice}
    else:
        choice = field(body, "tool_choice", dict, default={})
    mode = field(choice, "type", str, "tool_choice", default="auto")
    inner, path = nested(choice, mode, "tool_choice")
    name = None
    if mode == "allowed_tools":
        allowed = {
            field(nested(tool, "function", path)[0], "name", str, f"{path}.tools")
            for tool in items(inner, "tools", dict, path, required=True)
        }
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
        mode = field(inner, "mode", str, path, default="auto")
    elif mode in ("function", "custom"):
        name = field(inner, "name", str, path, required=True)
    if mode in ("required", "function", "custom"):
        return forced_choice(mode, name, tools, path), tools
    if mode not in ("auto", "none"):
        raise WireError(
            400,
            "tool_choice: Input should be 'none', 'auto', 'required', a function or allowed tools",
        )
    return mode, tools


def openai_text(message: Object, path: str, key: str = "content", *, images: Images) -> str:
    """The text of `message[key]`, which is a string or a list of parts of any of the APIs; `path`
    is where `message` stands. Its images go to `images`. Raises WireError 400."""
    content, path = message.get(key), join_path(path, key)
    parts = [] if content is None else content_blocks(content, path)
    texts = [_part_text(part, f"{path}.{number}", images) for number, part in enumerate(parts)]
    return "\n".join(filter(None, texts))


def _part_text(part: Object, path: str, images: Images) -> str:
    part_type = field(part, "type", str, path, required=True)
    match part_type:
        case "text" | "input_text" | "output_text" | "summary_text" | "reasoning_text":
            return field(part, "text", str, path, required=True)
        case "refusal":
            return field(part, "refusal", str, path, default="")
        case "image_url" | "input_image":
            inner, inner_path = nested(part, "image_url", path)
            key = "url" if inner is not part else "image_url"
            url, file_id = field(inner, key, str, inner_path), field(part, "file_id", str, path)
            return images.url_text(url, path, file_id)
        case "input_audio":
            return omitted(path, "audio", "this model cannot hear")
        case "file":
            return file_text(
                field(part, "file", dict, path, required=True), f"{path}.file", images.scan
            )
        case "input_file":
            return file_text(part, path, images.scan)
    return unknown(path, part_type)
