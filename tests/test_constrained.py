"""Constrained output: what a model without skill writes at temperature 1 is valid all the same, and
harms nobody beside it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import anthropic
import mlx.core as mx
import ollama
import pytest
from conftest import ROOT, Server
from jsonschema import Draft202012Validator
from models import CHATML, CONFIGS, build_model
from schemas import (
    ARGUMENTS,
    LIKE_CLAUDE_CODE,
    PARTS,
    REFERRED,
    SCHEMAS,
    TITLE,
    TOOLS,
    obj,
    rows,
    text,
    tool,
)

from _mlx_server.inference.decoding.runner import ModelRunner
from _mlx_server.inference.memory import StateSize
from _mlx_server.wire.anthropic import AnthropicMessages
from _mlx_server.wire.ollama import OllamaChat
from engine import (
    Done,
    Engine,
    Generation,
    InvalidRequest,
    Request,
    Sampling,
    Text,
    Thinking,
    ToolEnd,
    ToolStart,
)

HI = [{"role": "user", "content": "hi"}]
# A template that only mentions a family's tags is taken for one of that family.
FAMILIES = {
    "hermes": "{# tool_call.name #}",
    "qwen_coder": "{# <tool_call>\n<function= #}",
    "glm": "{# <arg_key> #}",
    "minimax": "{# <minimax:tool_call> #}",
    "minimax_3": "{# ]<]minimax[>[<tool_call> #}",
    "mistral": "{# [TOOL_CALLS] [ARGS] #}",
    "mistral_list": "{# [TOOL_CALLS] #}",
    "kimi": "{# <|tool_calls_section_begin|> #}",
    "deepseek": "{# <｜tool▁calls▁begin｜> #}",
    "harmony": "{# <|channel|> #}",
    "lfm": "{# <|tool_call_start|> #}",
    "gemma": "{# <|tool_call> <tool_call|> #}",
    "function_gemma": "{# <start_function_call> #}",
    "muse": "{# <atem:function_calls> #}",
    "deepseek_3": "{# <｜tool▁calls▁begin｜> ```json #}",
    "deepseek_32": "{# ｜DSML｜ #}",
    "deepseek_4": "{# <｜DSML｜tool_calls> #}",
    "kimi_3": "",
    "gemma, special": "{# <|tool_call> <tool_call|> #}",
    "deepseek_4, special": "{# <｜DSML｜tool_calls> #}",
}
MARKS = {
    "kimi_3": ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"],
    "deepseek_4, special": ["｜DSML｜"],
    "gemma, special": ["<|tool_call>", "<tool_call|>", '<|"|>'],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for family, mention in FAMILIES.items():
        build_model(
            "",
            path / family,
            template=CHATML + mention,
            config={**CONFIGS["qwen2"], "num_hidden_layers": 1},
            marks=MARKS.get(family, ()),
        )
    return path


@pytest.fixture(scope="module")
def engine(folder: Path):
    with Engine(models_dirs=[folder], max_queue=len(SCHEMAS)) as engine:
        yield engine


def ask(engine: Engine, seed: int = 1, model: str = "hermes", **fields) -> Generation:
    return engine.chat(
        fields.pop("messages", HI),
        model=model,
        **{
            "max_tokens": 900,
            "sampling": Sampling(temperature=1.0, seed=seed),
            "thinking": False,
            **fields,
        },
    )


def said(generation: Generation) -> tuple[str, str]:
    """The visible text and why it ended."""
    events = list(generation)
    return "".join(event.text for event in events if isinstance(event, Text)), events[-1].reason


def calls(generation: Generation) -> tuple[list[tuple[str, dict]], str]:
    """Names and arguments of all whole calls, and why the turn ended; unless it was cut there is no
    text beside them."""
    events = list(generation)
    assert events[-1].reason == "length" or not [
        event for event in events if isinstance(event, Text)
    ]
    names = [event.name for event in events if isinstance(event, ToolStart)]
    ends = [event for event in events if isinstance(event, ToolEnd)]
    return [
        (name, end.arguments) for name, end in zip(names, ends, strict=True) if not end.cut
    ], events[-1].reason


def check(answer: str, schema: dict) -> None:
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(
        json.loads(answer)
    )


@pytest.mark.slow
def test_a_model_without_skill_answers_every_schema_at_temperature_1(engine: Engine):
    assert len(SCHEMAS) > 200
    answers = [ask(engine, seed, format=schema) for seed, schema in enumerate(SCHEMAS)]
    for schema, generation in zip(SCHEMAS, answers, strict=True):
        answer, reason = said(generation)
        assert reason == "stop", (schema, answer)
        check(answer, schema)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=2.0, top_p=0.5),
        Sampling(temperature=1.0, top_k=1),
        Sampling(
            temperature=1.0,
            min_p=0.3,
            repetition_penalty=1.5,
            presence_penalty=1.0,
            frequency_penalty=1.0,
        ),
    ],
)
def test_every_sampler_stays_within_the_format(engine: Engine, sampling: Sampling):
    answer, reason = said(ask(engine, format=LIKE_CLAUDE_CODE[2], sampling=sampling))
    assert reason == "stop"
    check(answer, LIKE_CLAUDE_CODE[2])


def test_json_without_a_schema_is_an_object(engine: Engine):
    answers = [
        said(generation)
        for generation in [ask(engine, seed, format="json", max_tokens=200) for seed in range(8)]
    ]
    whole = [json.loads(answer) for answer, reason in answers if reason == "stop"]
    assert whole and all(isinstance(value, dict) for value in whole)
    assert all(answer.startswith("{") for answer, _ in answers)


def test_a_cut_answer_says_so(engine: Engine):
    answer, reason = said(ask(engine, format=LIKE_CLAUDE_CODE[2], max_tokens=9))
    assert reason == "length" and answer.startswith("{")


def test_the_free_answers_beside_it_stay_what_they_are(engine: Engine):
    def free() -> list[Generation]:
        return [
            engine.chat(
                f"free {n}", model="hermes", max_tokens=40, sampling=Sampling(temperature=0)
            )
            for n in range(3)
        ]

    alone = [said(generation) for generation in free()]
    held = [ask(engine, seed, format=TITLE) for seed in range(3)]
    beside = [said(generation) for generation in free()]
    for generation in held:
        check(said(generation)[0], TITLE)
    assert beside == alone


def test_a_seed_gives_the_same_answer_alone_and_in_company(engine: Engine):
    alone = said(ask(engine, 5, format=LIKE_CLAUDE_CODE[2]))
    company = [ask(engine, seed, format=schema) for seed, schema in enumerate(LIKE_CLAUDE_CODE)]
    assert said(ask(engine, 5, format=LIKE_CLAUDE_CODE[2])) == alone
    for generation in company:
        generation.cancel()


@pytest.mark.slow
def test_an_answer_that_waits_for_memory_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    monkeypatch.setattr(ModelRunner, "EXPECTED", 8)
    monkeypatch.setattr(StateSize, "STEP", 1)  # or memory would be full before
    long = rows(text(8, minLength=8), 20, minItems=20)

    def answers(engine: Engine) -> list[tuple[str, str]]:
        return [
            said(generation) for generation in [ask(engine, seed, format=long) for seed in range(4)]
        ]

    with Engine(str(folder / "hermes")) as engine:
        alone = [said(ask(engine, seed, format=long)) for seed in range(4)]
        runtime = engine.pool.runners[engine.default.name]
        memory = runtime.size + runtime.state_size.nbytes(500)
    with Engine(str(folder / "hermes"), memory=memory) as engine:
        said(ask(engine, max_tokens=1))  # loads the model
        assert answers(engine) == alone
    assert "one waits after" in caplog.text
    for answer, reason in alone:
        assert reason == "stop"
        check(answer, long)


def test_what_looks_like_markup_is_text_inside_the_answer(engine: Engine):
    const = "a <think> b </think> c <tool_call> {"
    answer, _ = said(ask(engine, seed=2, format={"const": const}, tools=[tool("a", obj())]))
    assert json.loads(answer) == const


def test_a_begun_answer_is_continued(engine: Engine):
    begun = '{"title": "A'
    answer, _ = said(
        ask(engine, format=TITLE, messages=[*HI, {"role": "assistant", "content": begun}])
    )
    check(begun + answer, TITLE)
    with pytest.raises(InvalidRequest, match="does not fit the output format"):
        ask(engine, format=TITLE, messages=[*HI, {"role": "assistant", "content": "Well,"}])


@pytest.mark.slow
def test_the_format_begins_behind_the_thinking():
    with Engine("demo") as engine:
        events = list(engine.chat("think then say hello", format=TITLE, max_tokens=200))
        assert "".join(event.text for event in events if isinstance(event, Thinking)).startswith(
            "The user wants me to think"
        )
        assert isinstance(events[-1], Done) and events[-1].reason == "stop"
        check("".join(event.text for event in events if isinstance(event, Text)), TITLE)


def test_a_call_may_follow_the_thinking_when_there_are_tools(engine: Engine):
    request = Request("hermes", HI, tools=TOOLS, format=TITLE)
    tongue = engine.renderer(engine.resolve("hermes"))
    constraint = tongue.constraint(
        request, dataclasses.replace(tongue.prompt(request), in_thinking=True)
    )
    think, end, call, brace, newline = (
        tongue.encode(text)[0] for text in ("x", "</think>", "<tool_call>", "{", "\n")
    )

    said, opens = [], []

    def allowed(*tokens: int) -> set[int]:
        """What may follow when these, too, are said; the answer's last token is taken only when the
        next one is picked."""
        for token in tokens:
            said.append(token)
            # Some models have more rows than there are tokens
            logits = constraint(mx.array([1, *said]), mx.zeros((1, 520)))
            opens.append(constraint.observe(token, len(said) - 1))
        return {token for token, logit in enumerate(logits[0].tolist()) if logit == 0}

    constraint(mx.array([1]), mx.zeros((1, 520)))
    assert len(allowed(think)) == 520
    assert {call, brace, newline} < allowed(end)
    assert think not in allowed(newline)
    assert {call, brace} < allowed(newline)
    assert call not in allowed(brace) and opens == [False, False, False, False, True]


def test_a_matcher_that_gives_up_ends_the_turn_and_says_why(engine: Engine):
    tongue = engine.renderer(engine.resolve("hermes"))
    request = Request("hermes", HI, format=TITLE, thinking=False)
    constraint = tongue.constraint(request, tongue.prompt(request))
    constraint(mx.array([1]), mx.zeros((1, 512)))
    logits = constraint(mx.array([1, tongue.encode("x")[0]]), mx.zeros((1, 512)))
    assert [token for token, logit in enumerate(logits[0].tolist()) if logit == 0] == sorted(
        tongue.tokenizer.eos_token_ids
    )
    assert "doesn't satisfy the grammar" in constraint.error and "\n" not in constraint.error


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_is_a_valid_call(engine: Engine, family: str):
    asked = [("any", True), *((choice, False) for choice in ["any", *ARGUMENTS])]
    answers = [
        ask(
            engine,
            seed,
            family,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            max_tokens=300,
        )
        for seed, (choice, parallel) in enumerate(asked)
    ]
    for (choice, parallel), generation in zip(asked, answers, strict=True):
        made, reason = calls(generation)
        # Without skill, several may be any number
        assert made and (parallel or (reason, len(made)) == ("tool_calls", 1))
        for name, arguments in made:
            assert choice in ("any", name)
            Draft202012Validator(ARGUMENTS[name]).validate(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hermes", "qwen_coder"])
@pytest.mark.parametrize("pattern", [r"^\/tm?p$", "^[/]tmp$", r"^(?=\/)\/tmp", r"^\cA"])
def test_a_pattern_that_cannot_be_held_lets_the_rest_be_held(
    engine: Engine, caplog: pytest.LogCaptureFixture, family: str, pattern: str
):
    known = r"\c" not in pattern and "?=" not in pattern
    schema = obj(path=text(9, pattern=pattern), mode={"enum": ["red", "green"]})
    for seed in range(3):
        generation = ask(
            engine, seed, family, tools=[tool("Open", schema)], tool_choice="any", max_tokens=200
        )
        ((_, arguments),) = calls(generation)[0][:1]
        assert arguments["mode"] in ("red", "green") and len(arguments["path"]) <= 9
        assert not known or arguments["path"] in ("/tmp", "/tp")
    assert ("patterns of tools may not be held" in caplog.text) is not known


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hermes", "qwen_coder"])
def test_calls_of_strict_tools_match_their_schemas_and_what_is_said_beside_them_is_free(
    engine: Engine, family: str
):
    fields = {"tools": TOOLS[1:], "max_tokens": 200}
    tag = engine.chat(
        HI, model=family, tool_choice="any", tools=TOOLS, max_tokens=0
    ).sequence.prompt.tokens[-1]
    sampling = Sampling(temperature=1.0, seed=4, logit_bias={tag: 9.0})
    events = list(ask(engine, model=family, strict=True, sampling=sampling, **fields))
    names = [event.name for event in events if isinstance(event, ToolStart)]
    whole = [event.arguments for event in events if isinstance(event, ToolEnd) and not event.cut]
    assert len(whole) > 1  # the first one does not end what is held
    for name, arguments in zip(names, whole, strict=False):
        Draft202012Validator(ARGUMENTS[name]).validate(arguments)
    assert not [
        event
        for event in ask(engine, model=family, sampling=sampling, **fields)
        if isinstance(event, ToolEnd)
    ]
    free = Sampling(temperature=1.0, seed=4)
    assert said(ask(engine, model=family, strict=True, sampling=free, **fields)) == said(
        ask(engine, model=family, sampling=free, **fields)
    )


@pytest.mark.slow
def test_free_strings_stay_free_in_tags_of_their_own(engine: Engine):
    schema = obj(
        ["number"],
        words={"type": "string"},
        number={"type": "integer", "maximum": 99, "minimum": 0},
    )
    generation = ask(
        engine,
        model="qwen_coder",
        tools=[tool("put", schema)],
        tool_choice="put",
        max_tokens=1200,
        sampling=Sampling(temperature=0.7, seed=3),
    )
    list(generation)
    assert generation.sequence.raw.startswith(("<parameter=words>\n", "<parameter=number>\n"))


def test_a_format_beside_tools_leaves_the_choice_to_the_model(engine: Engine):
    answers = [ask(engine, seed, format=TITLE, tools=TOOLS, max_tokens=40) for seed in range(16)]
    kinds = set()
    for generation in answers:
        answer, reason = said(generation)
        opened = generation.sequence.raw.startswith("<tool_call>")
        kinds.add(opened)
        if reason == "stop" and not opened:
            check(answer, TITLE)
    assert kinds == {True, False}


def test_without_a_choice_no_call_is_made(engine: Engine):
    events = list(
        ask(
            engine,
            format={"const": '{"name": "set", "arguments": {}}'},
            tools=TOOLS,
            tool_choice="none",
        )
    )
    assert not [event for event in events if isinstance(event, ToolStart)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gemma", "gemma, special", "deepseek_4, special", "qwen_coder", "lfm"]
)
def test_forced_arguments_that_are_no_json_match_their_schemas_too(engine: Engine, family: str):
    schemas = (
        [obj(value=part) for part in PARTS if "$ref" not in part and "format" not in part]
        + LIKE_CLAUDE_CODE[1:6]
        + REFERRED
    )
    answers = [
        ask(
            engine,
            seed,
            family,
            tools=[tool("t", schema)],
            tool_choice="t",
            parallel_tool_calls=False,
        )
        for seed, schema in enumerate(schemas)
    ]
    for schema, generation in zip(schemas, answers, strict=True):
        [(_, arguments)], reason = calls(generation)
        assert reason == "tool_calls"
        Draft202012Validator(schema).validate(arguments)


@pytest.mark.parametrize("family", ["hermes", "gemma"])
def test_a_tool_that_nothing_can_be_passed_to_is_not_held_to_its_schema(
    engine: Engine, family: str, caplog: pytest.LogCaptureFixture
):
    generation = ask(
        engine, model=family, tools=[tool("t", obj(a={"$ref": "#"}))], tool_choice="t", max_tokens=9
    )
    assert said(generation)[1] == "length" and "no arguments match the schema of t" in caplog.text


@pytest.mark.parametrize(
    "schema, why",
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "null"}}, "not"),
        ({"type": "strnig"}, "Invalid type: strnig"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"$ref": "http://example.org/x"}, "example.org"),
        ({"$ref": "#"}, "no text matches"),
        ({"anyOf": [{"$ref": "#"}]}, "no text matches"),
        (obj(a=obj(b={"$ref": "#"})), "no text matches"),
        (rows({"$ref": "#"}, minItems=1), "no text matches"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf not fully supported$"),
    ],
)
@pytest.mark.parametrize("thinking", [False, None])
def test_a_format_that_cannot_be_enforced_is_refused_and_the_reason_named(
    engine: Engine, schema: dict, why: str, thinking
):
    with pytest.raises(InvalidRequest, match=why) as refused:
        ask(engine, format=schema, thinking=thinking)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(
        "the output format cannot be enforced: "
    )


@pytest.mark.parametrize(
    "schema",
    [
        obj(
            a={"type": "boolean"},
            b={"type": "array", "uniqueItems": True, "items": {"type": "null"}, "maxItems": 1},
        ),
        {"type": "object", "properties": {"location": "garbage"}},
        {"properties": {"a": {"type": "nonsense"}}},
    ],
)
def test_no_schema_of_a_tool_breaks_a_forced_call(engine: Engine, schema: dict):
    assert said(ask(engine, tools=[tool("odd", schema)], tool_choice="odd", max_tokens=40))[1] in (
        "tool_calls",
        "length",
        "stop",
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: OllamaChat(
            {
                "model": "hermes",
                "messages": HI,
                "format": TITLE,
                "think": False,
                "options": {"temperature": 1},
            }
        ),
        lambda: AnthropicMessages(
            {
                "model": "hermes",
                "max_tokens": 900,
                "messages": HI,
                "thinking": {"type": "disabled"},
                "output_config": {"format": {"type": "json_schema", "schema": TITLE}},
            }
        ),
    ],
)
def test_what_is_streamed_is_the_whole_answer(engine: Engine, make):
    reply = make()
    generation = engine.submit(reply.request)
    objects = [
        *reply.open(generation),
        *(one for event in generation for one in reply.event(event)),
    ]
    if isinstance(reply, OllamaChat):
        pieces, whole = (
            [one["message"]["content"] for one in objects],
            reply.whole()["message"]["content"],
        )
    else:
        pieces = [one["delta"]["text"] for one in objects if one["type"] == "content_block_delta"]
        whole = reply.whole()["content"][0]["text"]
    assert "".join(pieces) == whole and len(pieces) > 3
    check(whole, TITLE)


@pytest.mark.slow
def test_the_official_clients_get_what_they_ask_for(server: Server):
    claude = anthropic.Anthropic(
        base_url=server.url, api_key="any", max_retries=0, _strict_response_validation=True
    )
    asked = {"model": "demo", "max_tokens": 400, "messages": HI, "extra_body": {"temperature": 1}}
    message = claude.messages.create(
        **asked, output_config={"format": {"type": "json_schema", "schema": TITLE}}
    )
    check(message.content[-1].text, TITLE)
    call = claude.messages.create(
        **asked,
        tool_choice={"type": "any"},
        tools=[
            {"name": name, "input_schema": schema}
            for name, schema in ARGUMENTS.items()
            if name.isascii()
        ],
    ).content[0]
    Draft202012Validator(ARGUMENTS[call.name]).validate(call.input)
    llama = ollama.Client(host=server.url)
    check(
        llama.chat(
            model="demo", messages=HI, format=TITLE, options={"temperature": 1}
        ).message.content,
        TITLE,
    )
    check(
        llama.generate(
            model="demo", prompt="hi", format=TITLE, options={"temperature": 1}
        ).response,
        TITLE,
    )
    with pytest.raises(anthropic.BadRequestError, match="uniqueItems"):
        claude.messages.create(
            **asked,
            output_config={"format": {"type": "json_schema", "schema": {"uniqueItems": True}}},
        )
    with pytest.raises(ollama.ResponseError, match="uniqueItems"):
        llama.chat(model="demo", messages=HI, format={"uniqueItems": True})


WITHOUT = """
import sys
sys.modules["llguidance"] = None  # what makes an import fail as if the package were not there
from _mlx_server.wire.anthropic import AnthropicMessages, anthropic_error
from _mlx_server.wire.ollama import OllamaChat, ollama_error
from engine import Engine, InvalidRequest, ToolEnd

hi = [{"role": "user", "content": "run echo hi"}]
bash = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
with Engine("demo") as engine:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    asked = {"model": "demo", "max_tokens": 9, "messages": hi, "output_config": {"format": form}}
    for reply, error in (
        (AnthropicMessages(asked), lambda refused: anthropic_error(refused, "")),
        (OllamaChat({"model": "demo", "messages": hi, "format": "json"}), ollama_error),
    ):
        try:
            engine.submit(reply.request)
        except InvalidRequest as refused:
            print(error(refused))
    reply = AnthropicMessages({"model": "demo", "max_tokens": 99, "messages": hi, "tools": [
        {"name": "Bash", "input_schema": bash}], "tool_choice": {"type": "tool", "name": "Bash"}})
    print([event.arguments for event in engine.submit(reply.request) if isinstance(event, ToolEnd)])
"""


@pytest.mark.slow
def test_without_the_package_a_format_is_refused_and_a_forced_call_still_begun():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    claude, llama, call = run.stdout.splitlines()
    for line in (claude, llama):
        assert line.startswith("(400, ") and 'pip install "mlx-server[constrained]"' in line
    assert "'invalid_request_error'" in claude and call == "[{'command': 'echo hi'}]"
