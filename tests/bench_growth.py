"""How the work on a prompt grows with what is kept: conversations in memory, segments on disk,
installed models, messages."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from bench_prompts import excerpt
from model_folders import make_model

from _mlx_server.inference.cache.disk_cache import DiskCache, segment_node
from _mlx_server.inference.cache.prefix_cache import CacheEntry, PrefixCache
from _mlx_server.inference.catalog.library import Library
from _mlx_server.inference.group import Group
from _mlx_server.inference.prompt.renderer import PromptRenderer
from engine import Request

ROOT = [1] * 4000  # tokens that all conversations begin with
RUNS = 200


def growth(_: argparse.Namespace) -> None:
    """Prints what a look-up takes with few and with many of each kind, and the ratio."""
    for title, kept, counts in (
        ("conversations in memory", conversations, (10, 500)),
        ("segments on disk", segments, (10, 5000)),
        ("installed models", models, (10, 1000)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            few, many = (median(kept(Path(folder) / str(count), count)) for count in counts)
        print(
            f"{title}: {counts[0]} {few * 1e6:.0f} µs, {counts[1]} {many * 1e6:.0f} µs, "
            f"ratio {many / few:.2f}"
        )
    costs = [(count, *next_turn(count)) for count in (10, 100, 500, 1000, 2000)]
    for count, tokens, seconds in costs:
        print(
            f"the next turn of {count} messages, {tokens} tokens: {seconds * 1e3:.1f} ms, "
            f"{seconds / tokens * 1e9:.0f} ns a token, {seconds / count * 1e6:.1f} µs a message"
        )


def next_turn(count: int) -> tuple[int, float]:
    """Renders and tokenises a conversation of `count` messages that has grown by an answer and a
    question; returns its tokens and the seconds."""
    renderer = PromptRenderer(Library([]).resolve("demo", trusted=True))
    dice = random.Random(count)
    messages = [
        {"role": ("user", "assistant")[at % 2], "content": excerpt(dice, 90)}
        for at in range(count + count % 2 - 1)
    ]
    seconds = []
    for turn in range(7):
        request = Request("demo", list(messages))
        prompt = renderer.prompt(request)
        answer = f"answer {turn}"
        everything = prompt.tokens + renderer.encode(answer)
        renderer.remember(request, prompt, everything, answer, "", [])
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": f"question {turn}"})
        started = time.thread_time()
        prompt = renderer.prompt(Request("demo", messages))
        seconds.append(time.thread_time() - started)
    return len(prompt.tokens), min(seconds)


def median(call: Callable[[], object]) -> float:
    """Processor seconds that a call takes."""
    seconds = []
    for _ in range(RUNS):
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return statistics.median(seconds)


def said(number: int) -> list[int]:
    """What a conversation has behind the root; all begin alike."""
    return [2, 2, 2, 10 + number, *[3] * 500]


def conversations(_: Path, count: int) -> Callable[[], object]:
    cache = PrefixCache(lambda: 1 << 40, Group())
    for number in range(count):
        cache.put(CacheEntry([*ROOT, *said(number)], []))
    return lambda: cache.find("", [*ROOT, *said(5), 9])


def segments(folder: Path, count: int) -> Callable[[], object]:
    folder.mkdir()
    root = write_segment(folder, "model", ROOT)
    for number in range(count):
        write_segment(folder, root, said(number))
    disk = DiskCache(folder, 1 << 40)
    return lambda: disk.find("model", [*ROOT, *said(5), 9])


def write_segment(folder: Path, parent: str, tokens: list[int]) -> str:
    """A file of the disk cache without layers; returns its node."""
    notes = {"parent": parent, "tokens": json.dumps(tokens), "readings": "{}", "trimmable": "true"}
    header = json.dumps({"__metadata__": {f"0.{key}": text for key, text in notes.items()}})
    data = len(header).to_bytes(8, "little") + header.encode()
    node = segment_node(parent, tokens)
    (folder / f"{node}.{zlib.crc32(data):08x}.safetensors").write_bytes(data)
    return node


def models(folder: Path, count: int) -> Callable[[], object]:
    for number in range(count):
        make_model(folder / f"Model{number}-1B")
    library = Library([folder])
    time.sleep(2 * Library.SETTLED)
    return lambda: library.resolve("model5")
