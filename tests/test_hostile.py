"""What models, clients and folders can send costs no more than its length."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from call_families import FAMILIES
from parsing import TOOLS

from _mlx_server.inference.parser import OutputParser

# What a model that has lost its way repeats
REPEATED = [
    *(" ", "\n", "a", "a ", "\\", '"', "{", "[", "(", "<", ",", "{[", '{"', '":', ", ", "1,"),
    *("to=", "name=", 'name="', "name='a' ", 'tool="', 'key="a" ', 'type="a" ', '"type": 1, '),
    *("END", "START", "START{", 'START{"a', "<function=", "<parameter=a>", "```json", "<invoke "),
    *('{"arguments":{},"name":"get_time"}', '{"arguments":{},"name":"get_time",}', "call:a ", "=a"),
]
# Behind the call tag; CALL stands for a call up to the middle of a value
BEGINNINGS = ["", '{"a": "', '<invoke x="', "to=", "a", "CALL"]


def cost(work: Callable[[str], object], repeated: str, times: int) -> float:
    """Seconds of this thread's time."""
    began = time.thread_time()
    work(repeated * times)
    return time.thread_time() - began


def grows(work: Callable[[str], object], repeated: str, times: int) -> float:
    """How much more the fourfold text costs. Where it is much, a machine that was busy with other
    work is given another chance."""
    for _ in range(4):
        few, many = (cost(work, repeated, times * factor) for factor in (1, 4))
        growth = many / max(few, 0.002)
        if growth < 8:
            break
    return growth


def costly(family: str, beginnings: list[str], repetitions: list[str]) -> dict[str, float]:
    """What costs an answer of this family more than its length, and how much more."""
    format, start, write, _, end = FAMILIES[family]
    call = write("Write", {"content": "x"})
    found = {}
    for beginning in beginnings:
        before = start + beginning.replace("CALL", call[: call.rindex("x")])

        def answer(text: str, before: str = before) -> None:
            parser = OutputParser(format, TOOLS)
            for at in range(0, len(text), 32):
                parser.feed((before if at == 0 else "") + text[at : at + 32])
            parser.finish()

        for repeated in repetitions:
            pumped = repeated.replace("START", start or "<|channel|>").replace("END", end)
            if pumped and (growth := grows(answer, pumped, 2500 // len(pumped))) >= 8:
                found[before + pumped] = growth
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_repeats_costs_its_length(family: str) -> None:
    assert not costly(family, ["", "to="], ["\n", "a", "START"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_model_repeats_costs_its_length(family: str) -> None:
    assert not costly(family, BEGINNINGS, REPEATED)
