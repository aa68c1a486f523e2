"""The prefix cache on disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import json
import logging
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from _mlx_server.inference.cache.layers import (
    concatenate_layers,
    is_trimmable,
    pack_layer,
    unpack_layer,
)
from _mlx_server.inference.cache.prefix_cache import CacheEntry, Checkpoint, PrefixCache
from _mlx_server.inference.cache.prefix_tree import PrefixTree
from _mlx_server.inference.prompt.conversations import Reading
from _mlx_server.inference.protocol import Priority, first_line

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
    modified: int  # when the file was found, in nanoseconds of unix time


class DiskCache:
    """Prefix states on disk, where they outlive an unload and a restart. Several processes may have
    the same folder.

    A state is a chain of segments. Each is one file of mlx-lm's `save_prompt_cache` with what its
    tokens add to the segment before: that part of the KV, and the whole state of layers that cannot
    be trimmed, as it is at the segment's end. So conversations share the files of what they have in
    common, and one that has grown adds only its growth.

    A segment's node is a hash of its parent's and of its tokens, the first parent being the model's
    fingerprint or, for what was read for an owner, a hash of both (`first_node`); a file's name is
    node and checksum, given when it is complete. A file that is torn, foreign or not what its name
    says is never used. All files together, the one being written included, stay within `limit`
    bytes: the least recently used segment that no other one follows goes first. A chain's files
    count as used together, by their modification times, and earlier for less important requests, as
    in the prefix cache.

    The files hold conversations: nobody else may open the folder, and none is written to through a
    link.

    Cost. Starting and removing take time in proportion to the segments (and a logarithm of their
    number), looking up and writing grow with the prompt.

    Only the MLX thread changes it. Any thread may search it: a node's followers are a tree that is
    replaced by every change."""

    NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{8})\.safetensors")
    MOST = 16 * 2**30  # bytes, if no limit is given
    SHARE = 10  # of the disk's free bytes one in so many may be used, if no limit is given

    def __init__(self, folder: Path, limit: int | None = None):
        """Reads what is there. `limit` is the most bytes of files; None for `MOST` or a part of the
        disk's free bytes. Raises OSError when `folder` cannot be written to or is not ours."""
        self.folder, self._limit = folder, limit
        self.nbytes = 0  # of all files
        self._segments: dict[str, Segment] = {}  # by node
        self._files: dict[str, Segment] = {}  # the same by the names of their files
        self._followers: dict[str, PrefixTree[Segment]] = {}  # by the parent's node
        # For the MLX thread: when each node was used last, in nanoseconds of unix time, and by that
        # time the nodes that no other one follows, some of them out of date.
        self._used: dict[str, int] = {}
        self._oldest: list[tuple[int, str]] = []
        self._writing = folder / f"writing-{os.getpid()}.safetensors"
        _make_private(folder)
        self._writing.unlink(missing_ok=True)
        _create(self._writing).close()
        self._look()
        self._make_room(0, set())

    @property
    def limit(self) -> int:
        """Most bytes of files at the moment."""
        if self._limit is not None:
            return self._limit
        free = shutil.disk_usage(self.folder).free
        return min(self.MOST, (free + self.nbytes) // self.SHARE)

    def _look(self) -> None:
        """Takes note of what other processes have written and removed."""
        names = set(os.listdir(self.folder))
        for name in self._files.keys() - names:
            self._remove(self._files[name])
        for name in names - self._files.keys():
            path = self.folder / name
            try:
                self._take_in(path)
            except Exception as error:  # nothing that lies there may stop the start
                self._discard(path, error)

    def _take_in(self, path: Path) -> None:
        """Adds the segment of a file, or removes what a process that has died has left."""
        if match := self.NAME.fullmatch(path.name):
            self._add(_read_segment(path, match[1]))
            return
        left = re.fullmatch(r"writing-(.*)\.safetensors", path.name)
        if left and (path == self._writing or not _alive(left[1])):
            path.unlink(missing_ok=True)

    def readings(self, model: str, owner: str = "") -> dict[str, Reading]:
        """What was read and generated for an owner in all that is kept of the model with this
        fingerprint."""
        found: dict[str, Reading] = {}
        nodes = [first_node(model, owner)]
        while nodes:
            for segment in self._followers_of(nodes.pop()).values():
                found |= segment.readings
                nodes.append(segment.node)
        return found

    def _followers_of(self, node: str) -> PrefixTree[Segment]:
        return self._followers.get(node, _EMPTY)

    def find(self, model: str, tokens: list[int], owner: str = "") -> tuple[list[Segment], int]:
        """The chain of segments that restores the longest prefix of an owner's `tokens`, and its
        length; `model` is the fingerprint. From any thread."""
        # A link is a segment and the link before it.
        best: Any = None
        longest = 0
        links: list[tuple[str, int, Any]] = [(first_node(model, owner), 0, None)]
        while links:
            node, start, before = links.pop()
            path, end, shared = self._followers_of(node).walk(tokens, start)
            for place, length in path:
                if (segment := place.value) is not None:
                    link = (segment, before)
                    links.append((segment.node, start + length, link))
                    if start + length > longest:
                        best, longest = link, start + length
            part = end.sample
            if part is not None and part.trimmable and start + shared > longest:
                best, longest = (part, before), start + shared
        chain = []
        while best is not None:
            segment, best = best
            chain.append(segment)
        return chain[::-1], longest

    def load(self, chain: list[Segment], length: int, priority: Priority) -> CacheEntry | None:
        """The state that a chain restores for a request of a priority; None if one of its files
        turns out to be bad. On the MLX thread."""
        parts, tokens, checkpoints = [], [], {}
        for segment in chain:
            try:
                layers = _load_layers(segment.path)
            except Exception as error:  # MLX raises many types for a bad file
                self._remove(segment)
                self._discard(segment.path, error)
                return None
            parts.append(layers)
            tokens += segment.tokens
            if not segment.trimmable:
                kept = [None if is_trimmable(layer) else layer for layer in layers]
                checkpoints[len(tokens)] = Checkpoint(kept)
        self._touch(chain, priority)
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
        chain, reached = self.find(model, entry.tokens, entry.owner)
        if reached == total:
            return True
        # An entry that parts inside the last segment has a segment of its own instead.
        if reached < sum(len(segment.tokens) for segment in chain):
            chain = chain[:-1]
        start = sum(len(segment.tokens) for segment in chain)
        ends = sorted({*marks, total})
        end = next(at for at in ends if at > start and entry.restorable(at) == at)
        tokens = entry.tokens[start:end]
        parent = chain[-1].node if chain else first_node(model, entry.owner)
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
            layers = entry.layers(start, end)
            if not self._write_segment(chain, parent, tokens, layers, notes, entry.priority):
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
        priority: Priority,
    ) -> bool:
        """Writes one file behind a chain; returns whether there was room for it."""
        from mlx_lm.models.cache import save_prompt_cache

        header = len(json.dumps(notes)) + 1024 * len(layers) + 4096
        size = header + sum(layer.nbytes for layer in layers)
        spared = {segment.node for segment in chain}
        if header > MOST_HEADER or not self._make_room(size, spared):
            return False
        self._writing.unlink(missing_ok=True)
        with _create(self._writing) as file:
            packed = list(map(pack_layer, layers))
            save_prompt_cache(file, packed, notes)  # type: ignore[arg-type]  # MLX takes both
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            checksum = _checksum(file)
        node = segment_node(parent, tokens)
        path = self.folder / f"{node}.{checksum}.safetensors"
        os.replace(self._writing, path)
        used = _time_of_use(priority)
        os.utime(path, ns=(used, used))
        self._add(_read_segment(path, node))
        self._touch(chain, priority)
        # Another process may have written at the same time
        self._make_room(0, {segment.node for segment in chain})
        return True

    def _touch(self, chain: list[Segment], priority: Priority) -> None:
        """Notes that a chain has been used, for other processes in the files' times."""
        now = _time_of_use(priority)
        for segment in chain:
            used = max(now, self._used.get(segment.node, 0))
            with contextlib.suppress(OSError):
                os.utime(segment.path, ns=(used, used))
            self._note_use(segment, used)

    def _note_use(self, segment: Segment, used: int) -> None:
        """Comes when a segment was used and when its last follower has gone."""
        self._used[segment.node] = used
        if self._followers_of(segment.node).sample is not None:
            return
        if len(self._oldest) > 2 * len(self._segments) + 64:
            self._oldest = [pair for pair in self._oldest if self._is_removable(*pair)]
            heapq.heapify(self._oldest)
        heapq.heappush(self._oldest, (used, segment.node))

    def _is_removable(self, used: int, node: str) -> bool:
        """Whether a node is still there, used last at that time, and not followed by any."""
        return self._used.get(node) == used and self._followers_of(node).sample is None

    def _add(self, segment: Segment) -> None:
        if before := self._segments.get(segment.node):
            self._remove(before)
            if before.path != segment.path:
                before.path.unlink(missing_ok=True)
        self._segments[segment.node] = self._files[segment.path.name] = segment
        followers = self._followers_of(segment.parent)
        self._followers[segment.parent] = followers.put(segment.tokens, segment)
        self.nbytes += segment.nbytes
        self._note_use(segment, segment.modified)

    def _remove(self, segment: Segment) -> None:
        if self._segments.pop(segment.node, None) is None:
            return
        del self._used[segment.node], self._files[segment.path.name]
        followers = self._followers[segment.parent].remove(segment.tokens)
        self._followers[segment.parent] = followers
        self.nbytes -= segment.nbytes
        if followers.sample is None:
            del self._followers[segment.parent]
            if parent := self._segments.get(segment.parent):
                self._note_use(parent, self._used[parent.node])

    def _discard(self, path: Path, error: Exception) -> None:
        message = "prompt cache on disk: %s is ignored and removed: %s"
        log.warning(message, path.name, first_line(error))
        with contextlib.suppress(OSError):  # a folder, for one
            path.unlink()

    def _make_room(self, size: int, spared: set[str]) -> bool:
        """Removes segments until `size` bytes fit beside the spared ones, which are whole chains;
        returns whether they do. If not, none is removed."""
        self._look()
        limit = self.limit
        if sum(self._segments[node].nbytes for node in spared) + size > limit:
            return False
        passed_over = []
        while self.nbytes + size > limit:
            used, node = heapq.heappop(self._oldest)
            if not self._is_removable(used, node):
                continue
            segment = self._segments[node]
            later = _mtime(segment.path)
            if node in spared:
                passed_over.append((used, node))
            elif later > used:  # another process has used it
                self._note_use(segment, later)
            else:
                self._remove(segment)
                with contextlib.suppress(OSError):
                    segment.path.unlink()
        for pair in passed_over:
            heapq.heappush(self._oldest, pair)
        return True


_EMPTY: PrefixTree[Segment] = PrefixTree()
# Bytes of a file's header; one of ours has some thousand tokens and the answers that end there
MOST_HEADER = 16 * 2**20


def _time_of_use(priority: Priority) -> int:
    """What counts as the time of use by a request of a priority, in nanoseconds of unix time."""
    return time.time_ns() - int(PrefixCache.STEP * 1e9) * priority


def _make_private(folder: Path) -> None:
    """Makes a folder that only its owner may open. Raises OSError if it is another user's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "the folder belongs to another user", str(folder))
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def _create(path: Path) -> BinaryIO:
    """A new file to write and read, which nobody else may open. Raises OSError if there is one of
    that name, or a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "w+b")


def _read_segment(path: Path, node: str) -> Segment:
    """A file's segment, from its header alone. Raises an exception of any type if it is none."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no file")
        length = int.from_bytes(file.read(8), "little")
        if length > min(found.st_size, MOST_HEADER):
            raise ValueError("the file is torn")
        header = json.loads(file.read(length))
    notes = {key.removeprefix("0."): value for key, value in header["__metadata__"].items()}
    tokens, readings = json.loads(notes["tokens"]), json.loads(notes["readings"])
    if not tokens or not _are_tokens(tokens):
        raise ValueError("its tokens are none")
    if segment_node(notes["parent"], tokens) != node:
        raise ValueError("the name belongs to other tokens")
    return Segment(
        path,
        node,
        notes["parent"],
        tokens,
        bool(json.loads(notes["trimmable"])),
        found.st_size,
        {key: _reading(*fields) for key, fields in readings.items()},
        found.st_mtime_ns,
    )


def _are_tokens(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and -(2**63) <= value < 2**32 for value in values
    )


def _reading(before: Any, tokens: Any, names: Any, thoughtful: Any) -> Reading:
    """What a file says was read. Raises ValueError if it is none."""
    texts = [before, *names, *names.values()]
    if not _are_tokens(tokens) or not all(isinstance(text, str) for text in texts):
        raise ValueError("what was read is none")
    return Reading(before, tokens, names, bool(thoughtful))


def _load_layers(path: Path) -> list[Any]:
    """The layers in a segment's file. Raises ValueError if it is not what its name says."""
    import mlx.core as mx
    from mlx_lm.models.cache import load_prompt_cache

    with open(path, "rb") as file:
        if _checksum(file) != path.name.split(".")[1]:
            raise ValueError("the checksum is wrong")
    packed = load_prompt_cache(str(path))  # type: ignore[no-untyped-call]
    layers = list(map(unpack_layer, packed))
    mx.eval([layer.state for layer in layers])
    return layers


def first_node(model: str, owner: str) -> str:
    """The name of the empty state of the model with this fingerprint, for an owner."""
    return hashlib.sha256(f"{model}{owner}".encode()).hexdigest()[:32] if owner else model


def segment_node(parent: str, tokens: list[int]) -> str:
    """The name of the state that `tokens` lead to from that of `parent`."""
    return hashlib.sha256(f"{parent}{tokens}".encode()).hexdigest()[:32]


def _alive(pid: str) -> bool:
    """Whether a process with this id runs."""
    try:
        if int(pid) <= 0:  # a group of processes
            return False
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:
        pass  # it is another user's
    return True


def _mtime(path: Path) -> int:
    """When a file was changed, in nanoseconds of unix time; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _checksum(file: BinaryIO) -> str:
    """The CRC-32 of the rest of a file."""
    crc = 0
    while block := file.read(1 << 24):
        crc = zlib.crc32(block, crc)
    return f"{crc:08x}"
