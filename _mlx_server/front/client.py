"""Asks a server that runs at an address, over HTTP, as other programs do."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from _mlx_server.front.options import api_keys, program, reached
from _mlx_server.inference.protocol import EngineError

PATIENCE = 10.0  # seconds that a short answer may take
PROBE = 2.0  # seconds that whoever listens on the port may take to answer


class ServerError(EngineError):
    """The server cannot be asked, or refuses; the message says why."""


@dataclass(frozen=True)
class ServedModel:
    """What a server says of a model that answers to a name."""

    name: str
    context_length: int  # tokens
    capabilities: list[str]


class ServerClient:
    """The server at the address and with the key that the flags name."""

    def __init__(self, host: str, port: int, key: str | None = None):
        self.url = reached(host, port)
        self._netloc = urlsplit(self.url).netloc
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def of(cls, args: argparse.Namespace) -> ServerClient:
        return cls(args.host, args.port, next(iter(api_keys(args)), None))

    def answers(self) -> bool:
        """Whether a server of this program answers there."""
        return self.holder() == "another mlx-server"

    def holder(self) -> str | None:
        """Which server of Ollama's API answers there, None if there is none."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            if self._request("GET", "/", patience=PROBE) == (200, b"Ollama is running"):
                status, _ = self._request("GET", "/health", patience=PROBE)
                return "Ollama" if status == 404 else "another mlx-server"
        return None

    def model(self, name: str) -> ServedModel:
        """The model that answers to `name` there. Raises ServerError."""
        id = self.ask("GET", f"/v1/models/{quote(name)}")["id"]
        shown = self.ask("POST", "/api/show", {"model": id})
        info = shown["model_info"]
        context = info[f"{info['general.architecture']}.context_length"]
        return ServedModel(id, context, shown["capabilities"])

    def ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        patience: float | None = PATIENCE,
    ) -> Any:
        """The JSON of an answer. Raises ServerError, also for a status that is no success."""
        try:
            status, content = self._request(method, path, body, patience)
            answer = json.loads(content) if content else {}
        except ConnectionRefusedError:
            how = f"no server listens at {self.url}; to start it: {program()}"
            raise ServerError(how) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or "its answer is none"
            raise ServerError(f"the server at {self.url} cannot be asked: {reason}") from None
        if status == 401:
            raise ServerError(f"the server at {self.url} wants one of its keys: --api-key KEY")
        if status != 200:
            said = answer.get("error") if isinstance(answer, dict) else None
            said = said.get("message") if isinstance(said, dict) else said
            raise ServerError(f"the server at {self.url} refuses: {said or status}")
        return answer

    def memory(self) -> float | None:
        """Bytes that MLX holds there, None if it does not say."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            _, text = self._request("GET", "/metrics", patience=PROBE)
            for line in text.decode().splitlines():
                if line.startswith("mlx_server_memory_bytes "):
                    return float(line.split()[1])
        return None

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        patience: float | None = PATIENCE,
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._netloc, timeout=patience)
        with contextlib.closing(connection):
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
