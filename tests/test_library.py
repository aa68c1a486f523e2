"""The model library: what counts as a model on this machine, and which model a name means.

Models here are folders of small JSON files; nothing in the library reads weights, so theirs are
empty or headers only."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest

from engine import Library, LocalModel, ModelLoadError, ModelNotFound

TOOLS = "{% for tool in tools %}{{ tool }}{% endfor %}{{ messages }}"


def make_model(
    path: Path,
    *,
    bits: int | None = 4,
    parameters: int = 0,
    template: str | list = TOOLS,
    files: dict | None = None,
    **config,
) -> Path:
    """Writes a model folder; `bits` None is unquantised, `parameters` go to the weight index,
    `files` are added."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
        "hidden_size": 64,
        "torch_dtype": "bfloat16",
        **({"quantization": {"group_size": 64, "bits": bits}} if bits else {}),
        **config,
    }
    contents = {
        "config.json": config,
        "tokenizer.json": {},
        "tokenizer_config.json": {"chat_template": template},
        **(files or {}),
    }
    if parameters:
        contents["model.safetensors.index.json"] = {
            "metadata": {"total_parameters": parameters},
            "weight_map": {"w": "model.safetensors"},
        }
    for name, content in contents.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    write_weights(path / "model.safetensors", {})
    return path


def write_weights(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Writes a safetensors file that has a header but no data: {name: (dtype, shape)}."""
    header = json.dumps(
        {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def add_repo(home: Path, repo: str, revision: str = "0123abcd", **options) -> Path:
    """Lays a repo out in the Hugging Face cache, as `hf download` does, and makes it `main`."""
    folder = home / ".cache/huggingface/hub" / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(revision)
    return make_model(folder / "snapshots" / revision, **options)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home directory, apart from the built-in model in some models folder of its own."""
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_model(tmp_path / "home/models/demo", bits=None, parameters=1_300_000)
    return tmp_path / "home"


@pytest.fixture
def library(home) -> Library:
    return Library([home / "models"])


def names(library: Library) -> list[str]:
    return [model.name for model in library.models()]


# ------------------------------------------------------------------ names against a well-filled machine

REPOS = """
Qwen2.5-Coder-32B-Instruct-4bit Qwen2.5-Coder-32B-Instruct-8bit Qwen2.5-Coder-7B-Instruct-4bit Qwen2.5-Coder-7B-4bit
Qwen2.5-7B-Instruct-4bit Qwen2.5-7B-Instruct-1M-4bit Qwen2.5-VL-7B-Instruct-4bit Qwen2.5-Math-7B-Instruct-4bit
Qwen2.5-Omni-7B-4bit Qwen2.5-14B-Instruct-bf16 Qwen2.5-0.5B-Instruct-4bit Qwen3-8B-4bit Qwen3-8B-4bit-DWQ-053125
Qwen3-8B-8bit Qwen3-8B-6bit Qwen3-8B-Base-4bit Qwen3-8B-bf16 Qwen3-VL-8B-Instruct-4bit Qwen3-0.6B-4bit
Qwen3-Embedding-0.6B-4bit-DWQ Qwen3-Embedding-8B-4bit-DWQ Qwen3-14B-8bit Qwen3-14B-3bit Qwen3-4B-Instruct-2507-4bit
Qwen3-4B-Thinking-2507-4bit Qwen3-4B-4bit Qwen3-30B-A3B-4bit Qwen3-30B-A3B-Instruct-2507-4bit-DWQ
Qwen3-30B-A3B-Instruct-2507-4bit Qwen3-Coder-30B-A3B-Instruct-4bit Qwen3-Coder-480B-A35B-Instruct-4bit
Qwen3-Next-80B-A3B-Instruct-4bit Qwen3-Next-80B-A3B-Thinking-4bit Qwen3.5-27B-4bit Qwen3Guard-Gen-8B-4bit QwQ-32B-4bit
Llama-3.2-3B-Instruct-4bit Llama-3.2-1B-Instruct-4bit Llama-3.2-3B-4bit Meta-Llama-3.1-8B-Instruct-8bit
Meta-Llama-3-8B-Instruct-4bit Llama-3.3-70B-Instruct-4bit Llama-Guard-3-8B-4bit Llama-3.2-11B-Vision-Instruct-4bit
Hermes-3-Llama-3.1-8B-4bit Llama-3.1-Nemotron-70B-Instruct-HF-4bit Llama-4-Scout-17B-16E-Instruct-4bit
gemma-3-12b-it-4bit-DWQ gemma-3-12b-it-qat-4bit gemma-3-12b-pt-4bit gemma-3n-E4B-it-lm-4bit gemma-2-9b-it-4bit
DeepSeek-R1-Distill-Qwen-14B-4bit DeepSeek-R1-Distill-Llama-8B-4bit DeepSeek-R1-0528-Qwen3-8B-4bit
DeepSeek-R1-Distill-Qwen-32B-abliterated-4bit Mistral-7B-Instruct-v0.3-4bit Mistral-7B-Instruct-v0.2-4bit
Mistral-Small-3.2-24B-Instruct-2506-4bit Mixtral-8x7B-Instruct-v0.1-4bit Codestral-22B-v0.1-4bit SmolLM3-3B-4bit
LFM2-8B-A1B-4bit LFM2-1.2B-4bit Seed-OSS-36B-Instruct-4bit starcoder2-7b-4bit
""".split()
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
        for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
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

MISSES = (
    """
qwen3:32b-q8_0 qwen3:1.7b qwen3:235b qwen3:8b-instruct qwen3:8b-q5_K_M qwen3:8b-nvfp4 qwen3:8b-mxfp4
qwen3:30b-a3b-thinking qwen3:30b-q8_0 qwen3:30b-a22b qwen3:4b-instruct-2601 qwen3.5:8b qwen3.5:27b-q8_0 qwen3-coder:8b
qwen3-math:7b qwen2.5-coder:14b qwen2.5-coder:32b-fp16 qwen2.5-coder:32b-base qwen2.5:32b qwen2.5:3b qwen2:7b qwen:7b
qwen3-vl:30b qwen3-embedding:4b qwq:8b qwen3-next:80b-a3b-base llama3.2:8b llama3.1:70b llama3.1:8b-q4_K_M llama3:70b
llama3.3:8b llama3.2:90b llama llama2 llama4:maverick llama3.1:8b-text-q2_K nemotron:70b hermes3:70b hermes:8b
gpt-oss:120b gpt-oss:20b-q8_0 gpt-oss:120b-cloud gpt-oss-safeguard:20b gemma3:27b gemma3:4b gemma2:27b gemma:7b
gemma3n:e2b deepseek-r1:7b deepseek-r1:32b deepseek-r1:70b deepseek-v3:671b deepseek-coder:6.7b deepseek-coder-v2:236b
phi4:3.8b phi4-mini:14b phi4-reasoning:14b phi3:14b phi mistral:24b mistral-small:22b mistral-large mixtral:8x22b
codellama:7b glm-4.5 glm-4.5-air:9b kimi-k2-thinking minimax-m1 smollm2 smollm3:135m starcoder2:3b granite4:small-h
command-r someone/qwen3:8b Qwen/Qwen3-8B mlx-community/Qwen3-9B-4bit qwen3:8b-gguf gpt2 o3 claude 8b 4bit :latest
""".split()
    + [
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
)


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


# ------------------------------------------------------------------ defaults and aliases


@pytest.mark.parametrize("name", ["claude-x", "gpt-5", "opus", "sonnet", "HAIKU", "default"])
def test_vendor_names_mean_the_default_model(home, library, name):
    assert library.resolve(name).name == "demo"
    add_repo(home, "org/Alpha-1B-4bit")
    add_repo(home, "org/Alpha-Embedding-1B-4bit")  # cannot chat
    assert library.resolve(name).name == "org/Alpha-1B-4bit"
    for repo, age, options in (
        ("org/Beta-1B-4bit", 9, {}),
        ("org/Toolless-1B-4bit", 0, {"template": "{{ messages }}"}),
    ):
        written = library.resolve("alpha").modified - age
        os.utime(
            add_repo(home, repo, **options) / "model.safetensors", (written + 10, written + 10)
        )
    assert library.resolve(name).name == "org/Beta-1B-4bit"  # the newest that knows tools
    beta, alpha = library.resolve("beta"), library.resolve("alpha")
    assert library.resolve(name, last_used=beta) is beta
    assert library.resolve(name, default=alpha, last_used=beta) is alpha


def test_a_local_model_of_a_vendors_name_wins(home, library):
    add_repo(home, "org/claude-like-1B-4bit")
    add_repo(home, "org/Beta-1B-4bit")
    assert library.resolve("claude-like").name == "org/claude-like-1B-4bit"


def test_without_any_model_nothing_stands_in(home, tmp_path):
    empty = Library([tmp_path / "nothing"])
    for model in empty.models():  # the built-in one, where it is shipped
        assert model.name == "demo"
    with pytest.raises(ModelNotFound, match=r"model 'qwen3:8b' not found; installed: (demo|none)$"):
        empty.resolve("qwen3:8b")


def test_aliases_are_globs_and_the_first_match_wins(home):
    add_repo(home, "org/Alpha-4B-4bit")
    add_repo(home, "org/Beta-8B-4bit")
    elsewhere = make_model(home / "elsewhere/gamma")
    library = Library(
        [home / "models"],
        [
            ("claude-*haiku*", "alpha:4b"),
            ("CLAUDE-*", "Beta-8B-4bit"),
            ("fast", "demo"),
            ("loop", "loop2"),
            ("loop2", "demo"),
            ("own", str(elsewhere)),
            ("x?", "sonnet"),
        ],
    )
    assert library.resolve("claude-haiku-5-5").name == "org/Alpha-4B-4bit"
    assert library.resolve("Claude-Opus-5-5:latest").name == "org/Beta-8B-4bit"
    assert library.resolve("FAST").name == "demo"
    assert library.resolve("own").path == elsewhere
    assert library.resolve("x1", default=library.resolve("beta")).name == "org/Beta-8B-4bit"
    # A target is not an alias again
    with pytest.raises(ModelNotFound, match="model 'loop' not found"):
        library.resolve("loop")


# ------------------------------------------------------------------ paths


def test_trusted_paths(home, library, tmp_path, monkeypatch):
    path = make_model(tmp_path / "else where/My-Model")
    listed = names(library)
    with pytest.raises(ModelNotFound):
        library.resolve(str(path))
    model = library.resolve(str(path), trusted=True)
    assert (model.name, model.path) == ("My-Model", path)
    assert names(library) == ["My-Model", *listed]
    assert library.resolve(str(path)) == model, "a path that is listed may be asked for by anyone"
    assert library.resolve("my-model") == model
    monkeypatch.chdir(path.parent)
    assert library.resolve("./My-Model") == library.resolve("My-Model/", trusted=True) == model
    make_model(home / "tilde")
    assert library.resolve("~/tilde", trusted=True).name == "tilde"


def test_a_path_into_the_cache_has_the_repos_name(home, library):
    snapshot = add_repo(home, "org/Alpha-4B-4bit")
    assert library.resolve(str(snapshot), trusted=True).name == "org/Alpha-4B-4bit"
    assert library.resolve(str(snapshot.parents[1]), trusted=True).name == "org/Alpha-4B-4bit"


def test_requests_never_leave_the_model_folders(home, library, tmp_path, monkeypatch):
    path = make_model(tmp_path / "secret")
    monkeypatch.chdir(tmp_path)
    for name in [
        str(path),
        "./secret",
        "secret",
        "../secret",
        "~/../secret",
        f"models/../../{path.name}",
        str(home / "models/../../secret"),
    ]:
        with pytest.raises(ModelNotFound):
            library.resolve(name)


@pytest.mark.parametrize(
    "files, reason",
    [
        (["model-q4.gguf", "README.md"], r"GGUF weights \(model-q4.gguf\)"),
        (["adapter_config.json", "adapters.safetensors"], "adapter"),
        (["config.json"], r"no model\*\.safetensors"),
        (["notes.txt"], "no config.json"),
    ],
)
def test_a_path_to_something_else_says_what_it_is(library, tmp_path, files, reason):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    with pytest.raises(ModelLoadError, match=reason):
        library.resolve(str(folder), trusted=True)


def test_a_path_to_nothing_or_a_file(library, tmp_path):
    with pytest.raises(ModelLoadError, match="No such file"):
        library.resolve(str(tmp_path / "absent"), trusted=True)
    with pytest.raises(ModelLoadError, match="GGUF"):
        library.resolve("models/qwen3-8b.gguf", trusted=True)


# ------------------------------------------------------------------ what is a model


def test_models_dirs_of_each_depth(home, tmp_path):
    make_model(tmp_path / "one/Alpha-1B-4bit")
    make_model(tmp_path / "one/org/Beta-1B-4bit")
    make_model(tmp_path / "one/org/deep/Gamma-1B-4bit")
    itself = make_model(tmp_path / "Delta-1B-4bit")
    library = Library([tmp_path / "one", str(itself), tmp_path / "absent"])
    assert names(library)[:3] == ["Alpha-1B-4bit", "org/Beta-1B-4bit", "Delta-1B-4bit"]
    assert "Gamma" not in str(names(library))


def test_lm_studio_folders(home, library):
    make_model(home / ".lmstudio/models/lmstudio-community/Alpha-1B-MLX-4bit")
    make_model(home / ".cache/lm-studio/models/mlx-community/Beta-1B-4bit")
    (home / ".lmstudio/models/bartowski/Gamma-GGUF").mkdir(parents=True)
    (home / ".lmstudio/models/bartowski/Gamma-GGUF/gamma.gguf").write_text("GGUF")
    assert names(library) == [
        "demo",
        "lmstudio-community/Alpha-1B-MLX-4bit",
        "mlx-community/Beta-1B-4bit",
    ]
    assert library.resolve("alpha:1b").name == "lmstudio-community/Alpha-1B-MLX-4bit"


@pytest.mark.parametrize(
    "variable, folder", [("HF_HUB_CACHE", "hub"), ("HF_HOME", ""), ("XDG_CACHE_HOME", "..")]
)
def test_the_cache_may_be_elsewhere(home, library, tmp_path, monkeypatch, variable, folder):
    add_repo(home, "org/Alpha-1B-4bit")
    shutil.move(home / ".cache", tmp_path / "moved")
    assert names(library) == ["demo"]
    monkeypatch.setenv(variable, str(tmp_path / "moved/huggingface" / folder))
    assert names(library) == ["demo", "org/Alpha-1B-4bit"]


def test_the_main_revision_else_the_newest(home, library):
    old, new = (add_repo(home, "org/Alpha-1B-4bit", revision) for revision in ("aaaa", "bbbb"))
    refs = old.parents[1] / "refs/main"
    refs.write_text("aaaa\n")
    assert library.resolve("alpha").path == old
    refs.unlink()
    os.utime(old, (1000, 1000))
    assert library.resolve("alpha").path == new
    refs.write_text("cccc")  # a revision whose download has not begun
    assert library.resolve("alpha").path == new


def test_a_download_is_listed_when_it_is_complete(home, library):
    snapshot = add_repo(
        home,
        "org/Alpha-1B-4bit",
        files={
            "model.safetensors.index.json": {
                "metadata": {},
                "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"},
            }
        },
    )
    write_weights(snapshot / "model-1-of-2.safetensors", {})
    blob = snapshot.parents[1] / "blobs/feed"
    (snapshot / "model-2-of-2.safetensors").symlink_to(blob)
    assert names(library) == ["demo"]
    with pytest.raises(ModelLoadError, match="model-2-of-2.safetensors is missing"):
        library.resolve(str(snapshot), trusted=True)
    blob.parent.mkdir()
    write_weights(blob, {})
    os.utime(snapshot, (2000, 2000))
    assert names(library) == ["demo", "org/Alpha-1B-4bit"]


def test_what_is_no_text_model_is_not_listed(home, library):
    add_repo(home, "org/whisper-large-mlx")
    for model in home.rglob("models--org--whisper*/**/tokenizer.json"):
        model.unlink()
    add_repo(home, "org/FLUX-4bit", model_type=None)
    (add_repo(home, "org/Adapter") / "model.safetensors").rename(home / "adapters.safetensors")
    (home / "models/empty").mkdir()
    (home / "models/file").write_text("")
    assert names(library) == ["demo"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '"text"',
        "\xff\xfe",
        '{"model_type": "x", "max_position_embeddings": "many"}',
        '{"model_type": "x", "quantization": 4}',
    ],
)
def test_a_broken_config_is_skipped_with_one_log_line(home, library, caplog, content):
    path = make_model(home / "models/broken")
    (path / "config.json").write_text(content, "latin-1")
    with caplog.at_level(logging.WARNING, "mlx_server"):
        assert names(library) == names(library) == ["demo"]
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_weights_that_are_no_safetensors_file_are_skipped(home, library):
    (make_model(home / "models/broken") / "model.safetensors").write_bytes(b"\xff" * 100)
    assert names(library) == ["demo"]


def test_a_changed_folder_is_read_again(home, library):
    path = make_model(home / "models/Alpha-1B")
    assert library.resolve("alpha").context_length == 40960
    assert library.resolve("alpha") is library.resolve("alpha"), "an unchanged one is not"
    make_model(path, max_position_embeddings=1234)
    os.utime(path / "config.json", (3000, 3000))
    assert library.resolve("alpha").context_length == 1234
    shutil.rmtree(path)
    with pytest.raises(ModelNotFound):
        library.resolve("alpha")


def test_the_first_of_one_name_counts(home, tmp_path):
    add_repo(home, "org/Alpha-1B-4bit")
    mine = make_model(tmp_path / "mine/org/alpha-1b-4bit")
    library = Library([tmp_path / "mine"])
    assert [model.path for model in library.models() if model.name != "demo"] == [mine]


def test_the_built_in_model_needs_no_folder(home):
    assert names(Library()) == ["demo"]


def test_the_built_in_model_of_an_installation(home, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(
        sys.modules["_mlx_server.inference.library"], "__file__", str(tmp_path / "a/b/c/library.py")
    )
    make_model(tmp_path / "share/mlx-server/demo")
    assert [model.path for model in Library().models()] == [tmp_path / "share/mlx-server/demo"]


# ------------------------------------------------------------------ what is known of a model


def described(path: Path) -> LocalModel:
    return Library().resolve(str(path), trusted=True)


def test_digests_are_stable_and_distinct(home, tmp_path):
    path = make_model(tmp_path / "a/model")
    digest = described(path).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    os.utime(path / "model.safetensors", (5, 5))
    (path / "README.md").write_text("more")
    assert described(path).digest == digest
    assert described(make_model(tmp_path / "b/model")).digest == digest, "wherever it lies"
    others = [
        make_model(tmp_path / "c/model", bits=8),
        make_model(tmp_path / "d/model"),
        make_model(tmp_path / "tuned"),
    ]
    write_weights(others[1] / "model.safetensors", {"w": ("F16", [1, 2])})
    assert len({digest, *(described(other).digest for other in others)}) == 4


def test_sizes_and_times(home, tmp_path):
    path = make_model(tmp_path / "model")
    for number, seconds in ((1, 1_000), (2, 2_000)):
        (path / f"model-{number}.safetensors").write_bytes(
            b"\2\0\0\0\0\0\0\0{}" + bytes(100 * number)
        )
        os.utime(path / f"model-{number}.safetensors", (seconds, seconds))
    # The same weights again, which MLX does not load
    (path / "consolidated.safetensors").write_bytes(bytes(999))
    os.utime(path / "model.safetensors", (10, 10))
    model = described(path)
    assert model.size == 110 + 210 + (path / "model.safetensors").stat().st_size
    assert model.modified == 2_000


def test_parameters_from_headers(home, tmp_path):
    recipe = {"bits": 4, "group_size": 64, "wide": {"bits": 8}, "plain": False}
    path = make_model(tmp_path / "model", quantization=recipe)
    write_weights(
        path / "model.safetensors",
        {
            "deep.weight": ("U32", [1000, 8]),
            "deep.scales": ("F16", [1000, 1]),
            "deep.biases": ("F16", [1000, 1]),
            "wide.weight": ("U32", [1000, 8]),
            "wide.scales": ("F16", [1000, 1]),
            "wide.biases": ("F16", [1000, 1]),
            "norm.weight": ("F16", [7]),
            "gate.scales": ("F16", [3]),
        },
    )
    model = described(path)
    assert model.parameters == 64_000 + 32_000 + 7 + 3
    assert model.parameter_size == "96.0K"


@pytest.mark.parametrize(
    "count, text",
    [(7_615_616_512, "7.6B"), (1_310_720, "1.3M"), (136_731_648, "136.7M"), (12, "12")],
)
def test_parameter_size(home, tmp_path, count, text):
    model = described(make_model(tmp_path / "model", parameters=count))
    assert (model.parameters, model.parameter_size) == (count, text)


@pytest.mark.parametrize(
    "config, text",
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, "int4"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"bits": 8, "mode": "affine"}}, "int8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "BF16"),
        ({}, "BF16"),
        ({"torch_dtype": "float16"}, "F16"),
        ({"torch_dtype": None, "dtype": "float32"}, "F32"),
        ({"torch_dtype": None, "text_config": {"dtype": "bfloat16"}}, "BF16"),
        ({"torch_dtype": None}, "unknown"),
    ],
)
def test_quantization(home, tmp_path, config, text):
    assert described(make_model(tmp_path / "model", bits=None, **config)).quantization == text


@pytest.mark.parametrize(
    "config, tokens",
    [
        ({}, 40960),
        (
            {"max_position_embeddings": None, "text_config": {"max_position_embeddings": 131072}},
            131072,
        ),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"max_position_embeddings": None}, 4096),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
    ],
)
def test_context_length(home, tmp_path, config, tokens):
    model = described(make_model(tmp_path / "model", **config))
    assert (model.context_length, model.embedding_length, model.family) == (tokens, 64, "qwen3")


@pytest.mark.parametrize(
    "options, capabilities",
    [
        ({}, ["completion", "tools"]),
        ({"template": "{{ messages }}"}, ["completion"]),
        ({"template": "{{ tools }}{% if enable_thinking %}"}, ["completion", "tools", "thinking"]),
        ({"template": "<think>"}, ["completion", "thinking"]),
        (
            {"template": "", "files": {"chat_template.jinja": "<|channel|>analysis {{ tools }}"}},
            ["completion", "tools", "thinking"],
        ),
        (
            {"template": "", "files": {"chat_template.json": {"chat_template": "{{ tools }}"}}},
            ["completion", "tools"],
        ),
        (
            {
                "template": [
                    {"name": "default", "template": "x"},
                    {"name": "tool_use", "template": "{{ tools }}"},
                ]
            },
            ["completion", "tools"],
        ),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["completion", "tools"]),
        ({"architectures": ["BertModel"]}, ["embedding"]),
        ({"files": {"modules.json": []}}, ["embedding"]),
    ],
)
def test_capabilities(home, tmp_path, options, capabilities):
    assert described(make_model(tmp_path / "model", **options)).capabilities == capabilities


def test_a_name_says_that_a_model_embeds(home, tmp_path):
    assert described(make_model(tmp_path / "Qwen3-Embedding-0.6B-4bit")).capabilities == [
        "embedding"
    ]
