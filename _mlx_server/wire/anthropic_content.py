"""The content of a Messages body as turns: https://platform.claude.com/docs/en/api/messages"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from _mlx_server.wire.conversation import Turn
from _mlx_server.wire.documents import document_text, elsewhere, image_note, omitted, unknown
from _mlx_server.wire.fields import Object, WireError, content_blocks, field
from _mlx_server.wire.images import Images
from _mlx_server.wire.tools import PastArguments

log = logging.getLogger("mlx_server")

# Claude Code puts these lines before its system prompt. They differ from request to request, so the
# prompt would never be found in the cache.
_BILLING = re.compile(r"\s*+x-anthropic-billing-header:[^\n]*+(?:\n|\Z)")
_ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "ctx": "user",
    "msg": "user",
}
# Blocks that say nothing to the model
_SILENT = ("redacted_thinking", "tool_addition", "tool_removal", "mcp_tool_listing", "fallback")


@dataclass(frozen=True)
class _Conversation:
    """What blocks refer to, and where their images go. `definitions` are the deferred tools that no
    block has referred to yet, by name, each as the JSON text that the model sees when a search
    found it first: a reference is short, and thousands of them must not become megabytes each."""

    definitions: dict[str, str]
    images: Images
    arguments: PastArguments


def system_text(content: Any, path: str) -> str:
    """The text of a system prompt or message, without the client's billing lines."""
    texts = _block_texts(content_blocks(content, path), path)
    texts = list(map(_without_billing, texts))
    return "\n\n".join(text.rstrip("\n") for text in texts if text.strip())


def _without_billing(text: str) -> str:
    start = 0
    while found := _BILLING.match(text, start):
        start = found.end()
    return text[start:]


def anthropic_turns(messages: list[Object], deferred: list[Object], images: Images) -> list[Turn]:
    """The turns of a messages array, whose images go to `images`. Raises WireError 400, also if the
    conversation ends with a tool call."""
    definitions = {
        tool["function"]["name"]: json.dumps(tool, ensure_ascii=False) for tool in deferred
    }
    conversation = _Conversation(definitions, images, PastArguments())
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        path = f"messages.{number}"
        role = _ROLES.get(field(message, "role", str, path, required=True))
        if role is None:
            raise WireError(400, f"{path}.role: Input should be 'user', 'assistant' or 'system'")
        content, path = message.get("content"), f"{path}.content"
        if content is None:
            raise WireError(400, f"{path}: Field required")
        if role == "system":
            turns.append(Turn("system", system_text(content, path)))
        else:
            turns += _message_turns(role, content_blocks(content, path), path, conversation)
    last = next((turn for turn in reversed(turns) if turn.role != "system"), Turn("user"))
    if last.calls:
        ids = ", ".join(id for id, _, _ in last.calls)
        raise WireError(
            400,
            f"messages.{len(messages) - 1}: `tool_use` ids were found without `tool_result` blocks "
            f"immediately after: {ids}. Each `tool_use` block must have a corresponding "
            "`tool_result` block in the next message.",
        )
    return turns


def _message_turns(
    role: str, blocks: list[Object], path: str, conversation: _Conversation
) -> list[Turn]:
    """One message as turns: a turn for each tool result, then one for all other blocks."""
    results: list[Turn] = []
    message = Turn(role)
    texts, thoughts = [], []
    for number, block in enumerate(blocks):
        block_path = f"{path}.{number}"
        block_type = block.get("type")
        if block_type == "tool_use" and role == "assistant":
            id = field(block, "id", str, block_path, required=True)
            name = field(block, "name", str, block_path, required=True)
            arguments = conversation.arguments.read(block.get("input"), block_path)
            message.calls.append((id, name, arguments))
        elif block_type == "tool_result" and role == "user":
            id = field(block, "tool_use_id", str, block_path, required=True)
            results.append(Turn("tool", _result_text(block, block_path, conversation), call_id=id))
        elif block_type == "thinking":
            thoughts.append(field(block, "thinking", str, block_path, default=""))
        else:
            texts.append(_block_text(block, block_path, conversation))
    message.text = "\n".join(text for text in texts if text and (text.strip() or role == "user"))
    message.reasoning = "\n".join(filter(None, thoughts))
    return [*results, message]


def _result_text(block: Object, path: str, conversation: _Conversation) -> str:
    text = _inner_text(block, path, conversation)
    if block.get("is_error") is True and not text.startswith("Error"):
        return f"Error: {text}"
    return text


def _inner_text(block: Object, path: str, conversation: _Conversation | None) -> str:
    """The text of the `content` inside a block."""
    content, path = block.get("content"), f"{path}.content"
    blocks = [] if content is None else content_blocks(content, path)
    return "\n".join(_block_texts(blocks, path, conversation))


def _block_texts(
    blocks: list[Object], path: str, conversation: _Conversation | None = None
) -> list[str]:
    """The texts of those blocks that have one."""
    texts = [
        _block_text(block, f"{path}.{number}", conversation) for number, block in enumerate(blocks)
    ]
    return [text for text in texts if text]


def _block_text(block: Object, path: str, conversation: _Conversation | None) -> str:
    """A block as text for the model: a note if it cannot be used, "" if it says nothing. Raises
    WireError 400 if it is malformed."""
    block_type = field(block, "type", str, path, required=True)
    match block_type:
        case "text":
            return field(block, "text", str, path, required=True)
        case "image":
            return _image_block_text(block, path, conversation)
        case "document":
            return _document_block_text(block, path, conversation)
        case "search_result":
            return _search_result_text(block, path, conversation)
        case "tool_reference":
            name = field(block, "tool_name", str, path, required=True)
            return conversation.definitions.pop(name, name) if conversation else name
        case "compaction":
            return _compaction_text(block, path)
        case "container_upload":
            return elsewhere(path, "file", field(block, "file_id", str, path))
    if block_type not in _SILENT:
        return unknown(path, block_type)
    log.info("%s: left out a block of type %s", path, block_type)
    return ""


def _image_block_text(block: Object, path: str, conversation: _Conversation | None) -> str:
    source, path = field(block, "source", dict, path, required=True), f"{path}.source"
    if conversation is None:  # no template has images in a system prompt
        return image_note(path)
    if source.get("type") == "base64":
        data = field(source, "data", str, path, required=True)
        return conversation.images.text(data, f"{path}.data")
    url, file_id = (field(source, key, str, path) for key in ("url", "file_id"))
    return conversation.images.url_text(url, path, file_id)


def _document_block_text(block: Object, path: str, conversation: _Conversation | None) -> str:
    title, context = (field(block, key, str, path) for key in ("title", "context"))
    source, path = field(block, "source", dict, path, required=True), f"{path}.source"
    source_type = field(source, "type", str, path, required=True)
    match source_type:
        case "text":
            text = field(source, "data", str, path, required=True)
        case "content":
            text = _inner_text(source, path, conversation)
        case "base64":
            data = field(source, "data", str, path, required=True)
            media_type = field(source, "media_type", str, path, default="")
            on_scan = conversation.images.scan if conversation else None
            text = document_text(data, media_type, f"{path}.data", title, on_scan)
        case "url" | "file":
            names = [field(source, key, str, path) for key in ("url", "file_id")]
            text = elsewhere(path, "document", *names)
        case _:
            text = unknown(path, "document")
    return "\n".join(filter(None, [title, context, text]))


def _compaction_text(block: Object, path: str) -> str:
    """The summary of what a client has cut off. It may be encrypted by Anthropic."""
    text = field(block, "content", str, path, default="")
    if not text and block.get("encrypted_content"):
        return omitted(path, "summary of the conversation so far", "it is encrypted")
    return text


def _search_result_text(block: Object, path: str, conversation: _Conversation | None) -> str:
    title, context, source = (
        field(block, key, str, path) for key in ("title", "context", "source")
    )
    text = _inner_text(block, path, conversation)
    return "\n".join(filter(None, [title, context, source, text]))
