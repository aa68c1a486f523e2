"""Which model a name means, on a machine with many of them."""

from __future__ import annotations

import os
import re

import pytest
from model_folders import add_repo, make_model

from _mlx_server.inference.catalog.names import best_repo, parse_name
from engine import Library, ModelNotFound

NAMES = """
Qwen2.5-Coder-32B-Instruct-4bit Qwen2.5-Coder-32B-Instruct-8bit Qwen2.5-Coder-7B-Instruct-4bit
Qwen2.5-Coder-7B-4bit Qwen2.5-7B-Instruct-4bit Qwen2.5-7B-Instruct-1M-4bit
Qwen2.5-VL-7B-Instruct-4bit Qwen2.5-Math-7B-Instruct-4bit Qwen2.5-Omni-7B-4bit
Qwen2.5-14B-Instruct-bf16 Qwen2.5-0.5B-Instruct-4bit Qwen3-8B-4bit Qwen3-8B-4bit-DWQ-053125
Qwen3-8B-8bit Qwen3-8B-6bit Qwen3-8B-Base-4bit Qwen3-8B-bf16 Qwen3-VL-8B-Instruct-4bit
Qwen3-0.6B-4bit Qwen3-Embedding-0.6B-4bit-DWQ Qwen3-Embedding-8B-4bit-DWQ Qwen3-14B-8bit
Qwen3-14B-3bit Qwen3-4B-Instruct-2507-4bit Qwen3-4B-Thinking-2507-4bit Qwen3-4B-4bit
Qwen3-30B-A3B-4bit Qwen3-30B-A3B-Instruct-2507-4bit-DWQ Qwen3-30B-A3B-Instruct-2507-4bit
Qwen3-Coder-30B-A3B-Instruct-4bit Qwen3-Coder-480B-A35B-Instruct-4bit
Qwen3-Next-80B-A3B-Instruct-4bit Qwen3-Next-80B-A3B-Thinking-4bit Qwen3.5-27B-4bit
Qwen3Guard-Gen-8B-4bit QwQ-32B-4bit Llama-3.2-3B-Instruct-4bit Llama-3.2-1B-Instruct-4bit
Llama-3.2-3B-4bit Meta-Llama-3.1-8B-Instruct-8bit Meta-Llama-3-8B-Instruct-4bit
Llama-3.3-70B-Instruct-4bit Llama-Guard-3-8B-4bit Llama-3.2-11B-Vision-Instruct-4bit
Hermes-3-Llama-3.1-8B-4bit Llama-3.1-Nemotron-70B-Instruct-HF-4bit
Llama-4-Scout-17B-16E-Instruct-4bit gemma-3-12b-it-4bit-DWQ gemma-3-12b-it-qat-4bit
gemma-3-12b-pt-4bit gemma-3n-E4B-it-lm-4bit gemma-2-9b-it-4bit DeepSeek-R1-Distill-Qwen-14B-4bit
DeepSeek-R1-Distill-Llama-8B-4bit DeepSeek-R1-0528-Qwen3-8B-4bit
DeepSeek-R1-Distill-Qwen-32B-abliterated-4bit Mistral-7B-Instruct-v0.3-4bit
Mistral-7B-Instruct-v0.2-4bit Mistral-Small-3.2-24B-Instruct-2506-4bit
Mixtral-8x7B-Instruct-v0.1-4bit Codestral-22B-v0.1-4bit SmolLM3-3B-4bit LFM2-8B-A1B-4bit
LFM2-1.2B-4bit Seed-OSS-36B-Instruct-4bit starcoder2-7b-4bit
"""
REPOS = NAMES.split()
SIZELESS = {  # millions of parameters, where no name tells
    "phi-4-4bit": 14_660,
    "Phi-4-mini-instruct-4bit": 3_836,
    "Phi-3.5-mini-instruct-4bit": 3_821,
    "Devstral-Small-2507-4bit": 23_572,
    "GLM-4.5-Air-4bit": 106_852,
    "granite-4.0-h-tiny-4bit": 6_939,
    "Kimi-K2-Instruct-4bit": 1_026_408,
    "MiniMax-M2-4bit": 228_690,
    "DeepSeek-R1-4bit": 671_026,
    "Mistral-Nemo-Instruct-2407-4bit": 12_248,
    "DeepSeek-Coder-V2-Lite-Instruct-4bit": 15_706,
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Library:
    home = tmp_path_factory.mktemp("installed")
    for name in REPOS:
        bits = re.search(r"(\d)bit", name)
        add_repo(home, f"mlx-community/{name}", bits=int(bits[1]) if bits else None)
    for name, millions in SIZELESS.items():
        add_repo(home, f"mlx-community/{name}", parameters=millions * 10**6)
    mxfp4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    add_repo(home, "mlx-community/gpt-oss-20b-MXFP4-Q4", quantization=mxfp4)
    add_repo(home, "mlx-community/Qwen3-32B-mxfp4", quantization=mxfp4)
    add_repo(home, "nomic-ai/nomic-embed-text-v1.5", bits=None, parameters=136_731_648)
    newest = add_repo(home, "lmstudio-community/Qwen3-4B-4bit")
    os.utime(newest / "model.safetensors", (2e9, 2e9))
    make_model(home / "models/demo", bits=None, parameters=1_300_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
            patch.delenv(variable, raising=False)
        yield Library([home / "models"])


NEWEST = "lmstudio-community/Qwen3-4B-4bit"
HITS = {
    # repo ids and folder names
    "mlx-community/Qwen3-8B-4bit": "Qwen3-8B-4bit",
    "MLX-Community/qwen3-8b-4BIT": "Qwen3-8B-4bit",
    "mlx-community/Qwen3-8B-4bit:latest": "Qwen3-8B-4bit",
    "Qwen3-8B-Base-4bit": "Qwen3-8B-Base-4bit",
    "qwen3-vl-8b-instruct-4bit:latest": "Qwen3-VL-8B-Instruct-4bit",
    "hf.co/mlx-community/Qwen3-8B-8bit": "Qwen3-8B-8bit",
    "lmstudio-community/Qwen3-4B-4bit": "lmstudio-community/Qwen3-4B-4bit",
    "Qwen3-8B-4bit-DWQ-053125": "Qwen3-8B-4bit-DWQ-053125",
    # size, quantisation
    "qwen2.5-coder:32b": "Qwen2.5-Coder-32B-Instruct-4bit",
    "qwen2.5-coder:32b-instruct-q8_0": "Qwen2.5-Coder-32B-Instruct-8bit",
    "qwen2.5-coder:32b-instruct-q4_K_M": "Qwen2.5-Coder-32B-Instruct-4bit",
    "qwen2.5-coder:7b": "Qwen2.5-Coder-7B-Instruct-4bit",
    "registry.ollama.ai/library/qwen2.5-coder:7b": "Qwen2.5-Coder-7B-Instruct-4bit",
    "qwen3:8b": "Qwen3-8B-4bit",
    "QWEN3:8B": "Qwen3-8B-4bit",
    "qwen3:8b-q8_0": "Qwen3-8B-8bit",
    "qwen3:8b-q6_K": "Qwen3-8B-6bit",
    "qwen3:8b-q4_0": "Qwen3-8B-4bit",
    "qwen3:8b-fp16": "Qwen3-8B-bf16",
    "qwen3:8b-bf16": "Qwen3-8B-bf16",
    "qwen3:8b-base": "Qwen3-8B-Base-4bit",
    "qwen3:14b": "Qwen3-14B-8bit",
    "qwen3:14b-q3_K_L": "Qwen3-14B-3bit",
    "qwen3:32b-mxfp4": "Qwen3-32B-mxfp4",
    "qwen2.5:14b": "Qwen2.5-14B-Instruct-bf16",
    # variants, revisions, experts
    "qwen2.5:7b": "Qwen2.5-7B-Instruct-4bit",
    "qwen2.5vl:7b": "Qwen2.5-VL-7B-Instruct-4bit",
    "qwen2.5-vl:7b": "Qwen2.5-VL-7B-Instruct-4bit",
    "qwen2.5-math:7b": "Qwen2.5-Math-7B-Instruct-4bit",
    "qwen3-vl:8b": "Qwen3-VL-8B-Instruct-4bit",
    "qwen3-embedding:0.6b": "Qwen3-Embedding-0.6B-4bit-DWQ",
    "qwen3:0.6b": "Qwen3-0.6B-4bit",
    "qwen3:4b": "Qwen3-4B-Instruct-2507-4bit",
    "qwen3:4b-instruct": "Qwen3-4B-Instruct-2507-4bit",
    "qwen3:4b-thinking": "Qwen3-4B-Thinking-2507-4bit",
    "qwen3:4b-thinking-2507-q4_K_M": "Qwen3-4B-Thinking-2507-4bit",
    "qwen3:30b": "Qwen3-30B-A3B-Instruct-2507-4bit",
    "qwen3:30b-a3b": "Qwen3-30B-A3B-Instruct-2507-4bit",
    "qwen3:30b-a3b-instruct-2507-q4_K_M": "Qwen3-30B-A3B-Instruct-2507-4bit",
    "qwen3-coder:30b": "Qwen3-Coder-30B-A3B-Instruct-4bit",
    "qwen3-coder": "Qwen3-Coder-30B-A3B-Instruct-4bit",
    "qwen3-coder:480b": "Qwen3-Coder-480B-A35B-Instruct-4bit",
    "qwen3-next:80b": "Qwen3-Next-80B-A3B-Instruct-4bit",
    "qwen3-next:80b-a3b-thinking": "Qwen3-Next-80B-A3B-Thinking-4bit",
    "qwen3.5:27b": "Qwen3.5-27B-4bit",
    "qwq": "QwQ-32B-4bit",
    "qwq:latest": "QwQ-32B-4bit",
    # the other families
    "llama3.2:3b": "Llama-3.2-3B-Instruct-4bit",
    "llama3.2": "Llama-3.2-1B-Instruct-4bit",
    "llama3.1:8b": "Meta-Llama-3.1-8B-Instruct-8bit",
    "llama3:8b": "Meta-Llama-3-8B-Instruct-4bit",
    "llama3": "Meta-Llama-3-8B-Instruct-4bit",
    "llama3.3": "Llama-3.3-70B-Instruct-4bit",
    "llama-guard3:8b": "Llama-Guard-3-8B-4bit",
    "llama3.2-vision:11b": "Llama-3.2-11B-Vision-Instruct-4bit",
    "llama4:scout": "Llama-4-Scout-17B-16E-Instruct-4bit",
    "hermes3:8b": "Hermes-3-Llama-3.1-8B-4bit",
    "gpt-oss:20b": "gpt-oss-20b-MXFP4-Q4",
    "gpt-oss": "gpt-oss-20b-MXFP4-Q4",
    "gpt-oss:20b-mxfp4": "gpt-oss-20b-MXFP4-Q4",
    "gemma3:12b": "gemma-3-12b-it-4bit-DWQ",
    "gemma3:12b-it-qat": "gemma-3-12b-it-qat-4bit",
    "gemma3n:e4b": "gemma-3n-E4B-it-lm-4bit",
    "gemma2:9b-instruct-q4_K_M": "gemma-2-9b-it-4bit",
    "deepseek-r1:14b": "DeepSeek-R1-Distill-Qwen-14B-4bit",
    "deepseek-r1:8b": "DeepSeek-R1-0528-Qwen3-8B-4bit",
    "deepseek-r1:8b-llama-distill-q4_K_M": "DeepSeek-R1-Distill-Llama-8B-4bit",
    "deepseek-r1:671b": "DeepSeek-R1-4bit",
    "deepseek-coder-v2:16b": "DeepSeek-Coder-V2-Lite-Instruct-4bit",
    "phi4": "phi-4-4bit",
    "phi4:14b": "phi-4-4bit",
    "phi4-mini": "Phi-4-mini-instruct-4bit",
    "phi4-mini:3.8b": "Phi-4-mini-instruct-4bit",
    "phi3.5": "Phi-3.5-mini-instruct-4bit",
    "mistral": "Mistral-7B-Instruct-v0.3-4bit",
    "mistral:7b-instruct-v0.2-q4_0": "Mistral-7B-Instruct-v0.2-4bit",
    "mistral-small3.2:24b": "Mistral-Small-3.2-24B-Instruct-2506-4bit",
    "mistral-nemo:12b": "Mistral-Nemo-Instruct-2407-4bit",
    "mixtral:8x7b": "Mixtral-8x7B-Instruct-v0.1-4bit",
    "devstral:24b": "Devstral-Small-2507-4bit",
    "codestral:22b": "Codestral-22B-v0.1-4bit",
    "glm-4.5-air": "GLM-4.5-Air-4bit",
    "granite4:tiny-h": "granite-4.0-h-tiny-4bit",
    "kimi-k2:1t": "Kimi-K2-Instruct-4bit",
    "minimax-m2": "MiniMax-M2-4bit",
    "seed-oss:36b": "Seed-OSS-36B-Instruct-4bit",
    "smollm3:3b": "SmolLM3-3B-4bit",
    "lfm2:8b-a1b": "LFM2-8B-A1B-4bit",
    "starcoder2:7b": "starcoder2-7b-4bit",
    "nomic-embed-text": "nomic-ai/nomic-embed-text-v1.5",
    "nomic-embed-text:v1.5": "nomic-ai/nomic-embed-text-v1.5",
    # community spellings that are no installed repo's
    "qwen2.5-coder-32b-instruct": "Qwen2.5-Coder-32B-Instruct-4bit",
    "mlx-community/Qwen2.5-Coder-32B-Instruct": "Qwen2.5-Coder-32B-Instruct-4bit",
    "Llama_3.2_3B_Instruct": "Llama-3.2-3B-Instruct-4bit",
    "deepseek-r1-distill-qwen-14b": "DeepSeek-R1-Distill-Qwen-14B-4bit",
    "hermes-3-llama-3.1-8b": "Hermes-3-Llama-3.1-8B-4bit",
    # vendors' names, with many models installed and none named
    "claude-sonnet-5-5": NEWEST,
    "Claude-3-5-Haiku-20241022": NEWEST,
    "claude-opus-4-1:latest": NEWEST,
    "gpt-4o": NEWEST,
    "opus": NEWEST,
    "sonnet[1m]": NEWEST,
    "haiku": NEWEST,
    "demo": "demo",
    "demo:latest": "demo",
}

UNKNOWN = """
qwen3:32b-q8_0 qwen3:1.7b qwen3:235b qwen3:8b-instruct qwen3:8b-q5_K_M qwen3:8b-nvfp4
qwen3:8b-mxfp4 qwen3:30b-a3b-thinking qwen3:30b-q8_0 qwen3:30b-a22b qwen3:4b-instruct-2601
qwen3.5:8b qwen3.5:27b-q8_0 qwen3-coder:8b qwen3-math:7b qwen2.5-coder:14b qwen2.5-coder:32b-fp16
qwen2.5-coder:32b-base qwen2.5:32b qwen2.5:3b qwen2:7b qwen:7b qwen3-vl:30b qwen3-embedding:4b
qwq:8b qwen3-next:80b-a3b-base llama3.2:8b llama3.1:70b llama3.1:8b-q4_K_M llama3:70b llama3.3:8b
llama3.2:90b llama llama2 llama4:maverick llama3.1:8b-text-q2_K nemotron:70b hermes3:70b hermes:8b
gpt-oss:120b gpt-oss:20b-q8_0 gpt-oss:120b-cloud gpt-oss-safeguard:20b gemma3:27b gemma3:4b
gemma2:27b gemma:7b gemma3n:e2b deepseek-r1:7b deepseek-r1:32b deepseek-r1:70b deepseek-v3:671b
deepseek-coder:6.7b deepseek-coder-v2:236b phi4:3.8b phi4-mini:14b phi4-reasoning:14b phi3:14b phi
mistral:24b mistral-small:22b mistral-large mixtral:8x22b codellama:7b glm-4.5 glm-4.5-air:9b
kimi-k2-thinking minimax-m1 smollm2 smollm3:135m starcoder2:3b granite4:small-h command-r
someone/qwen3:8b Qwen/Qwen3-8B mlx-community/Qwen3-9B-4bit qwen3:8b-gguf gpt2 o3 claude 8b 4bit
:latest
"""
ODD = [
    "",
    " ",
    "/",
    "..",
    "../../etc",
    "~",
    "qwen3 coder 8b",
    "qwen3:8b/..",
    "*",
    "mlx-community",
    "mlx-community/",
    "llama 3.1 8b hermes 4",
    "qwen3-8b-4bit-dwq-060606",
]
MISSES = UNKNOWN.split() + ODD


@pytest.mark.parametrize("name, expected", HITS.items())
def test_name_is_found(installed, name, expected):
    found = installed.resolve(name).name
    assert found == (
        expected if "/" in expected or expected == "demo" else f"mlx-community/{expected}"
    )


@pytest.mark.parametrize("name", MISSES)
def test_name_is_not_found(installed, name):
    with pytest.raises(ModelNotFound) as error:
        installed.resolve(name)
    assert error.value.model == name
    assert "mlx-community/Qwen3-8B-4bit" in str(error.value)


def test_every_model_is_found_by_its_own_names(installed):
    for model in installed.models():
        assert installed.resolve(model.name) is model
        assert installed.resolve(model.name.upper() + ":latest") is model


def test_the_last_used_is_preferred_only_where_the_size_is_open(installed):
    used = installed.resolve("llama3.2:3b")
    assert installed.resolve("llama3.2", last_used=used) is used
    assert installed.resolve("llama3.2:latest", last_used=used) is used
    eight = installed.resolve("qwen3:8b-q8_0")
    assert installed.resolve("qwen3:8b", last_used=eight).quantization == "int4"
    assert installed.resolve("qwen2.5-coder:7b", last_used=eight).name.endswith(
        "Coder-7B-Instruct-4bit"
    )


def test_a_names_parts():
    parts = parse_name("mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit")
    assert (parts.words, parts.extras) == ({"qwen", "3", "coder"}, {"a3b"})
    assert (parts.size, parts.chat, parts.bits) == ("30b", True, {"4"})
    distilled = parse_name("DeepSeek-R1-Distill-Qwen-14B-4bit")
    assert distilled.words == {"deepseek", "r", "1"}
    assert distilled.extras == {"distill", "qwen"}
    assert parse_name("Mistral-7B-Instruct-v0.3-4bit").revision == "v0.3"


def test_of_repos_the_name_says_the_quantisation():
    repos = ["o/Qwen3-8B-8bit", "o/Qwen3-8B-4bit", "o/Qwen3-8B", "o/Qwen3-8B-mxfp4", "o/Qwen3-4B"]
    assert best_repo("qwen3:8b", repos) == "o/Qwen3-8B-4bit"
    assert best_repo("qwen3:8b-q8_0", repos) == "o/Qwen3-8B-8bit"
    assert best_repo("qwen3:8b-fp16", repos) == "o/Qwen3-8B"
    assert best_repo("qwen3:8b-mxfp4", repos) == "o/Qwen3-8B-mxfp4"
    assert best_repo("qwen3:1b", repos) is None
