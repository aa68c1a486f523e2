"""Messages API requests as Claude Code makes them, and sessions of them."""

from __future__ import annotations

from typing import Any


def tool(name: str, **kinds: str) -> dict:
    return {
        "name": name,
        "description": f"{name} it.",
        "input_schema": {
            "type": "object",
            "properties": {key: {"type": kind} for key, kind in kinds.items()},
        },
    }


TOOLS = [
    tool("Bash", command="string", timeout="number", background="boolean"),
    tool("Write", path="string", content="string", replace_all="boolean"),
]
BILLING = "x-anthropic-billing-header: cc_version=2.1.330.{:03x}; cc_entrypoint=cli;"


def body(messages: list[dict], number: int = 0, tools: list[dict] = TOOLS) -> dict:
    """A request as Claude Code makes it: the cache marks on the last block, single texts as strings
    but where they are marked."""
    *before, last = messages
    blocks = (
        [{"type": "text", "text": last["content"]}]
        if isinstance(last["content"], str)
        else last["content"]
    )
    marked = [*blocks[:-1], {**blocks[-1], "cache_control": {"type": "ephemeral"}}]
    return {
        "model": "m",
        "max_tokens": 100,
        "tools": tools,
        "thinking": {"type": "adaptive"},
        "system": [
            {"type": "text", "text": BILLING.format(number)},
            {"type": "text", "text": "You are careful.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [*before, {**last, "content": marked}],
    }


def use(call_id: str, name: str = "Bash", **arguments: Any) -> dict:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def results(*pairs: tuple[str, Any]) -> dict:
    return {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": i, "content": content} for i, content in pairs
        ],
    }


def assistant(*blocks: dict | str) -> dict:
    return {
        "role": "assistant",
        "content": [{"type": "text", "text": b} if isinstance(b, str) else b for b in blocks],
    }


def user(*texts: str) -> dict:
    return {
        "role": "user",
        "content": texts[0]
        if len(texts) == 1
        else [{"type": "text", "text": text} for text in texts],
    }


def system(text: str) -> dict:
    return {"role": "system", "content": text}


# Recorded sessions

DEFERRED = {**tool("Fetch", url="string"), "defer_loading": True}
RECORDED: dict[str, list[list[dict]]] = {  # what each request adds to the one before
    "tool rounds": [
        [user("<system-reminder>\nbe kind\n</system-reminder>", "list the files")],
        [assistant("I look.", use("a1", command="ls")), results(("a1", "one\ntwo"))],
        [
            assistant(use("a2", command="cat one")),
            results(
                ("a2", [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}])
            ),
        ],
        [assistant("There are two."), user("thanks")],
        [assistant("You are welcome.\n"), user("bye", "now")],
    ],
    "system messages": [
        [user("hello"), system("the date is Monday")],
        [assistant("Hi."), user("list"), system("<total_tokens>14000 tokens left</total_tokens>")],
        [
            assistant(use("a1", command="ls")),
            results(("a1", "one")),
            system("<total_tokens>13900 tokens left</total_tokens>"),
        ],
        [
            assistant(use("a2", command="ls")),
            results(("a2", "two")),
            system("first"),
            system("second"),
            user("and now?"),
        ],
        [assistant("Done."), system("the mode has changed"), user("go on"), system("last")],
        [assistant("All right."), user("end")],
    ],
    "parallel results in completion order": [
        [user("look twice")],
        [
            assistant(use("a1", command="ls"), use("a2", command="pwd")),
            results(("a2", "/tmp"), ("a1", "one")),
        ],
        [
            assistant(use("a3", command="ls"), use("a4", command="pwd")),
            results(("a3", "one"), ("a4", "/tmp")),
            system("hurry"),
        ],
        [assistant("Same as before."), user("good")],
    ],
    "interrupted turns": [
        [user("count to a million")],
        [assistant("1 2 3"), user("[Request interrupted by user]", "only to ten")],
        [
            assistant(use("a1", command="seq 10")),
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "a1",
                        "content": "The user doesn't want this.",
                        "is_error": True,
                    },
                    {"type": "text", "text": "[Request interrupted by user for tool use]"},
                ],
            },
            user("just say it"),
        ],
        [assistant("1 to 10"), user("fine")],
    ],
}


def record(name: str) -> list[dict]:
    messages: list[dict] = []
    bodies = []
    for number, added in enumerate(RECORDED[name]):
        messages = [*messages, *added]
        bodies.append(body(messages, number))
    return bodies
