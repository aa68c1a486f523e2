"""Which models of a hub suit a machine: a rule over the hub's listing, not a list of names that
would age."""

from __future__ import annotations

import datetime
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.catalog.hub import Hub
from _mlx_server.inference.catalog.models import context_length, unsupported
from _mlx_server.inference.catalog.names import NameParts, active_billions, billions, parse_name
from _mlx_server.inference.images.image_layout import has_tower
from _mlx_server.inference.protocol import EngineError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

LISTED = 500  # models of the listing that are looked at, the most downloaded ones
RECENT = datetime.timedelta(days=365)  # before the newest one; older ones are surpassed
WEIGHTS = 0.75  # of the memory, the most that weights take; a session has to fit as well
MANY_BITS = 0.6  # of the memory, for a model in more bits than the fewest there are
LIGHT = 0.3  # of the memory, for a model beside which other programs have room
FILLED = 0.9  # of the memory, by weights and a session; prompts are read in the rest
ENOUGH_CONTEXT = 64_000  # tokens that an agent's sessions need
TRIED = 4  # models for a reason that are looked at more closely, two requests each
MIN_BILLIONS = 3  # parameters below which tools are called by chance
QUICK_BILLIONS = 4  # parameters at a time that a laptop reads some fifty times a second
CLASS = 1.25  # ratio of parameters within which models are of one size, and the liked ones better
WHOLE = 0.7  # of the size that a name tells; less is an adapter or a part of a model
GROUP = 64  # weights that share a scale and a bias, unless the config says another number
_TASKS = {"text-generation", "image-text-to-text", "any-to-any", None}
# Words of models that have a chat's template, but do not chat
_OTHERS = {"base", "embedding", "reranker", "guard"}
_BYTES = {"I32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class Candidate:
    """A model that a hub lists. `size` is in bytes, by the hub's count of weights, `billions` are
    its parameters, `active` those that work at a time, if its name says so."""

    repo: str
    size: float
    downloads: int  # of the last 30 days
    created: datetime.datetime
    parts: NameParts
    billions: float
    active: float | None
    sees: bool  # unless its files tell otherwise

    @property
    def model(self) -> object:
        """The same for one model in other bits."""
        return self.parts.words, self.parts.size, self.active


@dataclass(frozen=True)
class Choice:
    """A model that is offered, with its size in bytes, its window in tokens and the reason for it.
    All that are offered know tools."""

    repo: str
    size: int
    context_length: int
    sees: bool
    why: str


@dataclass(frozen=True)
class _Model:
    """What a candidate's files tell."""

    size: int
    context_length: int
    sees: bool
    dense: bool  # without experts


@dataclass(frozen=True)
class _Role:
    """A reason to take a model: those that it may speak for, the best first, and what the files of
    one have to tell."""

    candidates: list[Candidate]
    why: Callable[[Candidate], str]
    has: Callable[[_Model], bool] = lambda model: True


def offer(hub: Hub, memory: int) -> list[Choice]:
    """The models for a machine whose GPU may use so many bytes, the best first. Raises HubError."""
    candidates = list(_recent(_listed(hub)))
    look = functools.cache(functools.partial(_suitable, hub, memory))
    choices: dict[object, Choice] = {}
    for role in _roles(candidates, memory):
        for one in role.candidates[:TRIED]:
            model = look(one)
            if model and role.has(model):
                window, why = model.context_length, role.why(one)
                found = Choice(one.repo, model.size, window, model.sees, why)
                choices.setdefault(one.model, found)
                break
    return list(choices.values())


def _roles(candidates: list[Candidate], memory: int) -> Iterator[_Role]:
    fit = _best_bits([one for one in candidates if one.size <= memory * WEIGHTS], memory)
    largest = _largest_first(fit)
    yield _Role(largest, lambda one: "the largest that leaves room for long sessions")
    quick = [one for one in largest if one.active and one.active <= QUICK_BILLIONS]
    yield _Role(
        quick,
        lambda one: f"quick: {one.active:g} of {one.billions:g} billion parameters work at a time",
    )
    dense = [one for one in largest if not one.active]
    yield _Role(
        dense,
        lambda one: f"thorough and slower: all {one.billions:g} billion parameters work",
        lambda model: model.dense,
    )
    yield _Role(largest, lambda one: "the largest that sees images", lambda model: model.sees)
    popular = sorted(fit, key=lambda one: one.downloads, reverse=True)
    yield _Role(popular, lambda one: "the most downloaded of those that fit")
    light = _best_bits([one for one in candidates if one.size <= memory * LIGHT], memory)
    yield _Role(_largest_first(light), lambda one: "light: leaves memory to other programs")


def _largest_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Of those of one size the most downloaded first."""

    def rank(one: Candidate) -> tuple[int, int]:
        return round(math.log(one.billions, CLASS)), one.downloads

    return sorted(candidates, key=rank, reverse=True)


def _best_bits(candidates: list[Candidate], memory: int) -> list[Candidate]:
    """One of each model: that of the most bits which leave room, else of the fewest. Its downloads
    are those of all."""
    best: dict[object, Candidate] = {}
    downloads: Counter[object] = Counter()
    for one in sorted(candidates, key=lambda one: (one.size, one.downloads)):
        downloads[one.model] += one.downloads
        if one.model not in best or one.size <= memory * MANY_BITS:
            best[one.model] = one
    return [replace(one, downloads=downloads[model]) for model, one in best.items()]


def _recent(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    candidates = list(candidates)
    newest = max((one.created for one in candidates), default=None)
    return (one for one in candidates if newest and newest - one.created <= RECENT)


def _listed(hub: Hub) -> Iterator[Candidate]:
    """The models that can be served and know tools."""
    for info in hub.listing(LISTED):
        if candidate := _candidate(info):
            yield candidate


def _candidate(info: ModelInfo) -> Candidate | None:
    """What the hub lists, if it is a model for agents that mlx-lm loads."""
    config: dict[str, Any] = info.config or {}
    tokenizer = config.get("tokenizer_config") or {}
    template = config.get("chat_template_jinja") or tokenizer.get("chat_template") or ""
    parts = parse_name(info.id)
    if "tools" not in str(template) or not config.get("model_type") or unsupported(config):
        return None
    if info.pipeline_tag not in _TASKS or parts.words & _OTHERS:
        return None
    if info.created_at is None or not parts.bits or parts.bits & {"2", "3", "16"}:
        return None
    bits = min((int(b[-1]) for b in parts.bits if b[-1].isdigit()), default=4)
    named = billions(parts.size)
    size = _weights(info, bits, named)
    total = named or size * 8 / (bits + 32 / GROUP) / 1e9
    if total < MIN_BILLIONS or size < WHOLE * total * 1e9 * bits / 8:
        return None
    return Candidate(
        repo=info.id,
        size=size,
        downloads=info.downloads or 0,
        created=info.created_at,
        parts=parts,
        billions=round(total, 1),
        active=active_billions(parts),
        sees=info.pipeline_tag != "text-generation",
    )


def _weights(info: ModelInfo, bits: int, named: float) -> float:
    """Bytes of a model's weights. The hub counts the weights in packed integers of 32 bits, or
    these integers: which, is told by the parameters in billions that its name says, else by the
    scales and biases beside them."""
    counts = dict(info.safetensors.parameters) if info.safetensors else {}
    integers = counts.pop("U32", 0)
    others = sum(counts.values())
    packed = others >= integers * 32 / bits * 2 / GROUP
    if named and integers:
        weights = integers / 1e9
        packed = abs(math.log(weights * 32 / bits / named)) < abs(math.log(weights / named))
    rest = sum(_BYTES.get(kind, 2) * count for kind, count in counts.items())
    return integers * (4 if packed else bits / 8) + rest


def _suitable(hub: Hub, memory: int, one: Candidate) -> _Model | None:
    """What a repo's files tell, if the model fits with a session of an agent; None for others, and
    for one that cannot be read."""
    try:
        config = hub.read_json(one.repo, "config.json")
        text = {**config, **(config.get("text_config") or {})}
        model = _Model(
            size=hub.size(one.repo),
            context_length=context_length(config),
            sees=one.sees and has_tower(config, ["vision_tower."]),
            dense=not any(text.get(key) for key in _EXPERTS),
        )
        session = _state_bytes(text) * ENOUGH_CONTEXT
    except (EngineError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return None
    room = memory * FILLED if session else memory * MANY_BITS
    fits = model.size <= memory * WEIGHTS and model.size + session <= room
    return model if fits and model.context_length >= ENOUGH_CONTEXT else None


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _state_bytes(text: dict[str, Any]) -> int:
    """What a session's state takes for each token in 16 bits, as a config.json tells it: keys and
    values of the layers that attend to everything. 0 if it does not tell."""
    if isinstance(types := text.get("layer_types"), list):
        layers = types.count("full_attention")
    elif isinstance(pattern := text.get("hybrid_override_pattern"), str):
        layers = pattern.count("*")
    else:
        every = text.get("full_attention_interval") or text.get("sliding_window_pattern") or 1
        layers = text.get("num_hidden_layers", 0) // every
    if latent := text.get("kv_lora_rank"):  # one vector instead of keys and values
        return int(layers * (latent + text.get("qk_rope_head_dim", 0)) * 2)
    queries = text.get("num_attention_heads") or 1
    heads = text.get("num_global_key_value_heads") or text.get("num_key_value_heads") or queries
    width = text.get("global_head_dim") or text.get("head_dim")
    return int(layers * heads * (width or text.get("hidden_size", 0) // queries) * 2 * 2)
