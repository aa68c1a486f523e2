"""Where the tensors of a model's MTP head are: in its checkpoint, or in a folder of their own.

What a config says about a head means nothing: conversions keep it and drop the tensors. A head is
where a file holds it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _mlx_server.inference.catalog.library import hub_folder, snapshots, subfolders
from _mlx_server.inference.catalog.models import LocalModel, fingerprint, read_header
from _mlx_server.inference.catalog.names import NameParts, parse_name

_FAMILIES = ("qwen3_next", "qwen3_5")  # beginnings of model types
_IN_CHECKPOINT = re.compile(r"(?:\w+\.)*?mtp\.(.+)")
INSIDE = "mtp"  # the folder within a model's that may hold its head
RAW = "as_trained"  # in a file's metadata: its norms are as trainers save them
_JOINT = "fc.weight"  # joins a hidden state and the next token; no other kind of head has it


@dataclass(frozen=True)
class HeadFiles:
    """The files that hold a head. `prefixed` says whether its tensors' names begin with "mtp.",
    `raw` whether the checkpoint around them is as its trainers saved it, not as MLX did."""

    files: tuple[Path, ...]
    prefixed: bool
    raw: bool = False

    def name(self, tensor: str) -> str | None:
        """A tensor's name within the head; None for one that is no part of it."""
        return name_in_head(tensor) if self.prefixed else tensor


def name_in_head(tensor: str) -> str | None:
    """The name within a head of a checkpoint's tensor; None for one that is no part of it."""
    match = _IN_CHECKPOINT.fullmatch(tensor)
    return match[1] if match else None


def can_have_head(local: LocalModel) -> bool:
    """Whether models of this family were trained with a head of the kind that is used here."""
    return local.family.startswith(_FAMILIES)


def is_head_of(head: str, model: str) -> bool:
    """Whether a repo's name says that it is a head for the model of a name."""
    return _is_for(parse_name(head), parse_name(model))


@dataclass(frozen=True)
class Identity:
    """What a model's KV states depend on besides the tokens: `fingerprint` names it, and `head` has
    the files of the MTP head whose state is kept with the model's. Whoever looks for states of a
    model that is not loaded and whoever loads it make it alike."""

    head: HeadFiles | None
    fingerprint: str

    @classmethod
    def of(cls, local: LocalModel, kv_bits: int | None, speculates: bool) -> Identity:
        """As it is on the disk now. From any thread."""
        head = find_head(local) if speculates else None
        return cls(head, fingerprint(local, kv_bits, head.files if head else ()))


def weights_size(local: LocalModel, speculates: bool) -> int:
    """Bytes of a model's weights, with those of a head that is not among its own files."""
    head = find_head(local) if speculates else None
    beside = [path for path in (head.files if head else ()) if path.parent != local.path]
    return local.size + sum(path.stat().st_size for path in beside)


def find_head(local: LocalModel) -> HeadFiles | None:
    """The model's head, if there is one for it: in the model's folder, in a folder `mtp` within it,
    or in one beside it or in the Hugging Face cache whose name is the model's with the word MTP and
    any quantisation, as in "Qwen3.8-27B-MTP-4bit". One of the same quantisation is preferred."""
    if not can_have_head(local):
        return None
    return next(filter(None, map(_read, [local.path, *_sidecars(local)])), None)


def _read(folder: Path) -> HeadFiles | None:
    """The head in a folder."""
    headers = {}
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError, ValueError):
            headers[path] = read_header(path)
    inside = HeadFiles((), prefixed=True)
    found = {path: set(map(inside.name, header)) for path, header in headers.items()}
    if any(_JOINT in names for names in found.values()):
        files = tuple(path for path, names in found.items() if names - {None})
        tensors = (pair for header in headers.values() for pair in header.items())
        return HeadFiles(files, True, any(_is_raw(*pair) for pair in tensors))
    if any(_JOINT in header for header in headers.values()):
        return HeadFiles(tuple(headers), prefixed=False)
    return None


def _is_raw(name: str, tensor: Any) -> bool:
    """Whether an entry of a header tells that the checkpoint is as its trainers saved it."""
    if not isinstance(tensor, dict):  # nobody has checked these files
        return False
    shape = tensor.get("shape")
    if name == "__metadata__":
        return RAW in tensor
    return name.endswith("conv1d.weight") and isinstance(shape, list) and shape[-1:] != [1]


def _sidecars(local: LocalModel) -> Iterator[Path]:
    """Folders that may hold the model's head, the likeliest first."""
    yield local.path / INSIDE
    beside, name = local.path.parent, local.name
    if beside.name == "snapshots":
        beside, name = beside.parents[1], beside.parent.name.removeprefix("models--")
        name = name.replace("--", "/")
    model = parse_name(name)
    named = [(parse_name(other), path) for other, path in _named([beside, hub_folder()])]
    fitting = [(parts, path) for parts, path in named if _is_for(parts, model)]
    for _, path in sorted(fitting, key=lambda pair: pair[0].bits != model.bits):
        yield path


def _named(roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Folders whose names have MTP in them, with the names of repos without what a cache adds."""
    for root in dict.fromkeys(roots):
        for path in subfolders(root):
            name = path.name.removeprefix("models--").replace("--", "/")
            if "mtp" not in name.lower():
                continue
            yield from ((name, one) for one in (snapshots(path) if name != path.name else [path]))


def _is_for(head: NameParts, model: NameParts) -> bool:
    """Whether a head's name says that it is for the model of a name."""
    return (
        head.words == model.words | {"mtp"}
        and (head.size, head.chat, head.revision) == (model.size, model.chat, model.revision)
        and head.extras == model.extras
    )
