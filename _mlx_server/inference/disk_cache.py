"""The prefix cache on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from _mlx_server.inference.answers import Answer
from _mlx_server.inference.layers import concatenate_layers, is_trimmable
from _mlx_server.inference.prefix_cache import CacheEntry, Checkpoint, common_prefix
from _mlx_server.inference.protocol import first_line

log = logging.getLogger("mlx_server")


@dataclass(frozen=True)
class Segment:
    """One file of the shelf: what `tokens` add to the state that `parent` ends with. `trimmable`:
    any part of it will do."""

    path: Path
    node: str
    parent: str
    tokens: list[int]
    trimmable: bool
    nbytes: int
    answers: dict[str, Answer]


class DiskCache:
    """Prefix states on disk, where they outlive an unload and a restart.

    A state is a chain of segments. Each is one file of mlx-lm's `save_prompt_cache` with what its
    tokens add to the segment before: that part of the KV, and the whole state of layers that cannot
    be cut, as it is at the segment's end. So conversations share the files of what they have in
    common, and one that has grown adds only its growth.

    A segment's node is a hash of its parent's and of its tokens, the first parent being the model's
    fingerprint; a file's name is node and checksum, given when it is complete. A file that is torn,
    foreign or not what its name says is never used. All files together, the one being written
    included, stay within `limit` bytes: the least recently used segment that no other one follows
    goes first. A chain's files count as used together, by their modification times."""

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
        """The segments that restore the longest prefix of `tokens`, and its length; `model` is a
        fingerprint, or the node that is reached after `start` tokens. From any thread: it only
        reads."""
        best: tuple[list[Segment], int] = ([], start)
        for segment in list(self._followers.get(model, ())):
            reached = start + common_prefix(
                segment.tokens, tokens[start : start + len(segment.tokens)]
            )
            chain = [segment]
            if reached == start + len(segment.tokens):
                further, reached = self.find(segment.node, tokens, reached)
                chain += further
            elif not segment.trimmable:
                continue
            best = max(best, (chain, reached), key=lambda pair: pair[1])
        return best

    def load(self, chain: list[Segment], length: int) -> CacheEntry | None:
        """The state that a chain restores; None if one of its files turns out to be bad. On the MLX
        thread."""
        import mlx.core as mx
        from mlx_lm.models.cache import load_prompt_cache

        parts, tokens, checkpoints = [], [], {}
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
            if not segment.trimmable:
                checkpoints[len(tokens)] = Checkpoint(
                    [None if is_trimmable(layer) else layer for layer in layers]
                )
        line = CacheEntry(
            tokens, [concatenate_layers(list(layers)) for layers in zip(*parts)], checkpoints
        )
        # Which shares no state with snapshots
        return line if line.trimmable and length == len(tokens) else line.branch(length)

    def write(
        self,
        model: str,
        line: CacheEntry,
        answer: Callable[[str], Answer | None],
        marks: Iterable[int],
    ) -> bool:
        """Writes the next segment of a line, up to the next of the lengths `marks`; returns whether
        the line is all here, or cannot be. On the MLX thread."""
        from mlx_lm.models.cache import save_prompt_cache

        chain, reached = self.find(model, line.tokens)
        if reached == len(line.tokens):
            return True
        # Somewhere inside the last one: a fork begins before it
        if reached < sum(len(segment.tokens) for segment in chain):
            chain = chain[:-1]
        start = sum(len(segment.tokens) for segment in chain)
        parent = chain[-1].node if chain else model
        end = next(
            at
            for at in sorted({*marks, len(line.tokens)})
            if at > start and line.restorable(at) == at
        )
        tokens = line.tokens[start:end]
        node = _node(parent, tokens)
        answers = {
            key: dataclasses.astuple(answer(key))
            for key, at in line.answers.items()
            if start < at <= end and answer(key)
        }
        layers = line.layers(start, end)
        notes = {
            "parent": parent,
            "tokens": json.dumps(tokens),
            "answers": json.dumps(answers),
            "cuttable": json.dumps(line.trimmable),
        }
        size = (
            sum(layer.nbytes for layer in layers)
            + len(json.dumps(notes))
            + 1024 * len(layers)
            + 4096
        )
        try:
            if not self._make_room(size, {segment.node for segment in chain}):
                log.info(
                    "prompt cache on disk: %d tokens need %d MB, which is more than there is room for",
                    end,
                    size >> 20,
                )
                return True
            save_prompt_cache(str(self._writing), layers, notes)
            path = self.folder / f"{node}.{_checksum(self._writing, sync=True)}.safetensors"
            os.replace(self._writing, path)
            self._add(self._read(path, node))
            for segment in chain:
                os.utime(segment.path)
        except Exception as error:  # a full disk must not cost more than this
            log.warning("prompt cache on disk: cannot write: %s", first_line(error))
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
        return Segment(
            path,
            node,
            notes["parent"],
            tokens,
            json.loads(notes["cuttable"]),
            path.stat().st_size,
            {key: Answer(*fields) for key, fields in answers.items()},
        )

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
        log.warning(
            "prompt cache on disk: %s is ignored and removed: %s", path.name, first_line(error)
        )
        path.unlink(missing_ok=True)

    def _make_room(self, size: int, spared: set[str]) -> bool:
        """Removes segments until `size` bytes fit beside the spared ones; returns whether they do.
        If not, none is removed."""
        if sum(self._segments[node].nbytes for node in spared) + size > self.limit:
            return False
        while self.nbytes + size > self.limit:
            ends = [
                s
                for s in self._segments.values()
                if not self._followers.get(s.node) and s.node not in spared
            ]
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
