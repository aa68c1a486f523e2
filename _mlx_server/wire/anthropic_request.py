"""A Messages body as a `Request`, of version 2023-06-01 and of 2026-10-21:
https://platform.claude.com/docs/en/api/messages"""

from __future__ import annotations

from _mlx_server.inference.protocol import Request, Sampling
from _mlx_server.wire.anthropic_content import anthropic_turns, system_text
from _mlx_server.wire.anthropic_tools import anthropic_tool_choice, anthropic_tools
from _mlx_server.wire.conversation import Turn, ask_for_json, canonical, require_content
from _mlx_server.wire.fields import Object, WireError, field, items, model_name
from _mlx_server.wire.images import Images
from _mlx_server.wire.tools import any_strict

_THINKING = {"enabled": True, "adaptive": True, "disabled": False, "between_tools": False}


def messages_request(body: Object) -> Request:
    """The `Request` of a messages body. Raises WireError 400 with the path of what is wrong.

    Unknown fields and betas are ignored, as is all that only concerns Anthropic's own caches and
    billing."""
    return _request(body, counting=False)


def count_request(body: Object) -> Request:
    """The `Request` of a count_tokens body, which is a messages body that needs no max_tokens.
    Raises WireError 400.

    https://platform.claude.com/docs/en/api/messages-count-tokens"""
    return _request(body, counting=True)


def _request(body: Object, counting: bool) -> Request:
    model = model_name(body)
    max_tokens = field(body, "max_tokens", int, required=not counting, low=0)
    _refuse_unsupported(body)
    tools, deferred = anthropic_tools(items(body, "tools", dict))
    tool_choice, parallel = anthropic_tool_choice(
        field(body, "tool_choice", dict, default={}), tools + deferred
    )
    thinking, budget = _thinking(field(body, "thinking", dict, default={}))
    output = field(body, "output_config", dict, default={})
    schema = _output_schema(body, output)
    messages = items(body, "messages", dict, required=True)
    images = Images()
    turns = require_content(anthropic_turns(messages, deferred, images))
    system = Turn("system", system_text(body.get("system") or "", "system"))
    request = Request(
        model,
        canonical([system, *turns]),
        tools=tools,
        deferred_tools=deferred,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        strict=any_strict(body.get("tools") or []),
        sampling=Sampling(
            temperature=field(body, "temperature", float, low=0, high=2),
            top_p=field(body, "top_p", float, low=0, high=1),
            top_k=field(body, "top_k", int, low=0),
        ),
        stop=[text for text in items(body, "stop_sequences", str) if text],
        max_tokens=max_tokens,
        thinking=thinking,
        thinking_budget=budget,
        keep_thinking=_keep_thinking(body),
        effort=field(output, "effort", str, "output_config"),
        images=images.files,
    )
    if schema is not None:
        ask_for_json(request, schema)
    return request


def _refuse_unsupported(body: Object) -> None:
    """Raises WireError 400 for fields that would change the answer but have no meaning here."""
    if body.get("mcp_servers"):
        raise WireError(400, "mcp_servers is not supported by this server")
    if isinstance(body.get("container"), dict) and body["container"].get("skills"):
        raise WireError(400, "container.skills is not supported by this server")
    for key in ("compaction", "thread"):
        if body.get(key) is not None:
            raise WireError(400, f"{key} is not supported by this server")


def _keep_thinking(body: Object) -> bool | None:
    """`Request.keep_thinking`. A number of turns to keep wants old thinking gone; which turns keep
    theirs is the template's decision then:
    https://platform.claude.com/docs/en/build-with-claude/context-editing"""
    management = body.get("context_management")
    edits = management.get("edits") if isinstance(management, dict) else None
    for edit in edits if isinstance(edits, list) else []:
        if isinstance(edit, dict) and edit.get("type") == "clear_thinking_20251015":
            keep = edit.get("keep")
            return None if keep is None else keep == "all"
    return None


def _thinking(config: Object) -> tuple[bool | None, int | None]:
    """`Request.thinking` and `Request.thinking_budget`:
    https://platform.claude.com/docs/en/build-with-claude/extended-thinking"""
    if not config:
        return None, None
    thinking_type = field(config, "type", str, "thinking", required=True)
    if thinking_type not in _THINKING:
        types = "'enabled', 'adaptive', 'disabled' or 'between_tools'"
        raise WireError(400, f"thinking.type: Input should be {types}")
    budget = None
    if thinking_type == "enabled":
        budget = field(config, "budget_tokens", int, "thinking", low=0)
    return _THINKING[thinking_type], budget


def _output_schema(body: Object, output: Object) -> Object | None:
    """The JSON schema that the answer has to match, if there is one. An early beta had it in
    `output_format`: https://platform.claude.com/docs/en/build-with-claude/structured-outputs"""
    form = field(output, "format", dict, "output_config") or field(body, "output_format", dict)
    if form is None:
        return None
    if form.get("type") != "json_schema":
        raise WireError(400, "output_config.format.type: Input should be 'json_schema'")
    return field(form, "schema", dict, "output_config.format", required=True)
