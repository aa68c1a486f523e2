"""A session sent again: what of its prompts is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_prompts import made_up_trace, pieces
from bench_side import Side


def session(trace: str | None, reminded: bool) -> list[dict]:
    """The bodies of a recorded session, or of one that is made up; `reminded`: with a system
    message behind each result of a tool."""
    if trace:
        recorded = json.loads(Path(trace).read_text("utf-8"))["requests"]
        bodies = [request["body"] for request in recorded]
    else:
        bodies = made_up_trace()
    if not reminded:
        return bodies
    return [{**body, "messages": with_reminders(body["messages"])} for body in bodies]


def with_reminders(messages: list[dict]) -> list[dict]:
    shown: list[dict] = []
    for number, message in enumerate(messages):
        shown.append(message)
        blocks: Any = message["content"]
        if isinstance(blocks, list) and any(block["type"] == "tool_result" for block in blocks):
            left = f"<total_tokens>{200_000 - 100 * number} tokens left</total_tokens>"
            shown.append({"role": "system", "content": left})
    return shown


def send(side: Side, bodies: list[dict], max_tokens: int) -> None:
    """Sends a session's requests; prints what of each prompt could be reused, and what was."""
    before: list[tuple[list[str], int]] = []
    reusable_sum = reused_sum = read = new = 0
    titles = ("#", 3), ("prompt", 8), ("reusable", 8), ("reused", 8), ("prefilled", 9)
    print(*(f"{title:>{width}}" for title, width in (*titles, ("first token", 12))))
    for number, body in enumerate(bodies, 1):
        answer = side.ask({**body, "max_tokens": max_tokens})
        parts, reused = pieces(body), answer.reused or 0
        # A recorded answer is not the one the model gives here: the earlier prompt is what can be
        # reused.
        shared = [tokens for earlier, tokens in before if parts[: len(earlier)] == earlier]
        reusable = max(shared, default=0)
        before.append((parts, answer.prompt))
        reusable_sum, reused_sum = reusable_sum + reusable, reused_sum + min(reusable, reused)
        prefilled = answer.prompt - reused
        read, new = read + prefilled, new + answer.prompt - reusable
        print(
            f"{number:3} {answer.prompt:8} {reusable:8} {reused:8} {prefilled:9} "
            f"{answer.first:10.3f} s",
            flush=True,
        )
    print(f"prefilled {read} tokens, {read / new:.4f} of what an append-only prompt needs")
    share = reused_sum / max(1, reusable_sum)
    print(f"reused {reused_sum} of {reusable_sum} reusable tokens: {share:.2%}")
