"""The interpreters: vendors' JSON on one side, the engine's `Request` and `Event`s on the other.

Plain functions and small classes from dict to dict. They know no socket and no MLX array, so every
rule of a wire is testable without a server. Four districts: what all dialects share, above all the
one way into the canonical conversation; then Anthropic; then Ollama; then OpenAI."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime

from _mlx_server.inference.models import LocalModel
from _mlx_server.wire.fields import Object, WireError, timestamp
from _mlx_server.wire.ollama_models import listed_model, not_hidden


def anthropic_model(model: LocalModel) -> Object:
    """GET /v1/models/{id}: one object that validates in Anthropic's and in OpenAI's clients."""
    return {
        **_model(model.name, model.modified, "mlx"),
        "max_input_tokens": model.context_length,
        "max_tokens": model.context_length,
    }


def upstream_model(tag: Object) -> Object:
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


def anthropic_models(
    models: list[LocalModel], query: dict[str, str], tags: Iterable[Object] = ()
) -> Object:
    """GET /v1/models?limit&after_id&before_id. Raises WireError for a bad limit or an id that is
    not there.

    The page is 1000 by default, not Anthropic's 20: OpenAI's clients read the same answer and do
    not turn pages. `tags` are what an upstream lists."""
    everything = [*map(anthropic_model, models), *map(upstream_model, not_hidden(tags, models))]
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
        "object": "list",
        "data": data,
        "has_more": len(data) < end - start,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def ollama_tags(models: list[LocalModel], tags: Iterable[Object] = ()) -> Object:
    """GET /api/tags: the installed models, newest first, then what an upstream lists as `tags`."""
    newest = sorted(models, key=lambda model: model.modified, reverse=True)
    return {
        "models": [
            {
                **listed_model(model, model.size),
                "modified_at": timestamp(model.modified),
                "capabilities": list(model.capabilities),
            }
            for model in newest
        ]
        + not_hidden(tags, models)
    }
