"""A listing of mlx-community's models in the shape and mixture in which a hub gives it: names,
sizes and dates as they were in September 2026, downloads of that order.

https://huggingface.co/docs/hub/api#get-apimodels
"""

from __future__ import annotations

import json
from typing import Any

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"
# Model type, window, and what else of config.json tells how much a conversation takes
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen3.5-4b": ("qwen3_5", 262144, {"num_hidden_layers": 32, "full_attention_interval": 4}),
    "qwen3.5-27b": ("qwen3_5", 262144, {"num_hidden_layers": 64, "full_attention_interval": 4}),
    "qwen3.5-35b": (
        "qwen3_5_moe",
        262144,
        {"num_hidden_layers": 40, "full_attention_interval": 4, "num_experts": 256},
    ),
    "qwen3-next": (
        "qwen3_next",
        262144,
        {"num_hidden_layers": 48, "full_attention_interval": 4, "num_experts": 512},
    ),
    "qwen3": ("qwen3", 40960, {"num_hidden_layers": 36}),
    "qwen3-30b": ("qwen3_moe", 262144, {"num_hidden_layers": 48, "num_experts": 128}),
    "gpt-oss": ("gpt_oss", 131072, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gemma-4-31b": (
        "gemma4",
        262144,
        {
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "global_head_dim": 512,
        },
    ),
    "gemma-4-26b": (
        "gemma4",
        262144,
        {
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
            "num_global_key_value_heads": 2,
            "global_head_dim": 512,
            "num_experts": 128,
        },
    ),
    "gemma-4-e4b": (
        "gemma4",
        131072,
        {
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
            "global_head_dim": 512,
        },
    ),
    "gemma-3": ("gemma3", 131072, {"num_hidden_layers": 62, "sliding_window_pattern": 6}),
    "devstral": ("mistral3", 393216, {"num_hidden_layers": 40, "num_key_value_heads": 8}),
    "mistral": ("mistral", 32768, {"num_hidden_layers": 40, "num_key_value_heads": 8}),
    "llama-70b": ("llama", 131072, {"num_hidden_layers": 80, "num_key_value_heads": 8}),
    "llama": ("llama", 131072, {"num_hidden_layers": 28, "num_key_value_heads": 8}),
    "glm-4.7-flash": (
        "glm4_moe_lite",
        202752,
        {
            "num_hidden_layers": 47,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "n_routed_experts": 64,
        },
    ),
    "glm-4.5-air": (
        "glm4_moe",
        131072,
        {"num_hidden_layers": 46, "num_key_value_heads": 8, "n_routed_experts": 128},
    ),
    "nemotron-3": (
        "nemotron_h",
        262144,
        {"hybrid_override_pattern": "MEMEM*EM" * 6, "n_routed_experts": 128},
    ),
    "laguna": (
        "laguna",
        262144,
        {"num_hidden_layers": 40, "num_key_value_heads": 8, "num_experts": 256},
    ),
    "minimax": (
        "minimax",
        196608,
        {"num_hidden_layers": 62, "num_key_value_heads": 8, "num_local_experts": 256},
    ),
    "granite": ("granite", 131072, {"num_hidden_layers": 64, "num_key_value_heads": 8}),
    "deepseek": ("deepseek_v32", 163840, {"num_hidden_layers": 61, "n_routed_experts": 256}),
    "qwen3-vl": ("qwen3_vl", 262144, {"num_hidden_layers": 36}),
}
for kind in ("gemma4_assistant", "qwen3_5_mtp", "glm4v", "qwen3_asr", "qwen3_tts", "kokoro"):
    KINDS[kind] = (kind, 131072, {})
for kind in ("whisper", "parakeet", "llada2_moe", "bert", "lfm2_vl", "phi9"):
    KINDS[kind] = (kind, 32768, {})

# Repo, kind, billions of weights in packed integers and of others, bits, downloads, month, and the
# pipeline tag: T(ext), V(ision) or itself
MODELS: list[tuple[str, str, float, float, float, int, str, str]] = [
    ("Llama-3.2-3B-Instruct-4bit", "llama", 3.2, 0.1, 4, 210_000, "2024-09", "T"),
    (
        "whisper-large-v3-turbo",
        "whisper",
        0,
        0.8,
        16,
        180_000,
        "2024-10",
        "automatic-speech-recognition",
    ),
    (
        "parakeet-tdt-0.6b-v3",
        "parakeet",
        0,
        0.6,
        16,
        170_000,
        "2025-08",
        "automatic-speech-recognition",
    ),
    ("Qwen3-0.6B-4bit", "qwen3", 0.6, 0.02, 4, 160_000, "2025-04", "T"),
    ("Kokoro-82M-bf16", "kokoro", 0, 0.08, 16, 150_000, "2025-01", "text-to-speech"),
    ("gpt-oss-20b-MXFP4-Q8", "gpt-oss", 20.6, 0.7, 4, 140_000, "2025-08-05", "T"),
    (
        "Qwen3-Embedding-0.6B-4bit-DWQ",
        "qwen3",
        0.6,
        0.02,
        4,
        90_000,
        "2025-06",
        "feature-extraction",
    ),
    ("Qwen3.8-27B-4bit", "qwen3.5-27b", 26.9, 1.3, 4, 76_700, "2026-08", "V"),
    ("gemma-4-e4b-it-4bit", "gemma-4-e4b", 7.5, 1.0, 4, 70_000, "2026-04", "V"),
    ("Meta-Llama-3.1-8B-Instruct-4bit", "llama", 8.0, 0.3, 4, 60_000, "2024-07", "T"),
    ("Qwen3.5-4B-4bit", "qwen3.5-4b", 4.2, 0.4, 4, 55_000, "2026-03", "V"),
    ("gemma-4-26b-a4b-it-4bit", "gemma-4-26b", 25.2, 1.4, 4, 52_000, "2026-04", "V"),
    (
        "Qwen3-ASR-1.7B-8bit",
        "qwen3_asr",
        1.7,
        0.4,
        8,
        50_000,
        "2026-01",
        "automatic-speech-recognition",
    ),
    ("Qwen3.6-35B-A3B-4bit", "qwen3.5-35b", 34.7, 1.5, 4, 37_000, "2026-04", "V"),
    ("Qwen3-8B-4bit", "qwen3", 8.2, 0.26, 4, 32_000, "2025-04", "T"),
    ("Qwen3.6-27B-4bit", "qwen3.5-27b", 26.9, 1.3, 4, 30_000, "2026-04", "V"),
    ("gpt-oss-120b-MXFP4-Q8", "gpt-oss", 116, 3.8, 4, 28_000, "2025-08-05", "T"),
    ("Qwen3.5-9B-MLX-4bit", "qwen3.5-4b", 8.95, 0.457, 4, 27_120, "2026-03", "V"),
    ("Qwen3-Embedding-8B-4bit-DWQ", "qwen3", 7.6, 0.24, 4, 26_000, "2026-02", "T"),
    ("Qwen3-Coder-30B-A3B-Instruct-4bit", "qwen3-30b", 30.5, 0.95, 4, 25_000, "2025-07", "T"),
    ("GLM-4.7-Flash-4bit", "glm-4.7-flash", 29.9, 0.97, 4, 24_000, "2026-01", "T"),
    ("gemma-3-27b-it-qat-4bit", "gemma-3", 27, 1.3, 4, 22_000, "2025-04", "V"),
    ("Qwen3.8-27B-8bit", "qwen3.5-27b", 26.9, 1.3, 8, 21_000, "2026-08", "V"),
    ("Qwen3.8-27B-MTP-4bit", "qwen3_5_mtp", 0.42, 0.02, 4, 20_000, "2026-08", "T"),
    ("Qwen3.6-27B-MTP-8bit", "qwen3.5-27b", 0.42, 0.02, 8, 19_500, "2026-05", "T"),
    ("Qwen3.6-35B-A3B-8bit", "qwen3.5-35b", 34.7, 1.5, 8, 18_000, "2026-04", "V"),
    ("gemma-4-31b-it-4bit", "gemma-4-31b", 30.7, 1.5, 4, 17_500, "2026-04", "V"),
    ("Qwen3.5-9B-8bit", "qwen3.5-4b", 8.95, 0.457, 8, 14_500, "2026-03", "V"),
    ("Qwen3.5-9B-4bit", "qwen3.5-4b", 8.95, 0.457, 4, 13_845, "2026-03", "V"),
    ("Qwen3-Coder-Next-4bit", "qwen3-next", 79.6, 2.6, 4, 13_500, "2026-02", "T"),
    ("Qwen3.5-35B-A3B-4bit", "qwen3.5-35b", 34.7, 1.5, 4, 12_000, "2026-02", "V"),
    ("Qwen3.6-35B-A3B-6bit", "qwen3.5-35b", 34.7, 1.5, 6, 11_500, "2026-04", "V"),
    ("gemma-4-31B-it-assistant-4bit", "gemma4_assistant", 0.5, 0.02, 4, 11_000, "2026-05", "T"),
    ("Devstral-Small-2-24B-Instruct-2512-4bit", "devstral", 23.6, 1.2, 4, 10_500, "2025-12", "V"),
    ("Qwen3-VL-8B-Instruct-4bit", "qwen3-vl", 8.2, 0.8, 4, 10_000, "2025-10", "V"),
    ("Qwen3.5-122B-A10B-4bit", "qwen3.5-35b", 121, 4.6, 4, 9_500, "2026-02", "V"),
    ("NVIDIA-Nemotron-3-Nano-30B-A3B-4bit", "nemotron-3", 31.4, 1.0, 4, 9_000, "2025-12", "T"),
    ("Mistral-Small-24B-Instruct-2501-4bit", "mistral", 23.6, 0.74, 4, 8_500, "2025-01", "T"),
    ("Qwen3.5-0.8B-4bit", "qwen3.5-4b", 0.75, 0.1, 4, 8_400, "2026-03", "V"),
    ("Laguna-XS-2.1-4bit", "laguna", 33.2, 1.1, 4, 8_000, "2026-06", "T"),
    ("Qwen3-Coder-Next-mxfp4", "qwen3-next", 79.6, 2.6, 4, 7_800, "2026-05", "T"),
    ("GLM-4.6V-Flash-6bit", "glm4v", 9.4, 0.9, 6, 7_600, "2025-12", "V"),
    ("Llama-3.3-70B-Instruct-4bit", "llama-70b", 70.5, 2.2, 4, 7_400, "2024-12", "T"),
    ("Qwen3.6-27B-8bit", "qwen3.5-27b", 26.9, 1.3, 8, 7_200, "2026-04", "V"),
    ("Qwen3.5-9B-Base-4bit", "qwen3.5-4b", 8.95, 0.457, 4, 7_000, "2026-03", "V"),
    ("GLM-4.5-Air-4bit", "glm-4.5-air", 106.8, 3.4, 4, 6_800, "2025-07", "T"),
    ("Qwen3-TTS-12Hz-1.7B-Base-8bit", "qwen3_tts", 1.7, 0.3, 8, 6_600, "2026-01", "text-to-speech"),
    ("Laguna-XS-2.1-8bit", "laguna", 33.2, 1.1, 8, 6_400, "2026-06", "T"),
    ("gemma-4-e4b-it-8bit", "gemma-4-e4b", 7.5, 1.0, 8, 6_200, "2026-04", "V"),
    ("MiniMax-M2.7-4bit", "minimax", 228.7, 7.2, 4, 6_000, "2026-04", "T"),
    ("diffusiongemma-26B-A4B-it-mxfp8", "llada2_moe", 25.2, 1.4, 8, 5_900, "2026-06", "T"),
    ("Qwen3.6-35B-A3B-4bit-DWQ", "qwen3.5-35b", 34.7, 1.2, 4, 5_800, "2026-04", "T"),
    ("gemma-4-26b-a4b-it-8bit", "gemma-4-26b", 25.2, 1.4, 8, 5_600, "2026-04", "V"),
    ("LFM2.5-VL-1.6B-4bit", "lfm2_vl", 1.2, 0.4, 4, 5_500, "2026-01", "V"),
    ("Qwen3.5-397B-A17B-4bit", "qwen3.5-35b", 396, 13.5, 4, 5_400, "2026-02", "V"),
    ("granite-4.2-30b-4bit", "granite", 30, 0.95, 4, 5_300, "2026-08", "T"),
    ("bge-m3-mlx-8bit", "bert", 0.57, 0.02, 8, 5_200, "2026-01", "sentence-similarity"),
    ("Qwen3.6-27B-lora-4bit", "qwen3.5-27b", 0, 0.03, 4, 5_100, "2026-06", "T"),
    ("Phi-9-14B-4bit", "phi9", 14, 0.5, 4, 5_000, "2026-08", "T"),
    ("Story-Writer-33B-4bit", "llama", 33, 1.0, 4, 4_900, "2026-07", "T"),
    ("DeepSeek-V3.2-4bit", "deepseek", 671, 21, 4, 4_800, "2025-12", "T"),
    ("Qwen3.8-27B-bf16", "qwen3.5-27b", 0, 27.8, 16, 4_700, "2026-08", "V"),
    ("Qwen3.8-27B-OptiQ-4bit", "qwen3.5-27b", 26.9, 1.3, 5.4, 4_600, "2026-08", "V"),
    ("Qwen3.6-35B-A3B-3bit", "qwen3.5-35b", 34.7, 1.5, 3, 4_500, "2026-04", "V"),
    ("Qwen3.6-35B-A3B-GGUF", "qwen3.5-35b", 0, 0, 4, 4_400, "2026-04", "T"),
]
SEEING = {"vision_config": {"model_type": "siglip", "depth": 27}}
BASIC = {"num_key_value_heads": 4, "head_dim": 128, "num_attention_heads": 32}
LARGE_HEADS = ("qwen3_5", "qwen3_next")  # whose heads have 256 dimensions


def size(row: tuple[str, str, float, float, float, int, str, str]) -> int:
    """Bytes of a model's weights."""
    return int((row[2] * row[4] / 8 + row[3] * 2) * 1e9)


def listed(packed: bool = False) -> dict[str, dict[str, Any]]:
    """What the hub says of each repo. It counts the weights that packed integers hold, or, where
    it could not tell how many bits they have, these integers."""
    said = {}
    for row in MODELS:
        name, kind, integers, others, bits, downloads, month, tag = row
        counts = {
            "U32": int(integers * 1e9 * (bits / 32 if packed else 1)),
            "BF16": int(others * 1e9),
        }
        template = CHAT if "Story" in name or kind == "gemma-3" else TOOLS
        said[f"mlx-community/{name}"] = {
            "config": {
                "model_type": KINDS[kind][0],
                "quantization_config": {"bits": int(bits)},
                "chat_template_jinja": template,
                "tokenizer_config": {"eos_token": "<|im_end|>"},
            },
            "createdAt": f"{month if month.count('-') > 1 else month + '-15'}T12:00:00.000Z",
            "downloads": downloads,
            "pipeline_tag": {"T": "text-generation", "V": "image-text-to-text"}.get(tag, tag),
            "safetensors": {"parameters": counts, "total": sum(counts.values())},
        }
        if name.endswith("GGUF"):
            del said[f"mlx-community/{name}"]["safetensors"]
    return said


def files() -> dict[str, dict[str, bytes]]:
    """The repos' files. Their weights are empty."""
    repos = {}
    for name, kind, *_, tag in MODELS:
        model_type, window, shape = KINDS[kind]
        text = {**BASIC, "max_position_embeddings": window, **shape}
        if model_type.startswith(LARGE_HEADS):
            text["head_dim"] = 256
        if "moe" in model_type or model_type == "qwen3_next":
            text["num_key_value_heads"] = shape.get("num_key_value_heads", 2)
        config = {"model_type": model_type, "text_config": text} | (SEEING if tag == "V" else {})
        weights = "model.gguf" if name.endswith("GGUF") else "model.safetensors"
        repos[f"mlx-community/{name}"] = {"config.json": json.dumps(config).encode(), weights: b""}
    return repos
