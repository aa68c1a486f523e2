"""What costs grow with: the prompt, and not what is kept in memory, on disk or in folders. Work is
counted in steps of the interpreter, so that a busy machine changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from model_folders import empty_home, make_model

from _mlx_server.inference.cache.disk_cache import DiskCache, segment_node
from _mlx_server.inference.cache.prefix_cache import CacheEntry, Checkpoint, PrefixCache
from _mlx_server.inference.cache.prefix_tree import common_prefix
from _mlx_server.inference.catalog.library import Library
from _mlx_server.inference.event_queue import EventQueue
from _mlx_server.inference.group import Group
from _mlx_server.inference.output.stops import StopMatcher
from _mlx_server.inference.protocol import (
    Done,
    Event,
    ModelNotFound,
    Priority,
    Text,
    Thinking,
    Token,
    ToolInput,
    Usage,
)
from engine import Engine

ROOM = 1 << 40
MORE = pytest.mark.parametrize("many", [1, pytest.param(10, marks=pytest.mark.slow)])


def work(call: Callable[[], Any]) -> int:
    """How many instructions of the interpreter a call takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def agreed(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share, found the plain way."""
    return next(
        (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class Layer:
    """A layer that cannot be trimmed."""

    def __init__(self, nbytes: int):
        self.nbytes, self.state = nbytes, []


def recurrent(tokens: list[int], marks: list[int]) -> CacheEntry:
    """The state of a model that goes back only to checkpoints, which are at these lengths."""
    checkpoints = {at: Checkpoint([Layer(7 + at)]) for at in marks}
    return CacheEntry(tokens, [Layer(100)], checkpoints)


def plain(tokens: list[int], marks: list[int]) -> CacheEntry:
    """The state of a model that can be cut back to any length."""
    from mlx.core import zeros
    from mlx_lm.models.cache import KVCache

    cache = KVCache()
    cache.update_and_fetch(*[zeros((1, 1, len(tokens), 1))] * 2)
    return CacheEntry(tokens, [cache])


def recurrent_layers(tokens: list[int], marks: list[int]) -> CacheEntry:
    """The same with the layers of mlx-lm, which can be written."""
    from mlx.core import array
    from mlx_lm.models.cache import ArraysCache

    def layer() -> ArraysCache:
        cache = ArraysCache(size=1)
        cache[0] = array([[1.0] * 100])
        return cache

    return CacheEntry(tokens, [layer()], {at: Checkpoint([layer()]) for at in marks if at})


# ---- tokens that a client gives


def test_tokens_of_a_client_are_checked_without_asking_for_each_how_many_there_are():
    with Engine("demo") as engine:
        renderer = engine.renderer(engine.resolve("demo"))
        assert work(lambda: renderer.check_tokens([5] * 1000)) < 20 * 1000


# ---- the prefix cache


def test_two_lists_share_what_they_share():
    dice = random.Random(1)
    for _ in range(3000):
        a = [dice.randrange(2) for _ in range(dice.choice([0, 3, 63, 64, 65, 200, 500]))]
        b = a[: dice.randrange(len(a) + 1)] + [dice.randrange(2) for _ in range(dice.randrange(9))]
        start = dice.randrange(4)
        assert common_prefix(a, [7] * start + b, start) == agreed(a, b)


@MORE
@pytest.mark.parametrize("make", [plain, recurrent])
def test_what_is_found_filed_and_evicted_is_what_a_search_through_all_entries_finds(
    make: Any, many: int
):
    dice, limit = random.Random(2), 5000
    cache = PrefixCache(lambda: limit, Group())

    def tokens() -> list[int]:
        """Few values, so that lists often begin alike, and often like one that is there."""
        known = dice.choice(entries).tokens if entries and dice.random() < 0.8 else []
        return known[: dice.randrange(len(known) + 1)] + [
            dice.randrange(2) for _ in range(dice.randrange(1, 40))
        ]

    for step in range(200 * many):
        entries = cache.entries()
        prompt, model = tokens(), dice.choice("ab")
        match = cache.find(model, prompt)
        known = [entry for entry in entries if entry.model == model]
        shared = [agreed(entry.tokens, prompt) for entry in known]
        usable = [
            entry.restorable(min(at, len(prompt) - 1))
            for entry, at in zip(known, shared, strict=True)
        ]
        assert match.length == max(usable, default=0)
        assert match.shared == max(shared, default=0) == agreed(match.closest, prompt)
        if match.entry is not None:
            assert match.entry.restorable(match.length) == match.length
            assert match.entry.tokens[: match.length] == prompt[: match.length]
        if dice.random() < 0.5 and match.entry is not None:
            entry = cache.take(match)
            assert entry.tokens == prompt[: match.length]
            entry.tokens = prompt
            if make is plain:
                entry.cache = plain(prompt, []).cache
        else:
            entry = make(prompt, sorted({dice.randrange(1, len(prompt) + 1) for _ in range(3)}))
        entry.model, entry.root = model, dice.randrange(len(prompt) + 1)
        cache.put(entry)
        limit = dice.choice([5000, 20000])
        if step % 97 == 0:
            cache.drop(dice.choice("ab"))
        entries = cache.entries()
        checkpoints = {one for entry in entries for one in entry.checkpoints.values()}
        counted = sum(entry.cache_nbytes for entry in entries)
        assert cache.nbytes == counted + sum(one.nbytes for one in checkpoints)
        assert cache.nbytes == cache.held("a") + cache.held("b")
    cache.evict(spare=1 << 50)
    assert cache.nbytes == 0 and not cache.entries()
    assert cache.find("a", [0] * 9)[:2] == (None, 0)


def conversations(count: int, make: Any) -> PrefixCache:
    """So many conversations with one root, each of which parts from the others at once."""
    cache, root = PrefixCache(lambda: ROOM, Group()), [1] * 1000
    for number in range(count):
        tokens = [*root, 2, *[10 + number] * 100]
        entry = make(tokens, [1000, 1050])
        entry.root = 1000
        cache.put(entry)
    return cache


@pytest.mark.parametrize("make", [plain, recurrent])
def test_a_prompt_costs_the_same_beside_three_conversations_and_beside_five_hundred(make: Any):
    costs = []
    for count in (3, 500):
        cache = conversations(count, make)
        prompts = [cache.entries()[-1].tokens + [9] * 10, [1] * 1000 + [2, 5, 5], [8] * 1000]
        found = [cache.find("", prompt)[1] for prompt in prompts]
        assert found[0] == 1101 and found[1] >= 1000 and found[2] == 0
        costs.append([work(lambda p=prompt, c=cache: c.find("", p)) for prompt in prompts])
        new = make([1] * 1000 + [2, 6, 6, 6], [1000])
        costs[-1].append(work(lambda e=new, c=cache: c.put(e)))
        costs[-1].append(work(lambda c=cache: c.evict(ROOM - c.nbytes + 1)))
        costs[-1].append(work(lambda c=cache: (c.nbytes, c.held(""), c.evict())))
    for few, more in zip(*costs, strict=True):
        assert more <= 1.2 * few


# ---- the disk cache


def segment_file(folder: Path, parent: str, tokens: Any, **notes: Any) -> str:
    """A file like those of the disk cache, without layers; returns its node."""
    notes = {"parent": parent, "tokens": tokens, "readings": {}, "trimmable": True, **notes}
    texts = {f"0.{key}": json.dumps(value) for key, value in notes.items()}
    header = json.dumps({"__metadata__": {**texts, "0.parent": parent}}).encode()
    return raw_file(folder, segment_node(parent, tokens), header)


def raw_file(folder: Path, node: str, header: bytes) -> str:
    data = len(header).to_bytes(8, "little") + header
    (folder / f"{node}.{zlib.crc32(data):08x}.safetensors").write_bytes(data)
    return node


def forgotten(key: str) -> None:
    """No answer is remembered."""


@MORE
def test_a_long_chain_of_segments_is_found_continued_and_removed(many: int, tmp_path: Path):
    node, count = "model", 200 * many
    for number in range(count):
        readings = {f"answer {number}": ["", [number], {}, False]}
        node = segment_file(tmp_path, node, [number, 1], readings=readings)
    disk = DiskCache(tmp_path, 1 << 30)
    tokens = [token for number in range(count) for token in (number, 1)]
    chain, length = disk.find("model", [*tokens, 7, 7])
    assert (len(chain), length) == (count, 2 * count)
    assert len(disk.readings("model")) == count
    half = work(lambda: disk.find("model", tokens[:count]))
    assert work(lambda: disk.find("model", tokens)) < 2.1 * half
    assert not disk.write("model", plain([*tokens, 7, 8, 9], []), forgotten, [len(tokens) + 2])
    assert disk.find("model", [*tokens, 7, 8, 9])[1] == len(tokens) + 2
    small = DiskCache(tmp_path, disk.nbytes // 2)
    assert disk.nbytes * 0.49 < small.nbytes <= disk.nbytes // 2
    assert small.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    kept = len(small.find("model", tokens)[0])  # the beginning, since what follows goes first
    assert count * 0.4 < kept == len(list(tmp_path.iterdir()))


@MORE
def test_a_prompt_costs_the_same_beside_ten_segments_and_beside_many(many: int, tmp_path: Path):
    costs, new = [], plain([1] * 200 + [2, 7, 7, 7], [])
    for count in (10, 100 * many):
        folder = tmp_path / str(count)
        folder.mkdir()
        root = segment_file(folder, "model", [1] * 200)
        for number in range(count):
            # All of them begin alike, as chats do
            segment_file(folder, root, [2, 2, 2, 10 + number, *[3] * 60])
        started: list[DiskCache] = []
        start = work(lambda f=folder, s=started: s.append(DiskCache(f, 1 << 30))) / count
        disk = started[0]
        prompt = [1] * 200 + [2, 2, 2, 12, *[3] * 90]
        assert disk.find("model", prompt)[1] == 264
        find = work(lambda d=disk, p=prompt: d.find("model", p))
        write = work(lambda d=disk: d.write("model", new, forgotten, []))
        half = sum(path.stat().st_size for path in folder.iterdir()) // 2
        halved = work(lambda f=folder, h=half: DiskCache(f, h)) / count
        costs.append([start, find, write, halved])
    for few, more in zip(*costs, strict=True):
        assert more <= 1.2 * few


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"__metadata__": ' + b'{"a":' * 50_000, b"{}"]
)
def test_no_header_stops_the_start(header: bytes, tmp_path: Path):
    raw_file(tmp_path, "0" * 32, header)
    assert DiskCache(tmp_path, 1000).nbytes == 0 and not list(tmp_path.iterdir())


def test_nothing_in_its_folder_stops_the_start(tmp_path: Path):
    folder, name = tmp_path / "kept", "{}.00000000.safetensors".format
    folder.mkdir()
    (tmp_path / "precious").write_text("precious")
    (folder / name("1" * 32)).symlink_to(tmp_path / "precious")
    (folder / name("2" * 32)).mkdir()
    os.mkfifo(folder / name("3" * 32))
    (folder / name("4" * 32)).write_bytes(b"\xff" * 8 + b"{}")
    for tokens in ([], ["a"], [1.5], [[1]], [True], {"0": 1}, 7, None):
        segment_file(folder, "model", tokens)
    segment_file(folder, "model", [1], readings={"key": [1, 2, 3, 4, 5]})
    segment_file(folder, "model", [1], readings={"key": ["", ["x"], {}, False]})
    segment_file(folder, "model", [1], readings={"key": ["", [1 << 40], {}, False]})
    segment_file(folder, "model", [1], readings={"key": ["", [1], {"a": 1}, False]})
    for pid in ("", "x", "0", "-1", "9" * 99):
        (folder / f"writing-{pid}.safetensors").write_text("left")
    (folder / f"writing-{os.getpid()}.safetensors").symlink_to(tmp_path / "precious")
    (folder / "notes.txt").write_text("somebody's")
    disk = DiskCache(folder, 1 << 20)
    assert disk.write("model", plain([1, 2, 3], []), forgotten, [])
    assert disk.nbytes and disk.find("model", [1, 2, 3])[1] == 3
    assert (tmp_path / "precious").read_text() == "precious"
    (kept,) = disk.find("model", [1, 2, 3])[0]
    left = {path.name for path in folder.iterdir()}
    assert left == {kept.path.name, name("2" * 32), "notes.txt"}


def test_two_servers_with_one_folder_stay_within_the_limit_together(tmp_path: Path):
    limit = 40_000
    disks = [DiskCache(tmp_path, limit) for _ in range(2)]
    for number in range(40):
        disk, tokens = disks[number % 2], [number, *range(100)]
        assert disk.write("model", plain(tokens, []), forgotten, [])
        held = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert held <= limit and disk.nbytes == held
    assert number > len(list(tmp_path.iterdir())) > 4
    assert disk.find("model", [number - 1, *range(100)])[1] == 101  # which the other has written


def test_nobody_else_reads_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "new" / "kept"
    disk = DiskCache(folder)
    assert disk.write("model", plain([1, 2, 3], []), forgotten, [])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
    folder.chmod(0o755)
    DiskCache(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        DiskCache(folder)


def test_without_a_limit_it_takes_a_part_of_the_free_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free))
    disk, entry = DiskCache(tmp_path), plain(list(range(100)), [])
    assert disk.limit == 0 and disk.write("model", entry, forgotten, [50]) and not disk.nbytes
    free = 1 << 20
    assert not disk.write("model", entry, forgotten, [50]) and disk.nbytes
    assert disk.limit == (free + disk.nbytes) // 10
    free = 1 << 50
    assert disk.limit == 16 << 30


@MORE
@pytest.mark.parametrize("make", [plain, recurrent_layers])
def test_weeks_of_use_leave_the_files_of_live_entries_within_the_limit(
    make: Any, many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dice, limit = random.Random(3), 60_000
    cache, disk = PrefixCache(lambda: 20_000, Group()), DiskCache(tmp_path, limit)
    replace, said = os.replace, [[1] * 20]

    def sometimes_full(*paths: Any) -> None:
        if dice.random() < 0.05:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", sometimes_full)
    for step in range(100 * many):
        before = dice.choice(said[-20:])
        tokens = before[: dice.randrange(len(before) + 1)]
        tokens = tokens + [dice.randrange(50) for _ in range(dice.randrange(1, 40))]
        said.append(tokens)
        chain, kept = disk.find("m", tokens[:-1])
        if dice.random() < 0.5 and kept:
            assert disk.load(chain, kept, Priority.NORMAL).tokens == tokens[:kept]
        entry = make(tokens, [len(tokens) // 2, len(tokens)])
        entry.model, entry.root = "m", len(tokens) // 2
        cache.put(entry)
        for _ in range(dice.randrange(4)):
            if entry := cache.unwritten("m"):
                entry.written = disk.write("m", entry, forgotten, entry.checkpoints)
                if not entry.written and dice.random() < 0.2:
                    cache.evict(1 << 40)  # it leaves memory before all of it is written
                    assert disk.find("m", entry.tokens)[1] >= len(entry.tokens) // 2
        if dice.random() < 0.02:
            disk = DiskCache(tmp_path, limit)  # a restart
        files = {path.name.split(".")[0]: path for path in tmp_path.iterdir()}
        assert disk.nbytes == sum(path.stat().st_size for path in files.values()) <= limit
        if step % 20 == 0:
            assert all(
                parent in files or parent == "m" for parent in map(parent_of, files.values())
            )
    assert disk.nbytes > limit / 2


def parent_of(path: Path) -> str:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header["__metadata__"]["0.parent"]


# ---- stop strings


def test_stop_strings_end_an_answer_where_a_plain_search_says():
    dice = random.Random(4)

    def word(most: int) -> str:
        return "".join(dice.choice("ab") for _ in range(dice.randrange(most)))

    for _ in range(3000):
        stops, text = [word(6) for _ in range(dice.randrange(5))], word(60)
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
        _, length, first = min((end for end in ends if end[2]), default=(0, 0, None))
        expected = text[: text.find(first)] if first else text
        matcher, seen, rest = StopMatcher(stops), "", text
        while rest and matcher.stop_sequence is None:
            size = dice.randrange(1, 9)
            seen += matcher.feed(rest[:size])
            rest = rest[size:]
            assert expected.startswith(seen)
            held = text[len(seen) : len(text) - len(rest)]
            assert first or not held or any(stop.startswith(held) for stop in stops)
        assert matcher.stop_sequence == first and seen + matcher.flush() == expected


def test_a_thousand_stop_strings_cost_what_one_does():
    stops, text = (
        [f"{number:04}!{'x' * 50}" for number in range(1000)],
        "once upon a time 0123 " * 9,
    )
    one, many = StopMatcher(stops[:1]), StopMatcher(stops)
    assert work(lambda: many.feed(text)) <= 1.2 * work(lambda: one.feed(text))
    long = StopMatcher(["a" * 10_000 + "b"])
    costs = [work(lambda: long.feed("a" * 50)) for _ in range(150)]
    assert long.flush() == "a" * 7500 and max(costs) < 1.1 * min(costs)


# ---- installed models


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Models that were installed a while ago, and a library that looks for new ones only when it
    has a reason."""
    home = empty_home(tmp_path, monkeypatch)
    monkeypatch.setattr(Library, "TRUST", 1e9)
    for number in range(10):
        make_model(home / "models" / f"Model{number}-1B")
    long_ago(home)
    return Library([home / "models"])


def long_ago(home: Path) -> None:
    for folder in (home / "models", Library().hub):
        if folder.exists():
            os.utime(folder, (1000, 1000))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model7", "Model7-1B", "claude-x", "default"])
def test_a_name_costs_the_same_among_ten_and_among_a_thousand_models(
    library: Library, tmp_path: Path, name: str
):
    costs = []
    for _ in range(2):
        library.resolve(name)
        costs.append(work(lambda: library.resolve(name)))
        for number in range(10, 1000):
            make_model(tmp_path / "home" / "models" / f"Model{number}-1B")
        os.utime(tmp_path / "home" / "models", (2000, 2000))
    assert len(library.models()) > 1000 and costs[1] <= 1.2 * costs[0]


def test_what_is_installed_changed_or_deleted_between_two_requests_counts(
    library: Library, tmp_path: Path
):
    looks = work(lambda: library.resolve("model7"))
    assert work(lambda: library.resolve("model7")) < looks / 5
    new = make_model(tmp_path / "home" / "models" / "Other-1B")
    os.utime(tmp_path / "home" / "models", (2000, 2000))
    assert library.resolve("other").path == new
    make_model(new, max_position_embeddings=1234)
    os.utime(new / "config.json", (3000, 3000))
    assert library.resolve("other").context_length == 1234
    shutil.rmtree(new)
    os.utime(tmp_path / "home" / "models", (2000, 2000))
    with pytest.raises(ModelNotFound):
        library.resolve("other")


# ------------------------------------------------------------------ what a slow client has not read


def taken(*events: Event) -> list[Event | None]:
    queue = EventQueue(threading.RLock())
    queue.put(*events)
    return [queue.take(0) for _ in events]


def test_events_that_go_on_with_each_other_are_taken_as_one():
    a, b, c = (Token(0, one, 0.0, []) for one in (b"a", b"b", b"c"))
    done = Done("stop", Usage(), None, [])
    assert taken(
        Text("a", [a]),
        Text("b", [b]),
        Text("c", [c]),
        Thinking("d"),
        Thinking("e"),
        ToolInput("{"),
        ToolInput("}"),
        Text("f"),
        done,
    ) == [
        *(Text("abc", [a, b, c]), Thinking("de"), ToolInput("{}"), Text("f"), done),
        *[None] * 4,
    ]


class Counted(str):
    """A text that counts the characters which adding to it copies."""

    copied = 0

    def __add__(self, other: str) -> Counted:
        Counted.copied += len(self) + len(other)
        return Counted(super().__add__(other))


@pytest.mark.parametrize("kind", [Text, Thinking, ToolInput])
def test_what_waits_for_a_slow_client_is_not_copied_with_each_event(
    kind: type, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Counted, "copied", 0)
    event, *others = taken(*(kind(Counted("a" * 10)) for _ in range(1000)))
    assert event == kind("a" * 10_000) and not any(others)
    assert Counted.copied <= 10_000
