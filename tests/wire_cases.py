"""What several tests of the dialects need: a message, a generation, models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engine import LocalModel

IMAGE_NOTE = "[image omitted: it is no PNG, JPEG, GIF or WebP file]"
ELSEWHERE = "it is kept elsewhere, and this server does not fetch it"
HI = [{"role": "user", "content": "hi"}]


@dataclass
class Accepted:
    """What a dialect reads off a generation."""

    id: str = "0123456789abcdef01234567"
    prompt_tokens: int = 100
    cached_tokens: int = 60


def brief(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


DEMO = LocalModel(
    "demo",
    Path("/x"),
    10,
    1_700_000_000.5,
    "ab" * 32,
    {},
    "qwen2",
    1000,
    "1.0K",
    "int4",
    4096,
    64,
    ["completion", "tools"],
)
BIG = replace(
    DEMO,
    name="mlx-community/Qwen3-8B-4bit",
    modified=1_800_000_000.0,
    digest="cd" * 32,
    family="qwen3",
    config={
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "vocab_size": None,
        "text_config": {"num_key_value_heads": 8},
    },
)
DETAILS = {
    "parent_model": "",
    "format": "safetensors",
    "family": "qwen2",
    "families": ["qwen2"],
    "parameter_size": "1.0K",
    "quantization_level": "int4",
    "context_length": 4096,
    "embedding_length": 64,
}
