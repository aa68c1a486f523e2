"""Exceptions as the error answers of each dialect."""

from __future__ import annotations

import pytest

from _mlx_server.wire.errors import anthropic_error, ollama_error, openai_error
from _mlx_server.wire.fields import WireError
from engine import (
    EngineBusy,
    EngineClosed,
    EngineError,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    PromptTooLong,
)

BUSY = "server busy, please try again.  "


@pytest.mark.parametrize(
    "error, status, kind, message",
    [
        (WireError(405, "POST only"), 405, "invalid_request_error", "POST only"),
        (WireError(401, "invalid x-api-key"), 401, "authentication_error", "invalid x-api-key"),
        (WireError(403, "no"), 403, "permission_error", "no"),
        (WireError(404, "no"), 404, "not_found_error", "no"),
        (WireError(413, "big"), 413, "request_too_large", "big"),
        (WireError(503, "wait"), 503, "api_error", "wait"),
        (
            PromptTooLong(9, 8),
            400,
            "invalid_request_error",
            "prompt is too long: 9 tokens > 8 maximum",
        ),
        (InvalidRequest("no"), 400, "invalid_request_error", "no"),
        (
            ModelNotFound("x", ["demo", "y"]),
            404,
            "not_found_error",
            "model: x (installed: demo, y)",
        ),
        (ModelLoadError("broken"), 400, "invalid_request_error", "broken"),
        (EngineClosed("closing"), 529, "overloaded_error", "Overloaded: closing"),
        (EngineError("odd"), 500, "api_error", "odd"),
        (KeyError("/secret/path"), 500, "api_error", "internal error"),
    ],
)
def test_anthropics_errors(error: Exception, status: int, kind: str, message: str) -> None:
    got, headers, body = anthropic_error(error, "req_1")
    assert (got, body) == (
        status,
        {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"},
    )
    assert (headers.get("x-should-retry") == "false") == isinstance(error, ModelLoadError)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (WireError(405, "405 method not allowed"), 405, "405 method not allowed"),
        (ModelNotFound("x", ["demo"]), 404, "model 'x' not found"),
        (
            PromptTooLong(9, 8),
            400,
            "input length (9 tokens) exceeds the model's maximum context length (8 tokens)",
        ),
        (InvalidRequest("no"), 400, "no"),
        (ModelLoadError("broken"), 400, "broken"),
        (EngineBusy("full"), 503, f"{BUSY}maximum pending requests exceeded"),
        (EngineClosed("closing"), 503, f"{BUSY}closing"),
        (EngineError("odd"), 500, "odd"),
        (KeyError("/secret/path"), 500, "internal error"),
    ],
)
def test_ollamas_errors(error: Exception, status: int, message: str) -> None:
    assert ollama_error(error) == (status, {}, {"error": message})


@pytest.mark.parametrize(
    "error, status, kind, code, message",
    [
        (
            WireError(401, "invalid x-api-key"),
            401,
            "invalid_request_error",
            "invalid_api_key",
            "invalid x-api-key",
        ),
        (
            ModelNotFound("x", ["demo"]),
            404,
            "invalid_request_error",
            "model_not_found",
            "model 'x' not found; installed: demo",
        ),
        (
            PromptTooLong(9, 8),
            400,
            "invalid_request_error",
            "context_length_exceeded",
            "This model's maximum context length is 8 tokens. "
            "However, your messages resulted in 9 tokens.",
        ),
        (InvalidRequest("no"), 400, "invalid_request_error", None, "no"),
        (ModelLoadError("broken"), 400, "invalid_request_error", None, "broken"),
        (EngineBusy("full"), 503, "server_error", None, "Overloaded: full"),
        (EngineClosed("closing"), 503, "server_error", None, "Overloaded: closing"),
        (EngineError("odd"), 500, "server_error", None, "odd"),
        (KeyError("/secret"), 500, "server_error", None, "internal error"),
    ],
)
def test_openais_errors(error: Exception, status: int, kind: str, code: str | None, message: str):
    got, _, body = openai_error(error)
    assert (got, body) == (
        status,
        {"error": {"message": message, "type": kind, "param": None, "code": code}},
    )
