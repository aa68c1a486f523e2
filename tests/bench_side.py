"""One side of a comparison: a server at a URL, or mlx-lm's own loop in this process."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench_api import APIS, Answer
from bench_prompts import say, text
from soak import figure

FAILURES = OSError, ValueError, LookupError, http.client.HTTPException  # of other people's servers


@dataclass
class Side:
    """A server to measure.

    api: a key of `APIS`; model: the model's name in that API.
    tells: whether the server tells what of a prompt it had read before.
    context: tokens to ask Ollama for; 0 leaves it to the server.
    drafts: whether it may decode several tokens a pass; only Ollama's API can forbid it.
    """

    name: str
    url: str
    api: str
    model: str
    about: str = ""
    tells: bool = True
    context: int = 0
    drafts: bool = True

    def ask(self, body: dict) -> Answer:
        """Sends a Messages API body, streamed, in the server's API.

        An answer without a visible piece is timed by its end. Where tokens are not counted, a
        piece of the answer is one token, and four characters of the prompt. Raises OSError for an
        error.
        """
        path, form, read = APIS[self.api]
        payload = form({"temperature": 0, **body, "model": self.model, "stream": True})
        if self.api == "ollama" and self.context:  # with another one it would load the model anew
            payload["options"]["num_ctx"] = self.context
        if not self.drafts:
            payload["options"]["draft_num_predict"] = 0
        answer, pieces, started, seen = Answer(), 0, time.perf_counter(), 0.0
        with request(self.url, path, payload) as response:
            if response.status != 200:
                said = response.read(500).decode(errors="replace")
                raise OSError(f"{self.url}{path} answered {response.status}: {said}")
            for line in response:
                if not (line := line.removeprefix(b"data:").strip()).startswith(b"{"):
                    continue
                if (event := json.loads(line)).get("error"):
                    raise OSError(f"{self.url}{path} broke off: {event['error']}")
                if read(event, answer):
                    pieces, seen = pieces + 1, time.perf_counter()
                    answer.first = answer.first or seen - started
        answer.first = answer.first or time.perf_counter() - started
        answer.rest = max(0.0, seen - started - answer.first)
        answer.tokens = answer.tokens or pieces
        answer.prompt = answer.prompt or len(json.dumps(body)) // 4
        for block in answer.content:
            if block["type"] == "tool_use":
                block["input"], arguments = {}, block.pop("json")
                with contextlib.suppress(ValueError):  # there are none, or they were cut off
                    block["input"] = json.loads(arguments)
        return answer

    def memory(self) -> float:
        """GB that the server says it holds, in Ollama's list of models or in our metrics; 0 if it
        does not say."""
        with contextlib.suppress(*FAILURES):
            if self.api == "ollama":
                models = json.loads(get(self.url, "/api/ps"))["models"]
                return sum(model["size"] for model in models) / 1e9
            return figure(self.url, "memory_bytes") / 1e9
        return 0


class Generate:
    """mlx-lm's own `stream_generate` in this process, asked as a server is. It takes no tools."""

    name, parts = "stream_generate", ("prefill", "decode")

    def __init__(self, path: str):
        from mlx_lm.utils import load_model

        from _mlx_server.inference.prompt.renderer import PromptRenderer
        from engine import Library

        self._model, _ = load_model(Path(path))
        self._tokenizer = PromptRenderer(Library([]).resolve(path, trusted=True)).tokenizer

    def ask(self, body: dict) -> Answer:
        from mlx_lm import stream_generate

        started, first = time.perf_counter(), 0.0
        prompt = self._tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        pieces = stream_generate(
            self._model,
            self._tokenizer,
            prompt,
            max_tokens=body["max_tokens"],
            prefill_step_size=512,
        )
        for piece in pieces:
            seen, tokens = time.perf_counter(), piece.generation_tokens
            first = first or seen - started
        return Answer(len(prompt), 0, tokens, first, seen - started - first)

    def memory(self) -> float:
        return 0


@contextlib.contextmanager
def request(url: str, path: str, payload: dict | None = None) -> Iterator[http.client.HTTPResponse]:
    """Sends GET, or POST of a payload."""
    parts = urlsplit(url)
    headers = {
        "Content-Type": "application/json",
        "x-api-key": "bench",
        "anthropic-version": "2023-06-01",
    }
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=3600)
    with contextlib.closing(connection):
        method = "POST" if payload else "GET"
        connection.request(method, parts.path.rstrip("/") + path, json.dumps(payload), headers)
        yield connection.getresponse()


def get(url: str, path: str) -> str:
    """The text that GET brings, empty if the status is not 200."""
    with request(url, path) as response:
        return response.read().decode() if response.status == 200 else ""


def model_names(url: str) -> list[str]:
    listed = json.loads(get(url, "/api/tags") or get(url, "/v1/models"))
    return [one.get("name") or one["id"] for one in listed.get("models") or listed["data"]]


def find_side(name: str, url: str, api: str | None, model: str | None) -> Side:
    """The server at a URL, in that of its APIs that tells most, with its only model if none is
    named. Raises SystemExit."""
    try:
        models = [model] if model else model_names(url)
    except FAILURES as error:
        raise SystemExit(f"bench: {url} cannot be asked: {error}") from None
    if len(models) != 1:
        raise SystemExit(f"bench: name the model of {url}: {', '.join(models)}")
    sides, failed = [], []
    for one in [api] if api else APIS:
        side = Side(name, url, one, models[0], f"{models[0]}, asked in its API '{one}'")
        try:
            side.ask(say(text("probe", 20), 1))
            again = side.ask(say(text("probe", 20), 1))
        except FAILURES as error:
            failed.append(f"{url} cannot be asked: {error}")
        else:
            side.tells = bool(again.reused)
            sides.append(side)
    if not sides:
        raise SystemExit(f"bench: {'; '.join(failed)}")
    return max(sides, key=lambda side: side.tells)
