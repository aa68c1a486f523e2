"""The prefix cache on disk."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _mlx_server.inference.conversations import Reading
from _mlx_server.inference.layers import concatenate_layers, is_trimmable
from _mlx_server.inference.prefix_cache import CacheEntry, Checkpoint, common_prefix
from _mlx_server.inference.protocol import first_line

log = logging.getLogger("mlx_server")


@dataclass(frozen=True, eq=False)
class Segment:
    """One file: what `tokens` add to the state at whose end the node `parent` is. Of a `trimmable`
    segment any beginning can be used."""

    path: Path
    node: str
    parent: str
    tokens: list[int]
    trimmable: bool
    nbytes: int
    readings: dict[str, Reading]


class DiskCache:
    """Prefix states on disk, where they outlive an unload and a restart.

    A state is a chain of segments. Each is one file of mlx-lm's `save_prompt_cache` with what its
    tokens add to the segment before: that part of the KV, and the whole state of layers that cannot
    be trimmed, as it is at the segment's end. So conversations share the files of what they have in
    common, and one that has grown adds only its growth.

    A segment's node is a hash of its parent's and of its tokens, the first parent being the model's
    fingerprint; a file's name is node and checksum, given when it is complete. A file that is torn,
    foreign or not what its name says is never used. All files together, the one being written
    included, stay within `limit` bytes: the least recently used segment that no other one follows
    goes first. A chain's files count as used together, by their modification times.

    Only the MLX thread changes it. Any thread may search it: a node's followers are a tuple that is
    replaced by every change."""

    NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{8})\.safetensors")

    def __init__(self, folder: Path, limit: int):
        """Reads what is there. Raises OSError when `folder` cannot be written to."""
        self.folder, self.limit = folder, limit
        self.nbytes = 0  # of all files
        self._segments: dict[str, Segment] = {}  # by node
        self._followers: dict[str, tuple[Segment, ...]] = {}  # by the parent's node
        self._writing = folder / f"writing-{os.getpid()}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        self._writing.write_bytes(b"")
        for leftover in folder.glob("writing-*.safetensors"):
            if leftover == self._writing or not _alive(leftover.stem.removeprefix("writing-")):
                leftover.unlink(missing_ok=True)
        for path in folder.iterdir():
            if match := self.NAME.fullmatch(path.name):
                try:
                    self._add(_read_segment(path, match[1]))
                except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                    self._discard(path, error)
        self._make_room(0, set())

    def readings(self, model: str) -> dict[str, Reading]:
        """What was read and generated in all that is kept of the model with this fingerprint."""
        found: dict[str, Reading] = {}
        nodes = [model]
        while nodes:
            for segment in self._followers.get(nodes.pop(), ()):
                found |= segment.readings
                nodes.append(segment.node)
        return found

    def find(self, model: str, tokens: list[int]) -> tuple[list[Segment], int]:
        """The chain of segments that restores the longest prefix of `tokens`, and its length;
        `model` is the fingerprint. From any thread."""
        # A link is a segment and the link before it.
        best: Any = None
        longest = 0
        links: list[tuple[str, int, Any]] = [(model, 0, None)]
        while links:
            node, start, before = links.pop()
            for segment in self._followers.get(node, ()):
                end = start + len(segment.tokens)
                reached = start + common_prefix(segment.tokens, tokens[start:end])
                link = (segment, before)
                if reached == end:
                    links.append((segment.node, end, link))
                if reached > longest and (reached == end or segment.trimmable):
                    best, longest = link, reached
        chain = []
        while best is not None:
            segment, best = best
            chain.append(segment)
        return chain[::-1], longest

    def load(self, chain: list[Segment], length: int) -> CacheEntry | None:
        """The state that a chain restores; None if one of its files turns out to be bad. On the MLX
        thread."""
        parts, tokens, checkpoints = [], [], {}
        for segment in chain:
            try:
                layers = _load_layers(segment.path)
                os.utime(segment.path)
            except Exception as error:  # MLX raises many types for a bad file
                self._remove(segment)
                self._discard(segment.path, error)
                return None
            parts.append(layers)
            tokens += segment.tokens
            if not segment.trimmable:
                kept = [None if is_trimmable(layer) else layer for layer in layers]
                checkpoints[len(tokens)] = Checkpoint(kept)
        joined = [concatenate_layers(list(layers)) for layers in zip(*parts, strict=True)]
        entry = CacheEntry(tokens, joined, checkpoints)
        if entry.trimmable and length == len(tokens):
            return entry
        return entry.branch(length)  # it must share no layer with its checkpoints

    def write(
        self,
        model: str,
        entry: CacheEntry,
        reading: Callable[[str], Reading | None],
        marks: Iterable[int],
    ) -> bool:
        """Writes the next segment of an entry, up to the next of the lengths `marks`; returns
        whether all of the entry is there, or cannot be. On the MLX thread."""
        total = len(entry.tokens)
        chain, reached = self.find(model, entry.tokens)
        if reached == total:
            return True
        # An entry that parts inside the last segment has a segment of its own instead.
        if reached < sum(len(segment.tokens) for segment in chain):
            chain = chain[:-1]
        start = sum(len(segment.tokens) for segment in chain)
        ends = sorted({*marks, total})
        end = next(at for at in ends if at > start and entry.restorable(at) == at)
        tokens = entry.tokens[start:end]
        parent = chain[-1].node if chain else model
        known = {key: reading(key) for key, at in entry.answers.items() if start < at <= end}
        readings = {
            key: [one.before, list(one.tokens), one.names, one.thoughtful]
            for key, one in known.items()
            if one is not None
        }
        notes = {
            "parent": parent,
            "tokens": json.dumps(tokens),
            "readings": json.dumps(readings),
            "trimmable": json.dumps(entry.trimmable),
        }
        try:
            if not self._write_segment(chain, parent, tokens, entry.layers(start, end), notes):
                message = "prompt cache on disk: there is no room for %d tokens"
                log.info(message, end)
                return True
        except Exception as error:  # a full disk must not cost more than this
            log.warning("prompt cache on disk: cannot write: %s", first_line(error))
            self._writing.unlink(missing_ok=True)
            return True
        return end == total

    def _write_segment(
        self,
        chain: list[Segment],
        parent: str,
        tokens: list[int],
        layers: list[Any],
        notes: dict[str, str],
    ) -> bool:
        """Writes one file behind a chain; returns whether there was room for it."""
        from mlx_lm.models.cache import save_prompt_cache

        headers = len(json.dumps(notes)) + 1024 * len(layers) + 4096
        size = headers + sum(layer.nbytes for layer in layers)
        if not self._make_room(size, {segment.node for segment in chain}):
            return False
        save_prompt_cache(str(self._writing), layers, notes)
        node = _node(parent, tokens)
        path = self.folder / f"{node}.{_checksum(self._writing, sync=True)}.safetensors"
        os.replace(self._writing, path)
        self._add(_read_segment(path, node))
        for segment in chain:
            os.utime(segment.path)
        return True

    def _add(self, segment: Segment) -> None:
        if before := self._segments.get(segment.node):
            self._remove(before)
            if before.path != segment.path:
                before.path.unlink(missing_ok=True)
        self._segments[segment.node] = segment
        self._followers[segment.parent] = (*self._followers.get(segment.parent, ()), segment)
        self.nbytes += segment.nbytes

    def _remove(self, segment: Segment) -> None:
        if self._segments.pop(segment.node, None) is None:
            return
        followers = self._followers[segment.parent]
        self._followers[segment.parent] = tuple(one for one in followers if one is not segment)
        self.nbytes -= segment.nbytes

    def _discard(self, path: Path, error: Exception) -> None:
        message = "prompt cache on disk: %s is ignored and removed: %s"
        log.warning(message, path.name, first_line(error))
        path.unlink(missing_ok=True)

    def _make_room(self, size: int, spared: set[str]) -> bool:
        """Removes segments until `size` bytes fit beside the spared ones; returns whether they do.
        If not, none is removed."""
        if sum(self._segments[node].nbytes for node in spared) + size > self.limit:
            return False
        if self.nbytes + size <= self.limit:
            return True
        removable = [
            (_mtime(segment.path), node)
            for node, segment in self._segments.items()
            if node not in spared and not self._followers.get(node)
        ]
        heapq.heapify(removable)
        while self.nbytes + size > self.limit:
            segment = self._segments[heapq.heappop(removable)[1]]
            self._remove(segment)
            segment.path.unlink(missing_ok=True)
            parent = self._segments.get(segment.parent)
            if parent is None or parent.node in spared or self._followers.get(parent.node):
                continue
            heapq.heappush(removable, (_mtime(parent.path), parent.node))
        return True


def _read_segment(path: Path, node: str) -> Segment:
    """A file's segment, from its header alone."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the file is torn")
        header = json.loads(file.read(length))
    notes = {key.removeprefix("0."): value for key, value in header["__metadata__"].items()}
    tokens, readings = json.loads(notes["tokens"]), json.loads(notes["readings"])
    if _node(notes["parent"], tokens) != node:
        raise ValueError("the name belongs to other tokens")
    return Segment(
        path,
        node,
        notes["parent"],
        tokens,
        json.loads(notes["trimmable"]),
        path.stat().st_size,
        {key: Reading(*fields) for key, fields in readings.items()},
    )


def _load_layers(path: Path) -> list[Any]:
    """The layers in a segment's file. Raises ValueError if it is not what its name says."""
    import mlx.core as mx
    from mlx_lm.models.cache import load_prompt_cache

    if _checksum(path) != path.name.split(".")[1]:
        raise ValueError("the checksum is wrong")
    layers: list[Any] = load_prompt_cache(str(path))  # type: ignore[no-untyped-call]
    mx.eval([layer.state for layer in layers])
    return layers


def _node(parent: str, tokens: list[int]) -> str:
    return hashlib.sha256(f"{parent}{tokens}".encode()).hexdigest()[:32]


def _alive(pid: str) -> bool:
    """Whether a process with this id runs."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:
        pass  # it is another user's
    return True


def _mtime(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
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
