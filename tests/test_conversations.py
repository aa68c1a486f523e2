"""The memory of what was read, by itself."""

from __future__ import annotations

from _mlx_server.inference.prompt.conversations import ConversationMemory, Reading, answer_names

HI = {"role": "user", "content": "hi"}


def test_a_reading_is_all_tokens_of_those_before_it():
    memory = ConversationMemory()
    memory.learn({"one": Reading("", [1, 2], {}), "two": Reading("one", [3], {})})
    assert memory.tokens("two") == [1, 2, 3]
    assert memory.tokens("three") is None
    memory.learn({"four": Reading("gone", [5], {})})
    assert memory.tokens("four") is None


def test_a_conversation_that_comes_again_is_not_put_together_again_but_never_stale():
    memory = ConversationMemory()
    memory.learn({"one": Reading("", [1, 2], {}), "two": Reading("one", [3], {})})
    found = memory.tokens("two")
    assert memory.tokens("two") is found
    memory.learn({"three": Reading("two", [4, 5], {})})
    assert memory.tokens("three") == [1, 2, 3, 4, 5]
    assert memory.tokens("two") == found == [1, 2, 3]
    assert memory.tokens("three") == [1, 2, 3, 4, 5]
    memory.learn({"one": Reading("", [9, 9], {})})
    assert memory.tokens("three") == [9, 9, 3, 4, 5]
    assert memory.tokens("one") == [9, 9]
    assert found == [1, 2, 3]


def test_readings_that_lead_in_a_circle_are_none():
    memory = ConversationMemory()
    memory.learn({"a": Reading("b", [1], {}), "b": Reading("a", [2], {})})
    assert memory.tokens("a") is None
    memory.learn({"c": Reading("c", [1], {})})
    assert memory.tokens("c") is None


def test_an_answer_is_found_however_a_client_sends_it_back():
    memory = ConversationMemory()
    (asked,) = memory.follow("root", [HI])
    calls = [("id1", "Bash", {"command": "ls"})]
    names = answer_names(asked, "I look.", "hm", calls)
    memory.learn({"answer": Reading("", [1], dict.fromkeys(names, "answer"))})

    def back(id: str, arguments: dict, thinking: str = "", text: str = "I look.\n") -> str:
        function = {"name": "Bash", "arguments": arguments}
        call = {"id": id, "type": "function", "function": function}
        answer = {"role": "assistant", "content": text, "tool_calls": [call]}
        more = {"reasoning_content": thinking} if thinking else {}
        return memory.follow("root", [HI, {**answer, **more}])[-1]

    assert back("id1", {"command": "ls", "timeout": 9}) == "answer"  # rewritten
    assert back("call_1", {"command": "ls"}) == "answer"  # with an id of the client's
    assert back("id1", {"command": "ls"}, "hm\n") == "answer"
    assert back("call_1", {"command": "rm"}) != "answer"
    assert back("id1", {"command": "ls"}, "other") != "answer"
    assert back("id1", {"command": "ls"}, text="I lie.") != "answer"
    changed = memory.follow("root", [{**HI, "content": "ho"}])[-1]
    assert changed != asked and memory.follow("other root", [HI]) != [asked]


def test_the_oldest_readings_make_room():
    memory = ConversationMemory()
    half = [0] * (memory.MOST // 2)
    for key in "abc":
        memory.learn({key: Reading("", half, {key: key})})
        if key == "b":
            assert memory.tokens("a") == half  # used again: "b" is the oldest now
    assert memory.tokens("b") is None and memory.tokens("a") == memory.tokens("c") == half
    assert memory.follow("", []) == []
