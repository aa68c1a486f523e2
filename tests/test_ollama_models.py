"""Ollama's objects about models."""

from __future__ import annotations

import json

from ollama import ProcessResponse, ShowResponse
from wire_cases import BIG, DEMO, DETAILS

from _mlx_server.wire.ollama_models import ollama_ps, ollama_show
from engine import Loaded


def test_show() -> None:
    generation = {
        "temperature": 0.6,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "eos_token_id": [1, 2],
        "do_sample": True,
    }
    shown = ollama_show(BIG, 2048, "{{ x }}", generation, "qwen3:8b")
    ShowResponse.model_validate_json(json.dumps(shown))
    assert shown["model_info"] == {
        "general.architecture": "qwen3",
        "general.basename": "qwen3:8b",
        "general.parameter_count": 1000,
        "qwen3.context_length": 2048,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 36,
        "qwen3.attention.head_count": 32,
        "qwen3.attention.head_count_kv": 8,
    }
    assert shown["parameters"].splitlines()[0] == "temperature                    0.6"
    assert len(shown["parameters"].splitlines()) == 3 and "repeat_penalty" in shown["parameters"]
    assert all(
        isinstance(shown[key], str)
        for key in ("license", "modelfile", "system", "template", "modified_at")
    )
    assert shown["capabilities"] == ["completion", "tools"]


def test_ps() -> None:
    listed = ollama_ps([Loaded(DEMO, 10, 1_700_000_300.0, 2048), Loaded(BIG, 20, None, 4096)])
    ProcessResponse.model_validate_json(json.dumps(listed))
    assert [one["expires_at"][:4] for one in listed["models"]] == ["2318", "2023"]
    assert listed["models"][1] == {
        "name": "demo:latest",
        "model": "demo:latest",
        "size": 10,
        "size_vram": 10,
        "digest": "ab" * 32,
        "details": DETAILS,
        "expires_at": "2023-11-14T22:18:20.000000Z",
        "context_length": 2048,
    }
    assert ollama_ps([]) == {"models": []}
