"""What the name of a model says, and which model answers to a name."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.catalog.models import LocalModel

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
    r"(?:devstral|magistral)-(small)|phi-?3(?:\.5)?-(mini|small|medium)"
    r"|deepseek-(?:coder-)?v2-(lite)"
)


@dataclass(frozen=True)
class NameParts:
    """A model's name taken apart. `words` are its family, version and variants, in no order: what
    every name that means this model must say. `extras` are those that it may say besides. Any other
    word makes it another model's name.

    "Qwen3-Coder-30B-A3B-Instruct-4bit" has the words qwen, 3 and coder, the extra a3b, the size
    30b, chat and the bits {"4"}; "deepseek-r1:8b-q8_0" has the words deepseek, r and 1, the size 8b
    and the bits {"8"}."""

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
    reader = _NameReader()
    if unsaid := _UNSAID.match(bare):
        reader.extras.add(unsaid[unsaid.lastindex or 0])
    for token in re.split(r"[-_:\s]+", bare):
        reader.read(token)
    reader.move_base()
    sizes = sorted(reader.sizes, key=billions)
    return NameParts(
        frozenset(reader.words + sizes[:-1]),
        frozenset(reader.extras),
        sizes[-1] if sizes else None,
        reader.chat,
        frozenset(reader.bits),
        reader.revision,
    )


class _NameReader:
    """Sorts the tokens of a name, which it reads one after the other."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.sizes: list[str] = []
        self.extras: set[str] = set()
        self.bits: set[str] = set()
        self.chat = False
        self.revision = ""

    def read(self, token: str) -> None:
        if match := _QUANTISATION.fullmatch(token):
            self.bits.add(match[1] or match[2] or (match[3] and "16") or match[4])
        elif _SIZE.fullmatch(token):
            self.sizes.append(token)
        elif token in _CHAT:
            self.chat = True
        elif self._is_revision(token):
            self.extras.add(token)
            if not self.bits:  # later digits date the quantisation
                self.revision = max(self.revision, token)
        elif _OPTIONAL.fullmatch(token):
            self.extras.add(token)
        elif token not in _SILENT and token not in self.extras:
            self.words += _split_token(token)

    def _is_revision(self, token: str) -> bool:
        """DeepSeek-V3 has a version in its name, Mistral-7B-v0.3 a revision."""
        placed = token.isdigit() or bool(self.sizes) or self.chat
        return placed and bool(_REVISION.fullmatch(token))

    def move_base(self) -> None:
        """Makes the name and version of the model that was fine-tuned or distilled extras: they
        are the first such words that do not begin the name."""
        for start, word in enumerate(self.words):
            if start and word in _BASES:
                end = start + 1
                while end < len(self.words) and self.words[end][0].isdigit():
                    end += 1
                if self.words[start - 1] == "distill":
                    start -= 1
                self.extras.update(self.words[start:end])
                del self.words[start:end]
                return


def _split_token(token: str) -> list[str]:
    """qwen2.5vl is qwen 2.5 vl, and 4.0 is 4."""
    if _REVISION.fullmatch(token):
        return [token]
    words = re.findall(r"\d+(?:\.\d+)*|[^\W\d_]+|[^\w\s]", token)
    return ["base" if word == "pt" else word.removesuffix(".0") for word in words]


def billions(size: str | None) -> float:
    """Parameters: 0.6 for "0.6b", 0.135 for "135m", 56 for "8x7b", 4 for "e4b"."""
    match = _SIZE.fullmatch(size or "")
    if not match:
        return 0.0
    times = float(match[1][:-1]) if match[1] and match[1] != "e" else 1.0
    return times * float(match[2]) * {"m": 1e-3, "b": 1, "t": 1e3}[match[3]]


def active_billions(parts: NameParts) -> float | None:
    """How many of the parameters work at a time, where the name of a model with experts says it: 3
    for "a3b"."""
    active = [word for word in parts.extras if re.fullmatch(r"a\d+(?:\.\d+)?b", word)]
    return float(active[0][1:-1]) if active else None


def _bits(quantization: str) -> str:
    """ "4", "8", ...; "16" for all that is not quantised."""
    digits = re.sub(r"\D", "", quantization)
    return digits if digits not in ("", "32") else "16"


@dataclass(frozen=True)
class _Candidate:
    """What a name is compared with: a model's name, and what else is known of it."""

    name: str
    quantization: str
    parameters: int  # 0 if unknown

    def answers(self, asked: NameParts) -> bool:
        """Whether it may be served under a name: the same family, version and variant, and all
        else that was said."""
        parts = parse_name(self.name)
        if not parts.words or not parts.words <= asked.words | asked.extras:
            return False
        return (
            asked.words | asked.extras <= parts.words | parts.extras
            and self._has_size(asked.size, parts.size)
            and (parts.chat or not asked.chat)
            and asked.bits <= {_bits(self.quantization), self.quantization}
        )

    def _has_size(self, asked: str | None, named: str | None) -> bool:
        """phi-4 has its size in no name, but phi4:14b means it."""
        if asked is None or asked == named:
            return True
        return named is None and math.isclose(self.parameters / 1e9, billions(asked), rel_tol=0.05)


VENDOR_PREFIX = "anthropic/"
"""Before a model's name it means the same model. Claude Code offers no model whose name begins
otherwise: https://code.claude.com/docs/en/llm-gateway-protocol"""

VENDOR_NAME = re.compile(r"default|claude-.*|gpt-(?!oss).*|(?:opus|sonnet|haiku|fable)(?:\[.*\])?")
_REGISTRY = re.compile(r"^(?:(?:registry\.ollama\.ai|hf\.co|huggingface\.co)/)?(?:library/)?")
_PREFERRED_BITS = ["4", "5", "6", "8", "3", "16"]  # where a name does not say, best first


def plain_name(name: str) -> str:
    """A name as names are compared: in lower case, without a registry and `:latest`."""
    return _REGISTRY.sub("", name.strip().lower()).removesuffix(":latest")


def best_match(
    plain: str, models: Iterable[LocalModel], last_used: LocalModel | None
) -> LocalModel | None:
    """The best model of exactly this name, which is a plain one, else the best that answers to it;
    an org has to be the model's."""
    by_name = {model.name: model for model in models}
    candidates = [
        _Candidate(model.name, model.quantization, model.parameters) for model in by_name.values()
    ]
    found = _best(plain, candidates, last_used.name if last_used else None)
    return by_name[found.name] if found else None


def all_matches(plain: str, models: Iterable[LocalModel]) -> list[LocalModel]:
    """Every model of exactly this name, which is a plain one, else of this name in any org, else
    every one that answers to it."""
    by_name = {model.name: model for model in models}
    candidates = [
        _Candidate(model.name, model.quantization, model.parameters) for model in by_name.values()
    ]
    return [by_name[one.name] for one in _called(plain, candidates, parse_name(plain))]


def short_names(model: LocalModel) -> Iterator[str]:
    """Names that are shorter than a model's own and may mean it, the shortest first: family and
    size as in qwen3:8b, with the quantisation, with all else that the name says."""
    bare = model.name.rpartition("/")[2].lower()
    tokens = [token for token in re.split(r"[-_\s]+", bare) if token not in _SILENT]
    size = next((at for at, token in enumerate(tokens) if _SIZE.fullmatch(token)), None)
    if size:
        family, rest = "-".join(tokens[:size]), tokens[size + 1 :]
        yield f"{family}:{tokens[size]}"
        yield f"{family}:{tokens[size]}-q{_bits(model.quantization)}"
        words = [token for token in rest if not _QUANTISATION.fullmatch(token)]
        yield "-".join([f"{family}:{tokens[size]}", *words])
    yield bare


def best_repo(name: str, repos: Iterable[str]) -> str | None:
    """The one of some repo ids that a name means, by the rules for installed models; their names
    say the quantisation."""
    candidates = []
    for repo in repos:
        bits = min(parse_name(repo).bits, default="16")
        candidates.append(_Candidate(repo, f"int{bits}" if bits.isdigit() else bits, 0))
    found = _best(plain_name(name), candidates, None)
    return found.name if found else None


def _best(plain: str, candidates: list[_Candidate], last_used: str | None) -> _Candidate | None:
    asked = parse_name(plain)
    found = _called(plain, candidates, asked)

    def rank(one: _Candidate) -> tuple[Any, ...]:
        parts, bits = parse_name(one.name), _bits(one.quantization)
        habit = _PREFERRED_BITS.index(bits) if bits in _PREFERRED_BITS else len(_PREFERRED_BITS)
        return (
            asked.size is not None or one.name != last_used,
            not parts.chat,
            habit,
            billions(parts.size) or one.parameters / 1e9,
        )

    # Of those that rank equal, the later revision, then the plainer name
    found.sort(key=lambda one: (len(parse_name(one.name).extras), one.name))
    found.sort(key=lambda one: parse_name(one.name).revision, reverse=True)
    return min(found, key=rank, default=None)


def _called(plain: str, candidates: list[_Candidate], asked: NameParts) -> list[_Candidate]:
    """Those of exactly this name, else of this name in any org, else those that answer to it."""
    names = [(one, one.name.lower()) for one in candidates]
    org = plain.rpartition("/")[0]
    return (
        [one for one, name in names if name == plain]
        or [one for one, name in names if name.rpartition("/")[2] == plain]
        or [
            one
            for one, name in names
            if org in ("", name.rpartition("/")[0]) and one.answers(asked)
        ]
    )


def stand_in(models: Iterable[LocalModel]) -> LocalModel | None:
    """The model that serves a vendor's names if none was named: the newest one that can chat,
    rather one that knows tools, and the demo only if there are no others."""
    return max(
        (model for model in models if "completion" in model.capabilities),
        key=lambda one: (one.name != "demo", "tools" in one.capabilities, one.modified),
        default=None,
    )
