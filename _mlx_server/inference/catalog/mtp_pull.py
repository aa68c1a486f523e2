"""What a hub has of the MTP head that a conversion has lost: a sidecar of mlx-community, or a few
tensors in the checkpoint of the model it was made from.

https://huggingface.co/docs/safetensors/index#format"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _mlx_server.inference.catalog.download import (
    HubError,
    HubFailure,
    Order,
    RemoteFile,
    Span,
    read_span,
)
from _mlx_server.inference.catalog.hub_client import bounded
from _mlx_server.inference.catalog.mtp_files import INSIDE, RAW, is_head_of, name_in_head
from _mlx_server.inference.catalog.names import parse_name

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_SHARDS = 8  # that hold parts of a head, which is one layer
_MAX_HEADER = 32 << 20  # bytes of a shard's
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # of a number; other types are quantised in some way


def sidecars(model: str, repos: Iterable[str]) -> list[str]:
    """Which of the repos may be sidecars of a model, the likeliest first."""
    bits = parse_name(model).bits
    fitting = [repo for repo in repos if is_head_of(repo, model)]
    return sorted(fitting, key=lambda repo: parse_name(repo).bits != bits)


def head_order(repo: str, commit: str, index: Any, cache: Path, model: Path) -> Order | None:
    """How the MTP head in a repo's checkpoint, whose index says which file holds what (None: there
    is but one), gets into a folder within a model's; None if the checkpoint has none. Reads the
    headers of the files that hold it. Raises HubError, and whatever huggingface_hub does."""
    shards = {SINGLE}
    if index is not None:
        shards = {file for name, file in index["weight_map"].items() if name_in_head(name)}
    if len(shards) > _MAX_SHARDS:
        raise ValueError(f"a head in {len(shards)} files")
    header: dict[str, Any] = {"__metadata__": {"format": "pt", RAW: "yes"}}
    spans: list[Span] = []
    size = 0
    for shard in sorted(shards):
        for name, kind, span in _tensors(repo, commit, shard):
            length = span.end - span.start
            header[name] = {**kind, "data_offsets": [size, size + length]}
            spans.append(span)
            size += length
    if not spans:
        return None
    text = json.dumps(header)
    text += " " * (-len(text) % 8)
    digest = hashlib.sha256(f"{repo} {commit} {text}".encode()).hexdigest()
    file = RemoteFile(f"{INSIDE}/model.safetensors", 8 + len(text) + size, digest)
    return Order(repo, commit, str(cache), [file], text, spans, str(model / file.name))


def _tensors(repo: str, commit: str, shard: str) -> list[tuple[str, dict[str, Any], Span]]:
    """Names, types and places of those tensors of a file that belong to a head, as they stand
    there."""
    length = int.from_bytes(_read(repo, commit, Span(shard, 0, 8)), "little")
    if not 0 < length <= _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    found = []
    for name, kind in json.loads(_read(repo, commit, Span(shard, 8, 8 + length))).items():
        if not name_in_head(name):
            continue
        if kind["dtype"] not in _BYTES:
            raise HubError(HubFailure.NO_MODEL, f"that of {repo} is kept as {kind['dtype']}")
        start, end = kind["data_offsets"]
        if start < 0 or end - start != math.prod(kind["shape"]) * _BYTES[kind["dtype"]]:
            raise ValueError(f"{name} has {end - start} bytes")
        found.append((name, kind, Span(shard, 8 + length + start, 8 + length + end)))
    return sorted(found, key=lambda one: one[2].start)


def _read(repo: str, commit: str, span: Span) -> bytes:
    with bounded():
        return b"".join(read_span(repo, commit, span))
