"""Model folders for the library: small JSON files and weights that are empty or headers only, since
nothing in the library reads weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

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


def empty_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, apart from the built-in model in a models folder of its own."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(folder / "home"))
    make_model(folder / "home/models/demo", bits=None, parameters=1_300_000)
    return folder / "home"
