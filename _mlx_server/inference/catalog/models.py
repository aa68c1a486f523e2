"""Model folders, described from their files without loading any weights."""

from __future__ import annotations

import ast
import contextlib
import errno
import fnmatch
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import stat
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from _mlx_server.inference.images.image_layout import has_tower
from _mlx_server.inference.images.images import has_pillow
from _mlx_server.inference.protocol import ModelLoadError, Sampling, first_line

log = logging.getLogger("mlx_server")


@dataclass
class LocalModel:
    """A model folder that MLX can load, described from its small files."""

    name: str  # repo id ("mlx-community/Qwen3-8B-4bit"), folder name or "demo"
    path: Path
    size: int  # bytes of the weight files
    modified: float  # unix time of the newest weight file
    digest: str  # 64 hex digits; other ones for another name, config or other weight files
    config: dict[str, Any]  # config.json
    family: str  # its model_type
    parameters: int
    parameter_size: str  # "7.6B"
    quantization: str  # "int4", "mxfp4", "BF16", ...
    context_length: int  # tokens
    embedding_length: int  # numbers in a hidden state, 0 if unknown
    # Some of "completion", "tools", "insert", "thinking" and "vision"; or "embedding"
    capabilities: list[str]


Files = Mapping[str, os.stat_result]
"""The files of a folder by name, without those in its subfolders."""

MAX_FILE = 8 * 2**20  # bytes of a file that describes a model; its JSON takes a second
MAX_INDEX = 32 * 2**20  # bytes of what names all of its tensors
MAX_TOKENIZER = 64 * 2**20  # bytes of tokenizer.json; Gemma's has 33 MB
MAX_ADDED = 32 * 2**20  # bytes of tokenizer_config.json; with 65,536 tokens of speech it has 12 MB
MAX_TOKENS = 600_000  # keys in it; Gemma's has 262,144 tokens, and as many merges again
MAX_WORD = 64  # characters of what stands in every list of models
MAX_PARTS = 4096  # layers or experts; each takes memory before a tensor is looked at
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = {
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
    "spiece.model",
}
_COUNTS = re.compile(r"(?:.*_)?(?:layers?|depth|blocks|experts)")  # of what mlx-lm makes one by one
_PROMPT_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_TOKEN_FLAGS = (b"single_word", b"lstrip", b"rstrip", b"normalized", b"special")
# Where whoever saved a tokenizer had its files; nobody opens these
_TRACES = ("name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file")
_THINKS = re.compile(r"enable_thinking|<think>|:think>|\[THINK\]|reasoning_|<\|channel")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
_HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd")


class UnsupportedModel(ModelLoadError):
    """The installed mlx-lm cannot load `model`; `why` says the reason."""

    def __init__(self, model: LocalModel, why: str):
        super().__init__(f"model '{model.name}' cannot be loaded: {why}")
        self.model, self.why = model, why


def describe(name: str, path: Path) -> LocalModel:
    """The model in the folder `path`. Raises ModelLoadError, with a sentence that says why, if MLX
    cannot load it, whatever its files hold; the error has a cause if the folder is a broken model,
    not something else."""
    try:
        model = _describe(name, path)
        if why := unsupported(model.config):
            raise UnsupportedModel(model, why)
        return model
    except ModelLoadError:
        raise
    except Exception as error:  # a stranger's files can cause almost any
        raise ModelLoadError(f"{path} is broken: its JSON files cannot be understood") from error


def _describe(name: str, path: Path) -> LocalModel:
    files = _list_files(path)
    weights = {file: files[file] for file in _weight_files(path, files)}
    _check_headers(path / file for file in weights)
    config = _read_config(path)
    index = _read_optional(path, files, _INDEX, MAX_INDEX)
    _check_complete(path, files, index)
    recipe = _quantization_recipe(config)
    parameters = _amount(index.get("metadata", {}).get("total_parameters"))
    if not parameters:
        parameters = sum(_count_parameters(path / file, recipe) for file in weights)
    # Multimodal configs keep the language model's inside
    text = {**config, **(config.get("text_config") or {})}
    return LocalModel(
        name=name,
        path=path,
        size=sum(found.st_size for found in weights.values()),
        modified=max(found.st_mtime for found in weights.values()),
        digest=_digest(name, path, weights),
        config=config,
        family=config["model_type"][:MAX_WORD],
        parameters=parameters,
        parameter_size=_parameter_size(parameters),
        quantization=_quantization(recipe, text),
        context_length=context_length(config),
        embedding_length=_amount(_first(text, _HIDDEN_SIZES)),
        capabilities=_capabilities(name, path, files, config)
        + (["vision"] if _sees(path, weights, config, index) else []),
    )


def unsupported(config: dict[str, Any]) -> str:
    """Why mlx-lm cannot load a model with this config.json, as far as its type tells; "" if it
    can."""
    kind, folder = config.get("model_type"), _mlx_lm_folder()
    # One with Python code of its own is refused when it is loaded
    if not isinstance(kind, str) or folder is None or "model_file" in config:
        return ""
    if kind in _written_types(folder) or kind in _other_types(folder):
        return ""
    import importlib.metadata  # takes 20 ms

    version = importlib.metadata.version("mlx-lm")
    return f"mlx-lm {version} does not know the model type {kind[:64]!r}; a newer one may"


@functools.cache
def _mlx_lm_folder() -> Path | None:
    """Where the sources of the installed mlx-lm are, which tell the model types that it loads: it
    takes seconds to import. None if it does not show them."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _written_types(folder: Path) -> frozenset[str]:
    """The model types that have a file of their own."""
    names = os.listdir(folder / "models")
    return frozenset(name.removesuffix(".py") for name in names if name.endswith(".py"))


@functools.cache
def _other_types(folder: Path) -> frozenset[str]:
    """Those that are loaded as others. To parse what tells them takes 10 ms."""
    types: set[str] = set()
    for statement in ast.parse((folder / "utils.py").read_text("utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name("MODEL_REMAPPING")]):
                types |= ast.literal_eval(statement.value).keys()
            case ast.Assign(targets=[ast.Name("MODEL_ARCHITECTURE_REMAPPING")]):
                types |= {kind for kind, _ in ast.literal_eval(statement.value)}
    return frozenset(types)


def _list_files(path: Path) -> Files:
    """A link that leads nowhere, to a blob that is still being downloaded, is no file. Raises
    ModelLoadError for a folder with a pipe, a socket or a device: whoever opens one may wait for
    ever."""
    if path.suffix == ".gguf":
        raise ModelLoadError(f"{path} is not an MLX model: {shortcoming([path.name])}")
    files = {}
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    files[entry.name] = entry.stat()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read as a model folder: {error.strerror}") from None
    for name, found in files.items():
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            said = f"{path} is broken: {name} is no file; remove it"
            raise ModelLoadError(said) from OSError(errno.EINVAL)
    return {name: found for name, found in files.items() if stat.S_ISREG(found.st_mode)}


def check_folder(local: LocalModel) -> Files:
    """The files of a model's folder. Raises ModelLoadError if one of what lies in it now cannot be
    opened without waiting for ever: mlx-lm opens files by their names, and asks no questions."""
    for name in ("additional_chat_templates", "1_Pooling"):
        if (local.path / name).is_dir():
            _list_files(local.path / name)
    return _list_files(local.path)


def check_files(local: LocalModel) -> None:
    """Raises ModelLoadError, OSError and ValueError if the files that a model's tokenizer and
    template are made of cannot be read without harm: transformers takes what it finds, too."""
    files = check_folder(local)
    for name in (*_PROMPT_FILES, *_TOKENIZERS):
        if name in files:
            _check_inside(local.path, name)
    if "tokenizer.json" in files:
        _check_tokenizer(local.path / "tokenizer.json")
    settings = _read_optional(local.path, files, "tokenizer_config.json", MAX_ADDED)
    parts = (value for key, value in settings.items() if key != "added_tokens_decoder")
    for part in (settings, *(one for one in parts if isinstance(one, dict))):
        for key, value in part.items():
            if key not in _TRACES and isinstance(value, str) and _leads_out(local.path, value):
                raise ValueError(
                    f"the {key} of its tokenizer_config.json is a file elsewhere; remove it there"
                )


def _weight_files(path: Path, files: Files) -> list[str]:
    """The names of the files that mlx-lm loads."""
    weights = sorted(fnmatch.filter(files, "model*.safetensors"))  # mlx-lm's own pattern
    if "config.json" not in files or not weights:
        raise ModelLoadError(f"{path} is not an MLX model: {shortcoming(files)}")
    return weights


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json_file(path / "config.json")
    if not isinstance(config, dict):
        raise ValueError("config.json holds no object")
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise ModelLoadError(f"{path} is not an MLX model: its config.json names no model_type")
    for part in (config, *(one for one in config.values() if isinstance(one, dict))):
        for key, value in part.items():
            if _COUNTS.fullmatch(key) and isinstance(value, (int, float)) and value > MAX_PARTS:
                raise ValueError(f"{key} is out of range")
    return config


def _check_complete(path: Path, files: Files, index: dict[str, Any]) -> None:
    """Raises ModelLoadError if weights that the index names are missing, or the tokenizer is."""
    if missing := sorted(set(index.get("weight_map", {}).values()) - files.keys()):
        raise ModelLoadError(f"{path} is incomplete: {missing[0]} is missing")
    if not _TOKENIZERS & files.keys():
        raise ModelLoadError(f"{path} is not a text model: it has no tokenizer")


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


def read_json_file(path: Path, most: int = MAX_FILE) -> Any:
    """What a file's JSON says. Raises OSError, and ValueError also for a file of more than `most`
    bytes and for one that is too deeply nested."""
    try:
        return json.loads(read_file(path, most))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_file(path: Path, most: int = MAX_FILE) -> bytes:
    """A file of at most so many bytes. Raises OSError, and ValueError for one that is larger."""
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(size + 1) if size <= most else b""
    if len(content) > size or size > most:  # a file of the system may have more than its size
        raise ValueError(f"{path.name} is too large")
    return content


def open_file(path: Path) -> BinaryIO:
    """A file to read. Raises OSError, also for a pipe or a device, at which one may wait for
    ever."""
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return stream


def _read_optional(
    path: Path, files: Container[str], name: str, most: int = MAX_FILE
) -> dict[str, Any]:
    """A JSON object of a folder; an empty one if there is no such file."""
    content = read_json_file(path / name, most) if name in files else {}
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds no object")
    return content


def _first(config: dict[str, Any], keys: Iterable[str]) -> Any:
    """The first value of these keys that is neither null nor zero; else None."""
    return next((config[key] for key in keys if config.get(key)), None)


def _digest(name: str, path: Path, weights: Files) -> str:
    """Clients take equal digests for equal weights, so the name counts: fine-tunes of one model
    have equal configs and sizes."""
    parts = [name.lower(), [(file, found.st_size) for file, found in weights.items()]]
    return hashlib.sha256(read_file(path / "config.json") + repr(parts).encode()).hexdigest()


def _quantization_recipe(config: dict[str, Any]) -> dict[str, Any]:
    """How MLX has quantised the weights: bits, group size, mode, and layers that differ; empty if
    it has not."""
    for key in ("quantization", "quantization_config"):
        recipe = config.get(key) or {}
        if not isinstance(recipe, dict):
            raise ValueError(f"{key} is no object")
        if isinstance(recipe.get("bits"), (int, float)):
            return recipe
    return {}


def _quantization(recipe: dict[str, Any], text: dict[str, Any]) -> str:
    if not recipe:
        return _DTYPES.get(str(text.get("torch_dtype") or text.get("dtype")), "unknown")
    mode = recipe.get("mode", "affine")
    return (f"int{recipe['bits']}" if mode == "affine" else str(mode))[:MAX_WORD]


def context_length(config: dict[str, Any]) -> int:
    """The tokens of a model's window, by its config.json; a yarn-like scaling counts where the
    config has not already counted it."""
    text = {**config, **(config.get("text_config") or {})}
    stated = _amount(_first(text, _CONTEXT_LENGTHS) or 4096)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    scaled = (rope.get("factor") or 0) * (rope.get("original_max_position_embeddings") or 0)
    return max(stated, _amount(scaled))


def _amount(value: Any) -> int:
    """A number of a file as a whole one; 0 for none. Raises ValueError for one that can be no
    number of tokens or weights."""
    if not 0 <= (value or 0) < 2**60:
        raise ValueError("a number is out of range")
    return int(value or 0)


def _count_parameters(file: Path, recipe: dict[str, Any]) -> int:
    """Weights in a safetensors file, from its header alone."""
    header = read_header(file)
    total = 0
    for key, tensor in header.items():
        layer, _, kind = key.rpartition(".")
        packed = header.get(f"{layer}.weight", {}).get("dtype") == "U32"
        if key == "__metadata__" or packed and kind in ("scales", "biases"):
            continue
        count = math.prod(map(_amount, tensor["shape"][:16]))
        # 32 bits hold 32 / bits weights; a layer may have bits of its own
        if packed and kind == "weight":
            own = recipe.get(layer)
            count = count * 32 // (own if isinstance(own, dict) else recipe).get("bits", 32)
        total += count
    return total


def read_header(file: Path) -> dict[str, Any]:
    """What a safetensors file begins with: 8 bytes of length, then JSON.

    https://huggingface.co/docs/safetensors/index#format"""
    with open_file(file) as stream:
        # Of a larger header, which no model has, the JSON is cut off
        size = min(int.from_bytes(stream.read(8), "little"), MAX_INDEX)
        text = stream.read(size) or b"{}"
    try:
        header = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file.name} has no header")
    return header


def _check_headers(files: Iterable[Path]) -> None:
    """Raises ValueError if the headers of all safetensors files take too long to read."""
    total = 0
    for file in files:
        with open_file(file) as stream:
            total += min(int.from_bytes(stream.read(8), "little"), MAX_INDEX)
    if total > 2 * MAX_INDEX:
        raise ValueError("the headers of its weights are too large")


def _sees(path: Path, weights: Files, config: dict[str, Any], index: dict[str, Any]) -> bool:
    """Whether images can be shown to a model, here and now."""
    if not isinstance(config.get("vision_config"), dict) or not has_pillow():
        return False
    named = (name for file in weights for name in read_header(path / file))
    return has_tower(config, index.get("weight_map") or named)


def weight_files(local: LocalModel) -> list[Path]:
    """The files that hold a model's weights."""
    return sorted(local.path.glob("model*.safetensors"))


def _parameter_size(parameters: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)


def read_chat_template(path: Path, files: Container[str]) -> str:
    """The text of the chat template in a folder with these files; "" if there is none. Where there
    are several with names, all of them as JSON. Raises OSError and ValueError."""
    if "chat_template.jinja" in files:
        return read_file(path / "chat_template.jinja").decode("utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        if template := _read_optional(path, files, file, MAX_ADDED).get("chat_template"):
            return template if isinstance(template, str) else json.dumps(template)
    return ""


def _check_tokenizer(file: Path) -> None:
    """Raises ValueError for a tokenizer that would take seconds to load, in which nothing else
    runs: tokenizers keeps the interpreter's lock."""
    text = read_file(file, MAX_TOKENIZER)
    # A token that was added has these keys, too, and takes hardly longer than one without
    flags = len(_TOKEN_FLAGS) * min(text.count(b'"%s":' % flag) for flag in _TOKEN_FLAGS)
    if text.count(b'":') - flags > MAX_TOKENS or text.count(b'",') > 2 * MAX_TOKENS:
        raise ValueError("its tokenizer has too many tokens")


def _leads_out(path: Path, value: str) -> bool:
    """Whether a text of a model's folder is the path of something else that can be read. All that
    tokenizer_config.json has gets to the tokenizer's class, and some classes open it."""
    if not os.path.exists(value) or os.path.isdir(value):
        return False
    return not Path(os.path.realpath(value)).is_relative_to(os.path.realpath(path))


def _check_inside(path: Path, name: str) -> None:
    """Raises ValueError if a file of the folder `path` is a link to somewhere outside of it, other
    than to a file of the same name, to the folder of another model or to the blobs of a Hugging
    Face cache: those of a repo, or those that repos share."""
    real = Path(os.path.realpath(path / name))
    folder = Path(os.path.realpath(path))
    roots = [folder]
    if folder.parent.name == "snapshots":
        repo = folder.parents[1]
        roots += [repo / "blobs", repo.parent / "blobs"]
    # Downloads into other folders once were links to the cache, also from there:
    # https://github.com/huggingface/huggingface_hub/pull/1360
    if real.parent.name == "blobs" and real.parents[1].name.startswith("models--"):
        return
    if real.name == name or any(real.is_relative_to(root) for root in roots):
        return
    if os.path.exists(real.parent / "config.json") and any(real.parent.glob("model*.safetensors")):
        return
    raise ValueError(f"{name} leads outside of the model's folder; put a copy there")


# The tokens before what precedes a gap, before what follows it, and before what fills it
_GAPS = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
]


def gap_marks(vocabulary: Iterable[str]) -> tuple[str, ...]:
    """The three tokens among these between which a model that can fill a gap reads the texts
    around it; none if it cannot."""
    known = set(vocabulary)
    return next((marks for marks in _GAPS if set(marks) <= known), ())


def _capabilities(name: str, path: Path, files: Files, config: dict[str, Any]) -> list[str]:
    # A bare "...Model" ends without the head that predicts words.
    architectures = config.get("architectures") or ()
    headless = any(str(architecture).endswith("Model") for architecture in architectures)
    template = read_chat_template(path, files)
    settings = _read_optional(path, files, "tokenizer_config.json", MAX_ADDED)
    added = settings.get("added_tokens_decoder") or {}
    gap = gap_marks(token["content"] for token in added.values())
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
    """What a model's generation_config.json says about sampling; greedy if it says nothing."""
    try:
        config = read_json_file(path / "generation_config.json")
    except (OSError, ValueError):
        return Sampling(temperature=0.0)
    if not isinstance(config, dict) or not config.get("do_sample", "temperature" in config):
        return Sampling(temperature=0.0)
    sampling = Sampling(temperature=1.0)
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = config.get(name)
        kinds = int if name == "top_k" else (int, float)
        if isinstance(value, kinds) and -(2**31) < value < 2**31:
            setattr(sampling, name, value)
    return sampling


def read_shown_files(local: LocalModel) -> tuple[str, dict[str, Any]]:
    """A model's chat template and its generation_config.json, for clients. Raises ModelLoadError,
    also for a template that is a link to a file elsewhere, which may be no template."""
    try:
        files = os.listdir(local.path)
        _check_inside(local.path, "chat_template.jinja")
        generation = _read_optional(local.path, files, "generation_config.json")
        return read_chat_template(local.path, files), generation
    except (OSError, ValueError) as error:
        log.warning("cannot read %s: %s", local.path, error)
        raise ModelLoadError(f"the files of model '{local.name}' cannot be read") from None


def load_error(local: LocalModel, what: str, error: BaseException) -> ModelLoadError:
    """What the caller is told of an exception while `what` was loaded; the log gets all of it."""
    if "trust_remote_code" in str(error):
        said = (
            f"{what} wants Python code that comes with it to be run, which is never done here; "
            "take another conversion of it"
        )
        log.warning("%s (%s)", said, local.path)
        return ModelLoadError(said)
    log.warning("cannot load %s", what, exc_info=error)
    return ModelLoadError(f"{what} cannot be loaded: {first_line(error, str(local.path))}")


def fingerprint(local: LocalModel, kv_bits: int | None, head: Iterable[Path] = ()) -> str:
    """32 hex digits for what a KV state depends on besides the tokens: the model's files, the
    cache's bits per number (None: as computed), the layout of mlx-lm's cache classes, and the files
    of an MTP head whose state is kept with the model's."""
    from mlx_lm import __version__

    weights, heads = (
        sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
        for paths in (local.path.glob("*.safetensors"), head)
    )
    known = [local.config, weights, kv_bits, __version__, *([heads] if heads else [])]
    parts = json.dumps(known, sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


@dataclass
class Loaded:
    """A model in memory."""

    model: LocalModel
    size: int  # bytes of its weights
    expires: float | None  # unix time when it is unloaded if nobody uses it; None: never
    context_length: int  # tokens
