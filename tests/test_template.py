"""Chat templates: one canonical conversation renders on templates of every temperament that real
model families have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import CHATML, build_model

from _mlx_server.inference.catalog.models import describe
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.inference.prompt.template import speed_up
from engine import InvalidRequest, Request

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
        },
    }
]


def call(*ids: str) -> dict:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": i,
                "type": "function",
                "function": {"name": "look", "arguments": {"at": f"<{i}>"}},
            }
            for i in ids
        ],
    }


def result(call_id: str) -> dict:
    return {"role": "tool", "tool_call_id": call_id, "name": "look", "content": f"saw {call_id}"}


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Look twice."},
    call("toolu_aaaaaaaaaaaa", "toolu_bbbbbbbbbbbb"),
    result("toolu_aaaaaaaaaaaa"),
    result("toolu_bbbbbbbbbbbb"),
    {"role": "user", "content": "And now?"},
]

TOP = "{% if tools %}{{ tools }}\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}(call {{ c.function.arguments }}){% endfor %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS + "<|im_end|>\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(check: str = "", turn: str = TURN, opening: str = OPEN) -> str:
    return f"{TOP}{{% for m in messages %}}{check}{turn}{{% endfor %}}{opening}"


def refuse(condition: str) -> str:
    return f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}"


NINE = refuse("m.role == 'tool' and m.tool_call_id | length != 9") + (
    "{% for c in m.tool_calls or [] %}" + refuse("c.id | length != 9") + "{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "plain": template(),
    "strict": template(
        NINE
        + refuse("m.role == 'system' and not loop.first")
        + refuse(
            "m.role == 'user' and loop.previtem"
            " and loop.previtem.role not in ('assistant', 'system')"
        )
    ),
    "one call a turn": template(refuse("(m.tool_calls or []) | length > 1")),
    "no system": template(refuse("m.role == 'system'")),
    "no tools": template(refuse("m.role == 'tool'"))[len(TOP) :],
    "calls forgotten": template(turn="<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"),
    "always thinks": template(refuse("enable_thinking is defined and not enable_thinking")),
    "user first": template(
        refuse("m.role == 'assistant' and (loop.first or loop.previtem.role == 'system')")
    ),
}


def build_renderer(path: Path, template: str) -> PromptRenderer:
    return PromptRenderer(describe("m", build_model("qwen2", path, template=template)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_part_of_the_conversation_reaches_the_prompt(tmp_path: Path, name: str):
    renderer = build_renderer(tmp_path, TEMPLATES[name])
    request = Request("m", CONVERSATION, tools=TOOLS, thinking=False)
    text = renderer.tokenizer.decode(renderer.prompt(request).tokens)
    for part in (
        "Be brief.",
        "Look twice.",
        "<toolu_aaaaaaaaaaaa>",
        "<toolu_bbbbbbbbbbbb>",
        "saw toolu_aaaaaaaaaaaa",
        "saw toolu_bbbbbbbbbbbb",
        "And now?",
        "Looks.",
    ):
        assert text.count(part) == 1, (part, text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_appended_turn_leaves_the_tokens_before_it_alone(tmp_path: Path, name: str):
    renderer = build_renderer(tmp_path, TEMPLATES[name])
    before = renderer.prompt(Request("m", CONVERSATION[:2], tools=TOOLS))
    after = renderer.prompt(Request("m", CONVERSATION[:5], tools=TOOLS))
    assert after.tokens[: before.body] == before.tokens[: before.body]
    assert 0 < before.root <= before.body <= len(before.tokens)


def test_the_final_assistant_message_is_left_open(tmp_path: Path):
    renderer = build_renderer(tmp_path, CHATML)
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is"}]
    assert renderer.tokenizer.decode(renderer.prompt(Request("m", messages)).tokens).endswith(
        "<|im_start|>assistant\nIt is"
    )


def test_a_message_that_is_continued_ends_where_it_ends_whatever_was_said_before(tmp_path: Path):
    renderer = build_renderer(tmp_path, CHATML)
    messages = [
        {"role": "user", "content": "What is \u2063\u2063end\u2063\u2063?"},
        {"role": "assistant", "content": "It is"},
    ]
    text = renderer.tokenizer.decode(renderer.prompt(Request("m", messages)).tokens)
    assert text.endswith(f"{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\nIt is")


def test_a_forced_call_leaves_the_place_of_the_last_message_alone(tmp_path: Path):
    renderer = build_renderer(tmp_path, CHATML)
    free = renderer.prompt(Request("m", CONVERSATION, tools=TOOLS))
    forced = renderer.prompt(Request("m", CONVERSATION, tools=TOOLS, tool_choice="look"))
    assert forced.opening and len(forced.tokens) > len(free.tokens)
    assert (forced.root, forced.turn, forced.body) == (free.root, free.turn, free.body)


@pytest.mark.parametrize("family", ["<|fim_{}|>", "<fim_{}>", "<fim-{}>"])
def test_the_tokens_of_a_gap_are_those_of_the_models_family(tmp_path: Path, family: str):
    marks = [family.format(place) for place in ("prefix", "suffix", "middle")]
    path = build_model("qwen2", tmp_path, marks=marks)
    renderer = PromptRenderer(describe("m", path))
    assert renderer.gap_tokens() == tuple(marks)
    prompt = renderer.prompt(Request("m", prompt="a", suffix="b"))
    assert renderer.tokenizer.decode(prompt.tokens) == "{}a{}b{}".format(*marks)


def test_tools_are_not_shown_when_none_may_be_called(tmp_path: Path):
    renderer = build_renderer(tmp_path, CHATML)
    with_none = Request("m", CONVERSATION, tools=TOOLS, tool_choice="none")
    assert "Looks." not in renderer.tokenizer.decode(renderer.prompt(with_none).tokens)


def test_a_prompt_that_ends_inside_thinking_is_noticed(tmp_path: Path):
    opening = OPEN.replace("{% endif", "<think>\n{% endif")
    renderer = build_renderer(tmp_path, template(opening=opening))
    assert renderer.prompt(Request("m", CONVERSATION[:2])).in_thinking


EFFORTS = (
    "{% if reasoning_effort is defined and reasoning_effort not in ['low', 'medium', 'xhigh'] %}"
    "{{ raise_exception('no') }}{% endif %}"
    "thinking={{ enable_thinking }} effort={{ reasoning_effort }}\n"
)


@pytest.mark.parametrize(
    "thinking, effort, said",
    [
        (True, "low", "thinking=True effort=low"),
        (True, "xhigh", "thinking=True effort=xhigh"),
        (True, "max", "thinking=True effort="),
        (True, "bogus", "thinking=True effort="),
        (None, "medium", "effort=medium"),
        (False, "low", "thinking=False effort="),
    ],
)
def test_an_effort_the_template_does_not_know_leaves_thinking_as_it_was_asked_for(
    tmp_path: Path, thinking: bool | None, effort: str, said: str
):
    renderer = build_renderer(tmp_path, template(opening=EFFORTS + OPEN))
    request = Request("m", CONVERSATION[:2], thinking=thinking, effort=effort)
    assert f"{said}\n" in renderer.tokenizer.decode(renderer.prompt(request).tokens)


def test_raw_text_goes_around_the_template(tmp_path: Path):
    renderer = build_renderer(tmp_path, CHATML)
    assert (
        renderer.tokenizer.decode(renderer.prompt(Request("m", prompt="as it is")).tokens)
        == "as it is"
    )


def test_a_template_that_refuses_everything_is_the_requests_error(tmp_path: Path):
    renderer = build_renderer(tmp_path, "{{ raise_exception('never') }}")
    with pytest.raises(InvalidRequest, match="never"):
        renderer.prompt(Request("m", CONVERSATION))


def test_traits_are_found_by_probing(tmp_path: Path):
    strict, one, plain = (
        build_renderer(tmp_path / name, TEMPLATES[name]).template.traits
        for name in ("strict", "one call a turn", "plain")
    )
    assert strict.short_ids and not plain.short_ids
    assert not strict.user_after_tool and plain.user_after_tool
    assert not one.parallel_calls and plain.parallel_calls


def test_a_template_sees_of_every_value_what_the_sandbox_lets_it_see():
    from jinja2.runtime import LoopContext, Undefined
    from transformers.utils.chat_template_utils import _compile_jinja_template

    ordinary, fast = (_compile_jinja_template(text).environment for text in ("ordinary", "fast"))
    for _ in range(2):
        speed_up(fast)
    loop = LoopContext([1, 2, 3], Undefined)
    next(loop)
    message = {"role": "user", "items": 1, "_own": 2, "__class__": 3}
    for value in (message, "text", loop, [1], 1, None, str, len, lambda: 1):
        for name in {*dir(value), *message, "content", "format", "_absent"}:
            expected, found = (one.getattr(value, name) for one in (ordinary, fast))
            assert type(found) is type(expected), (value, name)
            if isinstance(expected, Undefined):
                with pytest.raises(Exception) as theirs:
                    str(expected + "")
                with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
                    str(found + "")
            elif not callable(expected):
                assert found == expected
    assert ordinary.getattr is not fast.getattr


def test_the_json_of_tools_and_calls_is_made_once_and_is_that_of_the_sandbox():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    ordinary, fast = (_compile_jinja_template(text).environment for text in ("one", "two"))
    to_json, made = ordinary.filters["tojson"], []
    fast.filters["tojson"] = lambda *given, **options: made.append(1) or to_json(*given, **options)
    speed_up(fast)
    tool = {"name": "Bash", "strict": True, "parameters": {"b": "é<", "a": [1, 1.0]}}
    ways = [{}, {"indent": 2}, {"indent": 4}, {"ensure_ascii": True}, {"sort_keys": True}]
    for _ in range(3):
        for way in ways:
            assert fast.filters["tojson"](tool, **way) == to_json(tool, **way)
        assert fast.filters["tojson"](tool, True) == to_json(tool, True)
    assert len(made) == len(ways) + 1
    for number in range(1000):  # objects that are gone leave their ids to others
        assert fast.filters["tojson"]({"number": number}) == f'{{"number": {number}}}'
        assert fast.filters["tojson"]("text") == '"text"'


def test_a_template_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from jinja2 import Environment

    source = CHATML + "{# of this test alone #}"
    build_model("qwen2", tmp_path / "model", template=source)
    compile_source, compiled = Environment.compile, []

    def count(self: Environment, given: str, *args: object, **kwargs: object) -> object:
        compiled.append(given)
        return compile_source(self, given, *args, **kwargs)

    monkeypatch.setattr(Environment, "compile", count)
    PromptRenderer(describe("model", tmp_path / "model"))
    assert compiled == [source]
