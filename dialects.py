"""Which endpoint speaks which vendor's dialect, and what a dialect means for every answer.

`ENDPOINTS` is the table: for each route its dialect, how a body becomes a `Reply`, and whether an
upstream may answer instead. A `Dialect` says how errors, headers and JSON look. The lists of models
are here too, because they mix what is installed with what an upstream has. How one vendor's JSON is
read and written is in `_mlx_server.wire`. This module knows no socket and no MLX array."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.catalog.names import VENDOR_PREFIX
from _mlx_server.wire.anthropic import AnthropicMessages
from _mlx_server.wire.errors import ErrorAnswer, anthropic_error, ollama_error, openai_error
from _mlx_server.wire.fields import Object, WireError, timestamp
from _mlx_server.wire.ollama import OllamaChat, OllamaGenerate
from _mlx_server.wire.ollama_embeddings import OllamaEmbed, OllamaEmbeddings
from _mlx_server.wire.ollama_models import listed_model, not_hidden
from _mlx_server.wire.openai import OpenAIChat, OpenAICompletion
from _mlx_server.wire.openai_embeddings import OpenAIEmbeddings
from _mlx_server.wire.reply import Reply
from _mlx_server.wire.responses import OpenAIResponses

# How a name begins that Claude Code offers: https://code.claude.com/docs/en/llm-gateway-protocol
_SHOWN_BY_CLAUDE_CODE = ("claude", "anthropic")


@dataclass(frozen=True)
class Dialect:
    """What all answers of one vendor's API have in common.

    `error` makes an exception and the request's id an answer. `request_id_header` is the header
    that carries the id, None if there is none. `content_type` belongs to JSON answers. With
    `strict_json` a body that goes on after its first JSON value is refused; without it the rest is
    ignored, as Ollama's decoder does."""

    name: str
    error: Callable[[Exception, str], ErrorAnswer]
    request_id_header: str | None
    content_type: str
    strict_json: bool


@dataclass(frozen=True)
class Endpoint:
    """A route's dialect. `reply` makes a body and a request id the `Reply` that the engine's events
    go through; it is None where no model generates. With `relayed` an upstream may answer for a
    model that is not installed here."""

    dialect: Dialect
    reply: Callable[[Object, str], Reply] | None = None
    relayed: bool = False


ANTHROPIC = Dialect("anthropic", anthropic_error, "request-id", "application/json", True)
OPENAI = Dialect(
    "openai", lambda error, _: openai_error(error), "x-request-id", "application/json", True
)
OLLAMA = Dialect(
    "ollama", lambda error, _: ollama_error(error), None, "application/json; charset=utf-8", False
)


def _generating(dialect: Dialect, reply: Callable[[Object], Reply]) -> Endpoint:
    """The endpoint of a `Reply` that needs no request id."""
    return Endpoint(dialect, lambda body, _: reply(body), relayed=True)


ENDPOINTS = {
    "/v1/messages": Endpoint(ANTHROPIC, AnthropicMessages, relayed=True),
    "/v1/messages/count_tokens": Endpoint(ANTHROPIC, relayed=True),
    "/v1/chat/completions": _generating(OPENAI, OpenAIChat),
    "/v1/completions": _generating(OPENAI, OpenAICompletion),
    "/v1/embeddings": _generating(OPENAI, OpenAIEmbeddings),
    "/v1/responses": _generating(OPENAI, OpenAIResponses),
    "/api/chat": _generating(OLLAMA, OllamaChat),
    "/api/generate": _generating(OLLAMA, OllamaGenerate),
    "/api/embed": _generating(OLLAMA, OllamaEmbed),
    "/api/embeddings": _generating(OLLAMA, OllamaEmbeddings),
    "/api/show": Endpoint(OLLAMA, relayed=True),
}


def endpoint(route: str) -> Endpoint:
    """The endpoint of any route. What is not in the table generates nothing and is not relayed; it
    speaks Anthropic's dialect below /v1/ and Ollama's elsewhere."""
    found = ENDPOINTS.get(route)
    return found or Endpoint(ANTHROPIC if route.startswith("/v1/") else OLLAMA)


def not_found(route: str) -> WireError:
    """The error for a route that does not exist, in the words of its dialect."""
    ollama = endpoint(route).dialect is OLLAMA
    return WireError(404, "404 page not found" if ollama else f"Not found: {route}")


def model_object(model: LocalModel) -> Object:
    """GET /v1/models/{id}: one object that validates in Anthropic's and in OpenAI's clients.

    https://platform.claude.com/docs/en/api/models/retrieve
    https://platform.openai.com/docs/api-reference/models/object"""
    return {
        **_model(model.name, model.modified, "mlx"),
        "max_input_tokens": model.context_length,
        "max_tokens": model.context_length,
    }


def upstream_model_object(tag: Object) -> Object:
    """The same for a model that an upstream lists as `tag`, an object of GET /api/tags."""
    try:
        modified = max(0.0, datetime.fromisoformat(tag["modified_at"]).timestamp())
    except (KeyError, TypeError, ValueError):
        modified = 0.0
    return _model(tag["name"], modified, "upstream")


def _model(name: str, modified: float, owner: str) -> Object:
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": timestamp(modified),
        "lifecycle": "active",
        "object": "model",
        "created": int(modified),
        "owned_by": owner,
    }


def model_page(
    models: list[LocalModel],
    query: dict[str, str],
    tags: Iterable[Object] = (),
    *,
    anthropic: bool = False,
) -> Object:
    """GET /v1/models?limit&after_id&before_id: the installed models, then what an upstream lists as
    `tags`. Raises WireError for a bad limit or an id that is not there.

    A client of Anthropic's (`anthropic`) also gets each installed model by a name that Claude Code
    offers. Codex, which says its `client_version`, fails without a list `models`; an empty one lets
    it use its own instructions, of which an entry would have to bring others. A page has 1000
    models by default, not Anthropic's 20: OpenAI's clients read the same answer and do not turn
    pages.

    https://platform.claude.com/docs/en/api/models/list
    https://platform.openai.com/docs/api-reference/models/list"""
    for_claude_code = [
        {**model_object(model), "id": f"{VENDOR_PREFIX}{model.name}"}
        for model in models
        if not model.name.lower().startswith(_SHOWN_BY_CLAUDE_CODE)
    ]
    everything = [
        *map(model_object, models),
        *(for_claude_code if anthropic else ()),
        *map(upstream_model_object, not_hidden(tags, models)),
    ]
    limit = query.get("limit") or "1000"
    if not re.fullmatch(r"\d{1,4}", limit, re.ASCII) or not 1 <= int(limit) <= 1000:
        raise WireError(400, "limit: Input should be an integer between 1 and 1000")
    names, start, end = [model["id"] for model in everything], 0, len(everything)
    for key in ("after_id", "before_id"):
        if query.get(key) and query[key] not in names:
            raise WireError(400, f"{key}: no model '{query[key]}'")
    if query.get("after_id"):
        start = names.index(query["after_id"]) + 1
    if query.get("before_id"):
        end = names.index(query["before_id"])
        data = everything[max(start, end - int(limit)) : end]
    else:
        data = everything[start : start + int(limit)]
    return {
        **({"models": []} if "client_version" in query else {}),
        "object": "list",
        "data": data,
        "has_more": len(data) < end - start,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def tag_list(models: list[LocalModel], tags: Iterable[Object] = ()) -> Object:
    """GET /api/tags: the installed models, newest first, then what an upstream lists as `tags`.

    https://github.com/ollama/ollama/blob/main/docs/api.md#list-local-models"""
    newest = sorted(models, key=lambda model: model.modified, reverse=True)
    installed = [
        {
            **listed_model(model, model.size),
            "modified_at": timestamp(model.modified),
            "capabilities": list(model.capabilities),
        }
        for model in newest
    ]
    return {"models": [*installed, *not_hidden(tags, models)]}
