"""The table of endpoints, and the lists of models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from anthropic.types import ModelInfo
from ollama import ListResponse
from wire_cases import BIG, DEMO, DETAILS, HI

from _mlx_server.wire.fields import WireError
from dialects import ENDPOINTS, endpoint, model_object, model_page, not_found, tag_list
from engine import LocalModel


def model(name: str) -> LocalModel:
    return replace(DEMO, name=name)


def test_model_object() -> None:
    one = model_object(model("mlx-community/Qwen3-4B-4bit"))
    ModelInfo.model_validate_json(json.dumps(one), strict=True)
    assert (
        one["id"] == one["display_name"] == "mlx-community/Qwen3-4B-4bit"
        and one["lifecycle"] == "active"
    )
    assert (one["object"], one["created"], one["owned_by"]) == ("model", 1_700_000_000, "mlx")


@pytest.mark.parametrize(
    "query, page, more",
    [
        ({}, "abcde", False),
        ({"limit": "2"}, "ab", True),
        ({"limit": "2", "after_id": "b"}, "cd", True),
        ({"limit": "2", "after_id": "d"}, "e", False),
        ({"after_id": "e"}, "", False),
        ({"limit": "2", "before_id": "d"}, "bc", True),
        ({"limit": "9", "before_id": "c"}, "ab", False),
    ],
)
def test_model_pages(query: dict, page: str, more: bool) -> None:
    listed = model_page([model(name) for name in "abcde"], query)
    assert "".join(one["id"] for one in listed["data"]) == page and listed["has_more"] is more
    assert (listed["first_id"], listed["last_id"]) == (
        (page[0], page[-1]) if page else (None, None)
    )


def test_models_are_listed_for_claude_code_by_names_that_it_offers() -> None:
    models = [model("org/a"), model("claude-b")]
    listed = model_page(models, {}, anthropic=True)["data"]
    for one in listed:
        ModelInfo.model_validate_json(json.dumps(one), strict=True)
    assert [(one["id"], one["display_name"]) for one in listed] == [
        ("org/a", "org/a"),
        ("claude-b", "claude-b"),
        ("anthropic/org/a", "org/a"),
    ]
    pages = [
        model_page(models, {"limit": "1", "after_id": one["id"]}, anthropic=True)["data"]
        for one in listed
    ]
    assert pages == [[listed[1]], [listed[2]], []]


def test_codex_gets_the_list_that_it_decodes() -> None:
    plain = model_page([model("a")], {})
    assert model_page([model("a")], {"client_version": "0.171.0"}) == {**plain, "models": []}


@pytest.mark.parametrize(
    "query", [{"limit": "0"}, {"limit": "x"}, {"limit": "1001"}, {"after_id": "nobody"}]
)
def test_bad_model_pages(query: dict) -> None:
    with pytest.raises(WireError):
        model_page([model("a")], query)


def test_tags() -> None:
    listed = tag_list([DEMO, replace(BIG, name="org/x:4b")])
    ListResponse.model_validate_json(json.dumps(listed))
    assert [one["name"] for one in listed["models"]] == ["org/x:4b", "demo:latest"]
    assert listed["models"][1] == {
        "name": "demo:latest",
        "model": "demo:latest",
        "modified_at": "2023-11-14T22:13:20.500000Z",
        "size": 10,
        "digest": "ab" * 32,
        "details": DETAILS,
        "capabilities": ["completion", "tools"],
    }
    assert tag_list([]) == {"models": []}


@pytest.mark.parametrize(
    "route, name, header, relayed",
    [
        ("/v1/messages", "anthropic", "request-id", True),
        ("/v1/messages/count_tokens", "anthropic", "request-id", True),
        ("/v1/models", "anthropic", "request-id", False),
        ("/v1/nowhere", "anthropic", "request-id", False),
        ("/v1/chat/completions", "openai", "x-request-id", True),
        ("/v1/completions", "openai", "x-request-id", True),
        ("/v1/embeddings", "openai", "x-request-id", True),
        ("/v1/responses", "openai", "x-request-id", True),
        ("/api/chat", "ollama", None, True),
        ("/api/embed", "ollama", None, True),
        ("/api/show", "ollama", None, True),
        ("/api/tags", "ollama", None, False),
        ("/v1", "ollama", None, False),
        ("/", "ollama", None, False),
        ("", "ollama", None, False),
    ],
)
def test_endpoints(route: str, name: str, header: str | None, relayed: bool) -> None:
    found = endpoint(route)
    assert (found.dialect.name, found.dialect.request_id_header) == (name, header)
    assert (found.relayed, found.dialect.strict_json) == (relayed, name != "ollama")


def test_replies_speak_the_dialect_of_their_endpoint() -> None:
    body = {"model": "m", "max_tokens": 9, "messages": HI, "input": "hi"}
    generating = {route: found for route, found in ENDPOINTS.items() if found.reply}
    assert len(generating) == 9
    for route, found in generating.items():
        prompt = {} if route == "/v1/responses" else {"prompt": "hi"}
        reply = found.reply({**body, **prompt}, "req_1")
        assert reply.dialect == found.dialect.name and reply.request.model == "m"


@pytest.mark.parametrize(
    "route, message",
    [("/v1/nowhere", "Not found: /v1/nowhere"), ("/api/nowhere", "404 page not found")],
)
def test_unknown_routes(route: str, message: str) -> None:
    error = not_found(route)
    assert (error.status, error.message) == (404, message)
