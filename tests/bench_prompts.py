"""Prompts to measure with: real source code, single questions and a made-up session of an agent."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_api import blocks

STORY = "Write a story of 1000 words about the ship {}."  # asks for a long answer
LIBRARY = Path(contextlib.__file__).parent  # the standard library


@functools.cache
def source() -> tuple[str, list[tuple[int, int]]]:
    """Source code, which is what agents read, and where its words are."""
    files = sorted(LIBRARY.glob("*.py"))[::4]
    text = "\n".join(path.read_text("utf-8") for path in files)
    return text, [match.span() for match in re.finditer(r"\S+", text)]


def excerpt(rng: random.Random, count: int) -> str:
    """`count` words in a row."""
    text, words = source()
    start = rng.randrange(len(words) - count)
    return text[words[start][0] : words[start + count - 1][1]]


def text(salt: str, words: int) -> str:
    """A text whose beginning no text of another salt has."""
    return f"{salt}\n{excerpt(random.Random(salt), words)}"


def say(words: str, tokens: int) -> dict:
    return {"max_tokens": tokens, "messages": [{"role": "user", "content": words}]}


def made_up_trace(turns: int = 12, seed: int = 5) -> list[dict]:
    """Bodies as an agent sends them: a growing conversation with tools, and in between requests for
    titles and those of a sub-agent."""
    rng = random.Random(seed)
    prose = functools.partial(excerpt, rng)
    tools = [made_up_tool(name, rng) for name in ("Bash", "Read", "Edit", "Grep", "Task")]
    system = prose(1200)
    messages: list[dict] = []
    bodies: list[dict] = []
    for turn in range(turns):
        if turn % 3 == 0:
            words = f"<system-reminder>\n{prose(60)}\n</system-reminder>\n{prose(20)}"
            messages.append({"role": "user", "content": [{"type": "text", "text": words}]})
        agent = {"system": [{"type": "text", "text": system}], "tools": tools}
        bodies.append({**agent, "messages": marked(messages)})
        if turn % 4 == 1:
            title = {"system": [{"type": "text", "text": "Write a title."}]}
            bodies.append({**title, "messages": [{"role": "user", "content": prose(40)}]})
        if turn % 5 == 2:
            helper = {"system": [{"type": "text", "text": system[:2000]}], "tools": tools[:3]}
            bodies.append({**helper, "messages": [{"role": "user", "content": prose(300)}]})
        messages += made_up_turn(turn, rng, prose)
    return bodies


def made_up_tool(name: str, rng: random.Random) -> dict:
    keys = [path.stem for path in rng.sample(sorted(LIBRARY.glob("*.py")), 3)]
    properties = {key: {"type": "string", "description": excerpt(rng, 12)} for key in keys}
    return {
        "name": name,
        "description": excerpt(rng, 150),
        "input_schema": {"type": "object", "properties": properties},
    }


def made_up_turn(turn: int, rng: random.Random, prose: Callable[[int], str]) -> list[dict]:
    """The model's answer: each third one ends the turn, the others are a call with its result."""
    if turn % 3 == 2:
        return [{"role": "assistant", "content": [{"type": "text", "text": prose(30)}]}]
    call = {
        "type": "tool_use",
        "id": f"toolu_{turn:04}",
        "name": "Bash",
        "input": {"command": prose(6)},
    }
    said = [{"type": "text", "text": prose(8)}, call]
    result = {
        "type": "tool_result",
        "tool_use_id": call["id"],
        "content": prose(rng.choice((20, 200, 900))),
    }
    return [{"role": "assistant", "content": said}, {"role": "user", "content": [result]}]


def marked(messages: list[dict]) -> list[dict]:
    """The messages with a cache mark at the end, as Claude Code sets it."""
    *earlier, last = messages
    *content, block = last["content"]
    block = {**block, "cache_control": {"type": "ephemeral"}}
    return [*earlier, {**last, "content": [*content, block]}]


def pieces(body: dict) -> list[str]:
    """What a prompt consists of, in order, without what is no part of it: two bodies that begin
    alike share a beginning."""

    def clean(block: Any) -> str:
        kept = {key: value for key, value in block.items() if key != "cache_control"}
        return json.dumps(kept, sort_keys=True)

    found = [clean(tool) for tool in body.get("tools") or []]
    for block in blocks(body.get("system") or []):
        if not block["text"].startswith("x-anthropic-billing-header"):
            found.append(clean(block))
    for message in body["messages"]:
        found += [message["role"] + clean(block) for block in blocks(message["content"])]
    return found
