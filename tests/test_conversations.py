"""The memory of what was read, by itself."""

from __future__ import annotations

import json
import operator
import random

from _mlx_server.inference.prompt.conversations import (
    ConversationMemory,
    KnownMessage,
    Reading,
    answer_names,
)
from _mlx_server.inference.prompt.history import HistoryMemo
from _mlx_server.inference.protocol import Message

HI = {"role": "user", "content": "hi"}


def follow(memory: ConversationMemory, start: str, messages: list[Message]) -> list[str]:
    return memory.follow(start, [KnownMessage(message, message) for message in messages])


def test_a_reading_is_all_tokens_of_those_before_it():
    memory = ConversationMemory()
    memory.learn({"one": Reading("", [1, 2], {}), "two": Reading("one", [3], {})})
    assert memory.tokens("two") == [1, 2, 3]
    assert memory.tokens("three") is None
    memory.learn({"four": Reading("gone", [5], {})})
    assert memory.tokens("four") is None


def test_the_integers_of_a_conversation_that_grows_are_made_once_and_never_stale():
    memory = ConversationMemory()
    memory.learn({"one": Reading("", [1001, 1002], {}), "two": Reading("one", [1003], {})})
    found = memory.tokens("two")
    memory.learn({"three": Reading("two", [1004, 1005], {})})
    grown = memory.tokens("three")
    assert grown == [1001, 1002, 1003, 1004, 1005]
    assert all(map(operator.is_, grown, found)) and len(found) == 3
    grown += [1, 2]  # each list is its caller's own
    assert memory.tokens("two") == found
    assert memory.tokens("three") == [1001, 1002, 1003, 1004, 1005]
    memory.learn({"one": Reading("", [9, 9], {})})
    assert memory.tokens("three") == [9, 9, 1003, 1004, 1005]
    assert memory.tokens("one") == [9, 9]


def test_readings_that_lead_in_a_circle_are_none():
    memory = ConversationMemory()
    memory.learn({"a": Reading("b", [1], {}), "b": Reading("a", [2], {})})
    assert memory.tokens("a") is None
    memory.learn({"c": Reading("c", [1], {})})
    assert memory.tokens("c") is None


def test_an_answer_is_found_however_a_client_sends_it_back():
    memory = ConversationMemory()
    (asked,) = follow(memory, "root", [HI])
    calls = [("id1", "Bash", {"command": "ls"})]
    names = answer_names(asked, "I look.", "hm", calls)
    memory.learn({"answer": Reading("", [1], dict.fromkeys(names, "answer"))})

    def back(id: str, arguments: dict, thinking: str = "", text: str = "I look.\n") -> str:
        function = {"name": "Bash", "arguments": arguments}
        call = {"id": id, "type": "function", "function": function}
        answer = {"role": "assistant", "content": text, "tool_calls": [call]}
        more = {"reasoning_content": thinking} if thinking else {}
        return follow(memory, "root", [HI, {**answer, **more}])[-1]

    assert back("id1", {"command": "ls", "timeout": 9}) == "answer"  # rewritten
    assert back("call_1", {"command": "ls"}) == "answer"  # with an id of the client's
    assert back("id1", {"command": "ls"}, "hm\n") == "answer"
    assert back("call_1", {"command": "rm"}) != "answer"
    assert back("id1", {"command": "ls"}, "other") != "answer"
    assert back("id1", {"command": "ls"}, text="I lie.") != "answer"
    changed = follow(memory, "root", [{**HI, "content": "ho"}])[-1]
    assert changed != asked and follow(memory, "other root", [HI]) != [asked]


def test_the_oldest_readings_make_room():
    memory = ConversationMemory()
    half = [0] * (memory.MOST // memory.TOKEN // 2 - 500)
    for key in "abc":
        memory.learn({key: Reading("", half, {key: key})})
        if key == "b":
            assert memory.tokens("a") == half  # used again: "b" is the oldest now
    assert memory.tokens("b") is None and memory.tokens("a") == memory.tokens("c") == half
    assert follow(memory, "", []) == []


# What is made of messages once


def shout(message: Message) -> Message:
    return {**message, "content": message["content"].upper()}


def known(memo: HistoryMemo, messages: list[Message]) -> list[KnownMessage]:
    """What is known of a conversation that is read."""
    history = memo.prepare(messages)
    memo.keep(history)
    return history.messages


def call(arguments: dict) -> Message:
    function = {"name": "Bash", "arguments": arguments}
    calls = [{"id": "a", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_of_a_conversation_that_comes_again_only_what_is_new_is_prepared():
    made: list[str] = []

    def escape(message: Message) -> Message:
        made.append(message["content"])
        return shout(message)

    memo = HistoryMemo(escape)
    for turn in range(2, 12):
        messages = [{"role": "user", "content": f"x{at}"} for at in range(turn)]
        assert [one.escaped for one in known(memo, messages)] == list(map(shout, messages))
    assert made == [f"x{at}" for at in range(11)]
    assert known(memo, []) == []
    for _ in range(2):  # refused, and not kept
        memo.prepare([HI])
    assert made[-2:] == [HI["content"]] * 2


ALIKE = [1, True, 1.0, "1", None, 0.0, -0.0, [1], [True], {"b": 1, "c": 2}, {"c": 2, "b": 1}]


def test_a_message_that_is_only_equal_is_prepared_anew():
    memo = HistoryMemo(lambda message: json.loads(json.dumps(message)))
    for _ in range(2):
        for value in ALIKE:
            messages = [HI, HI, call({"a": value}), call({"a": value, "b": value}), HI]
            found = [one.escaped for one in known(memo, messages)]
            assert json.dumps(found) == json.dumps(messages)


def test_edited_conversations_are_prepared_as_if_they_came_first():
    rng = random.Random(3)
    memo = HistoryMemo(shout)
    memory = ConversationMemory()
    messages: list[Message] = [HI]
    for _ in range(400):
        at = rng.randrange(len(messages) + 1)
        other = {"role": rng.choice(["user", "tool"]), "content": "a" * rng.randrange(3)}
        edit = rng.choice(["append", "append", "append", "replace", "drop", "insert"])
        if edit == "append":
            messages = [*messages, rng.choice([other, call({"a": rng.choice(ALIKE)})])]
        elif edit == "insert":
            messages = [*messages[:at], other, *messages[at:]]
        elif edit == "replace":
            messages = [*messages[:at], other, *messages[at + 1 :]]
        else:
            messages = messages[:at]
        messages = json.loads(json.dumps(messages))
        found = known(memo, messages)
        assert json.dumps([one.escaped for one in found]) == json.dumps(list(map(shout, messages)))
        for start in ("root", "other"):
            assert memory.follow(start, found) == follow(memory, start, messages)


def test_what_is_no_plain_json_is_prepared_as_well():
    class Text(str):
        pass

    deep: dict = {}
    for _ in range(3000):
        deep = {"a": deep}
    memo = HistoryMemo(shout)
    for message in ({"role": "user", "content": Text("hi")}, {**HI, "more": deep}):
        for _ in range(2):
            assert known(memo, [HI, message])[1].escaped["content"] == "HI"
