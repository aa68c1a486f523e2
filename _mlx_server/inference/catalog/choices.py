"""Which models of a hub suit a machine: a rule over the hub's listing, not a list of names that
would age."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.catalog.download import hub_error
from _mlx_server.inference.catalog.hub import Hub
from _mlx_server.inference.catalog.models import context_length
from _mlx_server.inference.catalog.names import NameParts, active_billions, billions, parse_name

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

LISTED = 500  # models of the listing that are looked at, the most downloaded ones
RECENT = datetime.timedelta(days=365)  # before the newest one; older ones are surpassed
WEIGHTS = 0.6  # of the memory; the rest is for conversations and the prompt cache
LIGHT = 0.25  # of the memory, for a model beside which other programs have room
ENOUGH_CONTEXT = 64_000  # tokens that an agent's sessions need
TRIED = 4  # models for a reason whose window is asked for, one request each
MIN_BILLIONS = 3  # parameters below which tools are called by chance
_BYTES = {"U32": 4, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class Candidate:
    """A model that a hub lists. `size` is in bytes, `billions` are its parameters, `active` those
    that work at a time, if it has experts."""

    repo: str
    size: int
    downloads: int  # of the last 30 days
    created: datetime.datetime
    parts: NameParts
    billions: float
    active: float | None
    sees: bool


@dataclass(frozen=True)
class Choice:
    """A model that is offered, with its window in tokens and the reason for it. All that are
    offered know tools."""

    candidate: Candidate
    context_length: int
    why: str


def offer(hub: Hub, memory: int) -> list[Choice]:
    """The models for a machine whose GPU may use so many bytes, the best first. Raises HubError."""
    candidates = list(_recent(_listed(hub)))
    context = functools.cache(functools.partial(_context_length, hub))
    choices: list[Choice] = []
    for why, fitting in _roles(candidates, memory):
        roomy = (one for one in fitting[:TRIED] if context(one.repo) >= ENOUGH_CONTEXT)
        best = next(roomy, None)
        if best and all(best != choice.candidate for choice in choices):
            choices.append(Choice(best, context(best.repo), why(best)))
    return choices


def _roles(
    candidates: list[Candidate], memory: int
) -> Iterator[tuple[Callable[[Candidate], str], list[Candidate]]]:
    """Reasons to take a model, each with those that it speaks for, the best first."""
    fit = _best_bits([one for one in candidates if one.size <= memory * WEIGHTS], memory)
    largest = sorted(fit, key=lambda one: (one.billions, one.downloads), reverse=True)
    yield lambda one: "the largest that leaves room for long sessions", largest
    quick = [one for one in largest if one.active and one.active <= one.billions / 4]
    yield (
        lambda one: f"quick: {one.active:g} of {one.billions:g} billion parameters work at a time",
        quick,
    )
    seeing = [one for one in largest if one.sees]
    yield lambda one: "the largest that sees images", seeing
    popular = sorted(fit, key=lambda one: one.downloads, reverse=True)
    yield lambda one: "the most downloaded of those that fit", popular
    light = [one for one in largest if one.size <= memory * LIGHT]
    yield lambda one: "light: leaves memory to other programs", light


def _best_bits(candidates: list[Candidate], memory: int) -> list[Candidate]:
    """One of each model: 8 bits if half of the memory can hold them, else the largest of 4 to 6."""
    best: dict[object, Candidate] = {}
    for one in sorted(candidates, key=lambda one: (one.size, one.downloads)):
        key = one.parts.words, one.parts.size, one.active
        wide = bool(one.parts.bits & {"8", "16"})
        if key not in best or not wide or one.size <= memory / 2:
            best[key] = one
    return list(best.values())


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
    size = _weights(info)
    parts = parse_name(info.id)
    if "tools" not in str(template) or not _loadable(str(config.get("model_type"))):
        return None
    if not size or info.created_at is None or not parts.bits or parts.bits & {"2", "3", "16"}:
        return None
    bits = min((int(b[-1]) for b in parts.bits if b[-1].isdigit()), default=4)
    total = billions(parts.size) or size * 8 / bits / 1e9
    if total < MIN_BILLIONS:
        return None
    return Candidate(
        repo=info.id,
        size=size,
        downloads=info.downloads or 0,
        created=info.created_at,
        parts=parts,
        billions=round(total, 1),
        active=active_billions(parts),
        sees=info.pipeline_tag == "image-text-to-text",
    )


def _weights(info: ModelInfo) -> int:
    """Bytes of a model's weights."""
    counts = info.safetensors.parameters if info.safetensors else {}
    return sum(_BYTES.get(kind, 2) * count for kind, count in counts.items())


@functools.cache
def _loadable(kind: str) -> bool:
    """Whether mlx-lm loads models of this type."""
    from mlx_lm import models
    from mlx_lm.utils import MODEL_REMAPPING

    name = MODEL_REMAPPING.get(kind, kind)
    return name.isidentifier() and any(
        os.path.exists(os.path.join(path, f"{name}.py")) for path in models.__path__
    )


def _context_length(hub: Hub, repo: str) -> int:
    """Tokens, as a repo's config.json has them. Raises HubError."""
    try:
        return context_length(hub.read_json(repo, "config.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise hub_error(error, repo) from error
