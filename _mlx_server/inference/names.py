"""What the name of a model says, and which model answers to a name."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from _mlx_server.inference.models import LocalModel

_QUANTISATION = re.compile(
    r"(?:(?:i?q|int|w)(\d)|(\d)bits?|b?f(?:p)?(16|32)|((?:mx|nv)fp\d))(?:a16)?"
)
_SIZE = re.compile(r"(e|\d+x)?(\d+(?:\.\d+)?)([mbt])")
_REVISION = re.compile(r"\d{4}|v\d+(?:\.\d+)*")
# Words a repo may carry without changing what the model is: active parameters, experts, context,
# quantisation recipe.
_OPTIONAL = re.compile(r"a\d+(?:\.\d+)?b|\d+e|\d+k|\d{5,}|qat|dwq|awq|gptq|gs\d+|hi")
_CHAT = {"instruct", "it", "chat", "text"}
_SILENT = {"mlx", "hf", "lm", "meta", "c4ai"}
# Named after the start of a name: what was fine-tuned
_BASES = {"llama", "qwen", "mistral", "gemma", "phi"}
# Words Ollama leaves out of a family's name, where size or habit says them.
_UNSAID = re.compile(
    r"(?:devstral|magistral)-(small)|phi-?3(?:\.5)?-(mini|small|medium)|deepseek-(?:coder-)?v2-(lite)"
)


@dataclass(frozen=True)
class NameParts:
    """A model's name taken apart. `words` are its family, version and variants, in no order: what
    every name that means this model must say. `extras` are those that it may say besides. Any other
    word makes it another model's name.

    "Qwen3-Coder-30B-A3B-Instruct-4bit" -> words qwen 3 coder, extras a3b, size 30b, chat, bits
    {"4"} "deepseek-r1:8b-q8_0"               -> words deepseek r 1, size 8b, bits {"8"}"""

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
        # DeepSeek-V3 is a version, 7B-v0.3 not
        elif _REVISION.fullmatch(token) and (token.isdigit() or sizes or chat):
            extras.add(token)
            # Later digits date the quantisation
            revision = revision if bits else max(revision, token)
        elif _OPTIONAL.fullmatch(token):
            extras.add(token)
        elif token not in _SILENT and token not in extras:
            # qwen2.5vl is qwen 2.5 vl, and 4.0 is 4
            words += (
                [token]
                if _REVISION.fullmatch(token)
                else [
                    {"pt": "base"}.get(word, re.sub(r"\.0$", "", word))
                    for word in re.findall(r"\d+(?:\.\d+)*|[^\W\d_]+|[^\w\s]", token)
                ]
            )
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
    return NameParts(
        frozenset(words + sizes[:-1]),
        frozenset(extras),
        sizes[-1] if sizes else None,
        chat,
        frozenset(bits),
        revision,
    )


def _billions(size: str | None) -> float:
    """ "0.6b" -> 0.6, "135m" -> 0.135, "8x7b" -> 56, "e4b" -> 4."""
    match = _SIZE.fullmatch(size or "")
    if not match:
        return 0.0
    times = int(match[1][:-1]) if match[1] and match[1] != "e" else 1
    return times * float(match[2]) * {"m": 1e-3, "b": 1, "t": 1e3}[match[3]]


def _bits(model: LocalModel) -> str:
    """ "4", "8", ...; "16" for all that is not quantised."""
    digits = re.sub(r"\D", "", model.quantization)
    return digits if digits not in ("", "32") else "16"


def _answers(model: LocalModel, asked: NameParts) -> bool:
    """Whether `model` may be served under a name: the same family, version and variant, and all
    else that was said."""
    parts = parse_name(model.name)
    billions = model.parameters / 1e9
    return (
        bool(parts.words)
        and parts.words <= asked.words | asked.extras <= parts.words | parts.extras
        and (
            asked.size in (None, parts.size)
            # phi-4 has its size in no name, but phi4:14b means it
            or parts.size is None
            and math.isclose(billions, _billions(asked.size), rel_tol=0.05)
        )
        and (parts.chat or not asked.chat)
        and asked.bits <= {_bits(model), model.quantization}
    )


VENDOR_NAME = re.compile(r"default|claude-.*|gpt-(?!oss).*|(?:opus|sonnet|haiku)(?:\[.*\])?")
_REGISTRY = re.compile(r"(?:(?:registry\.ollama\.ai|hf\.co|huggingface\.co)/)?(?:library/)?")
_HABIT = ["4", "5", "6", "8", "3", "16"]  # the bits to serve when a name does not say, best first


def plain_name(name: str) -> str:
    lowered = name.strip().lower()
    return lowered[_REGISTRY.match(lowered).end() :].removesuffix(":latest")


def best_match(
    plain: str, models: list[LocalModel], last_used: LocalModel | None
) -> LocalModel | None:
    """The best model of exactly this name, else the best that answers to it; an org has to be the
    model's."""
    org, _, _ = plain.rpartition("/")
    asked = parse_name(plain)
    exact = [model for model in models if model.name.lower() == plain]
    exact = exact or [model for model in models if model.name.lower().rpartition("/")[2] == plain]
    found = exact or [
        model
        for model in models
        if org in ("", model.name.lower().rpartition("/")[0]) and _answers(model, asked)
    ]

    def rank(model: LocalModel) -> tuple:
        parts, bits = parse_name(model.name), _bits(model)
        return (
            asked.size is not None or last_used is None or model.name != last_used.name,
            not parts.chat,
            _HABIT.index(bits) if bits in _HABIT else len(_HABIT),
            _billions(parts.size) or model.parameters / 1e9,
        )

    found.sort(key=lambda model: (len(parse_name(model.name).extras), model.name))
    found.sort(key=lambda model: parse_name(model.name).revision, reverse=True)
    return min(found, key=rank, default=None)


def best_repo(name: str, repos: Iterable[str]) -> str | None:
    """The one of some repo ids that a name means, by the rules for installed models; their names
    say the quantisation."""

    def described(repo: str) -> LocalModel:
        bits = min(parse_name(repo).bits, default="16")
        quantization = f"int{bits}" if bits.isdigit() else bits
        return LocalModel(repo, Path(), 0, 0.0, "", {}, "", 0, "", quantization, 0, 0, [])

    found = best_match(plain_name(name), [described(repo) for repo in repos], None)
    return found and found.name


def stand_in(models: list[LocalModel]) -> LocalModel | None:
    chatting = [model for model in models if "completion" in model.capabilities]
    return max(
        chatting,
        key=lambda one: (one.name != "demo", "tools" in one.capabilities, one.modified),
        default=None,
    )
