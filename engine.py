"""The engine room: local MLX models, their prompts, their KV caches and their output.

It knows models and tokens; it knows no HTTP and no vendor's JSON. A caller hands in a `Request` (the canonical
conversation) and iterates the `Generation` it gets back: a stream of `Event`s.

The threading rule. All MLX work (load, prefill, decode, cache copy and trim, unload) happens on ONE thread that the
`Engine` owns. Callers' threads resolve names, render and tokenise prompts, which needs no MLX array. Both sides meet
under ONE lock, `Engine._lock`, a Condition that guards the inbox, the outboxes and the model table. It is never held
during MLX work, tokenisation or I/O.
"""

from __future__ import annotations

import ast
import bisect
import collections
import contextlib
import copy
import dataclasses
import datetime
import enum
import fnmatch
import functools
import gc
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import queue
import re
import secrets
import shutil
import signal
import socket
import string
import sys
import threading
import time
import weakref
import zlib
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence, Union

log = logging.getLogger("mlx_server")


# ------------------------------------------------------------------ what goes in

Message = dict[str, Any]
"""One message of the canonical conversation: `{"role", "content": str, ...}`.

`system` only first; `user` and `assistant` alternate apart from runs of `tool` after an assistant's calls. An assistant
may carry `reasoning_content: str` and `tool_calls: [{"id", "type": "function", "function": {"name", "arguments": dict}}]`;
a tool result carries `tool_call_id` and `name`.
"""


@dataclass
class Sampling:
    """How to pick tokens. None leaves the choice to the model's generation_config.json; temperature 0 is greedy."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repetition_context: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None  # what is added to the logits of tokens


class Priority(enum.IntEnum):
    """Who goes first where requests have to wait for each other."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass
class Request:
    """One generation, in no vendor's words. With neither `messages` nor `prompt` it only loads the model.

    `prompt` (raw text or token ids: no chat template, no markup in the answer) replaces `messages` when given. `tools` are
    in OpenAI form and are rendered; `deferred_tools` are not rendered but may be called. `tool_choice` is "auto", "none",
    "any" or a tool's name.
    `max_tokens` None means up to the context's end; 0 only fills the prompt cache. `logprobs` asks for the visible answer's
    tokens with their probabilities, and for so many of the likeliest ones beside each. `keep_alive` is in seconds
    (negative: for ever, 0: unload afterwards, None: the model's current setting).
    `context` are tokens that the model reads before all that, an earlier answer's `Done.tokens`.
    `suffix` is raw text that the answer leads from `prompt` to, for models whose capabilities have "insert".
    `embed` asks for the prompt's `Embedding` instead of an answer, `truncate` for that of its beginning where it is too long.

    `thinking_budget` is how many tokens the model may think for; then its thinking is ended for it. None leaves it the time.

    `format` is what the visible answer must be: "json" (any JSON object) or a JSON schema, here the schema's dict; with
    `tools` the model may call one instead. Thinking stays free. A forced call (`tool_choice` "any" or a name) is held to
    the tools' names and, as far as the model's call syntax allows, their schemas; so is, with `strict`, every call the model
    makes. All this needs the package llguidance: without it a `format` is refused and a forced call only begun.
    """

    model: str
    messages: list[Message] = field(default_factory=list)
    prompt: str | list[int] | None = None
    context: list[int] = field(default_factory=list)
    suffix: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    deferred_tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str = "auto"
    strict: bool = False
    parallel_tool_calls: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    max_tokens: int | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    effort: str | None = None
    format: dict[str, Any] | str | None = None
    logprobs: int | None = None
    keep_alive: float | None = None
    priority: Priority = Priority.NORMAL
    embed: bool = False
    truncate: bool = False


# ------------------------------------------------------------------ what comes out


@dataclass
class Thinking:
    """A piece of the model's reasoning."""

    text: str


@dataclass
class Token:
    """A token that was generated, or could have been: its bytes, which need not be whole characters, the text they make by
    themselves, and the natural logarithm of its probability before temperature and the like. `top` are the likeliest."""

    text: str
    bytes: bytes
    logprob: float
    top: list[Token] = field(default_factory=list)


@dataclass
class Text:
    """A piece of the visible answer. Never holds part of a stop string or half a character. `tokens` are those that begin
    in it, if the request wants `logprobs`."""

    text: str
    tokens: list[Token] = field(default_factory=list)


@dataclass
class ToolStart:
    """A tool call begins: its unique `id` ("toolu_" and 24 characters) and the declared tool's name."""

    id: str
    name: str


@dataclass
class ToolInput:
    """A piece of the open call's arguments as JSON text; all pieces together are exactly one JSON object, or its beginning."""

    json: str


@dataclass
class ToolEnd:
    """The open call is over; `arguments` is the object its pieces spell. With `cut` the answer's end came before the call's:
    the pieces are no whole object, `arguments` is empty, and the call must not be made."""

    arguments: dict[str, Any]
    cut: bool = False


@dataclass
class Embedding:
    """What a text means to the model, as a vector of any length."""

    vector: list[float]


@dataclass
class Tick:
    """Nothing new for `Generation.TICK` seconds: the time to look whether the caller's client still listens."""


@dataclass
class Usage:
    """Token counts and seconds. `prompt_tokens` is the whole prompt, `cached_tokens` the part that was not prefilled
    again, `completion_tokens` everything generated, thinking included."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    thinking_tokens: int = 0
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass
class Done:
    """The last event. `reason` is "stop" (end of turn), "stop_sequence" (then `stop_sequence` names it), "length"
    (`max_tokens` reached), "context" (context window full), "tool_calls" (the turn ended and holds a call) or "load" (the
    request had nothing to generate from: the model was loaded, that is all). `tokens` are the prompt's and the answer's."""

    reason: str
    usage: Usage
    stop_sequence: str | None = None
    tokens: list[int] = field(default_factory=list)


Event = Union[Thinking, Text, ToolStart, ToolInput, ToolEnd, Embedding, Tick, Done]


# ------------------------------------------------------------------ what goes wrong


class EngineError(Exception):
    """Something failed in the engine; `str(error)` is one sentence a user can act on, free of internals."""


class InvalidRequest(EngineError):
    """The request can never succeed as it is."""


class PromptTooLong(InvalidRequest):
    """The prompt does not fit the context window. `tokens` and `maximum` are token counts."""

    def __init__(self, tokens: int, maximum: int):
        super().__init__(f"prompt is too long: {tokens} tokens > {maximum} maximum")
        self.tokens, self.maximum = tokens, maximum


class ModelNotFound(EngineError):
    """No local model answers to `model`; the message names what is installed."""

    def __init__(self, model: str, installed: list[str]):
        super().__init__(f"model '{model}' not found; installed: {', '.join(installed) or 'none'}")
        self.model, self.installed = model, installed


class ModelLoadError(EngineError):
    """The model's files cannot be loaded; trying again may help once they are repaired."""


class EngineBusy(EngineError):
    """As many requests as may wait do wait already; later there will be room."""


class EngineClosed(EngineError):
    """The engine is shutting down."""


# ------------------------------------------------------------------ the model library
#
# Which models are on this machine, and which of them a name means. No weights are read here.


@dataclass
class LocalModel:
    """A model folder that MLX can load, described without loading it.

    `name` is the repo id ("mlx-community/Qwen3-8B-4bit"), the folder's name or "demo". `size` is the weight files'
    bytes, `modified` the newest one's unix time, `digest` 64 hex digits, `family` the config's model_type,
    `quantization` "int4", "mxfp4", "BF16", ..., `context_length` is in tokens.
    """

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


_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "spiece.model"}
_THINKS = re.compile(r"enable_thinking|<think>|:think>|\[THINK\]|reasoning_|<\|channel")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def describe(name: str, path: Path) -> LocalModel:
    """The model in the folder `path`. Raises ModelLoadError, with a sentence that says why, if MLX cannot load it."""
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
        text = {**config, **(config.get("text_config") or {})}  # multimodal configs keep the language model's inside
        index = _json(path / "model.safetensors.index.json") if "model.safetensors.index.json" in files else {}
        missing = sorted(set(index.get("weight_map", {}).values()) - files.keys())
        recipe = next((recipe for key in ("quantization", "quantization_config")
                       if "bits" in (recipe := config.get(key) or {})), {})
        parameters = int(index.get("metadata", {}).get("total_parameters") or 0)
        parameters = parameters or sum(_count_parameters(path / file, recipe) for file in weights)
        template = _chat_template(path, files)
        added = _json(path / "tokenizer_config.json").get("added_tokens_decoder") if "tokenizer_config.json" in files else None
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
    # Fine-tunes of one model have equal configs and sizes, and clients take equal digests for equal weights.
    seal = hashlib.sha256(raw + repr([name.lower(), [(file, files[file].st_size) for file in weights]]).encode())
    mode = recipe.get("mode", "affine")
    plain = _DTYPES.get(str(text.get("torch_dtype") or text.get("dtype")), "unknown")
    return LocalModel(
        name=name, path=path, config=config, family=family, digest=seal.hexdigest(),
        size=sum(files[file].st_size for file in weights), modified=max(files[file].st_mtime for file in weights),
        parameters=parameters, parameter_size=_parameter_size(parameters),
        quantization=plain if not recipe else f"int{recipe['bits']}" if mode == "affine" else mode,
        context_length=context, embedding_length=width, capabilities=_capabilities(name, config, files, template, gap))


def shortcoming(files: Iterable[str]) -> str:
    """What keeps a folder or repo without model*.safetensors and config.json, which has these files, from being a model."""
    files = sorted(files)
    for kind, pattern in (("GGUF", "*.gguf"), ("PyTorch", "*.bin"), ("PyTorch", "*.pt*")):
        if foreign := fnmatch.filter(files, pattern):
            return f"it holds {kind} weights ({foreign[0]}); get the model's MLX version"
    if "adapter_config.json" in files:
        return "it is an adapter, not a whole model"
    return "it has no model*.safetensors" if "config.json" in files else "it has no config.json"


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _context_length(text: dict[str, Any]) -> int:
    """Tokens; a yarn-like scaling counts where the config has not already counted it."""
    stated = next((text[key] for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
                   if text.get(key)), 4096)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    return max(int(stated), int((rope.get("factor") or 0) * (rope.get("original_max_position_embeddings") or 0)))


def _count_parameters(file: Path, recipe: dict[str, Any]) -> int:
    """Weights in a safetensors file, from its header alone: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        size = min(int.from_bytes(stream.read(8), "little"), 100_000_000)  # the format's limit, for what is no such file
        header = json.loads(stream.read(size) or "{}")
    total = 0
    for key, tensor in header.items():
        layer, _, kind = key.rpartition(".")
        packed = header.get(f"{layer}.weight", {}).get("dtype") == "U32"
        if key == "__metadata__" or packed and kind in ("scales", "biases"):
            continue
        count = math.prod(tensor["shape"])
        if packed and kind == "weight":  # 32 bits hold 32 / bits weights; a layer may have bits of its own
            own = recipe.get(layer)
            count = count * 32 // (own if isinstance(own, dict) else recipe).get("bits", 32)
        total += count
    return total


def _parameter_size(parameters: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)


def _chat_template(path: Path, files: dict[str, os.stat_result]) -> str:
    if "chat_template.jinja" in files:
        return (path / "chat_template.jinja").read_text("utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        template = _json(path / file).get("chat_template") if file in files else None
        if template:  # a string, or a list of named ones
            return template if isinstance(template, str) else json.dumps(template)
    return ""


_GAPS = [  # the tokens before what precedes a gap, before what follows it, and before what fills it
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>")]


def gap_marks(vocabulary: Iterable[str]) -> tuple[str, ...]:
    """The tokens among these that make a model fill a gap; none if it has none."""
    return next((marks for marks in _GAPS if set(marks) <= set(vocabulary)), ())


def _capabilities(name: str, config: dict[str, Any], files: dict[str, os.stat_result], template: str,
                  gap: tuple[str, ...]) -> list[str]:
    # A bare "...Model" ends without the head that predicts words.
    headless = any(str(architecture).endswith("Model") for architecture in config.get("architectures") or ())
    if headless or "modules.json" in files or "embed" in name.lower():
        return ["embedding"]
    found = {"completion": True, "tools": "tools" in template, "insert": gap, "thinking": _THINKS.search(template)}
    return [capability for capability, present in found.items() if present]


# ------------------------------------------------------------------ what a name says

_QUANTISATION = re.compile(r"(?:(?:i?q|int|w)(\d)|(\d)bits?|b?f(?:p)?(16|32)|((?:mx|nv)fp\d))(?:a16)?")
_SIZE = re.compile(r"(e|\d+x)?(\d+(?:\.\d+)?)([mbt])")
_REVISION = re.compile(r"\d{4}|v\d+(?:\.\d+)*")
# Words a repo may carry without changing what the model is: active parameters, experts, context, quantisation recipe.
_OPTIONAL = re.compile(r"a\d+(?:\.\d+)?b|\d+e|\d+k|\d{5,}|qat|dwq|awq|gptq|gs\d+|hi")
_CHAT = {"instruct", "it", "chat", "text"}
_SILENT = {"mlx", "hf", "lm", "meta", "c4ai"}
_BASES = {"llama", "qwen", "mistral", "gemma", "phi"}  # named after the start of a name: what was fine-tuned
# Words Ollama leaves out of a family's name, where size or habit says them.
_UNSAID = re.compile(r"(?:devstral|magistral)-(small)|phi-?3(?:\.5)?-(mini|small|medium)|deepseek-(?:coder-)?v2-(lite)")


@dataclass(frozen=True)
class NameParts:
    """A model's name taken apart. `words` are its family, version and variants, in no order: what every name that means
    this model must say. `extras` are those that it may say besides. Any other word makes it another model's name.

    "Qwen3-Coder-30B-A3B-Instruct-4bit" -> words qwen 3 coder, extras a3b, size 30b, chat, bits {"4"}
    "deepseek-r1:8b-q8_0"               -> words deepseek r 1, size 8b, bits {"8"}
    """

    words: frozenset[str]
    extras: frozenset[str]
    size: str | None
    chat: bool
    bits: frozenset[str]  # "4", "8", "16" (unquantised), "mxfp4", ...
    revision: str  # "2507", "v0.3"; later ones sort higher


@functools.lru_cache(4096)
def parse_name(name: str) -> NameParts:
    """Takes apart a repo id or an Ollama-style name with its tag."""
    bare = name.lower().rpartition("/")[2]
    bare = re.sub(r"(\d)[-_ ](bits?)\b", r"\1\2", bare)
    bare = re.sub(r"(?<![a-z])(i?q\d)_[a-z0-9]+(?:_[a-z]+)?", r"\1", bare)  # q4_K_M, q8_0
    words: list[str] = []
    extras, bits, sizes = set[str](), set[str](), list[str]()
    chat, revision = False, ""
    if unsaid := _UNSAID.match(bare):
        extras.add(unsaid[unsaid.lastindex or 0])
    for token in re.split(r"[-_:\s]+", bare):
        if match := _QUANTISATION.fullmatch(token):
            bits.add(match[1] or match[2] or (match[3] and "16") or match[4])
        elif _SIZE.fullmatch(token):
            sizes.append(token)
        elif token in _CHAT:
            chat = True
        elif _REVISION.fullmatch(token) and (token.isdigit() or sizes or chat):  # DeepSeek-V3 is a version, 7B-v0.3 not
            extras.add(token)
            revision = revision if bits else max(revision, token)  # later digits date the quantisation
        elif _OPTIONAL.fullmatch(token):
            extras.add(token)
        elif token not in _SILENT and token not in extras:
            # qwen2.5vl is qwen 2.5 vl, and 4.0 is 4
            words += [token] if _REVISION.fullmatch(token) else [
                {"pt": "base"}.get(word, re.sub(r"\.0$", "", word))
                for word in re.findall(r"\d+(?:\.\d+)*|[^\W\d_]+|[^\w\s]", token)]
    sizes.sort(key=_billions)
    for start, word in enumerate(words):
        if start and word in _BASES:
            end = start + 1
            while end < len(words) and words[end][0].isdigit():
                end += 1
            start -= words[start - 1] == "distill"
            extras.update(words[start:end])
            del words[start:end]
            break
    return NameParts(frozenset(words + sizes[:-1]), frozenset(extras), sizes[-1] if sizes else None, chat,
                     frozenset(bits), revision)


def _billions(size: str | None) -> float:
    """"0.6b" -> 0.6, "135m" -> 0.135, "8x7b" -> 56, "e4b" -> 4."""
    match = _SIZE.fullmatch(size or "")
    if not match:
        return 0.0
    times = int(match[1][:-1]) if match[1] and match[1] != "e" else 1
    return times * float(match[2]) * {"m": 1e-3, "b": 1, "t": 1e3}[match[3]]


def _bits(model: LocalModel) -> str:
    """"4", "8", ...; "16" for all that is not quantised."""
    digits = re.sub(r"\D", "", model.quantization)
    return digits if digits not in ("", "32") else "16"


def _answers(model: LocalModel, asked: NameParts) -> bool:
    """Whether `model` may be served under a name: the same family, version and variant, and all else that was said."""
    parts = parse_name(model.name)
    billions = model.parameters / 1e9
    return (
        bool(parts.words) and parts.words <= asked.words | asked.extras <= parts.words | parts.extras
        and (asked.size in (None, parts.size)
             # phi-4 has its size in no name, but phi4:14b means it
             or parts.size is None and math.isclose(billions, _billions(asked.size), rel_tol=0.05))
        and (parts.chat or not asked.chat)
        and asked.bits <= {_bits(model), model.quantization})


# ------------------------------------------------------------------ from names to models

_VENDORS = re.compile(r"default|claude-.*|gpt-(?!oss).*|(?:opus|sonnet|haiku)(?:\[.*\])?")
_REGISTRY = re.compile(r"(?:(?:registry\.ollama\.ai|hf\.co|huggingface\.co)/)?(?:library/)?")
_HABIT = ["4", "5", "6", "8", "3", "16"]  # the bits to serve when a name does not say, best first


@dataclass
class Preset:
    """A name of its own for the model that is called `model`, and what its requests begin with and take where they leave
    things open: a system message, turns of a conversation, sampling, stops and the answer's length. `modified` is in unix
    seconds."""

    name: str
    model: str
    modified: float = field(default_factory=time.time)
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    max_tokens: int | None = None

    def fill(self, request: Request) -> Request:
        """A request with these defaults."""
        messages = request.messages
        if messages:
            own = messages[0]["role"] == "system"
            head = messages[:1] if own else [{"role": "system", "content": self.system}] if self.system else []
            messages = [*head, *([] if request.context else self.messages), *messages[own:]]
        return dataclasses.replace(
            request, messages=messages, sampling=_filled(request.sampling, self.sampling), stop=request.stop or self.stop,
            max_tokens=self.max_tokens if request.max_tokens is None else request.max_tokens)


class Presets:
    """Presets by name, whatever its case, kept in the file `path` if there is one. Raises EngineError for one that cannot be
    read."""

    def __init__(self, path: Path | None):
        self._path = path
        self._presets: dict[str, Preset] = {}
        try:
            known = _json(path) if path and path.exists() else []
            for one in [Preset(**{**preset, "sampling": Sampling(**preset["sampling"])}) for preset in known]:
                self._presets[_plain(one.name)] = one
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EngineError(f"{path} cannot be understood; repair or remove it") from error

    def __iter__(self) -> Iterator[Preset]:
        return iter(list(self._presets.values()))

    def get(self, name: str) -> Preset | None:
        return self._presets.get(_plain(name))

    def put(self, preset: Preset) -> None:
        """Adds one or replaces that of its name. Raises EngineError if the file cannot be written."""
        self._presets[_plain(preset.name)] = preset
        self._save()

    def remove(self, name: str) -> bool:
        """Whether there was one."""
        found = self._presets.pop(_plain(name), None) is not None
        if found:
            self._save()
        return found

    def _save(self) -> None:
        written = None
        while self._path and written != (current := list(self)):  # another thread may have changed something meanwhile
            written = current
            new = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                new.write_text(json.dumps([dataclasses.asdict(one) for one in written], ensure_ascii=False, indent=1), "utf-8")
                os.replace(new, self._path)
            except OSError as error:
                new.unlink(missing_ok=True)
                raise EngineError(
                    f"{self._path.name} cannot be written: {error.strerror}; the change lasts until the end") from None


def _demos() -> list[Path]:
    return [Path(__file__).parent / "tests" / "demo",  # in a checkout
            Path(sys.prefix) / "share" / "mlx-server" / "demo"]  # installed


class Library:
    """The models on this machine and the one resolver of their names.

    It looks into `models_dirs` (each a model, or a folder of NAME or ORG/NAME), the Hugging Face cache, LM Studio's
    folders, and for the built-in `demo`; where two have one name, the first counts. `aliases` are pairs of (glob,
    name), `state` is the file of the presets.
    """

    def __init__(self, models_dirs: Sequence[str | Path] = (), aliases: Sequence[tuple[str, str]] = (),
                 state: Path | None = None):
        self.presets = Presets(state)
        self.only: LocalModel | None = None  # the one that can be served, if there are no others
        self._dirs = [Path(folder).expanduser() for folder in models_dirs]
        self._aliases = [(pattern.lower(), target) for pattern, target in aliases]
        self._explicit: list[Path] = []  # trusted paths outside those folders; they are listed from then on
        self._described: dict[Path, tuple[tuple[int, int], LocalModel | None]] = {}

    def models(self) -> list[LocalModel]:
        """Every loadable model. Cheap enough for every request: folders that have not changed are not read again."""
        if self.only is not None:
            return [self.only]
        found: dict[str, LocalModel] = {}
        for name, path in self._folders():
            if name.lower() not in found and (model := self._describe(name, path)):
                found[name.lower()] = model
        return list(found.values())

    def catalog(self) -> list[LocalModel]:
        """Every model that can be served, presets as models of their names."""
        models = self.models()
        by_name = {model.name: model for model in models}
        return models + [dataclasses.replace(by_name[preset.model], name=preset.name, modified=preset.modified)
                         for preset in self.presets if preset.model in by_name]

    def resolve(self, name: str, *, default: LocalModel | None = None, last_used: LocalModel | None = None,
                trusted: bool = False) -> LocalModel:
        """The model that `name` means, by the first of these that fits:

        1. a path: of any folder if `trusted` (the command line, scripts), else only of a model that is listed already;
        2. an alias, whose target is then resolved as a trusted name, or a preset;
        3. a repo id or folder name, in any case, without its org if need be; `:latest` never counts;
        4. family, size and variant, as in `qwen2.5-coder:32b-instruct-q8_0`. Family, version, variant (VL, Coder, Base,
           Thinking, ...) and size have to agree. Of several that do, the best is: the last used if no size is asked
           for; an instruct model; 4-bit, then 5, 6, 8, 3, unquantised; the smaller; the later revision; the plainer
           name;
        5. a vendor's name (`claude-*`, `gpt-*`, `opus`, ...) or "default": `default`, else `last_used`, else the newest
           one that can chat, rather one that knows tools, else `demo`.

        Raises ModelNotFound; ModelLoadError for a trusted path or name of something that is no MLX model.
        """
        meant, by_owner = name, trusted
        if not _is_path(name, trusted):
            meant = self._aliased(name)
            trusted = trusted or meant is not name
            if preset := self.presets.get(meant):
                meant = preset.model
        models = self.models()
        if _is_path(meant, trusted):
            try:
                model = self._by_path(meant, models, trusted)
            except (ModelLoadError, ValueError, RuntimeError) as error:  # the latter two for what cannot be a path
                if by_owner:
                    raise
                log.warning("%s cannot be served: %s", name, error)
                model = None
        else:
            plain = _plain(meant)
            model = _by_name(plain, models, last_used)
            if model is None and _VENDORS.fullmatch(plain):
                model = default or last_used or _stand_in(models)
        if model is None and trusted:
            for folder, path in self._folders():
                if folder.lower() == _plain(meant):
                    describe(meant, path)  # it is there, and the error says why it cannot be served
        if model is None:
            raise ModelNotFound(name, [model.name for model in models])
        return model

    def _aliased(self, name: str) -> str:
        plain = _plain(name)
        return next((target for pattern, target in self._aliases if fnmatch.fnmatchcase(plain, pattern)), name)

    def preset(self, name: str) -> Preset | None:
        """The preset that `name` means."""
        return self.presets.get(self._aliased(name))

    def delete(self, name: str, model: LocalModel, release: Callable[[LocalModel], None] = lambda model: None) -> None:
        """Deletes a model's files, once `release` has returned. Raises InvalidRequest if `name` is not its whole one or it is
        not ours to delete, and EngineError."""
        if _plain(name) != model.name.lower():
            raise InvalidRequest(f"to delete a model, say its whole name: '{model.name}'")
        folder = self.folder(model)
        if folder is None:
            raise InvalidRequest(f"model '{model.name}' is not this server's to delete")
        release(model)
        try:
            shutil.rmtree(folder)
        except OSError as error:
            log.error("%s cannot be deleted: %s", error.filename, error.strerror)
            raise EngineError(f"model '{model.name}' cannot be deleted: {error.strerror}") from None
        log.info("deleted %s", folder)

    def folder(self, model: LocalModel) -> Path | None:
        """What holds a model's files and nothing else, if it is ours to delete: it lies in `models_dirs` or the Hugging Face
        cache, not only by a link, and is not the demo."""
        path = Path(os.path.realpath(model.path))
        if path in map(Path, map(os.path.realpath, _demos())):
            return None
        for root in map(Path, map(os.path.realpath, [*self._dirs, self.hub])):
            if path != root and path.is_relative_to(root):
                repo = root / path.relative_to(root).parts[0]
                return repo if repo.name.startswith("models--") else path
        return None

    @property
    def hub(self) -> Path:
        """The Hugging Face cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub"
        return Path(hub).expanduser()

    def _by_path(self, name: str, models: list[LocalModel], trusted: bool) -> LocalModel | None:
        path = Path(name).expanduser()
        if path.name.startswith("models--"):  # a repo's folder in a Hugging Face cache
            path = next(_snapshots(path), path)
        path = Path(os.path.realpath(path))
        known = next((model for model in models if os.path.realpath(model.path) == str(path)), None)
        if known is None and trusted:
            known = describe(path.name, path)
            self._explicit.append(path)
        return known

    def _describe(self, name: str, path: Path) -> LocalModel | None:
        try:
            seen = path.stat().st_mtime_ns, (path / "config.json").stat().st_mtime_ns
        except OSError:
            return None
        if self._described.get(path, (None,))[0] != seen:
            try:
                model = describe(name, path)
            except ModelLoadError as error:
                # Folders of other kinds are nobody's mistake; files that cannot be read are.
                log.log(logging.WARNING if error.__cause__ else logging.DEBUG, "model skipped: %s", error)
                model = None
            self._described[path] = seen, model
        return self._described[path][1]

    def _folders(self) -> Iterator[tuple[str, Path]]:
        """Where models may be, with the names they would have."""
        for path in self._explicit:
            yield path.name, path
        studio = [Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"]
        for root in [*self._dirs, self.hub, *studio]:
            if (root / "config.json").exists():
                yield root.resolve().name, root
                continue
            for child in _subfolders(root):
                if child.name.startswith("models--"):
                    name = child.name.removeprefix("models--").replace("--", "/")
                    yield from ((name, snapshot) for snapshot in _snapshots(child))
                elif (child / "config.json").exists():
                    yield child.name, child
                else:
                    yield from ((f"{child.name}/{path.name}", path) for path in _subfolders(child))
        yield from (("demo", path) for path in _demos())


def _subfolders(path: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        return []


def _snapshots(repo: Path) -> Iterator[Path]:
    """A cached repo's revisions: the one `main` points to, then the others, newest first."""
    try:
        yield repo / "snapshots" / (repo / "refs" / "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        pass
    yield from sorted(_subfolders(repo / "snapshots"), key=lambda path: path.stat().st_mtime, reverse=True)


def _plain(name: str) -> str:
    lowered = name.strip().lower()
    return lowered[_REGISTRY.match(lowered).end():].removesuffix(":latest")


def _is_path(name: str, trusted: bool) -> bool:
    return name.startswith(("/", "~", "./", "../")) or trusted and (
        name in (".", "..") or name.endswith(".gguf") or os.path.exists(os.path.join(name, "config.json")))


def _by_name(plain: str, models: list[LocalModel], last_used: LocalModel | None) -> LocalModel | None:
    """The best model of exactly this name, else the best that answers to it; an org has to be the model's."""
    org, _, _ = plain.rpartition("/")
    asked = parse_name(plain)
    exact = [model for model in models if model.name.lower() == plain]
    exact = exact or [model for model in models if model.name.lower().rpartition("/")[2] == plain]
    found = exact or [model for model in models
                      if org in ("", model.name.lower().rpartition("/")[0]) and _answers(model, asked)]

    def rank(model: LocalModel) -> tuple:
        parts, bits = parse_name(model.name), _bits(model)
        return (asked.size is not None or last_used is None or model.name != last_used.name, not parts.chat,
                _HABIT.index(bits) if bits in _HABIT else len(_HABIT), _billions(parts.size) or model.parameters / 1e9)

    found.sort(key=lambda model: (len(parse_name(model.name).extras), model.name))
    found.sort(key=lambda model: parse_name(model.name).revision, reverse=True)
    return min(found, key=rank, default=None)


def best_repo(name: str, repos: Iterable[str]) -> str | None:
    """The one of some repo ids that a name means, by the rules for installed models; their names say the quantisation."""
    def described(repo: str) -> LocalModel:
        bits = min(parse_name(repo).bits, default="16")
        quantization = f"int{bits}" if bits.isdigit() else bits
        return LocalModel(repo, Path(), 0, 0.0, "", {}, "", 0, "", quantization, 0, 0, [])

    found = _by_name(_plain(name), [described(repo) for repo in repos], None)
    return found and found.name


def _stand_in(models: list[LocalModel]) -> LocalModel | None:
    chatting = [model for model in models if "completion" in model.capabilities]
    return max(chatting, key=lambda one: (one.name != "demo", "tools" in one.capabilities, one.modified), default=None)


# ------------------------------------------------------------------ the prompt


@dataclass
class Prompt:
    """A rendered request. `tokens` are what the model reads. `root`, `turn` and `body` are token counts that later prompts
    are likely to share: the end of system and tools, the beginning of what the user says last, and the end before the
    generation prompt; 0 where there is none. `opening` is text that the prompt already holds of the answer (a forced tool
    call's opener), `in_thinking` that it ends inside thinking."""

    tokens: list[int]
    root: int = 0
    turn: int = 0
    body: int = 0
    opening: str = ""
    in_thinking: bool = False


class Template:
    """A model's chat template, and what must be done to a canonical conversation before this template renders it well.

    The traits are found by probing with small conversations, never by the model's name, since templates of one family
    differ between conversions.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self._compiled: Any = None
        self._compiled = self._compile()
        call = {"role": "assistant", "content": "", "tool_calls": [_probe_call("call00001")]}
        result = {"role": "tool", "tool_call_id": "call00001", "name": "probe", "content": "4711"}
        ask = {"role": "user", "content": "hello"}
        tools = [{"type": "function", "function": {"name": "probe_tool", "description": "x", "parameters": _EMPTY_SCHEMA}}]

        def renders(messages: list[Message], expect: str, tools: list[dict] | None = None) -> bool:
            try:
                text = self._apply(messages, tools, True, {})
            except Exception:  # templates raise whatever their author liked
                return False
            return all(word in text for word in expect.split())

        self.has_system = renders([{"role": "system", "content": "be brief 4711"}, ask], "4711")
        self.has_tools = renders([ask], "probe_tool", tools) and renders([ask, call, result], "0815 4711", tools)
        self.user_after_tool = renders([ask, call, result, ask], "4711", tools)
        self.assistant_first = renders([{"role": "assistant", "content": "4711"}, ask], "4711")
        pair = {**call, "tool_calls": [_probe_call("call00001"), _probe_call("call00002", "1516")]}
        self.parallel_calls = renders([ask, pair, result, {**result, "tool_call_id": "call00002"}], "0815 1516 4711", tools)
        long_id = "toolu_0123456789abcdefghijkl"
        long_call = {**call, "tool_calls": [_probe_call(long_id)]}
        self.short_ids = self.has_tools and not renders([ask, long_call, {**result, "tool_call_id": long_id}], "4711", tools)
        self.reasoning_field = "thinking" if (
            "reasoning_content" not in self._source and re.search(r"\.thinking\b|\[['\"]thinking['\"]\]", self._source)
        ) else "reasoning_content"
        self.text_beside_thought = renders([ask, {**call, "content": "1", self.reasoning_field: "2"}, result], "0815", tools)

    def render(self, messages: list[Message], tools: list[dict], options: dict[str, Any], *, generation: bool) -> str:
        """The prompt's text. `generation` opens the assistant's turn; a final assistant message is left open instead.
        Raises InvalidRequest when the template refuses the conversation in every form."""
        messages = self._adapt(messages, tools)
        prefill = bool(generation and messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"))
        if prefill:  # rendered with a mark behind it, since each template closes the turn in its own way
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _MARK}]
        error: Exception | None = None
        clock = {key: options[key] for key in options.keys() & {"strftime_now"}}
        effortless = {key: value for key, value in options.items() if key != "reasoning_effort"}
        for kwargs in (options, effortless, clock):  # templates raise on efforts they do not know or enable_thinking=False
            try:
                text = self._apply(messages, tools if self.has_tools else None, generation and not prefill, kwargs)
                return text[: text.index(_MARK)] if prefill else text
            except Exception as failure:
                error = error or failure
        log.warning("chat template failed: %s", error)
        raise InvalidRequest(f"the model's chat template cannot render this conversation: {error}")

    @property
    def shows_dates(self) -> bool:
        """Whether the template shows the present, and shows another date when it is given `strftime_now` as an option."""
        return self._compiled is not None and self.mentions("strftime_now")

    def mentions(self, option: str) -> bool:
        """Whether the template looks at an option."""
        return option in self._source

    def _compile(self) -> Any:
        """The template in transformers' own sandbox, if that can be had and renders as the tokenizer does, which first copies
        all that the template may see, and takes longer for it than for the rendering."""
        probe = [{"role": "user", "content": "a"}]
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            compiled = _compile_jinja_template(self._source)
            ours, theirs = self._fill(compiled, probe, None, True, {}), self._apply(probe, None, True, {})
            return compiled if re.sub(r"\d", "", ours) == re.sub(r"\d", "", theirs) else None  # a clock may stand in them
        except Exception:  # that function is not public, and a template may be anything
            return None

    def _apply(self, messages: list[Message], tools: list[dict] | None, generation: bool, options: dict) -> str:
        if self._compiled is not None:
            return self._fill(self._compiled, messages, tools, generation, options)
        return self._tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=generation, tokenize=False, **options)

    def _fill(self, compiled: Any, messages: list[Message], tools: list[dict] | None, generation: bool,
                         options: dict) -> str:
        return compiled.render(messages=messages, tools=tools or None, add_generation_prompt=generation, **{
            **self._tokenizer.special_tokens_map, "enable_thinking": self._tokenizer.has_thinking, **options})

    def _adapt(self, messages: list[Message], tools: list[dict]) -> list[Message]:
        if not self.has_tools:
            messages = _tools_as_text(messages, tools)
        if not self.has_system and messages and messages[0]["role"] == "system":
            first, rest = messages[0], list(messages[1:])
            if rest and rest[0]["role"] == "user":
                rest[0] = {**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}
            else:
                rest.insert(0, {"role": "user", "content": first["content"]})
            messages = rest
        out: list[Message] = []
        for message in messages:
            before = out[-1]["role"] if out else ""
            if message["role"] == "assistant" and before in ("", "system") and not self.assistant_first:
                out.append({"role": "user", "content": "(continued)"})
            if message["role"] == "user" and before == "tool" and not self.user_after_tool:
                out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n\n{message['content']}"}
                continue
            if message.get("reasoning_content") and self.reasoning_field == "thinking":
                message = {**message, "thinking": message["reasoning_content"]}
                if message["content"] and message.get("tool_calls") and not self.text_beside_thought:
                    message |= {"content": "", "thinking": f"{message['thinking']}\n\n{message['content']}"}
            out.append(message)
        if not self.parallel_calls:
            out = _one_call_a_turn(out)
        return [_with_short_ids(message) for message in out] if self.short_ids else out


_MARK = "\u2063\u2063end\u2063\u2063"
_EMPTY_SCHEMA = {"type": "object", "properties": {}}
_TOOL_PROMPT = """You can call these tools:
{tools}
To call one, write only this, once per call:
<tool_call>
{{"name": "the tool's name", "arguments": {{...}}}}
</tool_call>"""


def _probe_call(call_id: str, number: str = "0815") -> dict:
    return {"id": call_id, "type": "function", "function": {"name": "probe_tool", "arguments": {"number": number}}}


def _tools_as_text(messages: list[Message], tools: list[dict]) -> list[Message]:
    """For a template that knows no tools: definitions in the system message, calls and results in the Hermes form."""
    out: list[Message] = []
    if tools:
        text = _TOOL_PROMPT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        system = messages[0]["content"] + "\n\n" if messages and messages[0]["role"] == "system" else ""
        out.append({"role": "system", "content": system + text})
        messages = messages[1:] if system else messages
    for message in messages:
        if message.get("tool_calls"):
            calls = "\n".join("<tool_call>\n%s\n</tool_call>" % json.dumps(call["function"], ensure_ascii=False)
                              for call in message["tool_calls"])
            content = f"{message['content']}\n{calls}" if message["content"] else calls
            message = {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content}
        if message["role"] == "tool":
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        if out and message["role"] == "user" == out[-1]["role"]:
            out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n{message['content']}"}
        else:
            out.append(message)
    return out


def _one_call_a_turn(messages: list[Message]) -> list[Message]:
    """Splits an assistant's parallel calls into turns of one call, each followed by its result."""
    out: list[Message] = []
    placed: set[str] = set()
    for at, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if len(calls) > 1:
            results = {m.get("tool_call_id"): m for m in itertools.takewhile(lambda m: m["role"] == "tool", messages[at + 1:])}
            for number, call in enumerate(calls):
                out.append({**(message if number == 0 else {"role": "assistant", "content": ""}), "tool_calls": [call]})
                out += [results[call.get("id")]] if call.get("id") in results else []
            placed |= results.keys()
        elif not (message["role"] == "tool" and message.get("tool_call_id") in placed):
            out.append(message)
    return out


def _with_short_ids(message: Message) -> Message:
    """Ids of nine characters, which some templates insist on; a hash, so that a call and its result still agree."""
    def short(call_id: str) -> str:
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]

    if message.get("tool_calls"):
        return {**message, "tool_calls": [{**call, "id": short(call.get("id", ""))} for call in message["tool_calls"]]}
    return {**message, "tool_call_id": short(message.get("tool_call_id", ""))} if message["role"] == "tool" else message


@dataclass
class Answer:
    """What the model really wrote in one turn: all its tokens but the end token, its thinking ("" if it did not think) and
    the text after it."""

    tokens: list[int]
    visible: str
    thinking: str


class Tongue:
    """What a model needs to talk apart from its weights: tokenizer, chat template, output format, sampling defaults.

    Building one reads files but no weights and touches no MLX array, so it happens on the caller's thread, and whatever
    is wrong with a request is known before any work is queued.

    It also remembers the model's answers, by tool-call id or by text, and puts their very tokens into later prompts:
    clients re-serialise tool inputs, templates re-format them, and text need not tokenise as it was generated, but the KV
    cache is only good for what was generated.
    """

    REMEMBERED = 4096  # answers, and beginnings of conversations

    def __init__(self, local: LocalModel):
        from mlx_lm.utils import load_tokenizer
        from transformers import CONFIG_MAPPING, PreTrainedConfig

        try:
            # A type that only mlx-lm knows would be checked, and maybe refused, by rules for others; the tokenizer does not
            # need it.
            known = local.config.get("model_type") in CONFIG_MAPPING
            # Left open, trust would be asked for on the terminal.
            options = {"trust_remote_code": False, **({} if known else {"config": PreTrainedConfig()})}
            self.tokenizer = load_tokenizer(local.path, options, eos_token_ids=local.config.get("eos_token_id"))
        except Exception as error:
            raise _unloadable(local, f"the tokenizer of model '{local.name}'", error) from error
        self.template = Template(self.tokenizer) if self.tokenizer.has_chat_template else None
        self.format = OutputFormat.of(self.tokenizer)
        if self.template and not self.template.has_tools:
            self.format = dataclasses.replace(HERMES, thinking=self.format.thinking, noise=self.format.noise)
        self.defaults = _generation_defaults(local.path)
        self._noise = _any_of(self.format.noise)
        ends = [text for text in map(self.tokenizer.decode, self.tokenizer.eos_token_ids) if text]
        pattern = _any_of(ends).pattern
        if self.format.thinking and self.format.thinking[1] in self.format.noise:  # it may end the turn, too
            pattern += f"|{re.escape(self.format.thinking[1])}(?!{self._noise.pattern})"
        self._turn_end = re.compile(pattern)
        self._answers: dict[str, Answer] = {}
        self._roots: dict[str, int] = {}
        self._openers: dict[str, str] = {}
        self._births: dict[str, datetime.datetime] = {}
        self._specials = self._splittable()
        self._encode_piece = functools.lru_cache(2048)(self._encode_whole)

    def encode(self, text: str) -> list[int]:
        """A rendered template's text to token ids. What stands between two special tokens is tokenised once and remembered,
        so that a prompt that has grown costs no more than its growth."""
        if self._specials is None:
            return self._encode_whole(text)
        return list(itertools.chain.from_iterable(map(self._encode_piece, filter(None, self._specials.split(text)))))

    def _encode_whole(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _splittable(self) -> re.Pattern | None:
        """A pattern that cuts text at the special tokens, if this tokenizer treats the pieces independently."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = [t.content for t in added if not (t.lstrip or t.rstrip or t.single_word or t.normalized) and t.content.strip()]
        if not names:
            return None
        pattern = re.compile("(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")")
        probe = f" a{names[0]} b\n{names[-1]}\nc  d{names[0]}{names[-1]} é"
        pieces = [token for piece in pattern.split(probe) if piece for token in self._encode_whole(piece)]
        return pattern if pieces == self._encode_whole(probe) else None

    def prompt(self, request: Request) -> Prompt:
        """Renders and tokenises a request. Raises InvalidRequest when the template refuses it."""
        if request.prompt is not None or self.template is None:
            raw = request.prompt if request.prompt is not None else _untemplated(request.messages)
            if request.suffix:
                raw = "".join(itertools.chain(*itertools.zip_longest(self._gap(), (raw, request.suffix), fillvalue="")))
            return Prompt(request.context + (self.tokenizer.encode(raw) if isinstance(raw, str) else raw))
        tools = request.tools if request.tool_choice != "none" else []
        options = self._options(request)
        messages, answers = self._recall(request.messages)
        text = self.template.render(messages, tools, options, generation=True)
        if lost := {mark for mark in answers if mark not in text}:  # a template that drops text beside calls
            messages, answers = self._recall(request.messages, lost)
            text = self.template.render(messages, tools, options, generation=True)
        opener = self._opener(messages, tools, options, text)
        opening = self.format.opening(request.tool_choice) if tools else ""
        start = (self.format.thinking or ("",))[0]
        tokens = request.context + self._splice(text, answers, opener) + self._encode_whole(opening)
        return Prompt(
            tokens,
            root=self._root(request.messages, tools, options, text, len(tokens)),
            turn=self._turn(messages, text, len(tokens)),
            body=len(tokens) - len(self.encode(opener)) - len(self._encode_whole(opening)) if opener else 0,
            opening=opening,
            in_thinking=bool(start) and not opening and text.rstrip().endswith(start),
        )

    def _gap(self) -> tuple[str, ...]:
        marks = gap_marks(token.content for token in self.tokenizer.added_tokens_decoder.values())
        if not marks:
            raise InvalidRequest("this model cannot fill a gap: its tokenizer has no tokens for that")
        return marks

    def truncated(self, prompt: Prompt, most: int) -> Prompt:
        """The first tokens of a text to embed, with its end token if the tokenizer gives it one."""
        if len(prompt.tokens) <= most:
            return prompt
        end = [token for token in prompt.tokens[-1:] if token in self.tokenizer.all_special_ids]
        return Prompt(prompt.tokens[:most - len(end)] + end)

    def constraint(self, request: Request, prompt: Prompt) -> Constraint | None:
        """What holds the answer to the format or the calls that the request demands; None if it demands neither, or calls
        that cannot be enforced. Raises InvalidRequest for a format that cannot be."""
        if request.format is not None and not prompt.opening:
            return self._formatted(request, prompt)
        if prompt.opening or request.strict:
            try:
                return self._calls(request, prompt.opening)
            except (InvalidRequest, RecursionError) as error:
                log.warning("calls are not held to their schemas: %s", error)
        return None

    def _calls(self, request: Request, opening: str) -> Constraint | None:
        """Holds the call that is opened already or, without `opening`, each one from its tag on."""
        tools = [tool for tool in [*request.tools, *request.deferred_tools]
                 if request.tool_choice in ("any", "auto", tool["function"]["name"])]
        grammar = self.format.grammar(tools, request.parallel_tool_calls and bool(opening), self._literal)
        if not grammar or not tools:
            return None
        matcher, begun = self._matcher(grammar), self._encode_whole(opening or self.format.call[0])
        if not matcher.consume_tokens(begun):
            raise InvalidRequest(_grammar_error(matcher))
        for warning in matcher.get_grammar_warnings():
            log.warning("the call's arguments are not held to all of their schema: %s", warning)
        return Constraint(matcher, opener=[] if opening else begun)

    def _formatted(self, request: Request, prompt: Prompt) -> Constraint:
        schema = {"type": "object"} if request.format == "json" else request.format
        start, end = self.format.thinking or ("", "")
        begun = request.messages[-1] if request.prompt is None else {"role": "user"}
        thought = begun["role"] == "assistant" or self.tokenizer.decode(prompt.tokens[-8:]).rstrip().endswith(end)
        exits = {}
        if request.thinking is not False and not prompt.in_thinking and not thought:
            exits[self._encode_whole(start)[0]] = True
        blanks = ["\n", "\n\n"] if exits or prompt.in_thinking else []  # what models put behind their thinking
        lead = f"({' | '.join(map(json.dumps, blanks))})?" if blanks else ""
        matcher = self._matcher(f"start: {lead} value\nvalue: {json_rule(schema)}")
        reason = _grammar_error(matcher) if matcher.is_error() else "" if _ends(schema) else "no text matches it"
        if reason:
            raise InvalidRequest(f"the output format cannot be enforced: {reason}")
        for warning in matcher.get_grammar_warnings():
            if not warning.startswith("Unknown format"):  # which JSON Schema itself takes for no more than a note
                raise InvalidRequest(f"the output format cannot be enforced: {warning.partition(', falling back')[0]}")
        if begun["role"] == "assistant" and not matcher.consume_tokens(self._grammar_tokenizer.tokenize_str(begun["content"])):
            raise InvalidRequest("the assistant message to be continued does not fit the output format")
        if self.format.call and request.tools and request.tool_choice != "none":
            exits[self._encode_whole(self.format.call[0])[0]] = False
        return Constraint(matcher, None if prompt.in_thinking else 0, exits, self._encode_whole(end),
                          [token for text in blanks for token in self._encode_whole(text)])

    def budget(self, request: Request, prompt: Prompt, begins: int) -> ThinkingBudget | None:
        """What ends the thinking when the request's budget is spent; None if it has none or nothing that could be ended.
        The answer begins behind `begins` tokens."""
        if request.thinking_budget is None or request.prompt is not None or prompt.opening or not self.format.thinking:
            return None
        start, end = map(self._encode_whole, self.format.thinking)
        call = self._encode_whole(self.format.call[0]) if self.format.call else end
        return ThinkingBudget(request.thinking_budget, begins, [] if prompt.in_thinking else start, end, call)

    @functools.cached_property
    def _grammar_tokenizer(self) -> Any:
        try:
            from llguidance import LLTokenizer

            return LLTokenizer(self.tokenizer.backend_tokenizer.to_str(), eos_token=sorted(self.tokenizer.eos_token_ids))
        except ImportError:
            raise InvalidRequest('structured output needs one more package: pip install "mlx-server[constrained]"') from None
        except (AttributeError, ValueError) as error:
            raise InvalidRequest(f"this model's tokenizer does not allow structured output: {_first_line(error)}") from error

    def _matcher(self, grammar: str) -> Any:
        tokenizer = self._grammar_tokenizer
        from llguidance import LLMatcher

        # Forced text would be tokenised as a whole, and what it spells might become a special token.
        return LLMatcher(tokenizer, LLMatcher.grammar_from_lark('%llguidance {"no_forcing": true}\n' + grammar), log_level=0)

    def _literal(self, text: str) -> str:
        """A text in a grammar, where special tokens are told from text that only looks like them."""
        special = self._grammar_tokenizer.is_special_token
        names = {token.content: f"<[{id}]>" for id, token in self.tokenizer.added_tokens_decoder.items() if special(id)}
        pieces = re.split(f"({'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})", text)
        return " ".join(names.get(piece) or json.dumps(piece, ensure_ascii=False) for piece in pieces if piece) or '""'

    def spell(self, token: int) -> bytes:
        """The bytes of a token, from the table that mlx-lm's detokenizer has for most models."""
        table = getattr(self.tokenizer.detokenizer, "tokenmap", None)
        if table is None:
            return self.tokenizer.decode([token]).encode()
        written = table[token] if token < len(table) else ""  # some models have more logits than tokens
        if isinstance(written, bytes):  # SentencePiece
            return written.replace("\u2581".encode(), b" ")
        return b"".join(_byte_letters().get(letter) or letter.encode() for letter in written)

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Raises InvalidRequest for ids that no token has."""
        for token in tokens:
            if not 0 <= token < len(self.tokenizer):
                raise InvalidRequest(f"the model has no token {token}")

    def locate(self, request: Request, before: str) -> tuple[int, str] | None:
        """The index and the role of the message in which the prompt's text goes beyond `before`; None where the template
        does not tell."""
        messages, options = request.messages, self._options(request)
        tools = request.tools if request.tool_choice != "none" else []

        def ends_within(index: int) -> bool:
            return len(self.template.render(messages[: index + 1], tools, options, generation=False)) <= len(before)

        if self.template is None or not messages or request.context:
            return None
        try:
            at = bisect.bisect_left(range(len(messages) - 1), True, key=lambda index: not ends_within(index))
        except InvalidRequest:  # a conversation that ends there is none
            return None
        return at, messages[at]["role"]

    def remember(self, job: Generation) -> str:
        """Keeps the answer of a request that has decoded, under the ids of its calls or else the text the client saw;
        returns that key."""
        opening = job._prompt.opening
        tokens = job._line.tokens[job.prompt_tokens - len(self._encode_whole(opening)):]
        if tokens and tokens[-1] in self.tokenizer.eos_token_ids:
            tokens = tokens[:-1]
        visible = job._raw.rpartition(self.format.thinking[1])[2] if job._thinking else opening + job._raw
        key = _answer_key(job._parser.call_ids, job._visible, job.request.messages)
        while mark := self._noise.match(visible):
            visible = visible[mark.end():]
        self.learn({key: Answer(tokens, visible.lstrip("\n"), job._thinking)})
        return key

    def learn(self, answers: dict[str, Answer]) -> None:
        """Remembers answers, and forgets the oldest for them."""
        for key, answer in answers.items():
            _keep(self._answers, key, answer, self.REMEMBERED)

    def answer(self, key: str) -> Answer | None:
        """A remembered answer."""
        return self._answers.get(key)

    def _recall(self, messages: list[Message], lost: Iterable[str] = ()) -> tuple[list[Message], dict[str, Answer]]:
        """The conversation with a mark for the text of every remembered answer, and the answers by their marks, apart from
        `lost` ones. Their thinking is put back where the client left it out: whether it is shown is the template's decision."""
        marked, answers = list(messages), {}
        for at, message in enumerate(messages[:-1]):
            if message["role"] == "assistant":
                ids = [call.get("id", "") for call in message.get("tool_calls") or []]
                answer = self._answers.get(_answer_key(ids, message["content"], messages[:at]))
                mark = f"{_MARK}{at}{_MARK}"
                if answer is not None and mark not in lost:
                    answers[mark] = answer
                    marked[at] = {**message, "content": mark}
                    if answer.thinking and not message.get("reasoning_content"):
                        marked[at]["reasoning_content"] = answer.thinking
        return marked, answers

    def _splice(self, text: str, answers: dict[str, Answer], opener: str) -> list[int]:
        """Tokenises a text in which marks stand for answers: from a mark to the end of its turn the model's own tokens
        replace what the template made of them, and so does its thinking, unless the template has dropped that."""
        header = opener.partition((self.format.thinking or ("\0",))[0])[0]
        tokens: list[int] = []
        for mark, answer in answers.items():
            before, _, text = text.partition(mark)
            end = self._turn_end.search(text)
            text = text[end.start():] if end else ""
            turn = before.rfind(header) + len(header) if header else -1
            shown = self._noise.sub("", before[turn:]).strip()
            if turn >= 0 and (shown if answer.thinking else self.format.noise):  # the answer has its own markup around text
                before = before[:turn] + (opener[len(header):] if opener.rstrip().endswith(self.format.thinking[0]) else "")
                tokens += self.encode(before) + answer.tokens
            elif answer.thinking:
                tokens += self.encode(before + answer.visible)
            else:
                tokens += self.encode(before) + answer.tokens
        return tokens + self.encode(text)

    def _clock(self, messages: list[Message]) -> Callable[[str], str]:
        """What a template asks for the date: it stays that of the conversation's beginning, since a new date at the head of
        the prompt would have all of it prefilled again at midnight."""
        first = next((at for at, message in enumerate(messages) if message["role"] == "user"), 0)
        key = hashlib.sha256(json.dumps(messages[:first + 1]).encode()).hexdigest()
        born = self._births.get(key) or _keep(self._births, key, datetime.datetime.now(), self.REMEMBERED)
        return born.strftime

    def _options(self, request: Request) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.template.shows_dates:
            options["strftime_now"] = self._clock(request.messages)
        thinking = False if request.tool_choice not in ("auto", "none") else request.thinking
        if thinking is not None:
            options["enable_thinking"] = thinking
        if request.effort and thinking is not False and self.template.mentions("reasoning_effort"):
            known = self.template.mentions(f"'{request.effort}'") or self.template.mentions(f'"{request.effort}"')
            options["reasoning_effort"] = request.effort if known else _EFFORTS.get(request.effort, request.effort)
        return options

    def _opener(self, messages: list[Message], tools: list[dict], options: dict, text: str) -> str:
        """What the template puts behind the conversation to open the assistant's turn. It depends on little, and rendering
        a long conversation twice to see it takes long."""
        key = json.dumps([{**options, "strftime_now": 0}, bool(tools), messages[-1]["role"]]) if messages else ""
        opener = self._openers.get(key)
        if opener is None or not text.endswith(opener):
            body = self.template.render(messages, tools, options, generation=False)
            opener = text[len(body):] if text.startswith(body) else ""
            if opener:
                _keep(self._openers, key, opener, self.REMEMBERED)
        return opener

    def _turn(self, messages: list[Message], text: str, length: int) -> int:
        """Token count before what the user says last; 0 unless it is the last message."""
        if self._specials is None or not messages or messages[-1]["role"] != "user":
            return 0
        at = text.rfind(messages[-1]["content"].strip())
        cuts = [match.end() for match in self._specials.finditer(text, max(0, at - 200), max(0, at))]
        return max(0, length - len(self.encode(text[cuts[-1]:]))) if cuts and _MARK not in text[cuts[-1]:] else 0

    def _root(self, messages: list[Message], tools: list[dict], options: dict, text: str, length: int) -> int:
        """Token count of system and tools: what every conversation of this client begins with."""
        head = [m for m in messages[:1] if m["role"] == "system"]
        if not head and not tools:
            return 0
        key = json.dumps([head, tools, options], ensure_ascii=False, default=repr)
        root = self._roots.get(key)
        if root is None:
            try:
                one, two = (self.template.render([*head, {"role": "user", "content": c}], tools, options, generation=False)
                            for c in "xy")
            except InvalidRequest:
                return 0
            shared = os.path.commonprefix([one, two])
            root = _keep(self._roots, key, len(self.encode(shared)) if text.startswith(shared) else 0, 32)
        return root if root < length else 0


_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}  # for templates that do not name the finer ones


@functools.cache
def _byte_letters() -> dict[str, bytes]:
    """The letters by which byte-level vocabularies write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}


def _answer_key(call_ids: list[str], text: str, before: list[Message]) -> str:
    """What tells an answer from all others: the ids of its calls, else its text and what it answers."""
    asked = before[-1]["content"] if before else ""
    return " ".join(call_ids) if call_ids else hashlib.sha256(f"{asked}\0{text.strip()}".encode()).hexdigest()


def _any_of(texts: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _keep(memory: dict, key: str, value: Any, most: int) -> Any:
    """Puts a value into a memory that forgets the oldest of too many; returns it."""
    memory.pop(key, None)
    while len(memory) >= most:
        memory.pop(next(iter(memory)), None)  # another thread may be faster
    memory[key] = value
    return value


def _untemplated(messages: list[Message]) -> str:
    """The conversation for a model without a chat template: base models continue plain text."""
    return "\n\n".join(message["content"] for message in messages)


def _generation_defaults(path: Path) -> Sampling:
    try:
        config = json.loads((path / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return Sampling(temperature=0.0)
    if not config.get("do_sample", "temperature" in config):
        return Sampling(temperature=0.0)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return Sampling(**{"temperature": 1.0, **{n: config[n] for n in names if isinstance(config.get(n), (int, float))}})


def _unloadable(local: LocalModel, what: str, error: Exception) -> ModelLoadError:
    """What the caller is told of an exception while something was loaded; the log gets all of it."""
    if "trust_remote_code" in str(error):
        said = f"{what} wants Python code that comes with it to be run, which is never done here; take another conversion of it"
        log.warning("%s (%s)", said, local.path)
        return ModelLoadError(said)
    log.warning("cannot load %s", what, exc_info=error)
    return ModelLoadError(f"{what} cannot be loaded: {_first_line(error, str(local.path))}")


def _first_line(error: Exception, known: str = "/…") -> str:
    """An exception's first line without the machine's paths, one of which is known, fit for a client."""
    line = (str(error).splitlines() or [type(error).__name__])[0].replace(known, "…")
    return re.sub(r"(?:/[\w.+@-]+){2,}/?", "…", line)[:200]


# ------------------------------------------------------------------ output: decoded text -> events
#
#   feed(text) -> [state machine] -> thinking ------------------------------------> Thinking
#                                 -> call: CallReader, by the family's Shape -----> ToolStart, ToolInput, ToolEnd
#                                 -> visible text -> blanks at edges -> stops ----> Text
#
# Every decision waits until no further text can change it, so events do not depend on how the text was cut into pieces.
# Until a call's name and the form of its arguments are certain, a failure turns only its opening tag into text: what
# follows the tag is read again. From then on it is a call, and whatever comes is made into arguments.

Calls = list[tuple[str, Any]]
ParseCalls = Callable[[str, list[dict]], Calls]


class CutShort(ValueError):
    """A call as far as it goes, but it ends inside a value: an end tag found there belongs to the value."""


# What may stand around the JSON objects of one block: list brackets, commas, doubled braces.
_BEFORE_OBJECT = re.compile(r"[\s,{}\[\]]*(?=\{)")
_STRING_OR_STRAY_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)


def read_json(text: str) -> tuple[Any, str]:
    """The JSON value at the beginning of `text` and what follows it. Forgives raw newlines in strings and commas before
    a closing bracket. Raises CutShort inside an unfinished string, else ValueError."""
    decoder = json.JSONDecoder(strict=False)
    try:
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):
                raise CutShort(error.msg) from None
            text = _STRING_OR_STRAY_COMMA.sub(lambda match: match[1] or "", text)
            value, end = decoder.raw_decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, text[end:]


def parse_json_calls(text: str, tools: list[dict]) -> Calls:
    """`{"name": N, "arguments": {…}}` in any order of keys, once or several times; text after the objects is ignored."""
    calls: Calls = []
    while gap := _BEFORE_OBJECT.match(text):
        try:
            value, text = read_json(text[gap.end():])
        except ValueError:
            if calls:
                break
            raise
        if "name" not in value:
            break
        calls.append((value["name"], value.get("arguments", value.get("parameters"))))
    if not calls:
        raise ValueError("no JSON object with a name")
    return calls


def _wrap(parse: Callable[[str, list[dict]], Any]) -> ParseCalls:
    """An mlx-lm parser in our form. The ids some of them return are not unique and are left behind."""

    def parse_calls(text: str, tools: list[dict]) -> Calls:
        calls = parse(text, tools)
        return [(call["name"], call["arguments"]) for call in (calls if isinstance(calls, list) else [calls])]

    return parse_calls


@dataclass(frozen=True)
class Shape:
    """How a family writes one call: `head`, the arguments, and what `over` skips behind them.

    `head` matches up to the arguments and captures the tool's name. `key` matches what precedes an argument's value and
    captures its name and, where the markup has it, its type. Without `close` the arguments are an object in JSON or much
    like it, its strings in one of `quotes`, and `outer` tells that it stands in an object of its own. With `close`
    (KEY for the argument's name) values are plain text that ends there; with `newlines` one newline behind and one before
    the value belong to its tags. `after` is what follows a value: the object's end and its next argument, or the next
    argument's tag and the tags that end the call. `begins` is how another call may begin where no end tag would tell, and
    `opening` what follows the call tag, both with NAME for the tool's name. `written` is how the rest is written where that
    is to be enforced: for arguments that are no JSON object, what precedes and what follows each value and what stands
    between two arguments; then the call's end. `kind` spells a value's JSON type where the markup has it (KIND).
    """

    head: re.Pattern
    key: re.Pattern
    over: re.Pattern
    after: tuple[str, ...]
    begins: tuple[str, ...] = ()
    opening: str = ""
    written: tuple[str, ...] = ()
    kind: Callable[[str], str] | None = None
    quotes: tuple[str, ...] = ('"',)
    outer: bool = False
    close: str = ""
    newlines: bool = False

    def opens(self, name: str) -> str:
        """What follows the call tag in a call of a tool."""
        return self.opening.replace("NAME", json.dumps(name, ensure_ascii=False)[1:-1] if self.outer else name)


# A call counts only when its first argument has begun: more than a name is needed to be sure. No name holds a "<", so that
# none reaches over an end tag.
_JSON_KEY = r'"((?:[^"\\<]|\\.){0,200})"\s*:\s*'
_JSON_START = rf"\{{(?=\s*(?:\}}|{_JSON_KEY}))"


def _shape(head: str, over: str, after: tuple[str, ...] = ("}", ',"', ",}"), key: str = _JSON_KEY + r"(?=\S)",
           **more: Any) -> Shape:
    return Shape(re.compile(head, re.DOTALL), re.compile(key, re.DOTALL), re.compile(over), after, **more)


def _pairs(prefix: str = "") -> Shape:
    """`N<arg_key>K</arg_key><arg_value>V</arg_value>…` (GLM)."""
    key, value = f"{prefix}arg_key", f"{prefix}arg_value"
    return _shape(rf"\s*([^<>\n{{]+?)\s*(?=<{key}>|</{prefix}tool_call>)", r"\s*", (f"<{key}>",),
                  rf"\s*<{key}>([^<]*)</{key}>\s*<{value}>", close=f"</{value}>", opening="NAME\n",
                  written=(f"<{key}>KEY</{key}>\n<{value}>", f"</{value}>\n", "", ""))


def _invokes(prefix: str = "", kind: Callable[[str], str] | None = None) -> Shape:
    """`<invoke name="N"><parameter name="K">V</parameter></invoke>` (MiniMax, DeepSeek, Muse), with a prefix in each tag."""
    name = r"""\bname=["']?([^"'<>\n]+)["']?"""
    mark = ' string="KIND"' if kind else ""
    return _shape(rf"\s*<{prefix}invoke [^<>]*?{name}[^<>]*>(?=\s*<(?:{prefix}parameter|/{prefix}invoke))",
                  rf"\s*(?:</{prefix}invoke>)?\s*", (f"<{prefix}parameter ", f"</{prefix}invoke>", f"<{prefix}invoke "),
                  rf"""\s*<{prefix}parameter [^<>]*?{name}(?: string="(\w+)")?[^<>]*>""", close=f"</{prefix}parameter>",
                  opening=f'\n<{prefix}invoke name="NAME">\n', kind=kind,
                  written=(f'<{prefix}parameter name="KEY"{mark}>', f"</{prefix}parameter>\n", "", f"</{prefix}invoke>\n"))


_NAME_AND_JSON = _shape(
    r'\s*(?:```(?:json)?)?[\s,;{}\[\]]*\{\s*(?:"(?:type|id|index)"\s*:\s*(?:"[^"\\<]*"|\d+)\s*,\s*){0,3}'
    r'(?:"function"\s*:\s*\{\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*(?:"id"\s*:\s*"[^"\\<]*"\s*,\s*)?'
    r'"(?:arguments|parameters)"\s*:\s*' + _JSON_START,
    r"[\s,;}\]`]*", outer=True, begins=("{",), opening='\n{"name": "NAME", "arguments": ', written=("}\n",))
_FUNCTIONS = _shape(
    r"\s*<function=([^<>\n]+)>(?=\s*<(?:parameter=|/function>|function=|/(?:seed:)?tool_call>))", r"\s*(?:</function>)?\s*",
    ("<parameter=", "</function>", "<function="), r"\s*<parameter=([^<>\n]+)>(?:\n|(?=[^\n]))", close="</parameter>",
    newlines=True, begins=("<function=",), opening="\n<function=NAME>\n",
    written=("<parameter=KEY>\n", "\n</parameter>\n", "", "</function>\n"))
_LISTED = dataclasses.replace(_NAME_AND_JSON, opening='[{"name": "NAME", "arguments": ', written=("}]",))
_MISTRAL = _shape(r"[\s,;]*(?:\[TOOL_CALLS\]\s*)?([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\]\s*)?" + _JSON_START,
                  r"[\s,;\]]*", begins=("NAME[", "NAME{", "[TOOL_CALLS]"), opening="NAME[ARGS]", written=("",))
_PYTHON = _shape(r"[\s,\[]*([\w.-]+)\((?=\s*(?:\)|\w+\s*=))", r"[\s,\]]*", (")", ","), r"(\w+)\s*=\s*(?=\S)",
                 quotes=('"', "'"), begins=("NAME(", "["), opening="[NAME(", written=("KEY=", "", ", ", ")]"))
_KIMI_K2 = _shape(r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?([^:<\s]+)(?::\d*)?\s*<\|tool_call_argument_begin\|>\s*"
                  + _JSON_START, r"\s*(?:<\|tool_call_end\|>)?\s*", written=("<|tool_call_end|>",),
                  opening="<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>")
_KIMI_K3_HEAD = r'\s*<\|open\|>call [^<]*?\btool="([^"<]+)"[^<]*<\|sep\|>\s*'
_KIMI_K3_OVER = r"(?:\s*<\|close\|>(?:json|call)<\|sep\|>)*\s*"
_KIMI_K3 = (
    _shape(_KIMI_K3_HEAD + r"(?=<\|(?:open\|>argument|close\|>call))", _KIMI_K3_OVER,
           ("<|open|>argument ", "<|close|>call<|sep|>"),
           r'\s*<\|open\|>argument [^<]*?\bkey="([^"<]*)"(?:[^<]*?\btype="(\w+)")?[^<]*<\|sep\|>',
           close="<|close|>argument<|sep|>", opening='<|open|>call tool="NAME" index="1"<|sep|>',
           kind=lambda kind: "number" if kind == "integer" else kind,
           written=('<|open|>argument key="KEY" type="KIND"<|sep|>', "<|close|>argument<|sep|>", "", "<|close|>call<|sep|>")),
    _shape(_KIMI_K3_HEAD + r"<\|open\|>json[^<]*<\|sep\|>\s*" + _JSON_START, _KIMI_K3_OVER))
_DEEPSEEK = _shape(  # V3 and R1 name a type first and fence the JSON, V3.1 does not
    r"\s*<｜tool▁call▁begin｜>\s*(?:function<｜tool▁sep｜>)?\s*([^\s<`]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*"
    + _JSON_START, r"(?:[\s`]*<｜tool▁call▁end｜>)?\s*", opening="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
    written=("<｜tool▁call▁end｜>",))
_DEEPSEEK_FENCED = dataclasses.replace(
    _DEEPSEEK, opening="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n", written=("\n```<｜tool▁call▁end｜>",))
_HARMONY = _shape(r"(?:[^{]{0,40}?to=)?(?:functions\.)?([\w.-]+)[^{]*?<\|message\|>\s*" + _JSON_START, r"\s*",
                  opening="functions.NAME <|constrain|>json<|message|>", written=("",))
_NS = "]<]minimax[>["
_MINIMAX_M3 = _shape(
    rf"""\s*{re.escape(_NS)}<invoke name=["']?([^"'<>\n]+)["']?>(?=\s*{re.escape(_NS)}<)""",
    rf"\s*(?:{re.escape(_NS)}</invoke>)?\s*", (_NS + "<", _NS + "</invoke>", _NS + "<invoke "),
    rf"\s*{re.escape(_NS)}<(?!invoke|/)([^<>\s]+)>", close=_NS + "</KEY>", opening=f'\n{_NS}<invoke name="NAME">\n',
    written=(_NS + "<KEY>", _NS + "</KEY>\n", "", _NS + "</invoke>\n"))


_BARE_KEY = r"([^\s{}\[\]:,<](?:[^{}\[\]:,<]*[^\s{}\[\]:,<])?)\s*:"


def _gemma(quote: str) -> Shape:
    """`call:N{k:<|"|>v<|"|>,n:1}`."""
    return _shape(rf"[\s,]*call:([\w.-]+)\s*\{{(?=\s*(?:\}}|{_BARE_KEY}))", r"[\s,}]*", ("}", ","),
                  rf"{_BARE_KEY}\s*(?=[^\s<]|{re.escape(quote)})", quotes=(quote,), begins=("call:",), opening="call:NAME{",
                  written=("KEY:", "", ",", "}"))


@dataclass
class OutputFormat:
    """How one model writes its thinking and its tool calls; built once per model.

    Calls stand between the `call` tags in one of `shapes` or else in a text that `parse` turns into names and arguments
    (it raises ValueError when it is no call); `untagged` models leave the tags out. `openers` begin a call, too, at the
    beginning of a line. `noise` is markup around visible text, `final` are the tags after which nothing follows.
    """

    thinking: tuple[str, str] | None = None
    call: tuple[str, str] | None = None  # an empty end tag: the call lasts as long as its text makes sense
    parse: ParseCalls | None = None
    shapes: tuple[Shape, ...] = ()
    openers: tuple[str, ...] = ()
    untagged: bool = False
    noise: tuple[str, ...] = ()
    final: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> OutputFormat:
        """The format of an mlx-lm TokenizerWrapper. What mlx-lm found in the chat template decides; where it finds
        nothing or the wrong thing, the tags that the template or else the vocabulary knows."""
        template = getattr(tokenizer, "chat_template", None)
        template = template if isinstance(template, str) else ""
        vocabulary = " ".join(token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
        thinking = (tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else next(
            (tags for tags in (("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]")) if tags[0] in template), None)
        if tokenizer.has_tool_calling and _NS not in template:
            parser = tokenizer.tool_parser
            family = parser.__module__.rpartition(".")[2]
            family += ", listed" if family == "mistral" and "[ARGS]" not in template else ""
            format = _FAMILIES.get(family) or cls(parse=_wrap(parser))
            return dataclasses.replace(format, thinking=thinking, call=(tokenizer.tool_call_start, tokenizer.tool_call_end),
                                       noise=tuple(getattr(tokenizer, "_structural_markers", ())))
        format = next((format for known in (template, vocabulary) for mark, format in _MARKED.items() if mark in known), cls())
        if _DEEPSEEK in format.shapes and "```json" in template:
            format = dataclasses.replace(format, shapes=(_DEEPSEEK_FENCED,))
        return format if format.thinking else dataclasses.replace(format, thinking=thinking)

    def opening(self, choice: str) -> str:
        """What begins the answer when a call is demanded: `choice` is "any" or a tool's name; "" for "auto" and "none",
        or when this format has no call tag."""
        if choice in ("auto", "none") or self.call is None:
            return ""
        return self.call[0] + (self.shapes[0].opens(choice) if choice != "any" and self.shapes else "")

    def grammar(self, tools: Sequence[dict], parallel: bool, literal: Callable[[str], str]) -> str:
        """The grammar (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md) of an answer that is one call to one
        of `tools`, or several calls if `parallel`; "" when it is not known how this format writes its calls. `literal` makes
        an expression of a text. Raises InvalidRequest for a tool that nothing can be passed to."""
        if self.call is None or not self.shapes or not self.shapes[0].written:
            return ""
        shape = self.shapes[0]
        newline, calls, rules = literal("\n"), [], []
        for number, tool in enumerate(tools):
            schema = tool["function"].get("parameters") or _EMPTY_SCHEMA
            if not _ends(schema):
                raise InvalidRequest(f"no arguments match the schema of {tool['function']['name']}")
            rules += _Arguments(shape, schema, f"a{number}", literal).rules if len(shape.written) > 1 else [
                f"a{number}: {json_rule(schema)}"]
            calls.append(f"{literal(shape.opens(tool['function']['name']))} a{number} {literal(shape.written[-1])}")
        return "\n".join([f"start: call ({newline} call)*" if parallel else "start: call",
                          f"call: {literal(self.call[0])} ({' | '.join(calls)}) {literal(self.call[1])}", *rules])


HERMES = OutputFormat(None, ("<tool_call>", "</tool_call>"), parse_json_calls, (_NAME_AND_JSON,))
"""`<tool_call>{"name": N, "arguments": {…}}</tool_call>`: the form for models that have none of their own."""


def _dsml(tag: str, gap: str = "") -> OutputFormat:
    """DeepSeek from V3.2 on; its markup tells strings from JSON."""
    mark = f"｜DSML｜{gap}"
    return OutputFormat(call=(f"<{mark}{tag}>", f"</{mark}{tag}>"),
                        shapes=(_invokes(mark, lambda kind: "true" if kind == "string" else "false"),))


_FAMILIES = {  # by the name of mlx-lm's parser; some models fall back to JSON
    "json_tools": HERMES,
    "qwen3_coder": OutputFormat(parse=parse_json_calls, shapes=(_FUNCTIONS, _NAME_AND_JSON), openers=("<function=",)),
    "glm47": OutputFormat(parse=parse_json_calls, shapes=(_pairs(), _NAME_AND_JSON)),
    "laguna": OutputFormat(parse=parse_json_calls, shapes=(_pairs(), _NAME_AND_JSON)),
    "longcat": OutputFormat(parse=parse_json_calls, shapes=(_pairs("longcat_"), _NAME_AND_JSON)),
    "minimax_m2": OutputFormat(shapes=(_invokes(),)),
    "muse_spark": OutputFormat(shapes=(_invokes("atem:"),)),
    "mistral": OutputFormat(parse=parse_json_calls, shapes=(_MISTRAL, _NAME_AND_JSON)),
    "mistral, listed": OutputFormat(parse=parse_json_calls, shapes=(_LISTED, _MISTRAL)),
    "gemma4": OutputFormat(shapes=(_gemma('<|"|>'),)),
    "function_gemma": OutputFormat(shapes=(_gemma("<escape>"),)),
    "kimi_k2": OutputFormat(shapes=(_KIMI_K2,)),
    "kimi_k3": OutputFormat(shapes=_KIMI_K3),
    "pythonic": OutputFormat(shapes=(_PYTHON,)),
}
_MARKED = {  # by a tag, the surest first
    _NS: OutputFormat(call=(_NS + "<tool_call>", _NS + "</tool_call>"), shapes=(_MINIMAX_M3,)),
    # https://cookbook.openai.com/articles/openai-harmony
    "<|channel|>": OutputFormat(
        ("<|channel|>analysis<|message|>", "<|end|>"), ("<|channel|>commentary to=", ""), shapes=(_HARMONY,),
        openers=(" to=functions.", "<|channel|>analysis to="),
        noise=("<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|start|>assistant", "<|end|>"),
        final=("<|call|>", "<|return|>")),
    "<｜DSML｜ calls>": _dsml("calls", " "),
    "<｜DSML｜tool_calls>": _dsml("tool_calls"),
    "｜DSML｜": _dsml("function_calls"),
    "<｜tool▁calls▁begin｜>": OutputFormat(call=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), shapes=(_DEEPSEEK,)),
    "<seed:tool_call>": OutputFormat(
        call=("<seed:tool_call>", "</seed:tool_call>"), shapes=(_FUNCTIONS,), openers=("<function=",)),
    "<TOOLCALL>": dataclasses.replace(HERMES, call=("<TOOLCALL>", "</TOOLCALL>")),
    "<tool_call>": HERMES,
    "functools[": dataclasses.replace(HERMES, call=("functools", "")),
    "<|/tool_call|>": dataclasses.replace(HERMES, call=("<|tool_call|>", "<|/tool_call|>"), openers=("functools[",)),
    "<|tool_call|>": dataclasses.replace(HERMES, call=("<|tool_call|>", "")),
    "<|python_start|>": OutputFormat(
        call=("<|python_start|>", "<|python_end|>"), shapes=(_PYTHON, _NAME_AND_JSON), untagged=True),
    "<|python_tag|>": dataclasses.replace(HERMES, call=("<|python_tag|>", ""), untagged=True),
}


# One blank, or a new line with its indentation: a model cannot go on writing nothing but blanks.
_JSON_OPTIONS = {"whitespace_pattern": r" |\n {0,16}", "lenient": True}


def json_rule(schema: dict) -> str:
    """The grammar of JSON text that matches a schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


class _Arguments:
    """The grammar of a tool's arguments that are no JSON object, as `rules` of which the first has the name `prefix`.

    Arguments come in the order of the schema's properties. Between tags, strings are free up to their end tag and all else is
    JSON; where strings have quotes that are not JSON's, objects and arrays are written with these. Of what a schema says of
    strings their lengths, patterns and lists are kept. `literal` makes an expression of a text.
    """

    def __init__(self, shape: Shape, schema: dict, prefix: str, literal: Callable[[str], str]):
        self._shape, self._root, self._prefix, self._literal = shape, schema, prefix, literal
        self._before, self._behind, self._between, _ = shape.written
        self._definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        self._names: dict[str, str] = {}  # a schema in JSON -> the rule of its values
        self.rules = [""]
        self.rules[0] = f"{prefix}: {' | '.join(map(self._members, _flat(schema, schema)))}"

    def _add(self, expression: str, terminal: bool = False, option: str = "") -> str:
        name = f"{self._prefix}_{len(self.rules)}"
        name = name.upper() if terminal else name
        self.rules.append(f"{name}{option}: {expression}")
        return name

    def _members(self, schema: dict) -> str:
        """An object's members, without its braces."""
        required, others = schema.get("required", []), schema.get("additionalProperties", {})
        properties = {**{key: others for key in required if isinstance(key, str)}, **schema.get("properties", {})}
        if not properties and others is not False and not self._shape.close:
            pair = self._add(f'/[\\w.-]+/ ":" {self._value(others)}')
            return f"({pair} ({self._literal(self._between)} {pair})*)?"
        first = rest = '""'  # what may come behind nothing, and behind another member
        for key, value in reversed(properties.items()):
            member = self._add(self._member(key, value))
            follows, optional = f"{self._literal(self._between)} {member}", key not in required
            first = self._add(f"{member} {rest}" + (f" | {first}" if optional else ""))
            rest = self._add(f"({follows})? {rest}" if optional else f"{follows} {rest}")
        return first

    def _member(self, key: str, schema: Any) -> str:
        before, behind = self._before.replace("KEY", key), self._literal(self._behind.replace("KEY", key))
        if not self._shape.close:
            return f"{self._literal(before)} {self._value(schema)} {behind}"
        texts, others = [], []
        for part in _flat(schema, self._root):
            for kind in sorted(_kinds(part)) or ["string"]:
                head = self._literal(before.replace("KIND", self._shape.kind(kind) if self._shape.kind else ""))
                value = self._text(part, behind) if kind == "string" else f"{self._json(part, kind)} {behind}"
                (texts if kind == "string" else others).append(f"{head} {value}")
        return " | ".join(texts + others if self._shape.kind else texts or others)

    def _value(self, schema: Any) -> str:
        """The name of the rule of a value that does not stand between tags."""
        if self._shape.quotes[0] == '"':
            return self._add(json_rule({**self._definitions, **schema} if isinstance(schema, dict) else {}))
        known = json.dumps(schema)
        if known not in self._names:
            self._names[known] = self._add("")  # it may hold itself
            at = len(self.rules) - 1
            self.rules[at] += " | ".join(self._quoted(part, kind) for part in _flat(schema, self._root)
                                         for kind in sorted(_kinds(part) or _EVERY_KIND))
        return self._names[known]

    def _quoted(self, part: dict, kind: str) -> str:
        """One kind of value in an object like `{k:<|"|>v<|"|>,n:[1]}`."""
        quote, listed = self._shape.quotes[0], _listed(part)
        if kind in ("string", "array", "object") and listed is not None:
            return " | ".join(self._literal(self._spelled(value)) for value in listed if _KINDS[type(value)] & {kind})
        if kind == "string":
            return f"{self._literal(quote)} {self._text(part, self._literal(quote))}"
        if kind == "object":
            return f'"{{" ({self._members(part)}) "}}"'
        if kind == "array":
            return f'"[" {self._items(part)} "]"'
        return self._json(part, kind)

    def _items(self, part: dict) -> str:
        """An array's items, without its brackets; those that have places of their own are never left out."""
        least, most, others = part.get("minItems", 0), part.get("maxItems"), part.get("items", {})
        placed = [self._value(item) for item in part.get("prefixItems", ())]
        if placed and others is False:
            most = len(placed)
        if most == 0:
            return '""'
        item = "" if most == len(placed) else self._value(others)
        first = placed or [item]
        items = ' "," '.join(first)
        if most != len(first):
            items += f' ("," {item}){{{max(least - len(first), 0)},{"" if most is None else most - len(first)}}}'
        return items if placed or least else f"({items})?"

    def _spelled(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._shape.quotes[0]}{value}{self._shape.quotes[0]}"
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{self._spelled(item)}" for key, item in value.items()) + "}"
        return f"[{','.join(map(self._spelled, value))}]" if isinstance(value, list) else json.dumps(value)

    def _json(self, part: dict, kind: str) -> str:
        return self._add(json_rule({**self._definitions, **part, "type": kind}))

    def _text(self, part: dict, behind: str) -> str:
        """A string and what is written `behind` it, an expression of texts and special tokens."""
        if (listed := _listed(part)) is not None:
            return f"({' | '.join(self._literal(one) for one in listed if isinstance(one, str))}) {behind}"
        text = [f"/(?s:.{{{part.get('minLength', 0)},{part.get('maxLength', '')}}})/"]
        if "pattern" in part:
            text.append(_anywhere(part["pattern"]))
        name = self._add(" & ".join(text), terminal=True)
        lead = re.match(r'"(?:[^"\\]|\\.)*"', behind)
        if lead is None:
            return f"{name} {behind}"
        if lead[0] == behind:
            return self._add(name, option=f"[suffix={behind}]")
        # The text may hold what precedes the special token, so that only both together end it.
        return f"{self._add(f'{name} {lead[0]}', terminal=True)} {behind[lead.end():]}"


def _anywhere(pattern: str) -> str:
    """The expression of a text in which a schema's pattern is found."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inner = pattern[begins:len(pattern) - ends].replace("/", r"\/").replace("\n", r"\n").replace(r"\d", "[0-9]")
    return f"/{'' if begins else '(?s:.*)'}(?:{inner}){'' if ends else '(?s:.*)'}/"


_KINDS = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"},
          dict: {"object"}, type(None): {"null"}}
_EVERY_KIND = set().union(*_KINDS.values()) - {"integer"}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


# What a keyword must be to count at all.
_FORMS = {"$ref": str, "allOf": list, "anyOf": list, "oneOf": list, "enum": list, "type": (str, list), "properties": dict,
          "required": list, "prefixItems": list, "minItems": int, "maxItems": int, "minLength": int, "maxLength": int,
          "pattern": str}


def _flat(schema: Any, root: Any, path: tuple[str, ...] = ()) -> list[dict]:
    """The alternatives of a schema, at most 64, without references into `root` and combinations on their highest level; none
    if it refers to nothing but itself."""
    if not isinstance(schema, dict) or len(path) > 64:
        return [] if schema is False else [{}]
    schema = {key: value for key, value in schema.items() if isinstance(value, _FORMS.get(key, object))}
    parts = [{key: value for key, value in schema.items() if key not in ("$ref", "allOf", "anyOf", "oneOf")}]
    groups = [[one] for one in schema.get("allOf", ())] + [schema[key] for key in ("anyOf", "oneOf") if schema.get(key)]
    if reference := schema.get("$ref", ""):
        if reference in path:
            return []
        groups.append([_pointed(root, reference)])
    for group in groups:
        choices = (one for choice in group for one in _flat(choice, root, (*path, reference)))
        pairs = itertools.product(parts, itertools.islice(choices, 64))
        parts = [_merged(one, other) for one, other in itertools.islice(pairs, 64)]
    return parts


def _pointed(root: Any, reference: str) -> Any:
    """What a reference within a schema points to (RFC 6901); {} when that is nowhere."""
    for step in reference.lstrip("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        root = root.get(step, {}) if isinstance(root, dict) else {}
    return root


def _merged(one: dict, other: dict) -> dict:
    return {**one, **other, "properties": {**one.get("properties", {}), **other.get("properties", {})},
            "required": [*one.get("required", ()), *other.get("required", ())]}


def _listed(part: dict) -> list | None:
    """The only values that a schema allows, if it lists them."""
    return [part["const"]] if "const" in part else part.get("enum")


def _kinds(part: dict) -> set[str]:
    """The JSON types that a schema without combinations allows; empty when it does not say."""
    named = part.get("type", [])
    kinds = {named} if isinstance(named, str) else {name for name in named if isinstance(name, str)}
    listed = _listed(part)
    if listed is None:
        return kinds
    possible = {kind for value in listed for kind in _KINDS[type(value)]}
    return kinds & possible or possible


def _types(schema: Any, root: Any) -> set[str]:
    """The JSON types that a property's schema allows; empty when it does not say."""
    parts = _flat(schema, root)
    if len(parts) == 1:
        return _kinds(parts[0])
    return {kind for part in parts for kind in _kinds(part) or {"string"}}  # an untyped alternative may well be a string


def _ends(schema: Any) -> bool:
    """Whether a value that matches can come to an end: no part of it needs another of its own kind, without end."""
    needs: dict[int, list[list[Any]]] = {}  # schema -> what each of its alternatives holds at least
    waiting, root = [schema], schema
    while waiting:
        one = waiting.pop()
        if id(one) in needs:
            continue
        needs[id(one)] = parts = []
        for part in _flat(one, root):
            kinds, needed = _kinds(part) if _listed(part) is None else set(), []
            if kinds == {"object"}:
                properties = part.get("properties", {})
                needed = [properties[key] for key in properties if key in part.get("required", ())]
            elif kinds == {"array"}:
                first, least = part.get("prefixItems", []), part.get("minItems", 0)
                needed = first[:least] + [part.get("items", {})] * (least > len(first))
            parts.append(needed)
            waiting += needed
    ended: set[int] = set()
    while new := {one for one, parts in needs.items() if one not in ended and any(
            all(id(need) in ended for need in needed) for needed in parts)}:
        ended |= new
    return id(schema) in ended


def coerce(value: Any, types: set[str]) -> Any:
    """`value`, or what it spells when it is text and may be of one of `types`, but no string."""
    if not isinstance(value, str) or not types or "string" in types:
        return value
    try:
        spelled = _PYTHON_WORDS[value] if value in _PYTHON_WORDS else json.loads(value, strict=False)
    except (ValueError, RecursionError):
        return value
    if isinstance(spelled, float):
        if not math.isfinite(spelled):
            return value
        if "number" not in types and spelled.is_integer():
            spelled = int(spelled)
    return spelled if _KINDS[type(spelled)] & types else value


def _declared(tools: Iterable[dict]) -> dict[str, collections.defaultdict[str, set[str]]]:
    """Tool name -> property name -> the types it allows. What is not shaped like a schema counts as not said."""
    declared = {}
    for tool in tools:
        schema = tool["function"].get("parameters")
        parts = _flat(schema, schema)
        others = set().union(*(_types(part.get("additionalProperties"), schema) for part in parts))
        types = declared[tool["function"]["name"]] = collections.defaultdict(lambda others=others: others)
        for key, value in ((key, value) for part in parts for key, value in part.get("properties", {}).items()):
            types[key] = types.get(key, set()) | _types(value, schema)
    return declared


def _tool_id() -> str:
    return "toolu_" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(24))


def _held(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    return max((n for mark in marks for n in range(1, min(len(mark) - 1, len(text)) + 1)
                if text.endswith(mark[:n])), default=0)


_ESCAPE = r'\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.'
_HALF_ESCAPE = r'\\(?:u[0-9a-fA-F]{0,3}|u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?)?\Z'
_BRACKETS = {"{": "}", "[": "]", "(": ")"}


def _unescape(text: str) -> str:
    """What stands in a quoted string; a backslash that begins no escape is one."""

    def spelled(escape: re.Match) -> str:
        try:
            return json.loads(f'"{escape[0]}"')
        except ValueError:
            return "'" if escape[0] == "\\'" else escape[0]

    return re.sub(_ESCAPE, spelled, text, flags=re.DOTALL)


def _spell(text: str, missing: str, quote: str) -> Any:
    """The value that `text` spells, if need be with the closing brackets it is `missing`; else `text` itself."""
    for source in (text.strip(), text.strip() + missing):
        if quote != '"':  # then keys stand without any
            token = re.compile(rf"{re.escape(quote)}(.*?){re.escape(quote)}|(?<=[{{,])\s*{_BARE_KEY}", re.DOTALL)
            source = token.sub(lambda found: json.dumps(found[2] or found[1]) + ":" * bool(found[2]), source)
        for read in (lambda: read_json(source), lambda: (ast.literal_eval(source), "")):
            try:
                value, rest = read()
                if not rest.strip():
                    return value
            except Exception:  # literal_eval fails with almost any type of exception
                pass
    return text


def _comes_next(text: str, marks: Iterable[str], last: bool) -> bool | None:
    """Whether, blanks aside, one of `marks` or the end comes next; None while that is open."""
    text = "".join(text.lstrip()[:100].split())
    marks = ["".join(mark.split()) for mark in marks if mark]
    if any(text.startswith(mark) for mark in marks):
        return True
    return (last or None) if not text or any(mark.startswith(text) for mark in marks) else False


@functools.lru_cache(256)
def _stretch(marks: tuple[str, ...], escapes: bool) -> re.Pattern:
    """Matches text up to a mark, half an escape or its end."""
    ends = "|".join([re.escape(mark) for mark in marks] + [_HALF_ESCAPE] * escapes + [r"\Z"])
    return re.compile(rf"((?:[^\\]|{_ESCAPE})*?)({ends})" if escapes else f"(.*?)({ends})", re.DOTALL)


class CallReader:
    """Reads the text behind a call tag, in pieces of any size, into the events of one or several calls.

    Arguments leave as soon as they are certain: text of a string as it comes, other values, and strings that the tool's
    schema may turn into something else, when they are complete. Together they are exactly one JSON object. A call that is
    cut off (by `max_tokens`, say) or malformed in the middle ends there: its object holds all that has arrived, the last
    value as far as it goes, and `cut` is set. A value that is no JSON becomes the string of its text.

    `text` is what was not understood yet; when the calls are over it is what follows them.
    """

    LIMIT = 1000  # characters within which an argument must have begun

    def __init__(self, format: OutputFormat, call: tuple[str, str], tools: Sequence[dict], parallel: bool = True):
        self.text, self.cut, self.calls = "", False, 0
        self._format, self._parallel = format, parallel
        self._start, self._end = call
        self._tools = _declared(tools)
        self._names = {name.lower(): name for name in self._tools} | {name: name for name in self._tools}
        self._begins = {begin.replace("NAME", name)
                        for shape in format.shapes for begin in shape.begins for name in self._tools}
        self._last = False
        self._events: list[Event] = []
        self._written: list[str] = []  # of the open call's arguments
        self._steps = self._read_block()

    def read(self, text: str, last: bool) -> tuple[list[Event], bool]:
        """Takes the next piece of text; returns what has become certain and whether the calls are over. Raises ValueError,
        with everything in `text`, when it is no call."""
        self.text, self._last, self._events = self.text + text, last, []
        over = next(self._steps, True)
        return self._events, over or last

    # -- the grammar: each generator reads one part of it and yields when it needs more text

    def _read_block(self) -> Iterator[bool]:
        """Calls up to the end tag or, where there is none, to what can be no call."""
        shape, searched = None, 0
        while True:
            if shape:
                self.text = self.text[shape.over.match(self.text).end():]
                if not self._end and not self._may_begin():
                    return
            if head := self._take_head():
                shape, searched = head[0], 0
                yield from self._read_call(*head)
                if not self._parallel or self.cut and not (self._end and self.text.startswith(self._end)):
                    return
                continue
            end = self.text.find(self._end, searched) if self._end else -1
            if end >= 0 or self._last:
                if self._read_rest(end, searched):
                    return
                searched = end + len(self._end)
            else:
                searched = max(searched, len(self.text) - len(self._end) + 1)
                yield False

    def _take_head(self) -> tuple[Shape, str] | None:
        """The beginning of a call to a declared tool; the end tag of the call before it may be missing."""
        text = self.text.removeprefix(self._start) if self.calls and self._end else self.text
        for shape in self._format.shapes:
            head = shape.head.match(text)
            name = head[1].strip() if head else ""
            if name := self._names.get(name) or self._names.get(name.lower()):
                self.text = text[head.end():]
                return shape, name
        return None

    def _may_begin(self) -> bool:
        """Whether what follows a call can be the beginning of another."""
        return not self.text or any(begin.startswith(self.text) or self.text.startswith(begin) for begin in self._begins)

    def _read_rest(self, end: int, searched: int) -> bool:
        """The block is over, at an end tag or (`end` below 0) with the turn: what is left may be calls in a form that is not
        read bit by bit. False when that tag is part of a value."""
        text, behind = (self.text[:end], end + len(self._end)) if end >= 0 else (self.text, len(self.text))
        try:
            if searched and re.search(re.escape(self._end) + r"\s*" + re.escape(self._start), text):
                raise ValueError("the end tag that was skipped did end a call: the next one begins behind it")
            if end < 0 and self._end and self._format.parse is not parse_json_calls:
                raise ValueError("cut off")
            self._emit(text)
        except ValueError as error:
            if not self.calls and end >= 0 and isinstance(error, CutShort):
                return False
            if not self.calls:
                raise
            if "{" in text or "<" in text or end < 0 and not _comes_next(text, [self._end], last=True):
                return True
        self.text = self.text[behind:]
        return True

    def _emit(self, text: str) -> None:
        """Emit the calls in `text`. Raises ValueError, having emitted nothing, unless all of them are right."""
        calls = []
        try:
            for name, arguments in self._format.parse(text, self._described()):
                if isinstance(arguments, str) and arguments.strip():
                    arguments = read_json(arguments.strip())[0]
                arguments = dict((arguments or {}).items())
                json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair cannot be sent
                calls.append((self._names[name if name in self._names else name.lower()], arguments))
        except CutShort:
            raise
        except Exception as error:  # mlx-lm's parsers fail with almost any type of exception
            raise ValueError("not a call") from error
        if not calls:
            raise ValueError("no call")
        for name, arguments in calls if self._parallel else calls[:1]:
            self._open(name)
            for key, value in arguments.items():
                self._write_key(key)
                self._write_value(coerce(value, self._tools[name][key]), value)
            self._close()

    def _described(self) -> list[dict]:
        return [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {
            key: {"type": kind} for key, kinds in types.items() for kind in kinds if len(kinds) == 1}}}}
                for name, types in self._tools.items()]

    def _read_call(self, shape: Shape, name: str) -> Iterator[bool]:
        """One call from its arguments to the end of the object they stand in, if that ends."""
        self._open(name)
        complete = yield from (self._read_tags if shape.close else self._read_object)(shape, self._tools[name])
        self._close()
        self.cut = self.cut or not complete
        if complete and shape.outer:
            end, missing = yield from self._scan(shape, ["}"])
            self.text = self.text if missing else self.text[end:]

    def _read_object(self, shape: Shape, types: collections.defaultdict[str, set[str]]) -> Iterator[bool]:
        """The arguments up to the closing brace; returns whether that came."""
        brace = shape.after[0]
        while True:
            self.text = self.text.lstrip(" \t\r\n,")
            if self.text.startswith(brace):
                self.text = self.text[len(brace):]
                return True
            argument = shape.key.match(self.text)
            if argument is None:
                if self._gives_up(('"',)):
                    return False
                yield False
                continue
            key, self.text = _unescape(argument[1]), self.text[argument.end():]
            self._write_key(key)
            if quote := next((quote for quote in shape.quotes if self.text.startswith(quote)), ""):
                self.text = self.text[len(quote):]
                yield from self._read_text((quote,), shape.after, types[key], escapes=len(quote) == 1)
            else:
                end, missing = yield from self._scan(shape, [])
                text, self.text = self.text[:end].strip(), self.text[end:]
                self._write_value(_spell(text, missing, shape.quotes[0]), text)

    def _read_tags(self, shape: Shape, types: collections.defaultdict[str, set[str]]) -> Iterator[bool]:
        """The arguments up to what ends the call, which is left; returns whether that came."""
        while True:
            argument = shape.key.match(self.text)
            if argument is None:
                if _comes_next(self.text, (*shape.after[1:], self._end), last=False):
                    return True
                if self._gives_up(shape.after):
                    return False
                yield False
                continue
            key, self.text = argument[1].strip(), self.text[argument.end():]
            self._write_key(key)
            close = shape.close.replace("KEY", key)
            closes = (f"\n{close}", close) if shape.newlines else (close,)
            typed = argument.re.groups > 1 and argument[2] not in (None, "true", "string")
            yield from self._read_text(closes, shape.after, types[key], typed=typed)

    def _gives_up(self, begins: tuple[str, ...]) -> bool:
        """Whether what should be the next argument never will be: what is left is text, but a mere beginning is nothing."""
        if self._last and _comes_next(self.text, begins, last=True):
            self.text = ""
        return self._last or len(self.text) > self.LIMIT or bool(self._end) and self._end in self.text

    def _read_text(self, closes: tuple[str, ...], after: tuple[str, ...], types: set[str], *, escapes: bool = False,
                   typed: bool = False) -> Iterator[bool]:
        """A value of text. What closes it counts only where the markup can go on; elsewhere it is part of the value. An end
        tag within the value counts when nothing or another call follows."""
        parts: list[str] = []
        streams = not typed and (not types or "string" in types)
        say = self._write_text if streams else parts.append
        self._write('"' * streams)
        marks = (*closes, self._end) if self._end else closes
        stretch, going_on = _stretch(marks, escapes), (*after, self._end)
        while True:
            text, mark = stretch.match(self.text).groups()
            if not mark and not self._last:
                text = text[:len(text) - _held(text, marks)]
            say(_unescape(text) if escapes else text)
            self.text = self.text[len(text):]
            behind = self.text[len(mark):]
            if mark in marks:
                over = _comes_next(behind, going_on if mark in closes else (self._start,), self._last)
                if over:
                    self.text = behind if mark in closes else self.text
                    break
                if over is False:
                    say(mark)
                    self.text = behind
                    continue
            elif self._last:  # perhaps half an escape is left
                self.text = ""
                break
            yield False
        self._write('"' * streams)
        if not streams:
            text = "".join(parts)
            self._write_value(_spell(text, "", '"') if typed else coerce(text, types), text)

    def _scan(self, shape: Shape, closers: list[str]) -> Iterator[bool]:
        """Where a value ends that is not just text, or the object of which `closers` is the closing bracket, and which
        brackets are missing there because of an end tag or the end."""
        outside = re.compile("|".join(re.escape(mark) for mark in (*shape.quotes, *"{}[](),", self._end) if mark))
        at = 0
        while True:
            inside = bool(closers) and closers[-1] in shape.quotes
            found = (re.compile(rf"\\.|{re.escape(closers[-1])}", re.DOTALL) if inside else outside).search(self.text, at)
            if found is None:
                if self._last:
                    return len(self.text), "".join(reversed(closers))
                at = max(at, len(self.text) - max(1, _held(self.text, (*shape.quotes, self._end))))
                yield False
                continue
            mark = found[0]
            if not inside and (mark == self._end or not closers and mark in "}]),"):
                return found.start(), "".join(reversed(closers))
            at = found.end()
            if not inside and mark in _BRACKETS:
                closers.append(_BRACKETS[mark])
            elif not inside and mark in shape.quotes:
                closers.append(mark)
            elif mark != "," and not mark.startswith("\\"):
                closers.pop()
                if not closers:
                    return at, ""

    # -- the events

    def _open(self, name: str) -> None:
        self.calls += 1
        self._events.append(ToolStart(_tool_id(), name))
        self._written = []
        self._write("{")

    def _close(self) -> None:
        self._write("}")
        self._events.append(ToolEnd(json.loads("".join(self._written))))

    def _write_key(self, key: str) -> None:
        self._write((", " if len(self._written) > 1 else "") + json.dumps(key, ensure_ascii=False) + ": ")

    def _write_text(self, text: str) -> None:
        self._write(json.dumps(text, ensure_ascii=False)[1:-1])

    def _write_value(self, value: Any, text: Any) -> None:
        """Write `value` or, if JSON has no such value, its `text`."""
        try:
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
            json.loads(f"[[{written}]]")
        except (TypeError, ValueError, RecursionError):
            written = json.dumps(text, ensure_ascii=False)
        self._write(written)

    def _write(self, text: str) -> None:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
        self._written.append(text)
        if text and self._events and isinstance(self._events[-1], ToolInput):
            self._events[-1].json += text
        elif text:
            self._events.append(ToolInput(text))


class OutputParser:
    """Turns the decoded text of one answer, in pieces of any size, into events.

    Feed it until `finished` or until the turn ends, then call `finish`. `state` says what the text last fed belongs to;
    `called` whether a tool call came out, `call_ids` the ids of all; `stop_sequence` which stop string fired: the one
    that completes first, and of several that complete together the longest. `finished` is set by a stop string, by a tag
    after which nothing follows and, without `parallel`, by the first call; nothing comes out afterwards. `tools` are in
    OpenAI form; without any, call markup is plain text.
    """

    def __init__(self, format: OutputFormat, tools: Sequence[dict] = (), stop: Sequence[str] = (), *,
                 in_thinking: bool = False, parallel: bool = True):
        self.state = "thinking" if in_thinking and format.thinking else "text"
        self.called = self.finished = False
        self.call_ids: list[str] = []
        self.stop_sequence: str | None = None
        self._format, self._parallel, self._tools = format, parallel, tools
        self._stops = [text for text in stop if text]

        # The tags to find in each state and what each begins. A "left over" end tag is markup only right after a call.
        text: dict[str, str] = dict.fromkeys(format.noise, "nothing") | dict.fromkeys(format.final, "the end")
        thinking: dict[str, str] = dict.fromkeys(format.noise, "text") | dict.fromkeys(format.final, "the end")
        if format.thinking:
            text = {format.thinking[0]: "thinking", format.thinking[1]: "left over"} | text
            thinking |= {format.thinking[1]: "text", "\n" + format.thinking[1]: "text"}
        if format.call and tools:
            text |= ({format.call[1]: "left over"} if format.call[1] else {}) | dict.fromkeys(format.openers, "bare call")
            text[format.call[0]] = "call"
            thinking |= {format.call[0]: "call", "\n" + format.call[0]: "call"}
        self._marks = {"text": text, "thinking": thinking}
        self._reader: CallReader | None = None  # of the call that is being read
        self._opening, self._opened_in = "", "text"
        self._heard, self._withheld = 0, []  # how much of a possible bare call it has read, and what came of that

        # A bare call to a declared tool begins like this, blanks aside.
        names = [tool["function"]["name"].lower() for tool in tools]
        self._heads = [f'{fence}{{{kind}"name":"{name}"' for name in names for fence in ("", "```", "```json")
                       for kind in ("", '"type":"function",')]
        self._heads += [f"[{name}(" for name in names if _PYTHON in format.shapes]
        self._may_be_bare = bool(tools)  # nothing was said yet that rules out a bare call

        self._events: list[Event] = []
        self._buffer = ""  # text that is not understood yet
        self._pending = ""  # visible text that may be the beginning of a stop
        self._line_start = True
        # Blanks at the beginning of a stretch of text or thinking wait for something visible; None when it came.
        self._blanks: str | None = "" if format.thinking or tools else None
        self._drop_blanks = self.state == "thinking"

    def feed(self, text: str) -> list[Event]:
        """Take the next piece of decoded text; returns what has become certain."""
        return self._read(text, last=False)

    def finish(self, cut: bool = False) -> list[Event]:
        """The turn has ended, or was `cut` (by `max_tokens`, say): returns what was held back. A call that is not complete is
        made so as well as can be, but not if it was cut: half a command must not be run."""
        reader = self._reader
        events = self._read("", last=True)
        if cut and events and reader is not None and reader.cut and isinstance(events[-1], ToolEnd):
            closing = 2 if isinstance(events[-2:][0], ToolInput) else 1
            events[-closing:] = [ToolEnd({}, cut=True)]
        return events

    def _read(self, text: str, last: bool) -> list[Event]:
        self._events = []
        self._buffer += text
        step = {"text": self._read_text, "thinking": self._read_thinking, "call": self._read_call}
        while not self.finished and step[self.state](last):
            pass
        if last and not self.finished:
            if self._blanks and not self._drop_blanks:
                self._match_stops(self._blanks)
            self._say(Text, self._pending)
            self._blanks, self._pending = None, ""
        return self._events

    def verbatim(self) -> None:
        """From here on there is no markup: all that follows is text, whatever it looks like."""
        self._marks["text"], self._may_be_bare = {}, False

    # -- the states: each step takes what is certain from the buffer and tells whether another step may follow

    def _read_text(self, last: bool) -> bool:
        if self._may_be_bare and self._buffer.strip() and self._read_bare_calls(last):
            return self._reader is None
        mark = self._take_until_mark(self._show, last)
        if mark is None or self.finished:
            return False
        following = self._marks["text"][mark]
        if following == "thinking":
            self._enter("thinking")
        elif following == "the end":
            self._end_here()
        elif following == "call" or following == "bare call" and self._line_start:
            self._open(mark)
        elif following == "nothing":
            self._line_start = True
        elif following == "bare call" or not (self.called and self._blanks is not None):
            self._show(mark)
        return True

    def _read_thinking(self, last: bool) -> bool:
        mark = self._take_until_mark(self._think, last)
        if mark is None:
            return False
        following = self._marks["thinking"][mark]
        if following == "call":
            self._open(mark)
        elif following == "the end":
            self._end_here()
        else:
            self._enter("text")
        return True

    def _read_call(self, last: bool) -> bool:
        text, self._buffer = self._buffer, ""
        try:
            events, over = self._reader.read(text, last)
        except ValueError:  # it was no call: its opening tag is text, the rest is read again
            self.state = self._opened_in
            bare = self._marks["text"].get(self._opening) == "bare call"
            self._buffer = self._reader.text[len(self._opening) * bare:]
            (self._show if self.state == "text" else self._think)(self._opening)
            return True
        self._take(events, over)
        return over

    def _read_bare_calls(self, last: bool) -> bool:
        """Whether the visible text so far may be nothing but calls without tags. They are taken when it has ended, or at
        once if this model writes them so."""
        head = "".join(self._buffer.lstrip()[:256].split()).lower()
        if not any(head.startswith(known) or known.startswith(head) for known in self._heads):
            return False
        if self._reader is None:
            shapes = self._format.shapes if self._format.untagged else (_NAME_AND_JSON,)
            self._reader = CallReader(OutputFormat(shapes=shapes), ("", ""), self._tools, self._parallel)
            self._opening, self._heard, self._withheld = "", 0, []
        try:
            events, over = self._reader.read(self._buffer[self._heard:], last)
        except ValueError:
            self._reader = None
            return False
        self._heard = len(self._buffer)
        self._withheld += events
        rest = self._reader.text.strip("`,;}] \n\t\r")
        if self._withheld and (self._format.untagged or last and not rest and not self._reader.cut):
            self.state, self._buffer, self._opened_in = "call", "", "text"
            self._take(self._withheld, over)
        elif over and (rest or last):
            self._reader = None
            return False
        return True

    # -- moving between states

    def _take_until_mark(self, sink: Callable[[str], None], last: bool) -> str | None:
        """Give the sink all text that is certainly not a tag; take and return the first tag, if there is one."""
        marks = self._marks[self.state]
        found = re.search("|".join(map(re.escape, marks)), self._buffer) if marks else None
        if found:
            text, self._buffer = self._buffer[:found.start()], self._buffer[found.end():]
        else:
            certain = len(self._buffer) - (0 if last else _held(self._buffer, marks))
            text, self._buffer = self._buffer[:certain], self._buffer[certain:]
        sink(text)
        return found[0] if found else None

    def _enter(self, state: str) -> None:
        """Begin a stretch of thinking or, behind thinking or a call, of text."""
        self._say(Text, self._pending)
        self._pending, self.state = "", state
        self._blanks, self._drop_blanks, self._line_start = "", True, True

    def _open(self, mark: str) -> None:
        self._opening, self._opened_in, self.state = mark, self.state, "call"
        tags = self._format.call
        if mark in self._format.openers:
            tags, self._buffer = (tags[0], ""), mark + self._buffer
        self._reader = CallReader(self._format, tags, self._tools, self._parallel)

    def _take(self, events: list[Event], over: bool) -> None:
        """Emit what the reader has read of its calls; with them over, go on behind them."""
        if events:
            self._enter(self.state)
            self._events += events
            self.call_ids += [event.id for event in events if isinstance(event, ToolStart)]
            self.called, self._may_be_bare = True, False
        if over:
            self._buffer, self._reader = self._reader.text, None
            self.finished = not self._parallel
            self._enter("text")

    def _end_here(self) -> None:
        self._enter("text")
        self.finished = True

    # -- thinking and visible text

    def _begin(self, text: str) -> str:
        """`text` without the blanks that open its stretch, as far as these are to be dropped or must wait."""
        if self._blanks is None:
            return text
        self._blanks += text
        if not self._blanks.strip():
            return ""
        text, self._blanks = self._blanks.lstrip() if self._drop_blanks else self._blanks, None
        return text

    def _think(self, text: str) -> None:
        self._say(Thinking, self._begin(text))

    def _show(self, text: str) -> None:
        if text:
            self._line_start = text.endswith("\n")
        if text := self._begin(text):
            self._may_be_bare = False
            self._match_stops(text)

    def _match_stops(self, text: str) -> None:
        text = self._pending + text
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            _, certain, self.stop_sequence = min(hits)
            self.finished = True
        else:
            certain = len(text) - _held(text, self._stops)
        self._say(Text, text[:certain])
        self._pending = "" if hits else text[certain:]

    def _say(self, kind: type[Text] | type[Thinking], text: str) -> None:
        if text and self._events and isinstance(self._events[-1], kind):
            self._events[-1].text += text
        elif text:
            self._events.append(kind(text))


# ------------------------------------------------------------------ several processes, one model


class Group:
    """The processes that run one model together, each with its part of the weights. This one is alone.

    All of them take the same steps. Only rank 0 has callers: what differs between processes (who has come and gone, clocks,
    bytes) it finds, and the others are told; what follows from it each finds by itself. On the MLX thread.
    """

    rank, size = 0, 1
    lost = ""  # why the group is no more

    def start(self, twin: Callable[..., Generation], lose: Callable[[str], None]) -> None:
        """Comes before all else. `twin` makes this process's `Generation` of one of rank 0's, `lose` ends what runs there."""

    def decide(self, find: Callable[[], Any]) -> Any:
        """What `find` returns on rank 0, where alone it is called."""
        return find()

    def agree(self, tokens: Any) -> Any:
        """The tokens that rank 0 has picked, an array: on other hardware the logits may differ in their last bits."""
        return tokens

    def memory(self) -> int:
        """Bytes that each process may use."""
        return usable_memory()

    def load(self, path: Path, **options: Any) -> Any:
        """This process's part of a model; `options` are those of mlx-lm's `load_model`."""
        from mlx_lm.utils import load_model

        return load_model(path, **options)[0]

    def failed(self, error: Exception) -> None:
        """Says that this process goes on after a failure, which all of them have to have had. It does not if macOS has lost its
        patience with it: https://github.com/jundot/omlx/issues/3706"""
        if "SubmissionsIgnored" in str(error):
            self.lost = "the GPU takes no more work from this process"
            log.critical("%s, which has to start anew", self.lost)

    def give_up(self, reason: str) -> None:
        """Says that this process cannot go on."""

    def close(self) -> None:
        """Says that the work is done."""


class Ranks(Group):
    """The processes that `mlx.launch` has started, on one machine or several. They share each tensor or, with `pipeline`, the
    layers.

    Rank 0 has a TCP connection to every other one, on which it tells what it decides: waiting there costs nothing, and
    whoever is gone is missed at once. MLX's collectives wait for ever for a process that does not take part. So the group
    ends, on rank 0 by `lose` and elsewhere at once, when a connection closes or is silent, or when one process fails alone.
    Raises EngineError if the group does not come together.
    """

    BEAT = 5.0  # seconds between two signs of life
    SILENCE = 30.0  # seconds without one after which a process counts as gone
    SKEW = 15.0  # seconds within which a failure that all have in common shows everywhere
    _BEAT, _FAILED, _END = b"", b"failed", b"end"  # what is no pickle
    _GONE, _APART = "a machine of the group is gone", "the machines of the group are out of step"

    def __init__(self, pipeline: bool):
        import mlx.core as mx

        try:
            group = mx.distributed.init(strict=True)
            self.rank, self.size, self._pipeline = group.rank(), group.size(), pipeline
            self._peers = self._connect(_leader())
            self._memory = self._least(usable_memory())
        except (RuntimeError, ValueError, LookupError, OSError, EOFError, connection.AuthenticationError) as error:
            raise EngineError(f"the group does not come together: {_first_line(error)}") from error
        self._jobs: weakref.WeakValueDictionary[str, Generation] = weakref.WeakValueDictionary()  # that all know
        self._told: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._failures: queue.SimpleQueue[int] = queue.SimpleQueue()  # ranks with one that rank 0 has not had yet
        self._sending = threading.Lock()  # the MLX thread and `_watch` both do
        self._closed = False

    def _connect(self, host: str) -> dict[connection.Connection, int]:
        """Connections by the rank at their other end. Nobody gets one without the key, which MLX's own connections carry."""
        import mlx.core as mx

        key = secrets.token_bytes(32)
        listener = None if self.rank else connection.Listener((host, 0), backlog=self.size, authkey=key)
        ours = [listener.address[1], *key] if listener else [0] * 33
        port, *key = mx.distributed.all_sum(mx.array(ours), stream=mx.cpu).tolist()
        if listener:
            with listener:
                peers = {peer: peer.recv() for peer in (listener.accept() for _ in range(1, self.size))}
        else:
            peers = {connection.Client((host, port), authkey=bytes(key)): 0}
            next(iter(peers)).send(self.rank)
        for peer in peers:
            with socket.fromfd(peer.fileno(), socket.AF_INET, socket.SOCK_STREAM) as end:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peers

    def start(self, twin: Callable[..., Generation], lose: Callable[[str], None]) -> None:
        self._twin, self._on_loss = twin, lose
        threading.Thread(target=self._watch, name="group", daemon=True).start()

    def decide(self, find: Callable[[], Any]) -> Any:
        if self.rank:
            unpickler = pickle.Unpickler(io.BytesIO(self._told.get()))
            unpickler.persistent_load = self._named
            return unpickler.load()
        found, out = find(), io.BytesIO()
        if self.lost:
            raise SystemExit  # ends the thread
        pickler = pickle.Pickler(out)
        pickler.persistent_id = self._name
        pickler.dump(found)
        self._tell(out.getvalue())
        return found

    def _name(self, value: Any) -> tuple[str, tuple | None] | None:
        """How a request is sent: once as a whole, and by its id from then on."""
        if not isinstance(value, Generation):
            return None
        fields = None
        if value.id not in self._jobs:
            fields = value.request, value._prompt, value._limit, value._by_context, value._born
            self._jobs[value.id] = value
        return value.id, fields

    def _named(self, name: tuple[str, tuple | None]) -> Generation:
        key, fields = name
        if fields is None:
            return self._jobs[key]
        self._jobs[key] = job = self._twin(*fields)
        return job

    def agree(self, tokens: Any) -> Any:
        import mlx.core as mx

        agreed = mx.distributed.all_sum(tokens * int(self.rank == 0))
        mx.async_eval(agreed)  # everywhere before the next collective, which need not depend on it
        return agreed

    def memory(self) -> int:
        return self._memory

    def _least(self, number: int) -> int:
        """The smallest of the numbers that the processes have."""
        import mlx.core as mx

        return mx.distributed.all_min(mx.array(number, mx.int64), stream=mx.cpu).item()

    def load(self, path: Path, **options: Any) -> Any:
        import mlx.core as mx
        import mlx_lm
        from mlx_lm.utils import load_config, load_model

        files = sorted((file.name, file.stat().st_size) for file in path.glob("*.safetensors"))
        what = [load_config(path), files, mlx_lm.__version__]
        if self.decide(lambda: what) != what:
            raise ValueError("rank 0 has other files of that name, or another version of mlx-lm")
        model = load_model(path, lazy=True, **options)[0]
        whole, split = (_body(model), "pipeline") if self._pipeline else (model, "shard")
        if not hasattr(whole, split):
            raise ValueError(f"mlx-lm cannot split it so; try {'without' if self._pipeline else 'with'} --pipeline")
        getattr(whole, split)(mx.distributed.init())
        mx.eval(model.parameters())
        self._least(0)  # waits for the slowest disk: a GPU must not
        return model

    def failed(self, error: Exception) -> None:
        if str(error).startswith(("[ring]", "[jaccl]")):
            self.give_up(f"{self._GONE}: {error}")
        elif self.rank:
            return self._tell(self._FAILED)
        try:
            for _ in self._peers:
                self._failures.get(timeout=0 if self.lost else self.SKEW)
        except queue.Empty:
            self.give_up(self._APART)
            raise SystemExit from None

    def close(self) -> None:
        self._closed = True
        if not self.rank:
            self._tell(self._END)

    def _tell(self, message: bytes) -> None:
        with self._sending:
            for peer in self._peers:
                with contextlib.suppress(OSError):  # `_watch` finds out
                    peer.send_bytes(message)

    def _watch(self) -> None:
        """Takes what the others send, until one of them is gone."""
        told = failed = time.monotonic()
        heard = dict.fromkeys(self._peers, told)
        while True:
            for peer in connection.wait(self._peers, self.BEAT):
                try:
                    message = peer.recv_bytes()
                except (EOFError, OSError):
                    return self.give_up(f"{self._GONE}: rank {self._peers[peer]} has left")
                heard[peer] = time.monotonic()
                if message == self._END:
                    return
                if message == self._FAILED:
                    self._failures.put(self._peers[peer])
                    failed = heard[peer]
                elif message != self._BEAT:
                    self._told.put(message)
            now = time.monotonic()
            silent = next((rank for peer, rank in self._peers.items() if now - heard[peer] > self.SILENCE), None)
            if silent is not None:
                return self.give_up(f"{self._GONE}: rank {silent} is silent")
            if not self._failures.empty() and now - failed > self.SKEW:
                return self.give_up(self._APART)
            if now - told >= self.BEAT and not self._sending.locked():  # whoever sends shows life
                self._tell(self._BEAT)
                told = now

    def give_up(self, reason: str) -> None:
        if self._closed or self.lost:
            return
        self.lost = reason
        log.critical("%s; the server ends", reason)
        if self.rank:
            os._exit(1)
        self._on_loss(reason)


def _leader() -> str:
    """Rank 0's address, from what `mlx.launch` tells of its back ends ring and jaccl:
    https://ml-explore.github.io/mlx/build/html/usage/distributed.html"""
    hosts = os.environ.get("MLX_HOSTFILE")
    address = json.loads(Path(hosts).read_text())[0][0] if hosts else os.environ["MLX_JACCL_COORDINATOR"]
    return address.rpartition(":")[0]


# ------------------------------------------------------------------ the prefix cache


class Snapshot:
    """The states of a model's layers at some length: of those that cannot be cut back, None for the others."""

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self.nbytes = sum(layer.nbytes for layer in layers if layer is not None)


@dataclass(eq=False, repr=False)
class Line:
    """The KV state of one conversation: `tokens` are exactly what `cache` (one mlx-lm cache a layer) has read.

    A layer with plain or quantised KV can be cut back to any length. Sliding-window and recurrent layers cannot, so
    `snapshots` keeps their states at chosen lengths; lines that have branched share them.
    `model` is the fingerprint of what has read them, `root` the length of system and tools, `turns` are the lengths at which
    the user's latest turns ended: a template that drops old thinking goes back there. `answers` tells at which length each
    remembered answer ends.
    """

    SNAPSHOTS = 10  # besides those at the root and the latest turns

    tokens: list[int]
    cache: list[Any]
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    root: int = 0
    turns: list[int] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    used: float = 0.0
    shelved: bool = False  # nothing of it is left to write to disk
    model: str = ""

    @property
    def nbytes(self) -> int:
        return self.cache_nbytes + sum(snapshot.nbytes for snapshot in self.snapshots.values())

    @property
    def cache_nbytes(self) -> int:
        """Without the snapshots."""
        return sum(layer.nbytes for layer in self.cache)

    @property
    def cuttable(self) -> bool:
        return all(map(_cuttable, self.cache))

    def restorable(self, length: int) -> int:
        """The longest prefix of at most `length` tokens that this line can give."""
        if length >= len(self.tokens) or self.cuttable:
            return min(length, len(self.tokens))
        return max((at for at in tuple(self.snapshots) if at <= length), default=0)

    def snapshot(self) -> None:
        """Remembers the layers that cannot be cut back later, as they are now. On the MLX thread.

        Of too many the one goes that leaves the smallest gap for its distance from the end: near the end, where edits are
        likely, they stay dense, and far back one still restarts not too far from an edit.
        """
        if self.cuttable:
            return
        end = len(self.tokens)
        self.snapshots[end] = Snapshot([None if _cuttable(c) else _copy(c) for c in self.cache])
        at = sorted(self.snapshots)
        gaps = {here: (after - before) / (end - here + 1) for before, here, after in zip([0, *at], at, at[1:])
                if here != self.root and here not in self.turns[-2:]}
        if len(gaps) > self.SNAPSHOTS:
            del self.snapshots[min(gaps, key=gaps.get)]

    def layers(self, start: int, end: int) -> list[Any]:
        """What tokens `start` to `end` (a restorable length) contribute: copies of that part of the layers that can be cut,
        and of the others' whole state at `end`. On the MLX thread."""
        kept = self.snapshots[end].layers if end < len(self.tokens) and not self.cuttable else [None] * len(self.cache)
        return [_copy(layer if state is None else state, start, end) for layer, state in zip(self.cache, kept)]

    def branch(self, length: int) -> Line:
        """A copy of the first `length` tokens, which must be restorable. On the MLX thread."""
        return Line(self.tokens[:length], self.layers(0, length), {at: s for at, s in self.snapshots.items() if at <= length},
                    self.root, [at for at in self.turns if at <= length],
                    {key: at for key, at in self.answers.items() if at <= length}, model=self.model)


def _cuttable(layer: Any) -> bool:
    return type(layer).__name__ in ("KVCache", "QuantizedKVCache", "ConcatenateKVCache")


def _copy(layer: Any, start: int = 0, end: int | None = None) -> Any:
    """A copy that shares no buffer with `layer`; of a cuttable one only the tokens from `start` to `end`."""
    import mlx.core as mx
    from mlx.utils import tree_map

    if _cuttable(layer) and end is not None and layer.keys is not None:
        new = copy.copy(layer)
        new.keys, new.values = tree_map(lambda a: mx.contiguous(a[..., start:end, :]), (layer.keys, layer.values))
        new.offset = end - start
        return new
    return _own(copy.deepcopy(layer))


def _own(layer: Any) -> Any:
    """The layer, of which no array is a window into a larger one any more: it would hold all of that in memory."""
    import mlx.core as mx
    from mlx.utils import tree_map

    for part in getattr(layer, "caches", [layer]):
        for name, value in vars(part).items():
            setattr(part, name, tree_map(lambda a: mx.contiguous(a) if isinstance(a, mx.array) else a, value))
    return layer


def _chain(parts: list[Any]) -> Any:
    """One layer out of consecutive parts of it: the opposite of `Line.layers`."""
    import mlx.core as mx
    from mlx.utils import tree_map

    if not _cuttable(parts[-1]) or parts[-1].keys is None:
        return parts[-1]
    new = copy.copy(parts[0])
    new.keys, new.values = tree_map(lambda *arrays: mx.concatenate(arrays, axis=-2), *((p.keys, p.values) for p in parts))
    new.offset = sum(part.offset for part in parts)
    return new


class PrefixCache:
    """KV states of earlier requests to all models, found by longest common token prefix.

    Policy. A request takes the line that gives it the most tokens. When the conversation simply goes on, the line moves
    into the request and comes back longer; when it branches, the shared part is copied and the line stays. Memory is
    bounded in real bytes: the least recently used line goes first, where one that was never used again (a title, a
    sub-agent's only turn) counts as `ONE_OFF` seconds older, and the last thing kept of a line is its root (system and
    tools), which every new conversation of that client shares. A line larger than all the room there is keeps its beginning.
    A line is named by the model's fingerprint and its tokens, and no state of one model is ever given to another.
    """

    ONE_OFF = 600.0

    def __init__(self, room: Callable[[], int], group: Group = Group()):
        """`room` tells how many bytes there are for it at the moment."""
        self._room, self._group = room, group
        self._lines: dict[Line, int] = {}  # with the bytes of their caches, which do not change in here

    @property
    def nbytes(self) -> int:
        return self._bytes(list(self._lines))

    def _bytes(self, lines: list[Line]) -> int:
        """What lines take together; what several of them share counts once."""
        shared = {snapshot for line in lines for snapshot in line.snapshots.values()}
        return sum(self._lines.get(line, 0) for line in lines) + sum(snapshot.nbytes for snapshot in shared)

    @property
    def limit(self) -> int:
        """Most bytes at the moment."""
        return max(0, self._room())

    def lines(self, model: str) -> list[Line]:
        """What there is of a model. From any thread."""
        return [line for line in list(self._lines) if line.model == model]

    def find(self, model: str, tokens: list[int]) -> tuple[Line | None, int]:
        """The line that restores the longest proper prefix of `tokens`, and that length. From any thread: it only reads."""
        best, length = None, 0
        for line in self.lines(model):
            usable = line.restorable(min(common_prefix(line.tokens, tokens), len(tokens) - 1))
            if usable > length:
                best, length = line, usable
        return best, length

    def closest(self, model: str, tokens: list[int]) -> tuple[list[int], int]:
        """The tokens of the line that agrees with `tokens` the longest, and how many those are. From any thread."""
        pairs = ((line.tokens, common_prefix(line.tokens, tokens)) for line in self.lines(model))
        return max(pairs, key=lambda pair: pair[1], default=([], 0))

    def take(self, model: str, tokens: list[int]) -> Line | None:
        """The state to start from: a line moved out of the cache or a copy of one's beginning. On the MLX thread."""
        line, length = self.find(model, tokens)
        if line is None:
            return None
        line.hits += 1
        line.used = time.monotonic()
        if length == len(line.tokens):
            del self._lines[line]
            return line
        return line.branch(length)

    def held(self, model: str) -> int:
        """Bytes of a model's states. From any thread."""
        return self._bytes(self.lines(model))

    def put(self, line: Line) -> None:
        """Files a state and makes room for it. A line that the new one continues is dropped. On the MLX thread."""
        import mlx.core as mx

        mx.eval([_own(layer).state for layer in line.cache if not _cuttable(layer)])
        if self._group.decide(lambda: line.nbytes > self.limit):
            line = self._beginning(line)
        if not line.tokens:
            return
        line.used = time.monotonic()
        for old in self.lines(line.model):
            shared = common_prefix(old.tokens, line.tokens)
            if shared == len(old.tokens) and line.restorable(shared) == shared:
                del self._lines[old]
                line.hits = max(line.hits, old.hits)
            elif shared == len(line.tokens) and old.restorable(shared) == shared:
                return
        self._lines[line] = line.cache_nbytes
        self.evict()

    def drop(self, model: str) -> None:
        """Forgets all of a model. On the MLX thread."""
        for line in self.lines(model):
            del self._lines[line]

    def unshelved(self, model: str) -> Line | None:
        """The model's most recently used line that is not on disk yet."""
        return max((line for line in self.lines(model) if not line.shelved), key=lambda line: line.used, default=None)

    def _beginning(self, line: Line) -> Line:
        """The longest beginning of a line that fits."""
        length = self._group.decide(lambda: int(len(line.tokens) * self.limit / line.nbytes * 0.95))
        while length := line.restorable(length):
            shorter = line.branch(length)
            if self._group.decide(lambda: shorter.nbytes <= self.limit):
                return shorter
            length -= 1 + length // 8
        return Line([], [])

    def evict(self, spare: int = 0) -> None:
        """Keeps within its room, and so many bytes below. On the MLX thread."""
        while self._lines and (at := self._group.decide(lambda: self._surplus(spare))) is not None:
            victim = list(self._lines)[at]
            del self._lines[victim]
            if 0 < victim.root < len(victim.tokens) and victim.restorable(victim.root) == victim.root:
                others = self.lines(victim.model)
                if not any(common_prefix(victim.tokens, line.tokens) >= victim.root for line in others):
                    kept = victim.branch(victim.root)
                    kept.hits, kept.used, kept.shelved = 1, victim.used, victim.shelved
                    self._lines[kept] = kept.cache_nbytes

    def _surplus(self, spare: int) -> int | None:
        """Which line has to go, if one has to."""
        if self.nbytes <= self.limit - spare:
            return None
        ages = [line.used - (0 if line.hits else self.ONE_OFF) for line in self._lines]
        return ages.index(min(ages))


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share; by halving, since comparing slices runs in C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# ------------------------------------------------------------------ the prefix cache on disk


@dataclass(frozen=True)
class Segment:
    """One file of the shelf: what `tokens` add to the state that `parent` ends with. `cuttable`: any part of it will do."""

    path: Path
    node: str
    parent: str
    tokens: list[int]
    cuttable: bool
    nbytes: int
    answers: dict[str, Answer]


class Shelf:
    """Prefix states on disk, where they outlive an unload and a restart.

    A state is a chain of segments. Each is one file of mlx-lm's `save_prompt_cache` with what its tokens add to the segment
    before: that part of the KV, and the whole state of layers that cannot be cut, as it is at the segment's end. So
    conversations share the files of what they have in common, and one that has grown adds only its growth.

    A segment's node is a hash of its parent's and of its tokens, the first parent being the model's fingerprint; a file's
    name is node and checksum, given when it is complete. A file that is torn, foreign or not what its name says is never
    used. All files together, the one being written included, stay within `limit` bytes: the least recently used segment
    that no other one follows goes first. A chain's files count as used together, by their modification times.
    """

    NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{8})\.safetensors")

    def __init__(self, folder: Path, limit: int):
        """Reads what is there. Raises OSError when `folder` cannot be written to."""
        self.folder, self.limit = folder, limit
        self._segments: dict[str, Segment] = {}
        self._followers: dict[str, list[Segment]] = {}
        self._writing = folder / f"writing-{os.getpid()}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        self._writing.write_bytes(b"")
        for leftover in folder.glob("writing-*.safetensors"):
            if leftover == self._writing or not _alive(leftover.stem.removeprefix("writing-")):
                leftover.unlink(missing_ok=True)
        for path in folder.iterdir():
            if match := self.NAME.fullmatch(path.name):
                try:
                    self._add(self._read(path, match[1]))
                except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                    self._discard(path, error)
        self._make_room(0, set())

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in list(self._segments.values()))

    def answers(self, model: str) -> dict[str, Answer]:
        """The remembered answers in all that is kept of the model with this fingerprint."""
        found: dict[str, Answer] = {}
        for segment in self._followers.get(model, ()):
            found |= segment.answers | self.answers(segment.node)
        return found

    def find(self, model: str, tokens: list[int], start: int = 0) -> tuple[list[Segment], int]:
        """The segments that restore the longest prefix of `tokens`, and its length; `model` is a fingerprint, or the node that
        is reached after `start` tokens. From any thread: it only reads."""
        best: tuple[list[Segment], int] = ([], start)
        for segment in list(self._followers.get(model, ())):
            reached = start + common_prefix(segment.tokens, tokens[start:start + len(segment.tokens)])
            chain = [segment]
            if reached == start + len(segment.tokens):
                further, reached = self.find(segment.node, tokens, reached)
                chain += further
            elif not segment.cuttable:
                continue
            best = max(best, (chain, reached), key=lambda pair: pair[1])
        return best

    def load(self, chain: list[Segment], length: int) -> Line | None:
        """The state that a chain restores; None if one of its files turns out to be bad. On the MLX thread."""
        import mlx.core as mx
        from mlx_lm.models.cache import load_prompt_cache

        parts, tokens, snapshots = [], [], {}
        for segment in chain:
            try:
                if _checksum(segment.path) != self.NAME.fullmatch(segment.path.name)[2]:
                    raise ValueError("the checksum is wrong")
                layers = load_prompt_cache(str(segment.path))
                mx.eval([layer.state for layer in layers])
                os.utime(segment.path)
            except Exception as error:  # whatever mlx finds wrong with a file
                self._remove(segment)
                self._discard(segment.path, error)
                return None
            parts.append(layers)
            tokens += segment.tokens
            if not segment.cuttable:
                snapshots[len(tokens)] = Snapshot([None if _cuttable(layer) else layer for layer in layers])
        line = Line(tokens, [_chain(list(layers)) for layers in zip(*parts)], snapshots)
        return line if line.cuttable and length == len(tokens) else line.branch(length)  # which shares no state with snapshots

    def write(self, model: str, line: Line, answer: Callable[[str], Answer | None], marks: Iterable[int]) -> bool:
        """Writes the next segment of a line, up to the next of the lengths `marks`; returns whether the line is all here, or
        cannot be. On the MLX thread."""
        from mlx_lm.models.cache import save_prompt_cache

        chain, reached = self.find(model, line.tokens)
        if reached == len(line.tokens):
            return True
        if reached < sum(len(segment.tokens) for segment in chain):  # somewhere inside the last one: a fork begins before it
            chain = chain[:-1]
        start = sum(len(segment.tokens) for segment in chain)
        parent = chain[-1].node if chain else model
        end = next(at for at in sorted({*marks, len(line.tokens)}) if at > start and line.restorable(at) == at)
        tokens = line.tokens[start:end]
        node = _node(parent, tokens)
        answers = {key: dataclasses.astuple(answer(key)) for key, at in line.answers.items()
                   if start < at <= end and answer(key)}
        layers = line.layers(start, end)
        notes = {"parent": parent, "tokens": json.dumps(tokens), "answers": json.dumps(answers),
                 "cuttable": json.dumps(line.cuttable)}
        size = sum(layer.nbytes for layer in layers) + len(json.dumps(notes)) + 1024 * len(layers) + 4096
        try:
            if not self._make_room(size, {segment.node for segment in chain}):
                log.info("prompt cache on disk: %d tokens need %d MB, which is more than there is room for", end, size >> 20)
                return True
            save_prompt_cache(str(self._writing), layers, notes)
            path = self.folder / f"{node}.{_checksum(self._writing, sync=True)}.safetensors"
            os.replace(self._writing, path)
            self._add(self._read(path, node))
            for segment in chain:
                os.utime(segment.path)
        except Exception as error:  # a full disk must not cost more than this
            log.warning("prompt cache on disk: cannot write: %s", _first_line(error))
            self._writing.unlink(missing_ok=True)
            return True
        return end == len(line.tokens)

    def _read(self, path: Path, node: str) -> Segment:
        """A file's segment, from its header alone."""
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the file is torn")
            header = json.loads(file.read(length))
        notes = {key.removeprefix("0."): value for key, value in header["__metadata__"].items()}
        tokens, answers = json.loads(notes["tokens"]), json.loads(notes["answers"])
        if _node(notes["parent"], tokens) != node:
            raise ValueError("the name belongs to other tokens")
        return Segment(path, node, notes["parent"], tokens, json.loads(notes["cuttable"]), path.stat().st_size,
                       {key: Answer(*fields) for key, fields in answers.items()})

    def _add(self, segment: Segment) -> None:
        if before := self._segments.get(segment.node):
            self._remove(before)
            if before.path != segment.path:
                before.path.unlink(missing_ok=True)
        self._segments[segment.node] = segment
        self._followers.setdefault(segment.parent, []).append(segment)

    def _remove(self, segment: Segment) -> None:
        self._segments.pop(segment.node, None)
        followers = self._followers.get(segment.parent, [])
        if segment in followers:
            followers.remove(segment)

    def _discard(self, path: Path, error: Exception) -> None:
        log.warning("prompt cache on disk: %s is ignored and removed: %s", path.name, _first_line(error))
        path.unlink(missing_ok=True)

    def _make_room(self, size: int, spared: set[str]) -> bool:
        """Removes segments until `size` bytes fit beside the spared ones; returns whether they do. If not, none is removed."""
        if sum(self._segments[node].nbytes for node in spared) + size > self.limit:
            return False
        while self.nbytes + size > self.limit:
            ends = [s for s in self._segments.values() if not self._followers.get(s.node) and s.node not in spared]
            oldest = min(ends, key=lambda segment: _mtime(segment.path))
            self._remove(oldest)
            oldest.path.unlink(missing_ok=True)
        return True


def _node(parent: str, tokens: list[int]) -> str:
    return hashlib.sha256(f"{parent}{tokens}".encode()).hexdigest()[:32]


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:
        pass
    return True


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _checksum(path: Path, sync: bool = False) -> str:
    """A file's CRC-32; `sync` also sees to it that the disk really has the file."""
    crc = 0
    with open(path, "rb+" if sync else "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
        if sync:
            os.fsync(file.fileno())
    return f"{crc:08x}"


def fingerprint(local: LocalModel, kv_bits: int | None) -> str:
    """What a KV state depends on besides the tokens: the model's files, the precision, and mlx-lm's idea of a cache."""
    from mlx_lm import __version__

    weights = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in local.path.glob("*.safetensors"))
    return hashlib.sha256(json.dumps([local.config, weights, kv_bits, __version__], sort_keys=True).encode()).hexdigest()[:32]


# ------------------------------------------------------------------ sampling


def make_sampler(sampling: Sampling, vocabulary: int) -> Callable[[Any], Any]:
    """A sampler over log-probabilities with a random stream of its own, so that a seed gives the same text whatever else
    runs in the batch. On the MLX thread."""
    import mlx.core as mx
    from mlx_lm import sample_utils as kit

    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    if temperature <= 0:
        return kit.greedy_sampler
    top_k, top_p, min_p = sampling.top_k or 0, sampling.top_p or 1.0, sampling.min_p or 0.0
    key = mx.random.key(secrets.randbits(32) if sampling.seed is None else sampling.seed & 0xFFFFFFFF)

    def sample(logprobs: Any) -> Any:
        nonlocal key
        if 0 < top_p < 1:
            logprobs = kit.apply_top_p(logprobs, top_p)
        if 0 < min_p <= 1:
            logprobs = kit.apply_min_p(logprobs, min_p)
        if 0 < top_k < vocabulary:
            logprobs = kit.apply_top_k(logprobs, top_k)
        key, step = mx.random.split(key)
        return mx.random.categorical(logprobs * (1 / temperature), key=step)

    return sample


def make_penalties(sampling: Sampling) -> list[Callable[[Any, Any], Any]]:
    """mlx-lm's logits processors for the penalties and biases that are set. On the MLX thread."""
    from mlx_lm.sample_utils import make_logits_processors

    window = min(sampling.repetition_context or 64, 1 << 30)  # MLX counts in 32 bits
    repetition = sampling.repetition_penalty
    return make_logits_processors(
        sampling.logit_bias, repetition if repetition not in (None, 1.0) and repetition > 0 else None, window,
        sampling.presence_penalty, window, sampling.frequency_penalty, window)


# ------------------------------------------------------------------ constrained output


class Constraint:
    """A logits processor that keeps one answer within a grammar; after the grammar's end only the turn's end is left.

    `begins` is how many of the answer's tokens precede the text that is held: None as long as the model thinks, and for
    calls. `exits` are tokens that lead out of the grammar where that text could begin: into thinking (if True), which ends
    with the tokens `thinking_end`, or to where nothing is held any more. `blanks` may precede the text. With an `opener` only
    what follows these tokens is held, each time they come, up to the grammar's end.

    To be held, a token must be known before the next one is picked, and the model waits for that. What is awaited, the end of
    the thinking or an opener, costs no such wait: there the mask depends on the token that is still being computed.
    """

    def __init__(self, matcher: Any, begins: int | None = None, exits: dict[int, bool] | None = None,
                 thinking_end: Sequence[int] = (), blanks: Sequence[int] = (), opener: Sequence[int] = ()):
        self._matcher, self._opened, self._begins, self._exits = matcher, matcher, begins, exits or {}
        self._blanks, self._opener = blanks, list(opener)
        self._awaited = self._opener or list(thinking_end)  # the tokens from which on the answer is held
        self._state = "waiting" if opener or begins is None and thinking_end else "held"
        self._length = 0  # of the answer as far as it was read
        self._latest: list[int] = []
        self._started = False
        self._first: Any = None  # the mask right behind what is awaited

    def after(self, answer: Sequence[int]) -> Constraint:
        """A copy to go on with behind what is already written of the answer."""
        new = copy.copy(self)
        new._matcher = self._matcher.deep_copy()
        for token in answer:
            new._read(token)
        return new

    @property
    def error(self) -> str:
        """What made the matcher give up, which ends the turn: a grammar may outgrow llguidance's limits. Or ""."""
        return _grammar_error(self._matcher) if self._matcher.is_error() else ""

    def take(self, token: int, before: int) -> bool:
        """Must be told each token of the answer and how many precede it, before the next call; returns whether the text that is
        held opens with it."""
        if before == self._length:
            self._read(token)
        return self._begins == before and token not in self._exits and token not in self._blanks

    def __call__(self, context: Any, logits: Any) -> Any:
        """The logits (1, vocabulary) with all tokens ruled out that may not follow the tokens `context`. On the MLX thread."""
        import mlx.core as mx

        token, fresh, self._started = context[-1:], self._started, True
        if self._state == "waiting":
            *known, last = self._awaited
            if not fresh or self._latest[len(self._latest) - len(known):] != known:
                return logits
            if self._first is None:
                exits = [token for token, thinks in self._exits.items() if not thinks]
                self._first = self._mask(self._opened, exits, logits.shape[-1])
            return mx.where(mx.logical_or(token != last, self._first), logits, -math.inf)
        if fresh and self._state == "held":
            mx.async_eval(token)
            mx.async_eval(logits)  # the model computes while the mask is made
            self._read(token.item())
        if self._state != "held":
            return logits
        # Thinking is not begun merely because all else is ruled out.
        exits = [token for token, thinks in self._exits.items() if not thinks or token == mx.argmax(logits).item()
                 ] if self._length == self._begins else []
        return mx.where(self._mask(self._matcher, exits, logits.shape[-1]), logits, -math.inf)

    @staticmethod
    def _mask(matcher: Any, exits: Sequence[int], vocabulary: int) -> Any:
        import mlx.core as mx

        mask = bytearray(matcher.compute_bitmask().ljust(vocabulary // 8 + 1, b"\0"))
        for token in exits:
            mask[token // 8] |= 1 << token % 8
        bits = mx.array(memoryview(mask))[:, None] >> mx.arange(8, dtype=mx.uint8) & 1
        return bits.reshape(1, -1)[:, :vocabulary].astype(mx.bool_)

    def _read(self, token: int) -> None:
        beginning = self._begins == self._length
        self._length += 1
        if self._state == "waiting":
            self._latest = [*self._latest, token][-len(self._awaited):]
            if self._latest == self._awaited:
                self._state, self._matcher = "held", self._opened.deep_copy()
                if not self._opener:
                    self._begins = self._length
                    self._exits = {token: thinks for token, thinks in self._exits.items() if not thinks}
        elif beginning and token in self._exits:
            self._state, self._begins = "waiting" if self._exits[token] else "free", None
        elif self._state == "held":
            self._matcher.consume_token(token)
            if beginning and token in self._blanks:
                self._begins = self._length
            if self._opener and self._matcher.is_accepting():
                self._state, self._latest = "waiting", []


class ThinkingBudget:
    """A logits processor that lets one answer think for `budget` tokens; after those only the thinking's end is left.

    The answer begins behind the first `prompt` tokens of the context. Its thinking stands between the tokens `start`, none
    if the prompt ends inside it, and `end`, or a `call`, which may begin inside thinking. Thinking that has not begun when
    the budget would be spent is not expected any more.
    """

    def __init__(self, budget: int, prompt: int, start: Sequence[int], end: Sequence[int], call: Sequence[int]):
        self._budget, self._prompt = budget, prompt
        self._start, self._end, self._call = list(start), list(end), list(call)
        self._over = False

    def __call__(self, context: Any, logits: Any) -> Any:
        """The logits (1, vocabulary) behind the tokens `context`. Reads those, which makes the model wait, only from the
        moment on when the budget may be spent. On the MLX thread."""
        import mlx.core as mx

        written = context.shape[0] - self._prompt
        if self._over or written < self._budget:
            return logits
        answer = context[self._prompt:].tolist()
        begin = _find(answer, self._start)
        if begin < 0:
            self._over = written > self._budget + len(self._start)
            return logits
        thought = answer[begin + len(self._start):]
        self._over = _find(thought, self._end) >= 0 or _find(thought, self._call) >= 0
        if self._over or len(thought) < self._budget:
            return logits
        done = next(n for n in range(len(self._end) - 1, -1, -1) if thought[len(thought) - n:] == self._end[:n])
        return mx.where(mx.arange(logits.shape[-1]) == self._end[done], logits, -math.inf)


def _find(tokens: list[int], wanted: list[int]) -> int:
    """Where `wanted` first stands among `tokens`, or -1."""
    last = len(tokens) - len(wanted)
    return next((at for at in range(last + 1) if tokens[at:at + len(wanted)] == wanted), -1)


def _grammar_error(matcher: Any) -> str:
    """llguidance's reason in one line, without its dump of the grammar and the parser's state."""
    reason = matcher.get_error().rpartition("failed to compile JSON schema: ")[2]
    return " ".join(re.split(r"\n +\d+ \||\n<state>", reason)[0].split())


def weigh(token: int, logprobs: Any, top: int, spell: Callable[[int], bytes]) -> Token:
    """A token among all there are, with the `top` likeliest beside it; `spell` tells their bytes. On the MLX thread."""
    import mlx.core as mx

    def weighed(token: int) -> Token:
        written = spell(token)
        return Token(written.decode("utf-8", "replace"), written, max(logprobs[token].item(), _IMPOSSIBLE))

    best = mx.argpartition(-logprobs, top)[:top].tolist() if top else []
    return dataclasses.replace(weighed(token), top=sorted(map(weighed, best), key=lambda one: -one.logprob))


_IMPOSSIBLE = -9999.0  # of what cannot be sampled at all: JSON has no infinity


# ------------------------------------------------------------------ one running request


class Phase(enum.Enum):
    WAITING = enum.auto()  # for the weights, for memory or for its first chunk
    PREFILL = enum.auto()
    DECODE = enum.auto()
    ENDED = enum.auto()


@dataclass
class Miss:
    """Where a prompt and the cached one that is most like it part: at which token, in which message of the canonical
    conversation, and the first words there, as cached and now."""

    at: int
    message: int | None
    role: str
    was: str
    now: str


class Generation:
    """One answer in the making: iterate it for `Event`s, the last of which is `Done`; it raises EngineError on failure.

    `prompt_tokens`, `cached_tokens` and `miss` are known at once (the latter two as the cache stood at submission; `usage` is
    exact after the end). `cancel` may be called from any thread, at any time, any number of times.
    """

    TICK = 0.1  # seconds of silence after which the iterator yields a Tick

    def __init__(self, request: Request, local: LocalModel, tongue: Tongue, prompt: Prompt, limit: int, by_context: bool,
                 mutex: threading.RLock):
        self.id = secrets.token_hex(12)
        self.request, self.model = request, local
        self.prompt_tokens, self.cached_tokens = len(prompt.tokens), 0
        self.miss: Miss | None = None
        self.usage = Usage(prompt_tokens=len(prompt.tokens))
        self.ending = ""  # once it has ended: the reason, or the error's type
        self._tongue, self._prompt = tongue, prompt
        self._limit, self._by_context = limit, by_context
        self._news = threading.Condition(mutex)  # the engine's one lock, with a waiting room of its own
        self._outbox: collections.deque[Event | EngineError] = collections.deque()
        self._over = False
        self._cancelled = False
        # From here on the MLX thread's own notes.
        self._phase = Phase.WAITING
        self._line: Line | None = None
        self._read = prompt.tokens  # and at the end what was written
        self._number = 0
        self._passed_over = 0  # chunks that others have got since its last one
        self._suspect = False  # it was decoding when a step failed, and decodes alone from then on
        self._sampler: Any = None
        self._detokenizer: Any = None
        self._raw, self._visible, self._thinking = "", "", ""  # what the model wrote, and what of it is text and thinking
        callable_tools = [*request.tools, *request.deferred_tools] if request.tool_choice != "none" else []
        self._grammar = tongue.constraint(request, prompt) if prompt.tokens else None
        self._constraint: Constraint | None = None  # the grammar at work
        format = tongue.format if request.prompt is None else OutputFormat()
        stop = [*request.stop, *tongue._gap(), "<|endoftext|>"] if request.suffix else request.stop
        self._parser = OutputParser(format, callable_tools, stop, in_thinking=prompt.in_thinking,
                                    parallel=request.parallel_tool_calls)
        self._untold: list[Token] = []  # tokens that may turn out to be visible
        self._embedded: tuple[int, Any, list[Any]] | None = None  # tokens of a text read so far, their pooled states, caches
        self._born = self._mark = time.perf_counter()
        self._told = 0.0  # when it was last logged how far the prompt is

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._over:
            raise StopIteration
        with self._news:
            if not self._outbox:
                self._news.wait(self.TICK)
            event = self._outbox.popleft() if self._outbox else Tick()
        self._over = self._over or isinstance(event, (Done, EngineError))
        if isinstance(event, EngineError):
            raise event
        return event

    def text(self) -> Iterator[str]:
        """The visible answer, piece by piece."""
        return (event.text for event in self if isinstance(event, Text))

    def cancel(self) -> None:
        """Ends the generation soon; what it has prefilled stays in the prefix cache."""
        with self._news:
            self._cancelled = self._over = True
            self._outbox.clear()

    def _emit(self, *events: Event | EngineError) -> None:
        for event in events:
            if isinstance(event, Text):
                self._visible += event.text
                event.tokens = self._tell(event.text) if self._untold else []
            else:
                self._untold = []
        self._thinking += "".join(event.text for event in events if isinstance(event, Thinking))
        if events:
            with self._news:
                for event in events:
                    self._put_out(event)
                self._news.notify()

    def _put_out(self, event: Event | EngineError) -> None:
        """What continues a piece that nobody has taken yet joins it: who is late gets fewer and larger pieces."""
        last = self._outbox[-1] if self._outbox else None
        if type(event) is not type(last) or not isinstance(event, (Text, Thinking, ToolInput)):
            self._outbox.append(event)
        elif isinstance(event, ToolInput):
            last.json += event.json
        else:
            last.text += event.text
            if isinstance(event, Text):
                last.tokens += event.tokens

    def _left(self) -> int:
        """Tokens of the prompt that are still to be prefilled, as far as one can tell. The last one is the decoder's."""
        read = len(self._line.tokens) if self._line else self._embedded[0] if self._embedded else self.cached_tokens
        return len(self._prompt.tokens) - 1 - read

    def _tell(self, text: str) -> list[Token]:
        """Takes the tokens that a piece of visible text was made of; what lies before them was markup or blanks. All of them
        where the text is not made of their bytes, as with half a character."""
        wanted, told = text.encode(), self._untold
        start = b"".join(token.bytes for token in told).find(wanted)
        ends = list(itertools.accumulate(len(token.bytes) for token in told))
        last = bisect.bisect_left(ends, start + len(wanted)) + 1 if start >= 0 else len(told)
        self._untold = told[last:]
        return told[bisect.bisect_right(ends, start):last]

    def _lap(self) -> float:
        """Seconds since the last lap."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def _fail(self, error: EngineError) -> None:
        self._phase, self.ending = Phase.ENDED, type(error).__name__
        self._emit(error)

    def _finish(self, reason: str) -> None:
        self._phase = Phase.ENDED
        self.usage.total_seconds = time.perf_counter() - self._born
        if reason == "stop" and self._parser.stop_sequence is not None:
            reason = "stop_sequence"
        elif reason == "stop" and self._parser.called:
            reason = "tool_calls"
        elif reason == "length" and self._by_context:
            reason = "context"
        self.ending = "cancelled" if self._cancelled else reason
        self._emit(Done(reason, self.usage, self._parser.stop_sequence, self._read))


# ------------------------------------------------------------------ one loaded model


class Decoder:
    """All requests of a model that decode now, as one batch of mlx-lm's (`GenerationBatch`, the second half of BatchGenerator).

    A request alone decodes on its own caches in place, so that its state is moved in and out and never copied, and every
    cache class works. When another one joins, both are merged into batch caches. On the MLX thread.
    """

    def __init__(self, model: Any, end_tokens: Iterable[int], group: Group):
        from mlx_lm.generate import StopSequences

        self._model, self._ends, self._group = model, StopSequences([[token] for token in end_tokens]), group
        self._batch: Any = None
        self._count = 0

    def __len__(self) -> int:
        return len(self._batch.uids) if self._batch is not None else 0

    def accepts(self, cache: list[Any]) -> bool:
        """Whether a request with this cache can decode beside those that already do."""
        return not len(self) or all(hasattr(layer, "merge") for layer in cache)

    def insert(self, line: Line, token: int, limit: int, sampler: Any, processors: list[Any]) -> int:
        """Starts a request that has read `line` and reads `token` next; returns its number. The line's caches are the
        decoder's from here on. `processors` are mlx-lm's logits processors."""
        import mlx.core as mx
        from mlx_lm.generate import GenerationBatch

        self._count += 1
        batch = GenerationBatch(self._model, [self._count], mx.array([token]), line.cache, [list(line.tokens)], [sampler],
                                sampler, [tuple(processors)], [self._ends], [limit])
        batch.extract_cache = lambda _: list(batch.prompt_cache)  # nobody else's rows are in there
        batch._next_tokens = self._group.agree(batch._next_tokens)
        if len(self):
            _share(self._batch)
            _share(batch)
            self._batch.extend(batch)
        else:
            self._batch = batch
        return self._count

    def step(self) -> list[Any]:
        """One token for everyone: mlx-lm's responses, the last one of a request with its caches and all its tokens."""
        responses = self._batch.next() if len(self) else []
        if len(self):
            self._batch._next_tokens = self._group.agree(self._batch._next_tokens)
        return responses

    def peek(self, number: int) -> tuple[list[int], list[Any]]:
        """The tokens a request has read and its caches, which are still in use if it decodes alone."""
        at = self._batch.uids.index(number)
        return list(self._batch.tokens[at]), self._batch.extract_cache(at)

    def upcoming(self, number: int) -> Any:
        """A response for the token that a request has picked but not read yet; the next step would bring the same."""
        at, batch = self._batch.uids.index(number), self._batch
        return batch.Response(number, int(batch._next_tokens[at].item()), batch._next_logprobs[at], None, None, None)

    def remove(self, number: int) -> tuple[list[int], list[Any]]:
        """Takes a request out before its end: the tokens it has read and its caches."""
        state = self.peek(number)
        self.discard(number)
        return state

    def discard(self, number: int) -> None:
        """Takes a request out, if it is still there, with all that it has computed."""
        if number in self._batch.uids:
            self._batch.filter([at for at, uid in enumerate(self._batch.uids) if uid != number])


def _share(batch: Any) -> None:
    """Gives a batch caches that can hold several requests, if it has those of a single one."""
    if "extract_cache" in vars(batch):
        del batch.extract_cache
        batch.prompt_cache = [layer.merge([layer]) for layer in batch.prompt_cache]


def _pooling(local: LocalModel) -> str:
    """Which of an embedding model's states is the embedding: "lasttoken" or "cls", the first, or their "mean". Its folder says
    so with a word or, older ones, with a flag for each.
    https://sbert.net/docs/package_reference/sentence_transformer/models.html
    Raises ValueError for any other pooling."""
    file = local.path / "1_Pooling" / "config.json"
    config = _json(file) if file.is_file() else {"pooling_mode": "lasttoken"}
    flags = [re.sub("^pooling_mode_|_tokens?$", "", key) for key in config if key.startswith("pooling_mode_") and config[key]]
    mode = config.get("pooling_mode") or " and ".join(flags)
    if mode not in ("lasttoken", "cls", "mean"):
        raise ValueError(f"its pooling '{mode}' is not supported")
    return mode


def _body(model: Any) -> Any:
    """The part of an mlx-lm model that comes before its head; None where it has another name."""
    model = getattr(model, "language_model", model)
    return next((body for name in ("model", "transformer", "backbone") if (body := getattr(model, name, None))), None)


def _headless(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for a config, whose weights may be those of the body alone: without its name before theirs, and
    without a head."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)

    class Headless(model_class):
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            if not any(name.startswith(("model.", "language_model.")) for name in weights):
                weights = {f"model.{name}": value for name, value in weights.items()}
            weights = super().sanitize(weights) if hasattr(model_class, "sanitize") else weights
            if not any(name.startswith("lm_head.") for name in weights):
                self.pop("lm_head", None)
            return weights

    return Headless, args_class


class Runtime:
    """A model's weights and its running requests. Every method runs on the MLX thread.

    Prefill is done here, a chunk at a time, since snapshots have to be taken inside it and others get their turn between
    two chunks; the decoder then takes over. Whatever fails, fails for the request it belongs to.
    """

    CHUNK = 512  # tokens; larger ones gain no speed but memory peaks and waiting time
    LARGE = 2048  # but up to a fifth with experts, all of which each chunk reads: https://github.com/ml-explore/mlx-lm/pull/406
    LEAST = 64  # tokens that a chunk has after failures
    DEEP = 16384  # tokens up to which a large chunk's attention takes no more memory than a small one's does at 64k
    SPARSE = 4096  # tokens between two restore points inside a long prompt
    BATCH = 32  # requests that decode side by side
    EXPECTED = 4096  # tokens of an answer to keep memory free for; who writes more may have to wait in between
    INSPECTED = 32  # tokens between two looks whether the model still computes numbers
    TELL = 4.0  # seconds between two words on how far a long prompt is

    def __init__(self, local: LocalModel, tongue: Tongue, prefixes: PrefixCache, kv_bits: int | None, shelf: Shelf | None,
                 group: Group):
        import mlx.core as mx
        from mlx.utils import tree_flatten

        started = time.perf_counter()
        log.info("loading %s, %s", local.name, gigabytes(local.size))
        self.local, self.tongue, self.prefixes, self.shelf, self._group = local, tongue, prefixes, shelf, group
        self.fingerprint, self._kv_bits = fingerprint(local, kv_bits), kv_bits
        try:
            embeds = "embedding" in local.capabilities
            self.model = group.load(local.path, **({"get_model_classes": _headless} if embeds else {}))
            self._body = _body(self.model)
            self._pooling = _pooling(local) if embeds else "mean"
            cache = self._new_cache()
            forward = self._body if embeds else self.model
            mx.eval(forward(mx.array([[0]]), cache=cache))  # compiles the kernels, and shows what KV takes
        except Exception as error:
            raise _unloadable(local, f"model '{local.name}'", error) from error
        size = sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))
        self.size, self.state = group.decide(lambda: (size, StateSize.of(cache)))
        experts = any(type(module).__name__.endswith("SwitchLinear") for module in self.model.modules())
        self._undisturbed = self.LARGE if experts and group.size == 1 else self.CHUNK  # a GPU must not wait long for another
        self.load_seconds = time.perf_counter() - started
        self.jobs: list[Generation] = []
        self.keep_alive: float | None = None
        self.used = time.monotonic()
        self._decoder = self._new_decoder()
        log.info("loaded %s in %.1f s", local.name, self.load_seconds)

    def _new_cache(self) -> list[Any]:
        from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

        def quantized(layer: Any) -> Any:
            return QuantizedKVCache(64 if head % 64 == 0 else 32, self._kv_bits) if type(layer) is KVCache else layer

        config = self.local.config.get("text_config") or self.local.config
        head = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
        cache = make_prompt_cache(self.model)
        return [quantized(layer) for layer in cache] if self._kv_bits and head % 32 == 0 else cache

    def _new_decoder(self) -> Decoder:
        return Decoder(self.model, self.tongue.tokenizer.eos_token_ids, self._group)

    @property
    def expires(self) -> float | None:
        """When an idle model is unloaded, in monotonic seconds; None for never."""
        if self.keep_alive is None or self.keep_alive < 0:
            return None
        return (time.monotonic() if self.jobs else self.used) + self.keep_alive

    def reserve(self, job: Generation) -> int:
        """Bytes of KV to expect of a request."""
        written = job.usage.completion_tokens
        return self.state.nbytes(job.prompt_tokens + max(written, min(job._limit, self.EXPECTED)))

    def admit(self, job: Generation) -> None:
        """Takes a request in, with the state that it goes on from: before room is made for it by dropping states."""
        if job.request.keep_alive is not None:
            self.keep_alive = job.request.keep_alive
        waited = job._lap()
        self.jobs.append(job)
        if not job._prompt.tokens:
            return self._end(job, "load")
        if job._detokenizer is None:  # it was not paused
            job.usage.load_seconds = waited
            job._detokenizer = self.tongue.tokenizer.detokenizer
            job._parser.feed(job._prompt.opening)
        try:
            self._restore(job)
        except Exception as error:
            self._failed(error)
            self._drop(job, error)

    def decoding(self) -> list[Generation]:
        return [job for job in self.jobs if job._phase is Phase.DECODE]

    def candidates(self) -> list[Generation]:
        """The requests that can use a chunk of prefill, or begin to decode."""
        if len(self._decoder) >= self.BATCH:
            return []
        waiting = [job for job in self.jobs if job._phase in (Phase.WAITING, Phase.PREFILL)]
        return [job for job in waiting if job._left() > 0 or job._line is None or self._may_decode(job)]

    def _may_decode(self, job: Generation) -> bool:
        alone = job._suspect or any(other._suspect for other in self.decoding())
        return not len(self._decoder) or not alone and self._decoder.accepts(job._line.cache)

    # -- prefill

    def prefill(self, job: Generation, alone: bool) -> None:
        """One chunk of a request's prompt, a large one if nobody else is here to wait for it; behind the last one it decodes."""
        job._phase = Phase.PREFILL
        try:
            if job.request.embed:
                return self._embed(job)
            self._restore(job)
            if job._left() > 0:
                self._read_chunk(job, self._undisturbed if alone else self.CHUNK)
                self._tell(job)
            if job._left() <= 0 and self._may_decode(job):
                self._start_decoding(job)
        except Exception as error:
            self._failed(error)
            if _on_gpu(error):  # which had it too long, or had no room: smaller chunks may do
                self.CHUNK = self._undisturbed = max(self.CHUNK // 2, self.LEAST)
            else:
                self._salvage(job)
            self._drop(job, error)

    def _restore(self, job: Generation) -> None:
        """Gives a request the longest beginning of its prompt that anyone has read: a line of the prefix cache, the disk's, or
        a copy from a request that runs, so that a twin or a sub-agent of a running request does not prefill twice. One that
        has begun changes over when others have come a chunk further."""
        tokens, begun = job._prompt.tokens, job._line is not None
        if begun and len(self.jobs) == 1 or job.request.embed:
            return
        have = len(job._line.tokens) + self.CHUNK if begun else 0
        _, length = self.prefixes.find(self.fingerprint, tokens)
        chain, kept = self.shelf.find(self.fingerprint, tokens[:-1]) if self.shelf and not begun else ([], 0)
        shared, donor = self._most_like(job)
        line = None
        if shared > max(length, have):
            running = donor._line
            if donor._phase is Phase.DECODE:
                read, cache = self._decoder.peek(donor._number)
                running = dataclasses.replace(running, tokens=read, cache=cache)
            usable = running.restorable(min(shared, len(tokens) - 1))
            line = running.branch(usable) if usable > max(length, have) else None
        if kept > max(length, len(line.tokens) if line else 0):
            line = self.shelf.load(chain, kept)
        if line is None and length > have:
            line = self.prefixes.take(self.fingerprint, tokens)
        if line is None and begun:
            return
        line = line or Line([], self._new_cache())
        line.model, line.root, line.shelved = self.fingerprint, job._prompt.root, False
        if job._prompt.body and job.request.messages[-1]["role"] == "user":
            line.turns = [at for at in line.turns if at < job._prompt.body] + [job._prompt.body]
        if begun:
            job.usage.cached_tokens += len(line.tokens) - len(job._line.tokens)
        elif not job.usage.completion_tokens:
            job.usage.cached_tokens = len(line.tokens)
        job._line = line

    def _most_like(self, job: Generation) -> tuple[int, Generation | None]:
        """The running request that has read the most of what a request has to read, and how much that is."""
        def read(other: Generation) -> int:
            shared = common_prefix(other._prompt.tokens, job._prompt.tokens)
            return shared if other._phase is Phase.DECODE else min(shared, len(other._line.tokens))

        others = [other for other in self.jobs if other is not job and other._line is not None]
        return max(((read(other), other) for other in others), key=lambda pair: pair[0], default=(0, None))

    def _read_chunk(self, job: Generation, most: int) -> None:
        import mlx.core as mx

        tokens, line, prompt = job._prompt.tokens, job._line, job._prompt
        start, end = len(line.tokens), len(tokens) - 1
        marks = sorted({prompt.root, prompt.turn, prompt.body or end, (start // self.SPARSE + 1) * self.SPARSE, end})
        stop = min(next(at for at in marks if at > start), start + (most if start < self.DEEP else self.CHUNK))
        self.model(mx.array(tokens[start:stop])[None], cache=line.cache)
        mx.eval([c.state for c in line.cache])
        mx.clear_cache()
        line.tokens = tokens[:stop]
        if stop in marks and (stop < end or not prompt.body):
            line.snapshot()

    def _tell(self, job: Generation) -> None:
        """Logs, now and then, how far a prompt is."""
        now, done = time.perf_counter(), len(job._line.tokens)
        if now - max(job._mark, job._told) < self.TELL or job._left() <= 0:
            return
        job._told = now
        speed = (done - job.usage.cached_tokens) / (now - job._mark)
        log.info("%s: prompt %d %%, %s/%s tokens, %.0f tokens/s, %.0f s left", self.local.name, 100 * done // job.prompt_tokens,
                 f"{done:,}", f"{job.prompt_tokens:,}", speed, job._left() / speed)

    def _embed(self, job: Generation) -> None:
        """A chunk of a text to embed; behind the last one there is its vector. The prefix cache has no part in it."""
        import mlx.core as mx

        start, pooled, cache = job._embedded or (0, None, self._new_cache())
        tokens = job._prompt.tokens[start:start + self.CHUNK if job._left() > self.CHUNK else None]
        states = self._body(mx.array(tokens)[None], cache=cache)[0].astype(mx.float32)
        if self._pooling == "lasttoken":
            pooled = states[-1]
        elif self._pooling == "cls":
            pooled = states[0] if pooled is None else pooled
        else:
            pooled = states.sum(0) / job.prompt_tokens + (0 if pooled is None else pooled)
        mx.eval(pooled, [layer.state for layer in cache])
        mx.clear_cache()
        job._embedded = start + len(tokens), pooled, cache
        if job._left() >= 0:
            return
        vector = pooled.tolist()
        if not all(map(math.isfinite, vector)):
            raise ArithmeticError("the model's output is not a number")
        job._embedded = None
        job._emit(Embedding(vector))
        job.usage.prefill_seconds += job._lap()
        self._end(job, "stop")

    def _start_decoding(self, job: Generation) -> None:
        job.usage.prefill_seconds += job._lap()
        if job._limit <= 0:
            return self._end(job, "length")
        sampling = job.request.sampling
        job._sampler = job._sampler or make_sampler(sampling, len(self.tongue.tokenizer))
        processors = make_penalties(sampling)
        if job._grammar is not None:
            job._constraint = job._grammar.after(job._prompt.tokens[job.prompt_tokens:])
            processors.append(job._constraint)
        if budget := self.tongue.budget(job.request, job._prompt, job.prompt_tokens):
            processors.append(budget)
        job._number = self._decoder.insert(job._line, job._prompt.tokens[-1], job._limit - job.usage.completion_tokens,
                                           job._sampler, processors)
        job._line.cache = []  # the decoder gives it back at the end
        job._phase = Phase.DECODE

    def _salvage(self, job: Generation) -> None:
        """Files the chunks that a failed prefill had finished. The layers may or may not have taken up more than those."""
        import mlx.core as mx

        try:
            done = len(job._line.tokens)
            torn = dataclasses.replace(job._line, tokens=job._prompt.tokens[:done + 1])
            line = torn.branch(torn.restorable(done))
            mx.eval([layer.state for layer in line.cache])
            self.prefixes.put(line)
        except Exception:
            log.info("nothing of the failed prompt could be kept", exc_info=True)

    # -- decode

    def decode(self) -> None:
        """One token for each request that decodes."""
        by_number = {job._number: job for job in self.decoding()}
        if not by_number:
            return
        try:
            responses = self._decoder.step()
        except Exception as error:
            return self.part(error)
        for response in responses:
            job = by_number[response.uid]
            try:
                self._take_token(job, response)
            except Exception as error:
                self._failed(error)
                self._decoder.discard(job._number)
                self._drop(job, error)
                if _on_gpu(error) and self.decoding():
                    return self.part(error)

    def _take_token(self, job: Generation, response: Any) -> None:
        import mlx.core as mx

        usage, parser, detokenizer = job.usage, job._parser, job._detokenizer
        # Of logits that are no numbers every sampler picks token 0; a model that has once lost them never comes back.
        if response.token == 0 or usage.completion_tokens % self.INSPECTED == 0:
            with mx.stream(mx.cpu):  # on the GPU it would have to wait for the next step
                broken = math.isnan(response.logprobs[0].item())
            if broken:
                raise ArithmeticError("the model's output is not a number")
        if job._constraint is not None and job._constraint.take(response.token, usage.completion_tokens):
            parser.verbatim()
        usage.completion_tokens += 1
        usage.thinking_tokens += parser.state == "thinking"
        if response.finish_reason != "stop":
            detokenizer.add_token(response.token)
            if job.request.logprobs is not None:
                with mx.stream(mx.cpu):
                    job._untold.append(weigh(response.token, response.logprobs, job.request.logprobs, self.tongue.spell))
        if response.finish_reason:
            detokenizer.finalize()
        piece = detokenizer.last_segment
        job._raw += piece
        job._emit(*parser.feed(piece))
        if response.finish_reason:
            job._line.tokens, job._line.cache = response.all_tokens, response.prompt_cache
            self._end(job, response.finish_reason)
        elif parser.stop_sequence is not None or parser.finished:
            self._reclaim(job)
            self._end(job, "stop")

    def _reclaim(self, job: Generation) -> None:
        """Takes a request's state back from the decoder."""
        job._line.tokens, job._line.cache = self._decoder.remove(job._number)

    def part(self, error: Exception) -> None:
        """The step of those who decode has failed, and whose fault it was cannot be told: each of them reads what it had once
        more and goes on alone, where only the guilty one fails again."""
        jobs = self.decoding()
        self._failed(error)
        self._decoder, batch = self._new_decoder(), self._decoder._batch
        if len(jobs) == 1 or any(job._suspect for job in jobs):
            for job in jobs:
                self._drop(job, error)
            return
        log.warning("a step of %d requests has failed: they go on one by one", len(jobs), exc_info=error)
        read = dict(zip(batch.uids, batch.tokens))
        for job in jobs:
            if job._number not in read:  # it has ended meanwhile
                self._drop(job, error)
                continue
            written = job.prompt_tokens + job.usage.completion_tokens
            self._begin_again(job, read[job._number][:written])
            job._suspect = True

    def pause(self, job: Generation) -> bool:
        """Lets a decoding request wait for memory: its state goes to the prefix cache, from where it goes on later. Not if
        it ends with its next token."""
        response = self._decoder.upcoming(job._number)
        last = response.token in self.tongue.tokenizer.eos_token_ids or job.usage.completion_tokens + 1 >= job._limit
        if not last:
            self._take_token(job, response)  # it is picked, and never will be again
        if last or job._phase is Phase.ENDED:
            return False
        self._reclaim(job)
        line = job._line
        self._begin_again(job, [*line.tokens, response.token])
        self.jobs.remove(job)
        self.prefixes.put(line)
        return True

    def _begin_again(self, job: Generation, tokens: list[int]) -> None:
        job._prompt = dataclasses.replace(job._prompt, tokens=tokens)
        job.usage.decode_seconds += job._lap()
        job._line, job._phase = None, Phase.WAITING

    # -- the end

    def drop_cancelled(self, cancelled: list[Generation]) -> None:
        """Ends those of these requests that are here; what they have computed goes to the prefix cache."""
        for job in [job for job in self.jobs if job in cancelled]:
            if job._phase is Phase.DECODE:
                self._reclaim(job)
            self._end(job, "stop")

    def _end(self, job: Generation, reason: str) -> None:
        import mlx.core as mx

        if job._phase is Phase.DECODE:
            job.usage.decode_seconds += job._lap()
            mx.synchronize()  # the next step has changed its state already: if that fails, none is kept
        self._release(job)
        job._emit(*job._parser.finish(cut=reason == "length"))
        if job._phase is Phase.DECODE:
            job._line.answers[self.tongue.remember(job)] = len(job._line.tokens)
            job._read = list(job._line.tokens)
        if job._line is not None:
            self.prefixes.put(job._line)
            job._line = None
        if job._constraint is not None and job._constraint.error:
            return job._fail(InvalidRequest(f"the output format asks too much: {job._constraint.error}"))
        job._finish(reason)

    def _failed(self, error: Exception) -> None:
        """Comes first after a failure: what was computed at the same time may fail as well, and nobody else is to hear of it."""
        import mlx.core as mx

        self._group.failed(error)
        with contextlib.suppress(Exception):
            mx.synchronize()

    def _drop(self, job: Generation, error: Exception) -> None:
        """Fails one request; its state is not kept."""
        log.error("generation failed", exc_info=error)
        if job in self.jobs:
            self._release(job)
        job._line = None
        job._fail(EngineError("the model failed while generating; the server goes on, please try again"))

    def _release(self, job: Generation) -> None:
        self.jobs.remove(job)
        self.used = time.monotonic()
        if job.request.keep_alive is not None:
            self.keep_alive = job.request.keep_alive

    # -- the disk

    def unshelved(self) -> bool:
        """Whether there is something to write to disk."""
        return self.shelf is not None and self.prefixes.unshelved(self.fingerprint) is not None

    def write(self) -> None:
        """Writes one segment of what the disk has not got."""
        line = self.prefixes.unshelved(self.fingerprint)
        marks = {line.root, *line.snapshots, *range(self.SPARSE, len(line.tokens), self.SPARSE)}
        line.shelved = self.shelf.write(self.fingerprint, line, self.tongue.answer, marks)


def _on_gpu(error: Exception) -> bool:
    """Whether it was the GPU that failed. What its commands were to write or to move, earlier tokens' states among it, is lost."""
    return str(error).startswith("[METAL]")


@dataclass(frozen=True)
class StateSize:
    """What the state of a conversation takes: bytes for each token, and bytes that do not grow."""

    token: float
    fixed: int

    @classmethod
    def of(cls, cache: list[Any]) -> StateSize:
        """Measured on layers that have read something."""
        token, fixed = 0.0, 0
        layers = list(cache)
        for layer in layers:
            if isinstance(getattr(layer, "caches", None), (list, tuple)):
                layers += layer.caches
                continue
            keys = getattr(layer, "keys", None)
            rows = (keys[0] if isinstance(keys, (list, tuple)) else keys).shape[-2] if keys is not None else 0
            window = getattr(layer, "max_size", None)
            if rows and window is None:
                token += layer.nbytes / rows
            else:
                fixed += int(layer.nbytes / rows * window) if rows else layer.nbytes
        return cls(token, fixed)

    def nbytes(self, tokens: int) -> int:
        return int(self.token * tokens) + self.fixed

    def tokens(self, nbytes: int) -> int | None:
        """How many fit; None for any number."""
        return max(0, int((nbytes - self.fixed) / self.token)) if self.token else None


# ------------------------------------------------------------------ the models in memory


class Pool:
    """The models in memory, and who gets how much of it. On the MLX thread, but for reading.

    Policy. The weights, the KV that admitted requests are expected to need, and the prefix cache stay within `memory` bytes
    together. A request that needs room gets it from the prefix cache first, then from idle models, the least recently used
    one going first, and otherwise waits until others are through. When answers grow beyond what was expected, the
    latest request of the lowest priority is paused. `max_loaded` bounds the number of models.
    """

    def __init__(self, memory: int, cache_limit: int, max_loaded: int | None, kv_bits: int | None, shelf: Shelf | None,
                 group: Group):
        self.memory, self._group = memory, group
        self.prefixes = PrefixCache(self._spare, group)
        self.runtimes: dict[str, Runtime] = {}
        self.states: dict[str, tuple[int, StateSize]] = {}  # by model: bytes of the weights and of a state, once it was loaded
        self._cache_limit, self._max_loaded, self._kv_bits, self._shelf = cache_limit, max_loaded, kv_bits, shelf

    def jobs(self) -> list[Generation]:
        return [job for runtime in list(self.runtimes.values()) for job in list(runtime.jobs)]

    def context(self, name: str) -> int | None:
        """Tokens of a conversation that memory can hold beside the model alone; None if that is not known or no bound."""
        weights, state = self.states.get(name, (0, None))
        return state.tokens(self.memory - weights) if state else None

    def _spare(self) -> int:
        return min(self._cache_limit, self.memory - self._committed())

    def _committed(self) -> int:
        return sum(r.size + sum(map(r.reserve, r.jobs)) for r in self.runtimes.values())

    def open(self, local: LocalModel, tongue: Tongue) -> Runtime | None:
        """The model, loaded if need be; None if it has to wait for room. Raises ModelLoadError."""
        if runtime := self.runtimes.get(local.name):
            return runtime
        size = local.size // self._group.size
        while self._committed() + size > self.memory or len(self.runtimes) >= (self._max_loaded or math.inf):
            if not self._unload_idle():
                return None
        self.prefixes.evict(spare=size)
        self._wire(size)
        try:
            runtime = self.runtimes[local.name] = Runtime(local, tongue, self.prefixes, self._kv_bits, self._shelf, self._group)
        finally:
            self._clean()
        self.states[local.name] = runtime.size, runtime.state
        return runtime

    def fits(self, runtime: Runtime, job: Generation) -> bool:
        """Whether a request can begin now, when the prefix cache makes room for it. Raises PromptTooLong if it never can."""
        need = runtime.reserve(job)
        while self._committed() + need > self.memory:
            if self._unload_idle(runtime):
                continue
            if self.jobs():
                return False
            if (most := self.context(runtime.local.name)) is not None and job.prompt_tokens >= most:
                raise PromptTooLong(job.prompt_tokens, most)
            break  # less is left for the answer than is usual
        return True

    def settle(self) -> Generation | None:
        """Adapts the prefix cache to what the others take. When they take too much, pauses a request and returns it."""
        paused = None
        if self._committed() > self.memory and len(self.jobs()) > 1:
            running = [(job, runtime) for runtime in self.runtimes.values() for job in runtime.decoding()]
            latest, runtime = max(running, key=lambda pair: (pair[0].request.priority, pair[0]._born), default=(None, None))
            paused = latest if latest and runtime.pause(latest) else None
        self.prefixes.evict()
        return paused

    def _unload_idle(self, spared: Runtime | None = None) -> bool:
        idle = {name: r.used for name, r in self.runtimes.items() if not r.jobs and r is not spared}
        if idle:
            self.unload(min(idle, key=idle.get))
        return bool(idle)

    def unload(self, name: str) -> None:
        """Gives an idle model's weights and states back to the system, if nobody else holds the runtime."""
        runtime = self.runtimes[name]
        while runtime.unshelved():
            runtime.write()
        self.prefixes.drop(runtime.fingerprint)
        del self.runtimes[name], runtime
        self._clean()
        log.info("unloaded %s", name)

    def _clean(self) -> None:
        import mlx.core as mx

        gc.collect()
        mx.clear_cache()
        self._wire()

    def _wire(self, coming: int = 0) -> None:
        """Keeps the weights in memory, and as many bytes of those that are to be loaded. States come and go, which has made
        macOS panic where they were wired, too: https://github.com/ml-explore/mlx/issues/3186"""
        import mlx.core as mx

        if mx.metal.is_available():
            mx.set_wired_limit(min(usable_memory(), coming + sum(runtime.size for runtime in self.runtimes.values())))

    def forget(self) -> list[Generation]:
        """Drops everything, as after a failure that leaves nothing to rely on; returns the requests that ran."""
        jobs = self.jobs()
        self.runtimes, self.prefixes = {}, PrefixCache(self._spare, self._group)
        self._clean()
        return jobs


def gigabytes(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"


def usable_memory() -> int:
    """Bytes that the GPU may use; without one, all memory there is. Raises ImportError without MLX."""
    import mlx.core as mx

    device = mx.device_info() if mx.metal.is_available() else {}
    return device.get("max_recommended_working_set_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------ whose turn it is


class Schedule:
    """Who gets the next chunk of prefill, and when those who decode get their tokens.

    The highest priority goes first, and lower work keeps what it has and waits. Among equals it is the one with the least
    left to read, by powers of two, so that a short prompt does not wait for a long one; of about the same, the first that
    came. The oldest request is never passed over more than `PATIENCE` times in a row. While anyone decodes, prefill takes at
    most half of the time, a quarter if it is of lower priority, and all it needs if it is of higher.
    """

    PATIENCE = 3

    def __init__(self) -> None:
        self._owed = 0.0  # seconds that the decoding requests have a right to before the next chunk

    def choose(self, candidates: list[Generation], decoding: list[Generation]) -> Generation | None:
        """The request whose chunk is next, or None if those who decode are to go on."""
        if not candidates:
            return None
        highest = min(job.request.priority for job in candidates)
        equals = [job for job in candidates if job.request.priority == highest]
        chosen = min(equals, key=lambda job: (max(0, job._left()).bit_length(), job._born))
        oldest = min(equals, key=lambda job: job._born)
        if oldest._passed_over >= self.PATIENCE:
            chosen = oldest
        if self._owed > 0 and decoding and highest >= min(job.request.priority for job in decoding):
            return None
        for job in equals:
            job._passed_over = 0 if job is chosen else job._passed_over + 1
        return chosen

    def prefilled(self, job: Generation, seconds: float, decoding: list[Generation]) -> None:
        """Takes note of a chunk's time."""
        lower = bool(decoding) and job.request.priority > min(other.request.priority for other in decoding)
        self._owed = seconds * (3 if lower else 1) if decoding else 0.0

    def decoded(self, seconds: float) -> None:
        self._owed -= seconds


# ------------------------------------------------------------------ the engine


@dataclass
class Loaded:
    """A model in memory: bytes of its weights, unix time when it goes if idle (None: never), context window in tokens."""

    model: LocalModel
    size: int
    expires: float | None
    context_length: int


@dataclass
class Totals:
    """What the engine has done since its start: requests by how they ended, and tokens."""

    endings: collections.Counter[str] = field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Stats:
    """The engine at this moment. `memory` is what MLX holds, `memory_limit` what it may, both in bytes."""

    waiting: int
    running: int
    loaded: int
    prefix_cache_bytes: int
    prefix_cache_limit: int
    memory: int
    memory_limit: int
    totals: Totals


@dataclass
class Turn:
    """What callers want of a step: the requests that wait, in the order they came, and those that are cancelled."""

    waiting: list[Generation]
    cancelled: list[Generation]


class Engine:
    """Local MLX models behind one thread.

        with Engine("demo") as engine:
            answer = engine.chat("say hello world")
            for piece in answer.text():
                print(piece, end="", flush=True)
            print(answer.usage)

    `model` is the default model (a name or a path) and begins to load at once; `models_dirs` are folders of models,
    `aliases` pairs of (glob, name), `context` and `max_tokens` upper bounds in tokens, `cache_limit` the prefix cache's
    bytes (by default a quarter of `memory`). `cache_dir` is a folder where the prefix cache outlives the
    process, `cache_dir_limit` the most bytes of files in it. `kv_bits` (4 or 8) keeps the KV cache quantised. `memory` is
    the bytes that weights, KV and prefix cache may take together (by default nine tenths of what the GPU may use, the rest
    being for computing), `max_loaded` the number of models, `max_queue` the number of requests that may wait, `keep_alive`
    the seconds that an idle model stays (None: until its memory is needed). `state` is the file where presets are kept (None:
    nowhere, they end with the engine). With a `group` of several processes each makes the same engine, with a `model`, the only
    one then, and without a `cache_dir`; those that are not rank 0 `follow`.
    Raises ModelNotFound or ModelLoadError for a bad `model`, OSError for a `cache_dir` that cannot be written to.
    """

    SETTLE = 1.0  # seconds without work after which the prefix cache is written to disk
    LAST_WRITES = 2.5  # seconds that closing may spend on that
    STUCK = 600.0  # seconds after which a single step counts as hanging

    def __init__(self, model: str | None = None, *, models_dirs: Sequence[str | Path] = (),
                 aliases: Sequence[tuple[str, str]] = (), context: int | None = None, max_tokens: int | None = None,
                 cache_limit: int | None = None, cache_dir: str | Path | None = None, cache_dir_limit: int = 32 * 2**30,
                 kv_bits: int | None = None, memory: int | None = None, max_loaded: int | None = None, max_queue: int = 64,
                 keep_alive: float | None = None, state: str | Path | None = None, group: Group = Group()):
        self._group = group
        self._library = Library([Path(d) for d in models_dirs], aliases, Path(state).expanduser() if state else None)
        self._default = self._library.resolve(model, trusted=True) if model else None
        self._library.only = self._default if group.size > 1 else None
        self._context, self._max_tokens, self._kv_bits = context, max_tokens, kv_bits
        self._max_queue, self._keep_alive = max_queue, keep_alive
        self._shelf = Shelf(Path(cache_dir), cache_dir_limit) if cache_dir else None
        memory = memory or group.memory() * 9 // 10
        self._mutex = threading.RLock()
        self._lock = threading.Condition(self._mutex)
        self._queue: list[Generation] = []
        self._tongues: dict[str, Tongue | None] = {}  # None while a thread builds it
        self._unloads: list[tuple[str, threading.Event]] = []
        self._last_used: LocalModel | None = None
        self._pool = Pool(memory, cache_limit or memory // 4, max_loaded, kv_bits, self._shelf, group)
        if self._default is not None:
            self._check_size(self._default)
        self._schedule = Schedule()
        self._totals = Totals()
        self._ready = self._draining = self._closing = False
        self._broken: str | None = None
        self._stepping: float | None = None  # since when the current step runs, in monotonic seconds
        group.start(self._twin, self._lose)
        self._thread = threading.Thread(target=self._main, name="mlx", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- callers' side

    @property
    def hub(self) -> Path:
        """The folder where downloaded models are found."""
        return self._library.hub

    def models(self) -> list[LocalModel]:
        """Every model that can be served, presets as models of their names."""
        return self._library.catalog()

    def preset(self, name: str) -> Preset | None:
        """The preset that `name` means."""
        return self._library.preset(name)

    def keep(self, preset: Preset) -> None:
        """Adds a preset or replaces that of its name. Raises InvalidRequest for the name of an installed model."""
        if any(_plain(preset.name) == model.name.lower() for model in self._library.models()):
            raise InvalidRequest(f"'{preset.name}' is the name of an installed model; take another")
        self._library.presets.put(preset)

    def delete(self, name: str) -> None:
        """Removes a preset or, once its running requests are through, a model with its files. Raises ModelNotFound, and
        InvalidRequest if it is not named in full or not ours to delete."""
        if self._library.presets.remove(name):
            return
        local = self.resolve(name)
        self._library.delete(name, local, self._let_go)

    def _let_go(self, local: LocalModel) -> None:
        if local == self._default:
            raise InvalidRequest(f"model '{local.name}' is not this server's to delete")
        self.unload(local.name)
        with self._lock:
            self._tongues.pop(local.name, None)
            self._last_used = None if self._last_used == local else self._last_used

    def resolve(self, name: str) -> LocalModel:
        """The local model that answers to `name`. Raises ModelNotFound."""
        if self._default is not None and name in (str(self._default.path), self._default.name):
            return self._default
        return self._library.resolve(name, default=self._default, last_used=self._last_used)

    def show(self, local: LocalModel) -> tuple[str, dict[str, Any]]:
        """A model's chat template and its generation_config.json."""
        files = {path.name: path.stat() for path in local.path.iterdir()}
        return _chat_template(local.path, files), _json(local.path / "generation_config.json") if (
            "generation_config.json" in files) else {}

    def context_length(self, local: LocalModel) -> int:
        """Tokens of prompt and answer together that a request may have: what the model, `context` and, once the model has
        been loaded, memory allow."""
        bounds = [local.context_length, self._context, self._pool.context(local.name)]
        return min(bound for bound in bounds if bound is not None)

    def chat(self, messages: str | list[Message], **fields: Any) -> Generation:
        """Starts an answer to a text or a conversation; `fields` are those of `Request`."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        name = fields.pop("model", None) or (self._default.name if self._default else "default")
        return self.submit(Request(name, messages, **fields))

    def submit(self, request: Request) -> Generation:
        """Queues a request. What can be wrong with it is raised here: ModelNotFound, ModelLoadError (no tokenizer),
        InvalidRequest (the template refuses it, its format cannot be enforced, or there is no such token), PromptTooLong,
        EngineBusy, EngineClosed."""
        local, request = self.resolve(request.model), self._preset(request)
        self._check_open()
        tongue = self._tongue(local)
        request.sampling = _filled(request.sampling, tongue.defaults)
        given = request.prompt if isinstance(request.prompt, list) else []
        tongue.check_tokens([*(request.sampling.logit_bias or ()), *request.context, *given])
        prompt = tongue.prompt(request) if request.messages or request.prompt else Prompt([])
        if request.embed:
            if not prompt.tokens:
                raise InvalidRequest("a text without tokens has no embedding")
            if local.config.get("use_bidirectional_attention"):
                raise InvalidRequest(f"model '{local.name}' reads text in both directions, which mlx-lm cannot")
            prompt = tongue.truncated(prompt, self.context_length(local) - 1) if request.truncate else prompt
        limit, by_context = self._room(local, request, len(prompt.tokens))
        job = Generation(request, local, tongue, prompt, limit, by_context, self._mutex)
        if not request.embed:
            self._look_up(job)
        with self._lock:
            self._check_open()
            self._last_used = local
            self._queue.append(job)
            self._lock.notify_all()
        return job

    def _preset(self, request: Request) -> Request:
        preset = self.preset(request.model)
        return preset.fill(request) if preset else request

    def _check_open(self) -> None:
        if self._draining or self._closing or self._broken:
            raise EngineClosed(self._broken or "the server is shutting down")
        if self._waiting() >= self._max_queue:
            raise EngineBusy(f"{self._max_queue} requests are waiting already")

    def _waiting(self) -> int:
        jobs = [*self._queue, *self._pool.jobs()]
        return sum(job._phase is Phase.WAITING and not job._cancelled for job in jobs)

    def _look_up(self, job: Generation) -> None:
        """Notes what of a prompt was read before, as far as that is known now."""
        tokens, prefixes = job._prompt.tokens, self._pool.prefixes
        runtime = self._pool.runtimes.get(job.model.name)
        if runtime is None and self._shelf is None:
            return
        model = runtime.fingerprint if runtime else fingerprint(job.model, self._kv_bits)
        job.cached_tokens = prefixes.find(model, tokens)[1]
        job.miss = self._miss(prefixes.closest(model, tokens), job)
        if self._shelf is not None:
            kept = self._shelf.find(model, tokens[:-1])[1]
            job.cached_tokens, job.miss = max(kept, job.cached_tokens), job.miss if kept <= job.cached_tokens else None

    def _miss(self, closest: tuple[list[int], int], job: Generation) -> Miss | None:
        """Where the prompt and the cached one most like it part, if they do."""
        tokens = job._prompt.tokens
        was, at = closest
        if not 0 < at < min(len(was), len(tokens)):
            return None
        decode = job._tongue.tokenizer.decode
        index, role = job._tongue.locate(job.request, decode(tokens[:at])) or (None, "")
        return Miss(at, index, role, decode(was[at:at + 8]), decode(tokens[at:at + 8]))

    def count_tokens(self, request: Request) -> int:
        """Prompt tokens of a request, rendered just as `submit` does. Raises as `submit`, but never for length."""
        return len(self._tongue(self.resolve(request.model)).prompt(self._preset(request)).tokens)

    def loaded(self) -> list[Loaded]:
        """The models in memory."""
        pool, ahead = self._pool, time.time() - time.monotonic()  # what is told is the wall's time, what is measured is not
        return [Loaded(r.local, r.size + pool.prefixes.held(r.fingerprint),
                       None if (at := r.expires) is None else at + ahead, self.context_length(r.local))
                for r in list(pool.runtimes.values())]

    def unload(self, name: str) -> None:
        """Frees a model once its running requests are through, and returns then. Raises ModelNotFound."""
        done = threading.Event()
        with self._lock:
            self._unloads.append((self.resolve(name).name, done))
            self._lock.notify_all()
        while not done.wait(0.2) and self._thread.is_alive():
            pass

    def health(self) -> str | None:
        """What is wrong with the engine, or None. Answers at once, whatever the engine does."""
        since = self._stepping
        if self._broken or not self._thread.is_alive():
            return self._broken or "the engine has stopped"
        if self._draining or self._closing:
            return "the server is shutting down"
        return "the engine hangs" if since is not None and time.monotonic() - since > self.STUCK else None

    @property
    def broken(self) -> bool:
        """Whether it has failed for good, which only a new process changes."""
        return bool(self._broken)

    def stats(self) -> Stats:
        """Figures of this moment."""
        from mlx.core import get_active_memory

        pool = self._pool
        running = sum(job._phase is not Phase.WAITING for job in pool.jobs())
        return Stats(self._waiting(), running, len(pool.runtimes), pool.prefixes.nbytes, pool.prefixes.limit,
                     get_active_memory(), pool.memory, self._totals)

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and waits at most so long for those there are."""
        deadline = time.monotonic() + seconds
        with self._lock:
            self._draining = True
            while (self._queue or self._pool.jobs()) and not (self._closing or self._broken) and self._thread.is_alive() and (
                    time.monotonic() < deadline):
                self._lock.wait(0.05)

    def close(self, grace: float = 4.0) -> bool:
        """Ends running work with EngineClosed, frees the models and joins the thread, waiting at most `grace` seconds.

        Returns whether the thread has ended; a step on the GPU cannot be interrupted.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join(grace)
        return not self._thread.is_alive()

    def follow(self) -> bool:
        """Does what rank 0 decides, until it ends; returns whether all went well."""
        self._thread.join()
        return not self.broken

    def _twin(self, request: Request, prompt: Prompt, limit: int, by_context: bool, born: float) -> Generation:
        """This process's own of a request that has come to rank 0."""
        job = Generation(request, self._default, self._tongue(self._default), prompt, limit, by_context, self._mutex)
        job._born = born
        return job

    def _lose(self, reason: str) -> None:
        """Ends everything, as a signal would: a process of the group is gone, for which the MLX thread may wait for ever."""
        self._broken = reason
        with self._lock:
            jobs = [*self._queue, *self._pool.jobs()]
            self._lock.notify_all()
        for job in jobs:
            job._fail(EngineClosed(reason))
        os.kill(os.getpid(), signal.SIGTERM)

    def _tongue(self, local: LocalModel) -> Tongue:
        with self._lock:
            while not self._ready or self._tongues.get(local.name, ...) is None:
                if self._closing or self._broken:
                    raise EngineClosed(self._broken or "the server is shutting down")
                self._lock.wait()
            if local.name in self._tongues:
                return self._tongues[local.name]
            self._tongues[local.name] = None
        try:
            tongue = Tongue(local)
            if self._shelf is not None:
                tongue.learn(self._shelf.answers(fingerprint(local, self._kv_bits)))
        except BaseException:
            with self._lock:
                del self._tongues[local.name]
                self._lock.notify_all()
            raise
        with self._lock:
            self._tongues[local.name] = tongue
            self._lock.notify_all()
        return tongue

    def _room(self, local: LocalModel, request: Request, prompt: int) -> tuple[int, bool]:
        """How many tokens may be generated, and whether the context window is what bounds them."""
        context = self.context_length(local)
        if prompt and prompt >= context:
            raise PromptTooLong(prompt, context)
        asked = [n for n in (request.max_tokens, self._max_tokens) if n is not None]
        room = context - prompt
        return min([room, *asked]), not asked or min(asked) > room

    # -- the MLX thread

    def _main(self) -> None:
        try:
            import mlx.core as mx
            importlib.import_module("mlx_lm.generate")  # slow: done here so that callers need not wait for it
            if mx.metal.is_available():
                usable = usable_memory()
                mx.set_memory_limit(usable)
                mx.set_cache_limit(usable // 16)  # freed buffers that MLX keeps for itself
            with self._lock:
                self._ready = True
                self._lock.notify_all()
            if self._default is not None:
                self._preload(self._default)
            while turn := self._group.decide(self._wait):
                self._guarded_step(turn)
                if self._group.lost:
                    self._broken = self._group.lost
                    return
            self._group.close()
        except Exception:
            log.critical("the engine has stopped", exc_info=True)
            self._broken = "the engine has stopped after an internal error"
        finally:
            self._shutdown()

    def _preload(self, local: LocalModel) -> None:
        """Loads the default model before anyone asks for it; a failure is reported again to whoever does."""
        try:
            self._open(local, self._tongue(local))
        except EngineError as error:
            log.error("%s", error)
            self._group.give_up(str(error))

    def _check_size(self, local: LocalModel) -> None:
        memory, size = self._pool.memory, local.size // self._group.size
        if size <= memory:
            return
        fitting = [model for model in self._library.models() if model.size <= memory and "completion" in model.capabilities]
        best = max(fitting, key=lambda model: model.size, default=None)
        raise ModelLoadError(
            f"model '{local.name}' needs {gigabytes(size)} of memory, and {gigabytes(memory)} can be used; "
            + (f"'{best.name}' ({gigabytes(best.size)}) fits" if best else "take a smaller or more quantised one"))

    def _open(self, local: LocalModel, tongue: Tongue) -> Runtime | None:
        try:
            self._check_size(local)
            if local.name not in self._pool.runtimes:
                self._settle()
            runtime = self._pool.open(local, tongue)
        except ModelLoadError as error:
            self._group.give_up(str(error))
            raise
        if runtime is not None and runtime.keep_alive is None:
            runtime.keep_alive = self._keep_alive
        return runtime

    def _wait(self) -> Turn | None:
        """Sleeps until there is work; None when the engine is to end."""
        self._stepping = None
        with self._lock:
            while not self._closing:
                if self._queue or self._unloads or self._pool.jobs():
                    self._stepping = time.monotonic()
                    cancelled = [job for job in [*self._queue, *self._pool.jobs()] if job._cancelled]
                    self._queue = [job for job in self._queue if not job._cancelled]
                    return Turn(self._queue.copy(), cancelled)
                runtimes = self._pool.runtimes.values()
                writes = [runtime.used + self.SETTLE for runtime in runtimes if runtime.unshelved()]
                due = min([*writes, *(r.expires for r in runtimes if r.expires is not None)], default=None)
                if due is not None and due <= time.monotonic():
                    return Turn([], [])
                self._lock.wait(None if due is None else max(0.01, due - time.monotonic()))
            return None

    def _guarded_step(self, turn: Turn) -> None:
        """A step that cannot end the thread: what nobody below caught costs the running requests and the loaded models,
        whose state is unknown then, and nothing else."""
        try:
            self._step(turn)
            self._tidy()
        except Exception as error:
            self._group.failed(error)
            log.critical("unexpected failure in the engine", exc_info=True)
            for job in self._pool.forget():
                job._fail(EngineError("the engine failed; it starts afresh, please try again"))

    def _step(self, turn: Turn) -> None:
        """Ends what was cancelled, takes in what is new, reads a chunk of one prompt, adds a token to each answer."""
        jobs = self._pool.jobs()
        if turn.cancelled:
            self._settle()
        for runtime in self._pool.runtimes.values():
            runtime.drop_cancelled(turn.cancelled)  # first, so that the same request sent again finds what was computed
        jobs += self._admit(turn.waiting)
        if paused := self._pool.settle():
            log.info("out of memory for all answers at once: one waits after %d tokens", paused.usage.completion_tokens)
            with self._lock:
                self._queue.insert(0, paused)
        runtimes = list(self._pool.runtimes.values())
        decoding = [job for runtime in runtimes for job in runtime.decoding()]
        owner = {job: runtime for runtime in runtimes for job in runtime.candidates()}
        started = time.perf_counter()
        if chosen := owner and self._group.decide(lambda: self._schedule.choose(list(owner), decoding)):
            self._settle()
            owner[chosen].prefill(chosen, alone=len(self._pool.jobs()) == 1)
            self._schedule.prefilled(chosen, time.perf_counter() - started, decoding)
            started = time.perf_counter()
        for runtime in runtimes:
            if len(runtimes) > 1:
                self._settle()
            runtime.decode()
        self._schedule.decoded(time.perf_counter() - started)
        self._count(jobs)

    def _settle(self) -> None:
        """Waits for the tokens that are being computed, before anything else is: MLX tells of a failure whoever comes next,
        and leaves those whose tokens it were with wrong ones."""
        import mlx.core as mx

        try:
            mx.synchronize()
        except Exception as error:
            for runtime in self._pool.runtimes.values():
                if runtime.decoding():
                    runtime.part(error)

    def _admit(self, waiting: list[Generation]) -> list[Generation]:
        """Lets requests in, the highest priority first and then as they came, until one has to wait for a model or for
        memory; then everyone behind it waits, too. Returns those that are in."""
        admitted: list[Generation] = []
        if self._group.rank:
            self._queue = waiting.copy()
        for job in sorted(waiting, key=lambda job: job.request.priority):
            try:
                runtime = self._open(job.model, job._tongue)
                if runtime is None or not self._pool.fits(runtime, job):
                    break
            except EngineError as error:
                self._leave_queue(job)
                self._totals.endings[type(error).__name__] += 1
                job._fail(error)
                continue
            self._leave_queue(job)
            self._settle()
            runtime.admit(job)
            admitted.append(job)
        return admitted

    def _leave_queue(self, job: Generation) -> None:
        with self._lock:
            self._queue.remove(job)

    def _count(self, jobs: list[Generation]) -> None:
        """Adds those requests that have ended to the totals."""
        for job in jobs:
            if job._phase is Phase.ENDED:
                self._totals.endings[job.ending] += 1
                self._totals.prompt_tokens += job.prompt_tokens
                self._totals.cached_tokens += job.usage.cached_tokens
                self._totals.completion_tokens += job.usage.completion_tokens

    def _tidy(self) -> None:
        """Unloads what is due and not in use, and writes to disk when there is nothing else to do."""
        pool, now = self._pool, time.monotonic()

        def due() -> list[str]:
            with self._lock:
                asked = {name for name, _ in self._unloads}
            return [name for name in idle if name in asked or (pool.runtimes[name].expires or math.inf) <= now]

        idle = [name for name, runtime in pool.runtimes.items() if not runtime.jobs]
        for name in idle and self._group.decide(due):
            pool.unload(name)
        if not self._queue and not pool.jobs():
            settled = (r for r in pool.runtimes.values() if r.unshelved() and now >= r.used + self.SETTLE)
            if runtime := next(settled, None):
                runtime.write()  # only one segment: someone may be waiting by then
        with self._lock:
            for name, done in self._unloads:
                if name not in pool.runtimes:
                    done.set()
            self._unloads = [(name, done) for name, done in self._unloads if name in pool.runtimes]
            self._lock.notify_all()  # whoever waits for the end of the work

    def _shutdown(self) -> None:
        with self._lock:
            self._closing = True
            jobs, self._queue = [*self._queue, *self._pool.jobs()], []
            self._lock.notify_all()
        for job in jobs:
            job._fail(EngineClosed(self._broken or "the server is shutting down"))
        if self._shelf is not None and not self._broken:
            self._last_writes()
        for _, done in self._unloads:
            done.set()
        if self._ready and not self._group.lost:  # a torn connection would hold MLX for ever
            import mlx.core as mx

            self._pool.forget()
            mx.clear_streams()  # their threads must not outlive this one

    def _last_writes(self) -> None:
        """Takes what the running requests have computed and writes what there is time for."""
        until = time.monotonic() + self.LAST_WRITES
        try:
            for runtime in self._pool.runtimes.values():
                for job in runtime.jobs:
                    job._cancelled, job._phase = True, Phase.DECODE if job._number else Phase.PREFILL
                runtime.drop_cancelled(runtime.jobs)
                while runtime.unshelved() and time.monotonic() < until:
                    runtime.write()
        except Exception:
            log.error("the prefix cache could not be written", exc_info=True)


def _filled(sampling: Sampling, defaults: Sampling) -> Sampling:
    """What the client left open is taken from the model's defaults."""
    return Sampling(**{f.name: getattr(defaults, f.name) if getattr(sampling, f.name) is None else getattr(sampling, f.name)
                       for f in dataclasses.fields(Sampling)})
