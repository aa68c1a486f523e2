"""Images over HTTP, in every API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, Server, examples
from test_http import ask
from test_vision import FILES, OTHER, READ, bodies, encoded, in_tool_result, parts, reference
from vision_models import build_vision_model

from engine import Engine


def asked(server: Server, path: str, body: dict) -> dict:
    """The answer to a body that is fine."""
    response, text = ask(server, "POST", path, body)
    assert response.status == 200, text
    return json.loads(text)


def text_of(path: str, found: dict) -> str:
    """The text of an API's answer, thinking left out."""
    match path:
        case "/v1/messages":
            return "".join(block.get("text", "") for block in found["content"])
        case "/v1/chat/completions":
            return found["choices"][0]["message"]["content"] or ""
        case "/v1/responses":
            said = [item["content"] for item in found["output"] if item["type"] == "message"]
            return "".join(part["text"] for content in said for part in content)
        case "/api/chat":
            return found["message"]["content"]
    return found["response"]


def tokens_of(found: dict) -> tuple[int, int]:
    """How many tokens an API says the prompt and the answer have."""
    if "prompt_eval_count" in found:
        return found["prompt_eval_count"], found["eval_count"]
    usage = found["usage"]
    reused = usage.get("cache_read_input_tokens", 0) + usage.get("cache_creation_input_tokens", 0)
    read = usage.get("prompt_tokens", usage.get("input_tokens", 0)) + reused
    return read, usage.get("completion_tokens", usage.get("output_tokens"))


def tool_results(file: bytes) -> dict[str, dict]:
    """An image that a tool has read, in each API that has tools, by the path it is posted to."""
    question = {"role": "user", "content": "What is in a.png?"}
    arguments = {"file_path": "a.png"}
    function = {"name": READ["name"], "parameters": READ["input_schema"]}
    tools = [{"type": "function", "function": function}]
    name, text = READ["name"], json.dumps(arguments)
    one = {"id": "t1", "type": "function", "function": {"name": name, "arguments": text}}
    chat = [
        question,
        {"role": "assistant", "content": None, "tool_calls": [one]},
        {"role": "tool", "tool_call_id": "t1", "content": parts(file)},
    ]
    native = [
        question,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
        },
        {"role": "tool", "tool_name": name, "content": "", "images": [encoded(file)]},
    ]
    items = [
        question,
        {"type": "function_call", "call_id": "t1", "name": name, "arguments": text},
        {
            "type": "function_call_output",
            "call_id": "t1",
            "output": parts(file, kind="input_image"),
        },
    ]
    options = {"options": {"num_predict": 24}, "stream": False}
    model = {"model": "default"}
    return {
        "/v1/messages": in_tool_result(file),
        "/v1/chat/completions": {**model, "max_tokens": 24, "tools": tools, "messages": chat},
        "/v1/responses": {
            **model,
            "max_output_tokens": 24,
            "tools": [{"type": "function", **function}],
            "input": items,
        },
        "/api/chat": {**model, "tools": tools, "messages": native, **options},
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5", "mistral3", "pixtral", "gemma3", "gemma4"])
def test_every_api_means_the_same_in_every_family(kind: str, tmp_path: Path, serve):
    """Images that a user sends and those that a tool has read; the first ones as transformers
    answers."""
    with Engine(str(build_vision_model(kind, tmp_path / kind))) as engine:
        renderer = engine.renderer(engine.default)
        expected = reference(kind)["answer"].tolist()
        server = serve(engine)
        answers = set()
        for path, body in bodies(*FILES).items():
            found = asked(server, path, body)
            answers.add((text_of(path, found), *tokens_of(found)))
        [(text, _, count)] = answers
        assert count == len(expected) and text and text in renderer.decode(expected)
        of_tools = []
        for file in (FILES[1], OTHER):
            answers = set()
            for path, body in tool_results(file).items():
                found = asked(server, path, body)
                answers.add((text_of(path, found), *tokens_of(found)))
            of_tools += answers
        assert len(of_tools) == 2 and of_tools[0][0] != of_tools[1][0], of_tools


@pytest.mark.slow
def test_over_http_and_after_a_restart(tmp_path: Path):
    """The same text from every API; another process finds what this one has read."""
    model = build_vision_model("qwen3_vl", tmp_path / "qwen3_vl")
    flags = "--model", str(model), "--cache-dir", str(tmp_path / "cache")
    server = Server(*flags, cached=True)
    texts = set()
    for path, body in bodies(*FILES).items():
        found = asked(server, path, body)
        texts.add(text_of(path, found))
        if path == "/api/generate":
            assert all(token >= 0 for token in found["context"])
    assert len(texts) == 1
    body = bodies(*FILES)["/v1/messages"]
    counted = {key: value for key, value in body.items() if key != "max_tokens"}
    count = json.loads(ask(server, "POST", "/v1/messages/count_tokens", counted)[1])
    usage = json.loads(ask(server, "POST", "/v1/messages", body)[1])["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert read + usage["cache_creation_input_tokens"] == count["input_tokens"]
    tags = json.loads(ask(server, "GET", "/api/tags")[1])["models"]
    assert {"vision" in model["capabilities"] for model in tags if "qwen3" in model["name"]} == {
        True
    }
    shown = json.loads(ask(server, "POST", "/api/show", {"model": "default"})[1])
    assert "vision" in shown["capabilities"]
    said = [{"role": "assistant", "content": texts.pop()}, {"role": "user", "content": "And now?"}]
    body["messages"] += said
    warm = json.loads(ask(server, "POST", "/v1/messages", body)[1])
    assert server.stop() == 0
    server = Server(*flags, cached=True)
    again = json.loads(ask(server, "POST", "/v1/messages", body)[1])
    assert again["content"] == warm["content"]
    assert again["usage"]["cache_read_input_tokens"] >= count["input_tokens"]
    assert server.stop() == 0


@pytest.mark.slow
def test_the_example_of_the_documentation(tmp_path: Path):
    model = build_vision_model("qwen3_vl", tmp_path / "qwen3_vl")
    (shown,) = examples("docs/images.md")
    (tmp_path / "screenshot.png").write_bytes(FILES[0])
    server = Server("--model", str(model), "--max-tokens", "20")
    command = [sys.executable, "-c", shown.code.replace("http://localhost:11435", server.url)]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert out.returncode == 0, out.stderr
    assert server.stop() == 0
