"""Exceptions as error answers: one HTTP status and message for each kind, and three formats.

Anthropic: https://platform.claude.com/docs/en/api/errors
OpenAI: https://platform.openai.com/docs/guides/error-codes
Ollama: https://docs.ollama.com/api/errors"""

from __future__ import annotations

import re

from _mlx_server.inference.protocol import (
    EngineBusy,
    EngineClosed,
    EngineError,
    InvalidRequest,
    LoadPutOff,
    ModelLoadError,
    ModelNotFound,
    PromptTooLong,
)
from _mlx_server.wire.fields import Object, WireError

ErrorAnswer = tuple[int, dict[str, str], Object]
"""An HTTP status, headers to add and a JSON body."""

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_OPENAI_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def _classified(error: Exception) -> tuple[int, str, dict[str, str]]:
    """The HTTP status, message and headers of any exception. What would fail again is 4xx. Clients
    of Anthropic and OpenAI read the headers and know from them whether to try again."""
    match error:
        case WireError():
            return error.status, error.message, error.headers
        case ModelNotFound():
            return 404, str(error), {}
        case InvalidRequest():
            return 400, str(error), {}
        case ModelLoadError():
            return 400, str(error), {"x-should-retry": "false"}
        case EngineBusy():
            return 503, f"Overloaded: {error}", {"retry-after": str(error.retry_after)}
        case EngineClosed():
            return 503, f"Overloaded: {error}", {"retry-after": "1"}
        case EngineError():
            return 500, str(error), {}
    return 500, "internal error", {}


def anthropic_error(error: Exception, request_id: str) -> ErrorAnswer:
    """Any exception in Anthropic's format. An engine that is busy or closed is a 529, which is
    Anthropic's own status."""
    status, message, headers = _classified(error)
    match error:
        case ModelNotFound():
            installed = ", ".join(error.installed) or "none"
            message = f"model: {error.model} (installed: {installed})"
        case EngineBusy() | EngineClosed():
            status = 529
    default_type = "invalid_request_error" if status < 500 else "api_error"
    body = {
        "type": "error",
        "error": {"type": _ANTHROPIC_TYPES.get(status, default_type), "message": message},
        "request_id": request_id,
    }
    return status, headers, body


def openai_error(error: Exception) -> ErrorAnswer:
    """Any exception in OpenAI's format. `param` is the path that the message begins with."""
    status, message, headers = _classified(error)
    code, param = _OPENAI_CODES.get(status), None
    match error:
        case WireError() if path := re.match(r"[a-z_]\w*(\.\w+)*(?=: )", message):
            param = path[0]
        case ModelNotFound():
            code = "model_not_found"
        case PromptTooLong():
            code = "context_length_exceeded"
            message = (
                f"This model's maximum context length is {error.maximum} tokens. "
                f"However, your messages resulted in {error.tokens} tokens."
            )
    error_type = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": message, "type": error_type, "param": param, "code": code}
    return status, headers, {"error": body}


def ollama_error(error: Exception) -> ErrorAnswer:
    """Any exception in Ollama's format."""
    status, message, headers = _classified(error)
    match error:
        case ModelNotFound():
            message = f"model '{error.model}' not found"
        case PromptTooLong():
            message = (
                f"input length ({error.tokens} tokens) exceeds the model's maximum context length "
                f"({error.maximum} tokens)"
            )
        case EngineClosed() | LoadPutOff():
            message = f"server busy, please try again.  {error}"
        case EngineBusy():
            message = "server busy, please try again.  maximum pending requests exceeded"
    kept = headers if isinstance(error, WireError | LoadPutOff) else {}
    return status, kept, {"error": message}
