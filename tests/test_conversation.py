"""The canonical conversation, made from turns."""

from __future__ import annotations

import pytest
from wire_cases import brief

from _mlx_server.wire.conversation import NO_RESULT, Turn, canonical


def reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


A_CALLS = [("a", "f", {}), ("b", "g", {"x": 1})]
FOLDINGS = {
    "system first": ("s:one s:two u:hi", "system:one\n\ntwo user:hi"),
    "system after user": ("u:hi s:env a:yes", "user:[env]\nhi assistant:yes"),
    "system last": ("u:hi a:yes u:go s:env", "user:hi assistant:yes user:[env]\ngo"),
    "system after assistant": ("u:hi a:yes s:env u:go", "user:hi assistant:yes user:[env]\ngo"),
    "system between assistants": (
        "u:hi a:yes s:env a:no",
        "user:hi assistant:yes user:[env] assistant:no",
    ),
    "each before its words": ("u:1 s:A u:2 s:B", "user:[A]\n1\n[B]\n2"),
    "two after one": ("u:1 s:A s:B", "user:[A]\n[B]\n1"),
    "users merge": ("u:1 u:2", "user:1\n2"),
    "assistants merge": ("u:1 a:2 a:3 u:4", "user:1 assistant:2\n3 user:4"),
    "empty ones vanish": ("u: u:1 a: u:2 a:", "user:1\n2"),
    "results in call order": (
        "u:1 a! tb:B ta:A a:x",
        "user:1 assistant: tool:A tool:B assistant:x",
    ),
    "last result counts": (
        "u:1 a! ta:A tb:B ta:C a:x",
        "user:1 assistant: tool:C tool:B assistant:x",
    ),
    "no result": ("u:1 a! ta:A u:2", f"user:1 assistant: tool:A tool:{NO_RESULT} user:2"),
    "no results at the end": ("u:1 a!", f"user:1 assistant: tool:{NO_RESULT} tool:{NO_RESULT}"),
    "orphan": ("u:1 a:x tz:Z", "user:1 assistant:x user:Tool result (z): Z"),
    "system after results": (
        "u:1 a! ta:A tb:B s:env a:x",
        "user:1 assistant: tool:A tool:B\n[env] assistant:x",
    ),
    "system between results": ("u:1 a! ta:A s:env tb:B", "user:1 assistant: tool:A tool:B\n[env]"),
    "words among results": (
        "u:1 a! ta:A u:w tb:B s:env",
        "user:1 assistant: tool:A tool:B user:[env]\nw",
    ),
    "system, then words": (
        "u:1 a! ta:A tb:B s:env u:w",
        "user:1 assistant: tool:A tool:B\n[env] user:w",
    ),
    "prefill": ("u:1 a:So_", "user:1 assistant:So"),
}


def turns(script: str) -> list[Turn]:
    out = []
    for word in script.split(" "):
        who, _, text = word.replace("_", " ").partition(":")
        role = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}[who[0]]
        out.append(
            Turn(
                role,
                text,
                calls=A_CALLS if who == "a!" else [],
                call_id=who[1:] if role == "tool" else "",
            )
        )
    return out


@pytest.mark.parametrize("script, expected", FOLDINGS.values(), ids=FOLDINGS)
def test_canonical_conversation(script: str, expected: str) -> None:
    for name in ("env", "A", "B"):
        expected = expected.replace(f"[{name}]", reminder(name))
    messages = canonical(turns(script))
    assert " ".join(f"{role}:{content}" for role, content in brief(messages)) == expected


def test_calls_and_results_name_each_other() -> None:
    messages = canonical(
        [Turn("user", "1"), Turn("assistant", "Well", "hmm", A_CALLS), *turns("ta:A tb:B")]
    )
    assert messages[1:] == [
        {
            "role": "assistant",
            "content": "Well",
            "reasoning_content": "hmm",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": {"x": 1}}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "name": "f", "content": "A"},
        {"role": "tool", "tool_call_id": "b", "name": "g", "content": "B"},
    ]


def test_a_prompt_that_got_no_answer_stays_a_prefix() -> None:
    before, after = (
        canonical(turns(script))[-1]["content"] for script in ("u:1 s:A", "u:1 s:A u:2 s:B")
    )
    assert after.startswith(before)
