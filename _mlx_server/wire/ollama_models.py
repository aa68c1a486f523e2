"""Ollama's endpoints about models:
https://github.com/ollama/ollama/blob/main/docs/api.md and api/types.go beside it"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from _mlx_server.inference.catalog.models import Loaded, LocalModel
from _mlx_server.inference.catalog.presets import Preset
from _mlx_server.wire.chat_messages import chat_turns
from _mlx_server.wire.conversation import Turn, canonical
from _mlx_server.wire.fields import Object, WireError, field, is_type, items, timestamp
from _mlx_server.wire.images import Images
from _mlx_server.wire.ollama_request import (
    ollama_max_tokens,
    ollama_options,
    ollama_sampling,
    ollama_text,
)

# Ollama's name of a parameter by the name it has in `Sampling` and generation_config.json
_PARAMETER_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "repetition_penalty": "repeat_penalty",
    "repetition_context": "repeat_last_n",
}
_NAME = re.compile(r"\w[\w.-]{0,79}(/\w[\w.-]{0,79}){0,2}(:\w[\w.-]{0,79})?", re.ASCII)
_NEVER = "2318-01-01T00:00:00.000000Z"  # beyond it Go cannot count nanoseconds


def checked_name(name: Any, message: str) -> str:
    """A name that a model may get by Ollama's rules. Raises WireError 400 with `message` for any
    other value.

    https://github.com/ollama/ollama/blob/main/types/model/name.go"""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise WireError(400, message)
    return name


def _tagged(name: str) -> str:
    """A name with an explicit tag, without which clients do not find the model again."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def find_tag(tags: Iterable[Object], name: str) -> Object | None:
    """The one of an upstream's tag objects that a name means."""
    wanted = _tagged(name).lower()
    return next((tag for tag in tags if _tagged(tag["name"]).lower() == wanted), None)


def not_hidden(tags: Iterable[Object], models: list[LocalModel]) -> list[Object]:
    """An upstream's tag objects without those whose name is a local model's."""
    local = {_tagged(model.name).lower() for model in models}
    return [tag for tag in tags if _tagged(tag["name"]).lower() not in local]


def listed_model(model: LocalModel, size: int) -> Object:
    """What the lists of installed and of loaded models say about a model; `size` is in bytes."""
    return {
        "name": _tagged(model.name),
        "model": _tagged(model.name),
        "size": size,
        "digest": model.digest,
        "details": _details(model),
    }


def _details(model: LocalModel) -> Object:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": model.family,
        "families": [model.family],
        "parameter_size": model.parameter_size,
        "quantization_level": model.quantization,
        "context_length": model.context_length,
        "embedding_length": model.embedding_length,
    }


def ollama_ps(loaded: list[Loaded]) -> Object:
    """GET /api/ps: the models in memory, those that stay longest first."""
    longest_first = sorted(
        loaded,
        key=lambda entry: math.inf if entry.expires is None else entry.expires,
        reverse=True,
    )
    return {
        "models": [
            {
                **listed_model(entry.model, entry.size),
                "size_vram": entry.size,
                "context_length": entry.context_length,
                "expires_at": _NEVER if entry.expires is None else timestamp(entry.expires),
            }
            for entry in longest_first
        ]
    }


def ollama_show(
    model: LocalModel,
    context_length: int,
    template: str,
    generation: Object,
    name: str,
    preset: Preset | None = None,
) -> Object:
    """POST /api/show: `context_length` in tokens, the text of the chat template, the model's
    generation_config.json, the name that the client asked for and the preset that it means."""
    preset = preset or Preset(name, model.name, model.modified)
    parameters = _parameters(generation, preset)
    return {
        "license": "",
        "modelfile": _modelfile(model, preset, parameters),
        "template": template,
        "system": preset.system,
        "parameters": "\n".join(f"{key:<30} {value}" for key, value in parameters),
        **({"messages": preset.messages} if preset.messages else {}),
        "details": _details(model),
        "capabilities": list(model.capabilities),
        "modified_at": timestamp(preset.modified),
        "model_info": _model_info(model, context_length, name),
    }


def _parameters(generation: Object, preset: Preset) -> list[tuple[str, Any]]:
    """Name and value of the parameters that a model and its preset set; the preset has
    precedence."""
    chosen = {key: value for key, value in vars(preset.sampling).items() if value is not None}
    parameters: list[tuple[str, Any]] = [
        (_PARAMETER_NAMES[key], value)
        for key, value in {**generation, **chosen}.items()
        if key in _PARAMETER_NAMES and is_type(value, float)
    ]
    if preset.max_tokens is not None:
        parameters.append(("num_predict", preset.max_tokens))
    parameters += [("stop", json.dumps(stop, ensure_ascii=False)) for stop in preset.stop]
    return parameters


def _modelfile(model: LocalModel, preset: Preset, parameters: list[tuple[str, Any]]) -> str:
    """https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx"""
    lines = [f"FROM {model.name}"]
    if preset.system:
        lines.append(f'SYSTEM """{preset.system}"""')
    lines += [f"PARAMETER {key} {value}" for key, value in parameters]
    return "\n".join(lines) + "\n"


def _model_info(model: LocalModel, context_length: int, name: str) -> Object:
    """What Ollama reads from a GGUF file's header, as far as config.json says it."""
    config = {**model.config, **(model.config.get("text_config") or {})}
    numbers = {
        "context_length": context_length,
        "embedding_length": model.embedding_length,
        "block_count": config.get("num_hidden_layers"),
        "attention.head_count": config.get("num_attention_heads"),
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "feed_forward_length": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
    }
    return {
        "general.architecture": model.family,
        "general.basename": name,
        "general.parameter_count": model.parameters,
        **{f"{model.family}.{key}": value for key, value in numbers.items() if is_type(value, int)},
    }


def ollama_create(body: Object, name: str, base: Preset) -> Preset:
    """POST /api/create: a preset called `name` for the model of `base`. What the body does not set
    is taken from `base`. Raises WireError 400, also for bodies that want to make weights or
    templates."""
    for key in ("files", "adapters", "quantize", "template", "renderer", "parser"):
        if body.get(key):
            raise WireError(
                400,
                f"'{key}' is not supported by this server: "
                "a model can be created 'from' an installed one",
            )
    options = ollama_options(body, "parameters")
    text_of = functools.partial(ollama_text, images=Images())
    turns = chat_turns(items(body, "messages", dict), text_of)
    system = field(body, "system", str, default="") or base.system
    messages = canonical([Turn("system", system), *turns])
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    if messages and messages[-1]["role"] != "assistant":
        raise WireError(400, "messages: the last one should be the assistant's")
    sampling = ollama_sampling(options)
    unset = {
        key: value for key, value in vars(base.sampling).items() if getattr(sampling, key) is None
    }
    max_tokens = ollama_max_tokens(options)
    return Preset(
        name,
        base.model,
        system=system,
        messages=messages or base.messages,
        sampling=replace(sampling, **unset),
        stop=[text for text in options["stop"] if text] or base.stop,
        max_tokens=base.max_tokens if max_tokens is None else max_tokens,
    )
