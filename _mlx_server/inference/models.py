"""Model folders, described from their files without loading any weights."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _mlx_server.inference.protocol import ModelLoadError, Sampling, first_line

log = logging.getLogger("mlx_server")


@dataclass
class LocalModel:
    """A model folder that MLX can load, described without loading it.

    `name` is the repo id ("mlx-community/Qwen3-8B-4bit"), the folder's name or "demo". `size` is
    the weight files' bytes, `modified` the newest one's unix time, `digest` 64 hex digits, `family`
    the config's model_type, `quantization` "int4", "mxfp4", "BF16", ..., `context_length` is in
    tokens."""

    name: str
    path: Path
    size: int
    modified: float
    digest: str
    config: dict[str, Any]
    family: str
    parameters: int
    parameter_size: str
    quantization: str
    context_length: int
    embedding_length: int
    capabilities: list[str]


_TOKENIZERS = {
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
    "spiece.model",
}
_THINKS = re.compile(r"enable_thinking|<think>|:think>|\[THINK\]|reasoning_|<\|channel")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def describe(name: str, path: Path) -> LocalModel:
    """The model in the folder `path`. Raises ModelLoadError, with a sentence that says why, if MLX
    cannot load it."""
    if path.suffix == ".gguf":
        raise ModelLoadError(f"{path} is not an MLX model: {shortcoming([path.name])}")
    try:
        # A snapshot's link to a blob that is still being downloaded leads nowhere and is no file.
        files = {entry.name: entry.stat() for entry in os.scandir(path) if entry.is_file()}
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read as a model folder: {error.strerror}") from None
    weights = sorted(fnmatch.filter(files, "model*.safetensors"))  # mlx-lm's own pattern
    if "config.json" not in files or not weights:
        raise ModelLoadError(f"{path} is not an MLX model: {shortcoming(files)}")
    try:
        raw = (path / "config.json").read_bytes()
        config = json.loads(raw)
        family = config.get("model_type")
        # Multimodal configs keep the language model's inside
        text = {**config, **(config.get("text_config") or {})}
        index = (
            read_json_file(path / "model.safetensors.index.json")
            if "model.safetensors.index.json" in files
            else {}
        )
        missing = sorted(set(index.get("weight_map", {}).values()) - files.keys())
        recipe = next(
            (
                recipe
                for key in ("quantization", "quantization_config")
                if "bits" in (recipe := config.get(key) or {})
            ),
            {},
        )
        parameters = int(index.get("metadata", {}).get("total_parameters") or 0)
        parameters = parameters or sum(_count_parameters(path / file, recipe) for file in weights)
        template = read_chat_template(path, files)
        added = (
            read_json_file(path / "tokenizer_config.json").get("added_tokens_decoder")
            if "tokenizer_config.json" in files
            else None
        )
        gap = gap_marks({token["content"] for token in (added or {}).values()})
        context = _context_length(text)
        width = int(text.get("hidden_size") or text.get("d_model") or text.get("n_embd") or 0)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelLoadError(f"{path} is broken: its JSON files cannot be understood") from error
    if not isinstance(family, str) or not family:
        raise ModelLoadError(f"{path} is not an MLX model: its config.json names no model_type")
    if missing:
        raise ModelLoadError(f"{path} is incomplete: {missing[0]} is missing")
    if not _TOKENIZERS & files.keys():
        raise ModelLoadError(f"{path} is not a text model: it has no tokenizer")
    # Fine-tunes of one model have equal configs and sizes, and clients take equal digests for equal
    # weights.
    seal = hashlib.sha256(
        raw + repr([name.lower(), [(file, files[file].st_size) for file in weights]]).encode()
    )
    mode = recipe.get("mode", "affine")
    plain = _DTYPES.get(str(text.get("torch_dtype") or text.get("dtype")), "unknown")
    return LocalModel(
        name=name,
        path=path,
        config=config,
        family=family,
        digest=seal.hexdigest(),
        size=sum(files[file].st_size for file in weights),
        modified=max(files[file].st_mtime for file in weights),
        parameters=parameters,
        parameter_size=_parameter_size(parameters),
        quantization=plain if not recipe else f"int{recipe['bits']}" if mode == "affine" else mode,
        context_length=context,
        embedding_length=width,
        capabilities=_capabilities(name, config, files, template, gap),
    )


def shortcoming(files: Iterable[str]) -> str:
    """What keeps a folder or repo without model*.safetensors and config.json, which has these
    files, from being a model."""
    files = sorted(files)
    for kind, pattern in (("GGUF", "*.gguf"), ("PyTorch", "*.bin"), ("PyTorch", "*.pt*")):
        if foreign := fnmatch.filter(files, pattern):
            return f"it holds {kind} weights ({foreign[0]}); get the model's MLX version"
    if "adapter_config.json" in files:
        return "it is an adapter, not a whole model"
    return "it has no model*.safetensors" if "config.json" in files else "it has no config.json"


def read_json_file(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _context_length(text: dict[str, Any]) -> int:
    """Tokens; a yarn-like scaling counts where the config has not already counted it."""
    stated = next(
        (
            text[key]
            for key in (
                "max_position_embeddings",
                "n_positions",
                "max_seq_len",
                "seq_length",
                "n_ctx",
            )
            if text.get(key)
        ),
        4096,
    )
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    return max(
        int(stated),
        int((rope.get("factor") or 0) * (rope.get("original_max_position_embeddings") or 0)),
    )


def _count_parameters(file: Path, recipe: dict[str, Any]) -> int:
    """Weights in a safetensors file, from its header alone: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        # The format's limit, for what is no such file
        size = min(int.from_bytes(stream.read(8), "little"), 100_000_000)
        header = json.loads(stream.read(size) or "{}")
    total = 0
    for key, tensor in header.items():
        layer, _, kind = key.rpartition(".")
        packed = header.get(f"{layer}.weight", {}).get("dtype") == "U32"
        if key == "__metadata__" or packed and kind in ("scales", "biases"):
            continue
        count = math.prod(tensor["shape"])
        # 32 bits hold 32 / bits weights; a layer may have bits of its own
        if packed and kind == "weight":
            own = recipe.get(layer)
            count = count * 32 // (own if isinstance(own, dict) else recipe).get("bits", 32)
        total += count
    return total


def _parameter_size(parameters: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)


def read_chat_template(path: Path, files: dict[str, os.stat_result]) -> str:
    if "chat_template.jinja" in files:
        return (path / "chat_template.jinja").read_text("utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        template = read_json_file(path / file).get("chat_template") if file in files else None
        if template:  # a string, or a list of named ones
            return template if isinstance(template, str) else json.dumps(template)
    return ""


_GAPS = [  # the tokens before what precedes a gap, before what follows it, and before what fills it
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
]


def gap_marks(vocabulary: Iterable[str]) -> tuple[str, ...]:
    """The tokens among these that make a model fill a gap; none if it has none."""
    return next((marks for marks in _GAPS if set(marks) <= set(vocabulary)), ())


def _capabilities(
    name: str,
    config: dict[str, Any],
    files: dict[str, os.stat_result],
    template: str,
    gap: tuple[str, ...],
) -> list[str]:
    # A bare "...Model" ends without the head that predicts words.
    headless = any(
        str(architecture).endswith("Model") for architecture in config.get("architectures") or ()
    )
    if headless or "modules.json" in files or "embed" in name.lower():
        return ["embedding"]
    found = {
        "completion": True,
        "tools": "tools" in template,
        "insert": gap,
        "thinking": _THINKS.search(template),
    }
    return [capability for capability, present in found.items() if present]


def generation_defaults(path: Path) -> Sampling:
    try:
        config = json.loads((path / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return Sampling(temperature=0.0)
    if not config.get("do_sample", "temperature" in config):
        return Sampling(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return Sampling(
        **{
            "temperature": 1.0,
            **{n: config[n] for n in names if isinstance(config.get(n), (int, float))},
        }
    )


def load_error(local: LocalModel, what: str, error: Exception) -> ModelLoadError:
    """What the caller is told of an exception while something was loaded; the log gets all of
    it."""
    if "trust_remote_code" in str(error):
        said = f"{what} wants Python code that comes with it to be run, which is never done here; take another conversion of it"
        log.warning("%s (%s)", said, local.path)
        return ModelLoadError(said)
    log.warning("cannot load %s", what, exc_info=error)
    return ModelLoadError(f"{what} cannot be loaded: {first_line(error, str(local.path))}")


def fingerprint(local: LocalModel, kv_bits: int | None) -> str:
    """What a KV state depends on besides the tokens: the model's files, the precision, and mlx-lm's
    idea of a cache."""
    from mlx_lm import __version__

    weights = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in local.path.glob("*.safetensors")
    )
    return hashlib.sha256(
        json.dumps([local.config, weights, kv_bits, __version__], sort_keys=True).encode()
    ).hexdigest()[:32]


@dataclass
class Loaded:
    """A model in memory: bytes of its weights, unix time when it goes if idle (None: never),
    context window in tokens."""

    model: LocalModel
    size: int
    expires: float | None
    context_length: int
