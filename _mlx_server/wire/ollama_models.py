"""Ollama's native API, its objects about models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from _mlx_server.inference.models import Loaded, LocalModel
from _mlx_server.inference.presets import Preset
from _mlx_server.wire.conversation import Turn, canonical, chat_turns
from _mlx_server.wire.fields import Object, WireError, field, is_type, items, timestamp
from _mlx_server.wire.ollama import ollama_options, ollama_sampling, ollama_text

_SHOWN = {
    **{
        key: key
        for key in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "seed",
        )
    },
    # Our words, and Ollama's
    "repetition_penalty": "repeat_penalty",
    "repetition_context": "repeat_last_n",
}
_NEVER = "2318-01-01T00:00:00.000000Z"  # the last moment Go can count nanoseconds to


def _tagged(name: str) -> str:
    """A name with an explicit tag, without which clients do not find it again."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


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


def listed_model(model: LocalModel, size: int) -> Object:
    return {
        "name": _tagged(model.name),
        "model": _tagged(model.name),
        "size": size,
        "digest": model.digest,
        "details": _details(model),
    }


def find_tag(tags: Iterable[Object], name: str) -> Object | None:
    """The one of an upstream's tag objects that a name means."""
    return next(
        (tag for tag in tags if _tagged(tag["name"]).lower() == _tagged(name).lower()), None
    )


def not_hidden(tags: Iterable[Object], models: list[LocalModel]) -> list[Object]:
    """An upstream's tag objects without those whose name is a local model's."""
    local = {_tagged(model.name).lower() for model in models}
    return [tag for tag in tags if _tagged(tag["name"]).lower() not in local]


def ollama_show(
    model: LocalModel,
    context_length: int,
    template: str,
    generation: Object,
    name: str,
    preset: Preset | None = None,
) -> Object:
    """POST /api/show: `context_length` in tokens, the chat template's text, the model's
    generation_config.json, the name the client asked for and the preset it means."""
    preset = preset or Preset(name, model.name, model.modified)
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
    chosen = {key: value for key, value in vars(preset.sampling).items() if value is not None}
    defaults = {
        key: value
        for key, value in {**generation, **chosen}.items()
        if key in _SHOWN and is_type(value, float)
    }
    parameters = [(_SHOWN[key], value) for key, value in defaults.items()]
    parameters += [("num_predict", preset.max_tokens)] * (preset.max_tokens is not None)
    parameters += [("stop", json.dumps(stop, ensure_ascii=False)) for stop in preset.stop]
    system = [f'SYSTEM """{preset.system}"""'] if preset.system else []
    modelfile = [
        f"FROM {model.name}",
        *system,
        *(f"PARAMETER {key} {value}" for key, value in parameters),
    ]
    return {
        "license": "",
        "modelfile": "\n".join(modelfile) + "\n",
        "template": template,
        "system": preset.system,
        "parameters": "\n".join(f"{key:<30} {value}" for key, value in parameters),
        **({"messages": preset.messages} if preset.messages else {}),
        "details": _details(model),
        "capabilities": list(model.capabilities),
        "modified_at": timestamp(preset.modified),
        "model_info": {
            "general.architecture": model.family,
            "general.basename": name,
            "general.parameter_count": model.parameters,
            **{
                f"{model.family}.{key}": value
                for key, value in numbers.items()
                if is_type(value, int)
            },
        },
    }


def ollama_create(body: Object, name: str, base: Preset) -> Preset:
    """POST /api/create: a preset called `name` for the model of `base`, whose defaults it takes
    where it has none. Raises WireError; weights and templates are not made here."""
    for key in ("files", "adapters", "quantize", "template", "renderer", "parser"):
        if body.get(key):
            raise WireError(
                400,
                f"'{key}' is not supported by this server: a model can be created 'from' an installed one",
            )
    given = {**body, "options": field(body, "parameters", dict, default={})}
    options = ollama_options(given)
    limit = options.get("num_predict", -1)
    turns = chat_turns(items(body, "messages", dict), ollama_text)
    messages = canonical(
        [Turn("system", field(body, "system", str, default="") or base.system), *turns]
    )
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    if messages and messages[-1]["role"] != "assistant":
        raise WireError(400, "messages: the last one should be the assistant's")
    sampling = ollama_sampling(options)
    kept = {
        key: value for key, value in vars(base.sampling).items() if getattr(sampling, key) is None
    }
    return Preset(
        name,
        base.model,
        system=system,
        messages=messages or base.messages,
        sampling=replace(sampling, **kept),
        stop=[text for text in options["stop"] if text] or base.stop,
        max_tokens=limit if limit >= 0 else base.max_tokens,
    )


def checked_name(name: Any, said: str) -> str:
    """A name that a model may get, by Ollama's rules. Raises WireError with what is `said` of one
    that is none."""
    if not is_type(name, str) or not re.fullmatch(
        r"\w[\w.-]{0,79}(/\w[\w.-]{0,79}){0,2}(:\w[\w.-]{0,79})?", name, re.ASCII
    ):
        raise WireError(400, said)
    return name


def ollama_ps(loaded: list[Loaded]) -> Object:
    """GET /api/ps: the models in memory, longest-lived first."""
    lasting = sorted(
        loaded, key=lambda one: math.inf if one.expires is None else one.expires, reverse=True
    )
    return {
        "models": [
            {
                **listed_model(one.model, one.size),
                "size_vram": one.size,
                "context_length": one.context_length,
                "expires_at": _NEVER if one.expires is None else timestamp(one.expires),
            }
            for one in lasting
        ]
    }
