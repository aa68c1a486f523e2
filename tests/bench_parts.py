"""What is measured of a side: each part of the table is a function that runs once."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from bench_api import Answer
from bench_prompts import STORY, say, text
from bench_side import FAILURES, Generate, Side
from soak import figure

Figures = dict[str, float]


@dataclass
class Plan:
    """Sizes, the same for both sides.

    words, long: words of a prompt and of a long one; tokens: of an answer; turns: of a session.
    salt: makes every prompt new; no two plans have the same.
    """

    words: int = 100
    long: int = 200
    tokens: int = 16
    turns: int = 4
    salt: str = field(default_factory=lambda: f"{time.time_ns():x}")


def loop(side: Side, plan: Plan, salt: str) -> Figures:
    """An agent's session in which each turn answers the model's last one."""
    fields = {"command": {"type": "string"}, "timeout": {"type": "number"}}
    tool = {
        "name": "Bash",
        "description": f"Runs a command. {salt}",
        "input_schema": {"type": "object", "properties": fields, "required": ["command"]},
    }
    system = "You are an agent.\n" + text(salt, plan.words)
    messages: list[dict] = [{"role": "user", "content": "run echo 0"}]
    answers: list[Answer] = []
    for turn in range(plan.turns):
        body = {"max_tokens": 96, "system": system, "tools": [tool], "messages": messages}
        answers.append(side.ask(body))
        messages += next_turn(answers[-1], turn)
    first, *later = answers
    new = sum(b.prompt - a.prompt - a.tokens for a, b in zip(answers, later, strict=False))
    read = sum(tokens_read(side, first, answer) for answer in later)
    warm = statistics.median(answer.first for answer in later)
    return {"cold": first.first, "warm": warm, "reread": read / max(1, new)}


def next_turn(answer: Answer, turn: int) -> list[dict]:
    """The answer and what the agent sends next, as messages."""
    calls = [block for block in answer.content if block["type"] == "tool_use"]
    for call in calls:  # agents send inputs back validated: in another order, with defaults
        call["input"] = {"timeout": 120000, **dict(reversed(call["input"].items()))}
    if all(block["type"] == "thinking" for block in answer.content):
        answer.content.append({"type": "text", "text": "(nothing)"})
    results = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": f"line {turn}"}
        for call in calls
    ]
    return [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": results or f"run echo {turn}"},
    ]


def tokens_read(side: Side, first: Answer, answer: Answer) -> int:
    """Tokens of a prompt that were prefilled. Where the server does not tell, they are taken to be
    in proportion to the time, as measured by the session's first turn."""
    if side.tells:
        return answer.prompt - (answer.reused or 0)
    share = (answer.reading or answer.first) / (first.reading or first.first)
    return min(answer.prompt, round(first.prompt * share))


def prefill(side: Side | Generate, plan: Plan, salt: str) -> Figures:
    answer = side.ask(say(text(salt, plan.words), 1))
    return {"prefill": answer.prompt / answer.first}


def decode(side: Side | Generate, plan: Plan, salt: str) -> Figures:
    """A story; where drafts can be forbidden also with and without them, in turn, alone and two at
    once."""
    figures = {"decode": speed(side, say(STORY.format(salt), plan.tokens))}
    if isinstance(side, Side) and side.api != "chat":
        drafting = replace(side, api="ollama")
        sides = [(drafting, ""), (replace(drafting, drafts=False), "_plain")]
        if salt[-1] in "13579":  # runs begin with the one and with the other
            sides.reverse()
        for one, key in sides:
            figures[f"story{key}"] = speed(one, say(STORY.format(f"{salt}{key}"), plan.tokens))
            figures[f"two{key}"] = together(one, 2, plan, f"{salt}{key}")
    return figures


def speed(side: Side | Generate, body: dict) -> float:
    """Tokens a second of an answer, behind its first one."""
    answer = side.ask(body)
    if answer.tokens < 2 or not answer.rest:
        raise ValueError(f"an answer of {answer.tokens} tokens that came at once has no speed")
    return (answer.tokens - 1) / answer.rest


def together(side: Side, count: int, plan: Plan, salt: str) -> float:
    """Tokens a second of so many stories at once."""
    bodies = [say(STORY.format(f"{salt} {count} {n}"), plan.tokens) for n in range(count)]
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(side.ask, bodies))
    return sum(a.tokens for a in answers) / max(a.first + a.rest for a in answers)


def concurrent(side: Side, plan: Plan, salt: str) -> Figures:
    return {"one": together(side, 1, plan, salt), "concurrent": together(side, 8, plan, salt)}


def contended(side: Side, plan: Plan, salt: str) -> Figures:
    """A short request that comes while a long prompt is read, and what 512 tokens of that take. A
    prompt that is read before the short request comes is followed by a longer one."""
    for factor in (1, 2, 4, 8):
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(side.ask, say(text(f"{salt} {factor}", factor * plan.long), 2))
            time.sleep(0.1)
            with contextlib.suppress(LookupError):  # others do not tell whether they have begun
                while figure(side.url, "running_requests") == 0 and not long.done():
                    time.sleep(0.02)
            if not long.done():
                short = side.ask(say(text(f"{salt} short", 20), 2))
                chunk = 512 * long.result().first / long.result().prompt
                return {"contended": short.first, "chunk": chunk}
    tokens = long.result().prompt
    raise ValueError(f"a prompt of {tokens} tokens was read before the short request came")


PARTS: dict[str, Callable[[Any, Plan, str], Figures]] = {
    part.__name__: part for part in (loop, prefill, decode, concurrent, contended)
}


def progress(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def calibrate(side: Side, other: Side | Generate | None, seconds: float) -> Plan:
    """Loads the models, and finds sizes with which one run of a part takes about `seconds`."""
    small = Plan()

    def warm_up(one: Side | Generate) -> Answer:
        progress(f"warming up {one.name}")
        answers = [one.ask(say(text(f"{small.salt} {n}", small.words), 8)) for n in range(2)]
        with contextlib.suppress(LookupError):  # others do not tell
            while isinstance(one, Side) and figure(one.url, "unmeasured_models"):
                time.sleep(0.02)
        return answers[0]

    per_word = warm_up(side).prompt / small.words
    read = prefill(side, small, small.salt)["prefill"]
    write = speed(side, say(STORY.format(small.salt), small.tokens))
    prompt = max(100, min(8000, read * seconds / 2))
    long = max(2 * prompt, read)  # it has to take a while
    if isinstance(other, Side):
        other.context = max(8192, int(2 * long))
    if other:
        warm_up(other)
    return Plan(
        words=int(prompt / per_word),
        long=int(long / per_word),
        tokens=int(max(16, min(256, write * seconds / 2))),
        turns=int(max(3, min(10, write * seconds / 100))),
    )


def measure(
    sides: list[Side | Generate], plan: Plan, parts: list[str], seconds: float, trouble: list[str]
) -> list[Figures]:
    """Figures of each side: medians of one to five runs of each part, in turn, as many as fit into
    the part's `seconds`. What failed is added to `trouble`."""
    seen: list[dict[str, list[float]]] = [{} for _ in sides]
    for part in parts:
        able = [side for side in sides if isinstance(side, Side) or part in Generate.parts]
        started = time.perf_counter()
        for run in range(5):
            if run and (time.perf_counter() - started) * (run + 1) / run > seconds:
                break
            for side in able[:]:
                progress(f"{part} of {side.name}, run {run + 1}")
                try:
                    with watched_memory(side) as memory:
                        found = PARTS[part](side, plan, f"{plan.salt} {part} {run}")
                except FAILURES as error:
                    trouble.append(f"{part} of {side.name}: {error}")
                    able.remove(side)
                else:
                    for key, value in [*found.items(), ("memory", max(memory))]:
                        seen[sides.index(side)].setdefault(key, []).append(value)
    return [{key: middle(key, values) for key, values in one.items()} for one in seen]


def middle(key: str, values: list[float]) -> float:
    return max(values) if key == "memory" else statistics.median(values)


@contextlib.contextmanager
def watched_memory(side: Side | Generate) -> Iterator[list[float]]:
    """The GB that a server holds, looked at four times a second."""
    ended, memory = threading.Event(), [0.0]

    def look() -> None:
        while not ended.wait(0.25):
            memory.append(side.memory())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look)
        try:
            yield memory
        finally:
            ended.set()
